"""What a warm-up of ENSC and MVA is worth on FER2013: `python results/fer2013_warmup/run.py path/to/fer2013
[NAME ...]`.

The settings are those of the question `recipe` on 32x32 images with ten epochs and seed 0, whose records are the runs
without a warm-up. Here the weights of ENSC and MVA rise linearly from 0 over the first 30 % of the steps. Nothing was
tuned. Runs that are in `warmup.json` are not made again.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

from fastai.callback.core import Callback

from ecan_fastai.all import *
from ecan_fastai.config import RunConfig
from ecan_fastai.runresults import environment
from ecan_fastai.runs import resolve_config, run_learner, run_loaders

FILE = Path(__file__).parent / "warmup.json"
RUNS = {"ECAN, warm-up": False, "ECAN, centred, warm-up": True}


class LossWarmup(Callback):
    "Raise the weights of an `ECANLoss` linearly from 0 to their values over a fraction of all training steps"

    def __init__(self, pct):
        self.pct = pct

    def before_fit(self):
        self.weights = self.loss_func.l1, self.loss_func.l2

    def before_batch(self):
        if self.training:
            steps = self.pct * self.n_epoch * len(self.dls.train)
            share = min(1, (self.train_iter + 1) / steps)
            self.loss_func.l1, self.loss_func.l2 = (share * w for w in self.weights)


def measure(learn):
    predictor, found = Predictor.from_learner(learn), {}
    for name, dl in zip(learn.dls.split_names[1:], learn.dls.loaders[1:]):
        probs = predictor.probabilities([f.image for f in dl.items], num_workers=2)
        targets = [learn.dls.vocab.o2i[f.label] for f in dl.items]
        found[name] = split_metrics(targets, probs.argmax(1), learn.dls.vocab)
    return found


def train(path, center_features):
    cfg = RunConfig(str(path), size=32, level="weak", momentum=0.99, epochs=10, center_features=center_features)
    set_seed(resolve_config(cfg).seed, reproducible=True)
    with tempfile.TemporaryDirectory() as out:
        dls = run_loaders(cfg, out)
        learn = run_learner(cfg, dls, out)
        with learn.no_bar():
            learn.fit_one_cycle(cfg.epochs, cfg.lr, cbs=LossWarmup(0.3))
    columns = learn.recorder.metric_names[1:-1]
    return dict(
        center_features=center_features,
        splits=measure(learn),
        history={c: [round(float(row[i]), 4) for row in learn.recorder.values] for i, c in enumerate(columns)},
        environment=environment(dls),
    )


def main(path, names):
    warnings.simplefilter("ignore")
    made = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names:
        if name not in made:
            made[name] = train(path, RUNS[name])
            FILE.write_text(json.dumps(made, indent=1))
            print(name, json.dumps(made[name]["splits"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(RUNS))
