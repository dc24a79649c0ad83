"""What a run on seven expressions is worth to a model of four moods, on real FER2013: `python
results/fer2013_transfer/run.py path/to/fer2013`.

Train is cut into two stratified halves. ECAN learns the seven expressions of the first half. Then the second half,
regrouped as positive, negative, neutral and surprise, is learnt twice with as many steps: by fine-tuning that
encoder, and from scratch. PublicTest and PrivateTest, regrouped, are evaluated once each at the end. Nothing was
tuned: Adam at fastai's rates, weak augmentation, batch 256.
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

MOODS = dict(
    happy="positive",
    surprise="surprise",
    neutral="neutral",
    angry="negative",
    disgust="negative",
    fear="negative",
    sad="negative",
)
EPOCHS = dict(first_half=8, second_half=5)


def learner(faces, **kwargs):
    dls = ExpressionDataLoaders.from_faces(
        faces, size=48, channels=1, recipe="fer2013", level="weak", bs=256, device="cpu"
    )
    return ecan_learner(dls, momentum=0.99, opt_func=Adam, **kwargs)


def measure(learn):
    with learn.no_bar():
        return {
            s: split_metrics(y, p.argmax(1), learn.dls.vocab)
            for s in ("PublicTest", "PrivateTest")
            for p, y in [learn.get_preds(dl=learn.dls[s])]
        }


def main(path, out, seed=0):
    warnings.simplefilter("ignore")
    faces = fer2013_faces(path)
    train, tests = (
        [f for f in faces if f.split == "train"],
        [replace(f, label=MOODS[f.label]) for f in faces if f.split != "train"],
    )
    first, second = train_test_split(train, test_size=0.5, stratify=[f.label for f in train], random_state=seed)
    second = [replace(f, label=MOODS[f.label]) for f in second]
    record = dict(seed=seed, epochs=EPOCHS, images=dict(first_half=len(first), second_half=len(second)), seconds={})

    def timed(name, learn, fit):
        start = time.time()
        with learn.no_bar():
            fit(learn)
        record["seconds"][name] = round(time.time() - start)
        return learn

    set_seed(seed)
    seven = timed(
        "seven expressions, first half", learner(first), lambda learn: learn.fit_one_cycle(EPOCHS["first_half"], 2e-3)
    )
    weights = Path(out) / "seven.pth"
    torch.save(seven.model.inference().state_dict(), weights)
    set_seed(seed)
    tuned = timed(
        "fine-tuned",
        learner(second + tests, pretrained=weights),
        lambda learn: learn.fine_tune(EPOCHS["second_half"] - 1),
    )
    record["fine-tuned"] = measure(tuned)
    set_seed(seed)
    scratch = timed(
        "from scratch", learner(second + tests), lambda learn: learn.fit_one_cycle(EPOCHS["second_half"], 2e-3)
    )
    record["from scratch"] = measure(scratch)
    weights.unlink()
    (Path(out) / f"seed{seed}.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(__file__).parent, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
