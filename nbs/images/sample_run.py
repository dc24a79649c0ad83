"""Draw README's picture from the folder of a run on the drawn faces:

ecan_train sample
python nbs/images/sample_run.py runs/sample-ecan-seed0
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from ecan_fastai.all import ExpressionDataLoaders, plot_confusion, set_seed

run = Path(sys.argv[1])
set_seed(0)
dls = ExpressionDataLoaders.from_folder(
    run / "faces", size=48, channels=1, recipe="fer2013", level="weak", num_workers=0
)
vocab, items = list(dls.vocab), dls.train_ds
labels = np.array([items[i][1].item() for i in range(len(items))])
chosen = [i for c in range(len(vocab)) for i in np.flatnonzero(labels == c)[:1]] + [
    np.flatnonzero(labels == vocab.index("happy"))[1]
]

fig = plt.figure(figsize=(12, 4), layout="constrained")
left, middle, right = fig.subfigures(1, 3, width_ratios=[4.2, 3.6, 4.2])
for ax, i in zip(left.subplots(4, 2).flat, chosen):
    views = [np.asarray(v)[0] for v in items[i][0]]
    ax.imshow(np.concatenate([views[0], np.full((48, 3), 255, np.uint8), views[1]], 1), cmap="gray", vmin=0, vmax=255)
    ax.set_title(vocab[labels[i]], fontsize=9)
    ax.axis("off")
left.suptitle("two views of every face", fontsize=11)

history, ax = pd.read_csv(run / "history.csv"), middle.subplots()
for column, name, color in (
    ("accuracy", "accuracy", "#4477aa"),
    ("balanced_accuracy_score", "average accuracy", "#ee6677"),
):
    ax.plot(history["epoch"] + 1, 100 * history[column], marker=".", color=color, label=name)
ax.set(xlabel="epoch", ylabel="%", ylim=(0, 102))
ax.xaxis.set_major_locator(MaxNLocator(integer=True))
ax.legend(loc="lower right", fontsize=9)
middle.suptitle("ecan_train sample: validation", fontsize=11)

table, ax = pd.read_csv(run / "predictions_test.csv"), right.subplots()
targets, predicted = [[vocab.index(v) for v in table[c]] for c in ("label", "predicted")]
plot_confusion(targets, predicted, vocab, ax=ax)
right.suptitle(f"test split: accuracy {100 * np.mean(np.equal(targets, predicted)):.1f} %", fontsize=11)
fig.savefig(Path(__file__).with_suffix(".png"), dpi=80)
