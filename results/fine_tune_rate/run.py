"""Learning rates for fine-tuning the shipped model in one fit: `python results/fine_tune_rate/run.py path/to/fer2013`.

Faces of PublicTest, on which the shipped model was not trained (8 % of them are in train, too), in three groups: 420 to
train on, and 390 others to measure on. Each run is that of the page on fine-tuning, `ecan_train FACES --pretrained
fer2013 --opt adam --lr RATE --momentum 0.9 --level weak --epochs 10`, with two seeds. The shipped model itself is
measured with the probabilities of each group added up.
"""

import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import cv2
import numpy as np

from ecan_fastai.all import *
from ecan_fastai.data import read_face
from ecan_fastai.readers.factory import read_faces
from ecan_fastai.runs import start_run

GROUPS = {"negative": ["angry", "disgust", "fear", "sad"], "neutral": ["neutral"], "positive": ["happy"]}
N_TRAIN, N_HELD_OUT = 140, 130  # of each group


def drawn(path):
    "Images of PublicTest for each split and group"
    faces, images = [f for f in read_faces(path) if f.split == "PublicTest"], {}
    draw = random.Random(0)
    for group, labels in GROUPS.items():
        chosen = draw.sample([read_face(f.image, 1) for f in faces if f.label in labels], N_TRAIN + N_HELD_OUT)
        images["train", group], images["valid", group] = chosen[:N_TRAIN], chosen[N_TRAIN:]
    return images


def written(images, folder):
    "Write the images as split folders with class folders"
    for (split, group), faces in images.items():
        (folder / split / group).mkdir(parents=True)
        for i, face in enumerate(faces):
            cv2.imwrite(str(folder / split / group / f"{i}.png"), face)
    return folder


def as_it_is(images):
    "Accuracy of the shipped model, which chooses the group with the largest sum of probabilities"
    predictor, right, n = Predictor(), 0, 0
    for k, group in enumerate(GROUPS):
        probs = predictor.probabilities(images["valid", group])
        sums = np.stack([probs[:, [predictor.vocab.index(v) for v in labels]].sum(1) for labels in GROUPS.values()], 1)
        right, n = right + int((sums.argmax(1) == k).sum()), n + len(probs)
    return right / n


def main(path):
    warnings.simplefilter("ignore")
    images, rows = drawn(path), []
    with tempfile.TemporaryDirectory() as folder:
        faces = written(images, Path(folder) / "faces")
        settings = dict(pretrained="fer2013", opt="adam", momentum=0.9, level="weak", epochs=10)
        for lr in (2e-3, 5e-4, 1e-4):
            for seed in (0, 1):
                cfg = RunConfig(str(faces), "folder", lr=lr, seed=seed, **settings)
                record = start_run(cfg, Path(folder) / f"{lr}-{seed}")
                measured = record["splits"]["valid"]
                rows.append(dict(lr=lr, seed=seed, accuracy=measured["accuracy"], n=measured["n"]))
                print(rows[-1], flush=True)
    record = dict(as_it_is=as_it_is(images), environment=record["environment"], runs=rows)
    (Path(__file__).parent / "rates.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
