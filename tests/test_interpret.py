import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from ecan_fastai.interpret import *
from ecan_fastai.metrics import *

VOCAB = list("abcd")


def test_metrics_by_hand():
    m = split_metrics([0, 0, 1, 2], [0, 1, 1, 1], VOCAB[:3])
    assert m["accuracy"] == 0.5 and m["average_accuracy"] == pytest.approx((0.5 + 1 + 0) / 3) and m["n"] == 4
    assert m["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)


def test_metrics_are_scikit_learns_and_absent_classes_do_not_count():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    m = split_metrics(y, p, VOCAB)
    assert m["average_accuracy"] == pytest.approx(balanced_accuracy_score(y, p)) and m["macro_f1"] == pytest.approx(
        f1_score(y, p, average="macro")
    )


def test_per_class_table():
    t = per_class_table([0, 0, 1, 2], [0, 1, 1, 1], VOCAB)
    assert (
        list(t.index) == VOCAB
        and list(t.n) == [2, 1, 1, 0]
        and list(t.recall) == [0.5, 1, 0, 0]
        and t.precision["b"] == pytest.approx(1 / 3)
    )


def test_confusion_shows_percent_of_each_true_class():
    ax = plot_confusion([0, 0, 1, 2], [0, 1, 1, 1], VOCAB)
    assert [t.get_text() for t in ax.texts] == [
        "50",
        "50",
        "0",
        "0",
        "0",
        "100",
        "0",
        "0",
        "0",
        "100",
        "0",
        "0",
        "0",
        "0",
        "0",
        "0",
    ]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (2)", "b (1)", "c (1)", "d (0)"]
    plt.close("all")


@pytest.mark.parametrize(
    "columns,panels",
    [
        (["train_loss", "valid_loss", "accuracy"], 2),
        (["train_loss", "valid_loss", "accuracy", "ce", "ensc"], 3),
        (["train_loss", "valid_loss", "accuracy", "ce", "ensc", "mva", "alpha"], 4),
    ],
)
def test_history_has_a_panel_for_what_was_recorded(columns, panels):
    fig = plot_history(pd.DataFrame({"epoch": [0, 1], **{c: [2.0, 1.0] for c in columns}}))
    assert (
        len(fig.axes) == panels
        and all(ax.lines for ax in fig.axes)
        and list(fig.axes[0].lines[0].get_xdata()) == [1, 2]
    )
    plt.close("all")


def test_confusions_side_by_side_are_those_alone():
    runs = {"one": ([0, 0, 1, 2], [0, 1, 1, 1]), "two": ([0, 0, 1, 2], [0, 0, 1, 2])}
    fig = plot_confusions(runs, VOCAB)
    for ax, (title, (y, p)) in zip(fig.axes, runs.items()):
        assert ax.get_title() == title and [t.get_text() for t in ax.texts] == [
            t.get_text() for t in plot_confusion(y, p, VOCAB).texts
        ]
    plt.close("all")


def test_confusions_of_other_faces_keep_their_own_counts():
    fig = plot_confusions({"one": ([0, 0, 0, 1], [0, 0, 0, 1]), "two": ([0, 1, 1, 1], [0, 1, 1, 1])}, VOCAB[:2])
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes] == [["a (3)", "b (1)"], ["a (1)", "b (3)"]]
    plt.close("all")


def test_tsne_keeps_far_classes_apart_and_repeats():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    z = 50 * np.eye(3)[y] + rng.normal(size=(60, 3))

    def points(fig):
        return [np.asarray(c.get_offsets()) for c in fig.axes[0].collections]

    a, b = points(plot_tsne({"far": z}, y, VOCAB)), points(plot_tsne({"far": z}, y, VOCAB))
    assert all(np.allclose(p, q) for p, q in zip(a, b)) and [len(p) for p in a] == [20, 20, 20, 0]
    middles = [p.mean(0) for p in a[:3]]
    for i in range(3):
        assert all(
            np.linalg.norm(p - middles[i]) < min(np.linalg.norm(p - m) for j, m in enumerate(middles) if j != i)
            for p in a[i]
        )
    with pytest.raises(ValueError, match="few: expected features of 60 faces, got 10"):
        plot_tsne({"few": z[:10]}, y, VOCAB)
    with pytest.raises(ValueError, match="marks for 9 classes"):
        plot_tsne({"far": z}, y, list("abcdefghij"))
    plt.close("all")


def test_class_counts_are_sorted_and_written():
    (ax,) = plot_class_counts({"data": dict(a=3, b=7, c=5)}).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["b", "c", "a"] and [t.get_text() for t in ax.texts] == [
        "7",
        "5",
        "3",
    ]
    plt.close("all")


def test_sweep_shows_mean_and_standard_deviation_over_seeds():
    table = pd.DataFrame(dict(l1=[0.2, 0.1, 0.2, 0.1, 0.3], accuracy=[0.5, 0.3, 0.7, 0.4, 0.6]))
    (bars,) = plot_sweep(table, "l1", ["accuracy"], ax=None).containers
    x, y = bars[0].get_data()
    assert list(x) == [0, 1, 2] and np.allclose(y, [35, 60, 60])
    assert [t.get_text() for t in bars[0].axes.get_xticklabels()] == ["0.1", "0.2", "0.3"]
    ends = [
        s[:, 1] for s in bars[2][0].get_segments() if np.isfinite(s).all() and len(s)
    ]  # none where there is one run
    assert np.allclose(
        [(b - a) / 2 for a, b in ends], [100 * np.std([0.3, 0.4], ddof=1), 100 * np.std([0.5, 0.7], ddof=1)]
    )
    named = plot_sweep(
        pd.DataFrame(dict(schedule=["one-cycle", "cosine"], accuracy=[0.5, 0.6])), "schedule", ["accuracy"]
    )
    assert [t.get_text() for t in named.get_xticklabels()] == ["cosine", "one-cycle"]
    plt.close("all")
