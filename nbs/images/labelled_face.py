"""Draw the home page's picture: `python nbs/images/labelled_face.py`"""

from pathlib import Path

import matplotlib.pyplot as plt

from ecan_fastai.all import Predictor

here = Path(__file__).parent
predictor = Predictor()
face = predictor.predict_faces(here / "smile.jpg").iloc[0]

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), width_ratios=[1, 1.3], layout="constrained")
left.imshow(plt.imread(here / "smile.jpg"))
left.axis("off")
box = (face.left, face.top), face.right - face.left, face.bottom - face.top
left.add_patch(plt.Rectangle(*box, fill=False, color="orange", lw=2))
left.set_title(f"{face.label}, {100 * face.probability:.1f} %")
right.barh(predictor.vocab, [face[c] for c in predictor.columns], color="#4477aa")
right.set(xlabel="probability", xlim=(0, 1))
fig.savefig(here / "labelled_face.png", dpi=90)
