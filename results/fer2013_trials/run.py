"""What two changes to ECAN that are not in the package are worth on FER2013: `python results/fer2013_trials/run.py
path/to/fer2013 [NAME ...]`.

- A warm-up: the weights of ENSC and MVA rise linearly from 0 over the first 30 % of the steps. The settings are those
  of the question `recipe` on 32x32 images with ten epochs, whose records are the runs without a warm-up.
- A projection head, as MoCo v2 and SupCon have it: ENSC compares the output of two linear layers on the features,
  512 to 512 to 128 with a ReLU between them. MVA and the classifier still see the features. The settings are those of
  the questions `rate` and `recipe` in twenty epochs at 0.3, whose records are the runs without a head, centred and not.

Seed 0. Nothing was tuned. Runs that are in `trials.json` are not made again.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from torch import nn

from ecan_fastai.all import *
from ecan_fastai.config import RunConfig
from ecan_fastai.model import ECANModel
from ecan_fastai.runresults import environment
from ecan_fastai.runs import resolve_config, run_learner, run_loaders

FILE = Path(__file__).parent / "trials.json"


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


class Projected(nn.Module):
    "Encoder that gives its features (n, d), and behind them their projection (n, 128)"

    def __init__(self, encoder, d):
        super().__init__()
        self.encoder, self.head = encoder, nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 128))

    def forward(self, x):
        z = self.encoder(x)
        return torch.cat([z, self.head(z)], 1)


class FirstFeatures(nn.Linear):
    "Linear classifier of the first `in_features` features"

    def forward(self, z):
        return super().forward(z[:, : self.in_features])


class ProjectedLoss(ECANLoss):
    "`ECANLoss` whose contrast compares projections, which stand behind the d features"

    def __init__(self, d, **settings):
        super().__init__(**settings)
        self.d, self.features = d, ECANLoss(l1=0, l2=self.l2)

    def forward(self, out, y):
        if isinstance(out, torch.Tensor):
            return super().forward(out, y)
        names = ["z_q", "z_k", "bank_z", "centers"]
        features, projections = (
            out | {k: out[k][:, part] for k in names} for part in (slice(self.d), slice(self.d, None))
        )
        without_contrast = self.features(features, y)
        parts = self.features.parts
        z, bank = torch.cat([projections["z_q"], projections["z_k"]]), projections["bank_z"]
        center = bank.mean(0) if self.center_features else None
        ensc = self.contrast_loss(z, y.repeat(2), bank, projections["bank_y"], center=center)
        cosines = mean_cosines(projections["z_q"].detach(), y, center)
        values = [parts["ce"], ensc.detach(), parts["mva"], parts["alpha"], *cosines]
        self.parts = dict(zip(self.part_names, values))
        ce = nn.functional.cross_entropy(out["logits"].float(), y)
        return without_contrast + self.l1 * (ensc - ce)


def warm_up(learn):
    learn.add_cb(LossWarmup(0.3))


def project(learn):
    model, d = learn.model, learn.model.classifier.in_features
    view = learn.dls.train_ds[0][0][0]
    encoder = Projected(model.encoder, d)
    learn.model = ECANModel(encoder, len(learn.dls.vocab), len(view), model.bank.size, size=view.shape[1:])
    learn.model.classifier = FirstFeatures(d, len(learn.dls.vocab))
    learn.loss_func = ProjectedLoss(d, center_features=learn.loss_func.center_features)


SHORT = dict(size=32, level="weak", momentum=0.99, epochs=10, precision="fp32")
LONGER = dict(lr=0.3, momentum=0.99, epochs=20, precision="bf16")
RUNS = {
    "ECAN, warm-up": (warm_up, dict(SHORT, center_features=False)),
    "ECAN, centred, warm-up": (warm_up, dict(SHORT, center_features=True)),
    "ECAN, projection head": (project, dict(LONGER, center_features=False)),
    "ECAN, centred, projection head": (project, dict(LONGER, center_features=True)),
}


def measure(learn):
    predictor, found = Predictor.from_learner(learn), {}
    for name, dl in zip(learn.dls.split_names[1:], learn.dls.loaders[1:]):
        probs = predictor.probabilities([f.image for f in dl.items], num_workers=2)
        targets = [learn.dls.vocab.o2i[f.label] for f in dl.items]
        found[name] = split_metrics(targets, probs.argmax(1), learn.dls.vocab)
    return found


def train(path, change, settings):
    cfg = resolve_config(RunConfig(str(path), **settings))
    set_seed(cfg.seed, reproducible=True)
    with tempfile.TemporaryDirectory() as out:
        dls = run_loaders(cfg, out)
        learn = run_learner(cfg, dls, out)
        change(learn)
        with learn.no_bar():
            learn.fit_one_cycle(cfg.epochs, cfg.lr)
    columns = learn.recorder.metric_names[1:-1]
    return dict(
        settings=settings,
        splits=measure(learn),
        history={c: [round(float(row[i]), 4) for row in learn.recorder.values] for i, c in enumerate(columns)},
        environment=environment(dls),
    )


def main(path, names):
    warnings.simplefilter("ignore")
    made = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names:
        if name not in made:
            made[name] = train(path, *RUNS[name])
            FILE.write_text(json.dumps(made, indent=1))
            print(name, json.dumps(made[name]["splits"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(RUNS))
