import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from ecan_fastai.interpret import *

VOCAB = list("abcd")

def test_metrics_by_hand():
    m = split_metrics([0, 0, 1, 2], [0, 1, 1, 1], VOCAB[:3])
    assert m["accuracy"] == 0.5 and m["average_accuracy"] == pytest.approx((0.5+1+0)/3) and m["n"] == 4
    assert m["macro_f1"] == pytest.approx((2/3 + 0.5 + 0)/3)

def test_metrics_are_scikit_learns_and_absent_classes_do_not_count():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    m = split_metrics(y, p, VOCAB)
    assert m["average_accuracy"] == pytest.approx(balanced_accuracy_score(y, p)) and m["macro_f1"] == pytest.approx(f1_score(y, p, average="macro"))

def test_per_class_table():
    t = per_class_table([0, 0, 1, 2], [0, 1, 1, 1], VOCAB)
    assert list(t.index) == VOCAB and list(t.n) == [2, 1, 1, 0] and list(t.recall) == [0.5, 1, 0, 0] and t.precision["b"] == pytest.approx(1/3)

def test_confusion_shows_percent_of_each_true_class():
    ax = plot_confusion([0, 0, 1, 2], [0, 1, 1, 1], VOCAB)
    assert [t.get_text() for t in ax.texts] == ["50", "50", "0", "0", "0", "100", "0", "0", "0", "100", "0", "0", "0", "0", "0", "0"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (2)", "b (1)", "c (1)", "d (0)"]
    plt.close("all")

@pytest.mark.parametrize("columns,panels", [(["train_loss", "valid_loss", "accuracy"], 2), (["train_loss", "valid_loss", "accuracy", "ce", "ensc"], 3),
                                            (["train_loss", "valid_loss", "accuracy", "ce", "ensc", "mva", "alpha"], 4)])
def test_history_has_a_panel_for_what_was_recorded(columns, panels):
    fig = plot_history(pd.DataFrame({"epoch": [0, 1], **{c: [2., 1.] for c in columns}}))
    assert len(fig.axes) == panels and all(ax.lines for ax in fig.axes) and list(fig.axes[0].lines[0].get_xdata()) == [1, 2]
    plt.close("all")
