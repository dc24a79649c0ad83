"""How alike the features of FER2013's images are: `python results/fer2013_similarity/run.py path/to/fer2013 RUN [RUN
...]`, with the folders of finished runs.

Mean cosine between the features of 2,000 images of train (drawn with seed 0), of the same class and of different
ones; encoder in evaluation mode, no augmentation.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np

from ecan_fastai.all import *
from ecan_fastai.readers.fer2013 import fer2013_faces

if __name__ == "__main__":
    faces = random.Random(0).sample([f for f in fer2013_faces(sys.argv[1]) if f.split == "train"], 2000)
    labels = np.array([f.label for f in faces])
    same = labels[:, None] == labels
    file = Path(__file__).with_name("similarity.json")
    found = json.loads(file.read_text()) if file.exists() else {}
    for run in map(Path, sys.argv[2:]):
        z = Predictor(run).features([f.image for f in faces])
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        cosine = z @ z.T
        np.fill_diagonal(cosine, np.nan)
        found[run.name] = {
            "same class": float(np.nanmean(cosine[same])),
            "different classes": float(cosine[~same].mean()),
        }
        print(run.name, found[run.name], flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
