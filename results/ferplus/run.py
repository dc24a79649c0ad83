"""What the shipped model is worth on other labels: `python results/ferplus/run.py path/to/fer2013 votes.csv`.

FER+ labels the images of FER2013 anew, with the votes of ten people and one class more (contempt). 1,000 faces of its
train split are learnt with as many steps from the shipped weights and from scratch, with hard labels and with the
shares of votes, two seeds each; runs in ferplus.json are not made again. Nothing was tuned: one-cycle, SGD 0.02 at
batch 64, weak augmentation, four epochs. The shipped model was trained on these train images with FER2013's
labels, and not on PublicTest, which is measured here (8 % of its images are in train, too).
"""

import itertools
import json
import sys
import time
import warnings
from pathlib import Path

from fastai.callback.core import CancelValidException
from sklearn.model_selection import train_test_split

from ecan_fastai.all import *
from ecan_fastai.readers.ferplus import FERPLUS_SETTINGS, ferplus_faces

N, EPOCHS, LR = 1000, 4, 0.02


class MeasureAtTheEnd(Callback):
    "No validation after the epochs: `get_preds` measures once"

    def before_validate(self):
        raise CancelValidException


def run(faces, pretrained, soft, seed):
    set_seed(seed, reproducible=True)
    train = [f for f in faces if f.split == "train"]
    labels = [f.label for f in train]
    some, _ = train_test_split(train, train_size=N, stratify=labels, random_state=seed)
    dls = ExpressionDataLoaders.from_faces(
        [*some, *(f for f in faces if f.split == "PublicTest")],
        **FERPLUS_SETTINGS,
        valid="PublicTest",
        soft_labels=soft,
        level="weak",
        bs=64,
        device="cpu",
        seed=seed,
    )
    learn = baseline_learner(dls, "resnet18_cifar", pretrained="fer2013" if pretrained else False)
    learn.unfreeze()
    start = time.time()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(EPOCHS, LR, cbs=MeasureAtTheEnd())
        p, y = learn.get_preds()
    return {**split_metrics(y, p.argmax(1), dls.vocab), "seconds": round(time.time() - start)}


def main(path, votes):
    warnings.simplefilter("ignore")
    out = Path(__file__).parent / "ferplus.json"
    rows = json.loads(out.read_text())["runs"] if out.exists() else []
    done = {(r["seed"], r["soft_labels"], r["pretrained"]) for r in rows}
    faces = ferplus_faces(path, votes=votes)
    for seed, soft, pretrained in itertools.product((0, 1), (False, True), (True, False)):
        if (seed, soft, pretrained) not in done:
            measured = run(faces, pretrained, soft, seed)
            rows.append(dict(seed=seed, soft_labels=soft, pretrained=pretrained, **measured))
            out.write_text(json.dumps(dict(images=N, epochs=EPOCHS, runs=rows), indent=1) + "\n")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
