"""What the answers to unequal classes are worth on real FER2013: `python results/fer2013_balance/run.py path/to/fer2013
[SEED ...]`.

A stratified quarter of train is learnt, another quarter of train is measured on; PublicTest and PrivateTest are not
touched. ECAN without any answer, with the balanced sampler, with class weights in cross-entropy, and with bank
entries as further positives of the minority classes (here disgust). Nothing was tuned: Adam at fastai's rates, weak
augmentation, batch 128, four epochs. One record a seed.
"""

import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from sklearn.model_selection import train_test_split

from ecan_fastai.all import *
from ecan_fastai.readers.fer2013 import fer2013_faces

EPOCHS = 4


def quarters(path, seed):
    train = [f for f in fer2013_faces(path) if f.split == "train"]

    def cut(faces, n):
        return train_test_split(faces, train_size=n, stratify=[f.label for f in faces], random_state=seed)

    learnt, rest = cut(train, len(train) // 4)
    held, _ = cut(rest, len(train) // 4)
    return learnt + [replace(f, split="valid") for f in held]


def measure(faces, balance, seed):
    set_seed(seed)
    dls = ExpressionDataLoaders.from_faces(
        faces,
        size=48,
        channels=1,
        recipe="fer2013",
        level="weak",
        bs=128,
        num_workers=0,
        device="cpu",
        vocab=EXPRESSIONS,
        balanced=balance == "sampler",
    )
    loss = ECANLoss(
        weight=dls.class_weights() if balance == "weights" else None,
        bank_positives=dls.minority_classes() if balance == "positives" else None,
    )
    learn = ecan_learner(dls, momentum=0.99, opt_func=Adam, loss_func=loss)
    start = time.time()
    with learn.no_bar():
        learn.fit_one_cycle(EPOCHS, 2e-3)
        probs, targets = learn.get_preds()
    predicted = probs.argmax(1)
    recall = per_class_table(targets, predicted, dls.vocab).recall.to_dict()
    return dict(**split_metrics(targets, predicted, dls.vocab), recall=recall, seconds=round(time.time() - start))


def main(path, seeds):
    warnings.simplefilter("ignore")
    for seed in seeds:
        faces = quarters(path, seed)
        record = dict(
            seed=seed, epochs=EPOCHS, images={s: sum(f.split == s for f in faces) for s in ("train", "valid")}
        )
        record["runs"] = {b: measure(faces, b, seed) for b in ("none", "sampler", "weights", "positives")}
        (Path(__file__).parent / f"seed{seed}.json").write_text(json.dumps(record, indent=1))
        print(json.dumps(record, indent=1), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(s) for s in sys.argv[2:]] or [0, 1, 2])
