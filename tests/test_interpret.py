import sys

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from ecan_fastai.inference import Predictor
from ecan_fastai.interpret import *
from ecan_fastai.interpret import _features_and_labels, _on_image
from ecan_fastai.learner import baseline_learner
from ecan_fastai.metrics import *
from ecan_fastai.model import FaceClassifier

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
    with pytest.raises(ValueError, match="few: expected features of 60 images, got 10"):
        plot_tsne({"few": z[:10]}, y, VOCAB)
    plt.close("all")


def test_tsne_tells_twenty_classes_apart():
    y = np.repeat(np.arange(20), 2)
    fig = plot_tsne({"many": np.random.default_rng(0).normal(size=(40, 4))}, y, [str(c) for c in range(20)])
    looks = {
        (tuple(c.get_facecolor()[0]), tuple(map(tuple, c.get_paths()[0].vertices))) for c in fig.axes[0].collections
    }
    assert len(looks) == 20
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
    assert list(x) == [0, 1, 2] and np.allclose(np.array(y, float), [35, 60, 60])
    assert [t.get_text() for t in bars[0].axes.get_xticklabels()] == ["0.1", "0.2", "0.3"]
    segments = [np.array(s, float) for s in bars[2][0].get_segments()]
    ends = [s[:, 1] for s in segments if np.isfinite(s).all() and len(s)]  # none where there is one run
    assert np.allclose(
        [(b - a) / 2 for a, b in ends], [100 * np.std([0.3, 0.4], ddof=1), 100 * np.std([0.5, 0.7], ddof=1)]
    )
    named = plot_sweep(
        pd.DataFrame(dict(schedule=["one-cycle", "cosine"], accuracy=[0.5, 0.6])), "schedule", ["accuracy"]
    )
    assert [t.get_text() for t in named.get_xticklabels()] == ["cosine", "one-cycle"]
    plt.close("all")


class Brightness(nn.Module):
    "Two features, each the mean of one half of the image: bright on the left, bright on the right"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(1)
        mask = torch.zeros(2, 8, 8)
        mask[0, :, :4], mask[1, :, 4:] = 1, 1
        self.register_buffer("mask", mask)

    def forward(self, x):
        return (self.conv(x) * self.mask).mean((2, 3))


def predictor_of(encoder, n_features, vocab, channels=1, side=8, crops="center"):
    model = FaceClassifier(encoder, nn.Linear(n_features, len(vocab), bias=False)).eval()
    predictor = Predictor.__new__(Predictor)
    views = dict(level="weak", recipe="rafdb", size=side, channels=channels)
    stats = [0.0] * channels, [1.0] * channels
    predictor._build(model, vocab, stats, views, crops, "cpu")
    return predictor


def test_grad_cam_of_a_model_whose_evidence_is_known():
    """logit = w . features and features = mean(conv * mask) = mean(x * mask): the gradient is constant on a half, and
    so is the weight of its map; the heat is the image, whichever half decides"""
    predictor = predictor_of(Brightness(), 2, ["$left$", "right"])
    with torch.no_grad():
        predictor.model.classifier.classifier.weight.copy_(torch.eye(2))
    image = np.zeros((8, 8, 1), np.uint8)
    image[2, 1], image[5, 6] = 200, 100
    heat = grad_cam(predictor, [image, image], ["$left$", "right"])
    assert heat.shape == (2, 8, 8) and np.allclose(heat, image[..., 0] / 200, atol=1e-6)
    with torch.no_grad():
        predictor.model.classifier.classifier.weight[0].neg_()
    assert (grad_cam(predictor, image, "$left$") == 0).all()  # the image speaks against the class
    fig = plot_grad_cam(predictor, image, "$left$")
    fig.canvas.draw()
    assert fig.axes[0].get_title().startswith("$left$ 0.")
    with pytest.raises(ValueError, match="the model has no class 'up', its classes are"):
        grad_cam(predictor, image, "up")
    with pytest.raises(ValueError, match="one class for each of 1 images, got 2"):
        grad_cam(predictor, image, ["right", "right"])
    plt.close("all")


def test_other_threads_may_use_the_predictor_while_grad_cam_explains_it():
    predictor, found = predictor_of(Brightness(), 2, ["left", "right"]), []
    pixels = predictor.pixels

    def look(image):
        found.extend(m for m in predictor.model.modules() if m._forward_hooks or m._forward_pre_hooks)
        return pixels(image)

    predictor.pixels = look
    grad_cam(predictor, np.full((8, 8), 9, np.uint8), "left")
    assert not found


def naive_heat(maps, gradient):
    "Grad-CAM by its formula, of (channels, h, w) in float64"
    weights = gradient.mean((1, 2))
    return np.maximum(sum(w * a for w, a in zip(weights, maps)), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch,size,where,layout",
    [
        ("resnet18", 96, "layer4", "maps"),
        ("efficientnet_lite0", 96, "blocks.6", "maps"),
        ("swin_tiny_patch4_window7_224", 224, "layers.3", "channels last"),
        ("vit_tiny_patch16_224", 224, "blocks.11", "tokens"),
        ("vit_tiny_patch16_224", 224, "blocks.11", "tokens and registers"),
    ],
)
def test_grad_cam_is_its_formula_on_the_last_maps_of(arch, size, where, layout):
    torch.manual_seed(0)
    more = dict(reg_tokens=4) if "registers" in layout else {}
    encoder = timm.create_model(arch, num_classes=0, in_chans=3, **more).eval()
    predictor = predictor_of(encoder, encoder.num_features, list("abc"), 3, size)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    kept = {}

    def keep(x):
        x.retain_grad()
        kept["x"] = x

    module = encoder.get_submodule(where)
    if "tokens" in layout:
        hook = module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    else:
        hook = module.register_forward_hook(lambda _, args, out: keep(out))
    predictor.model.classifier(torch.cat(predictor.model.views(predictor.pixels(image)[None])))[0, 1].backward()
    hook.remove()
    maps, gradient = (t[0].detach().double().numpy() for t in (kept["x"], kept["x"].grad))
    if "tokens" in layout:
        maps, gradient = (t[-196:].T.reshape(-1, 14, 14) for t in (maps, gradient))
    elif layout == "channels last":
        maps, gradient = (t.transpose(2, 0, 1) for t in (maps, gradient))
    expected = cv2.resize(naive_heat(maps, gradient), (size, size), interpolation=cv2.INTER_LINEAR)
    before = predictor.probabilities([image])
    assert expected.max() > 0
    assert np.allclose(grad_cam(predictor, image, "b")[0], expected / expected.max(), atol=2e-3)
    assert np.array_equal(predictor.probabilities([image]), before) and not module._forward_hooks  # nothing is left


def test_heat_of_several_views_lies_where_the_views_were_cut_out():
    views = torch.zeros(3, 1, 2, 2)
    views[0, 0, 0, 0], views[1, 0, 0, 0], views[2, 0, 1, 1] = 3, 4, 5
    heat = _on_image(views, [(False, 0, 0), (True, 0, 0), (False, 1, 1)], 3)
    assert torch.equal(heat[0], torch.tensor([[1.5, 2, 0], [0, 0, 0], [0, 0, 5]]))


def test_heat_of_an_encoder_without_maps_or_without_the_extra(monkeypatch):
    flat = predictor_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3, list("ab"))
    with pytest.raises(ValueError, match="no feature maps in Sequential"):
        grad_cam(flat, np.zeros((8, 8), np.uint8))
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r'pip install "ecan_fastai\[explain\]"'):
        grad_cam(flat, np.zeros((8, 8), np.uint8))


def test_overlay_keeps_cold_pixels():
    image = np.full((2, 2, 1), 100, np.uint8)
    over = heat_overlay(image, np.array([[0, 0], [0, 1.0]]))
    assert (over[0] == 100).all() and over.shape == (2, 2, 3) and over[1, 1, 0] > 150 and over.dtype == np.uint8


def test_probe_of_known_features(make_dls):
    "Features that are the answer give 1, constant features the share of the most frequent class"
    dls = make_dls()
    valid = torch.cat([y for *_, y in dls.valid])

    class Answers(nn.Module):
        "The class of an image, looked up by its pixels' sum"

        def __init__(self, known):
            super().__init__()
            self.known, self.scale = known, nn.Parameter(torch.ones(1))
            self.dropout = nn.Dropout(0.9)

        def forward(self, x):
            rows = [self.known[round(float(s))] for s in x.double().sum((1, 2, 3)) * 100]
            return self.dropout(torch.stack(rows)) * self.scale

    known = {}
    for dl in (dls.test_dl(dls.train_ds.items, with_labels=True), dls.valid):
        for x, y in dl:
            for image, label in zip(x, y):
                known[round(float(image.as_subclass(torch.Tensor).double().sum() * 100))] = torch.eye(7)[int(label)]
    encoder = Answers(known).train()
    assert probe(encoder, dls) == 1 and encoder.dropout.training

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.w.expand(len(x), 2)

    train = torch.cat([y for *_, y in dls.test_dl(dls.train_ds.items, with_labels=True)])
    assert probe(Constant(), dls) == pytest.approx(float((valid == train.mode().values).float().mean()))


def test_probe_refuses_a_valid_split_that_training_has_seen(make_dls):
    dls = make_dls(train_all=True)
    with pytest.raises(ValueError, match="with train_all training has seen it"):
        probe(nn.Flatten(), dls)


def test_probe_takes_the_mean_feature_of_several_crops(make_dls):
    dls = make_dls(level="strong", size=48, eval_crops="five", n_views=1)
    learn = baseline_learner(dls, "resnet18_half")
    learn.model.eval()
    z, _ = _features_and_labels(learn.model.encoder, dls.valid)
    expected = Predictor.from_learner(learn).features([f.image for f in dls.valid.items])
    assert np.allclose(z, expected, atol=1e-4)


def test_probe_of_a_learner_is_that_of_its_encoder(make_dls):
    learn = baseline_learner(make_dls(), "resnet18_half")
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    accuracy = probe(learn, learn.dls)
    assert accuracy == probe(learn.model.encoder, learn.dls)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_class_names_with_dollars_are_drawn_as_they_are():
    vocab, rng = ["$a", "b$c$", "$\\bad$"], np.random.default_rng(0)
    y = rng.integers(0, 3, 30)
    figures = [
        plot_confusion(y, y, vocab, "$5").figure,
        plot_confusions({"$x$": (y, y)}, vocab),
        plot_tsne({"$\\worse$": rng.normal(size=(30, 4))}, y, vocab),
        plot_class_counts({"$data": dict.fromkeys(vocab, 3)}),
    ]
    for fig in figures:
        fig.canvas.draw()  # "$\bad$" as mathematics raises here
    plt.close("all")


def test_groups_of_people_by_hand():
    correct = [1, 0, np.nan, 1, 1, 0]
    people = pd.DataFrame(dict(gender=["f", "f", "f", "m", None, "m"]), index=[9, 3, 1, 0, 5, 5])
    table = subgroup_table(correct, people)
    assert table[["group", "images", "found", "correct"]].values.tolist() == [
        ["f", 3, 2, 1],
        ["m", 2, 2, 1],
        ["unknown", 1, 1, 1],
    ]
    assert list(table["accuracy"]) == [0.5, 0.5, 1]
    nobody = subgroup_table([np.nan], people[:1]).iloc[0]
    assert nobody["found"] == 0 and np.isnan(nobody["accuracy"])


def test_intervals_of_groups_are_scipys():
    from scipy.stats import binomtest

    for k, n in ((0, 7), (3, 7), (7, 7), (40, 90)):
        row = subgroup_table([1] * k + [0] * (n - k), pd.DataFrame(dict(a=["x"] * n))).iloc[0]
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_ages_are_put_into_bands_of_ten():
    ages = [*map(str, range(18, 32)), None]
    table = subgroup_table([1] * 15, pd.DataFrame(dict(age=ages, code=[0, 1] * 7 + [1])))
    assert table[["attribute", "group", "images"]].values.tolist() == [
        ["age", "10-19", 2],
        ["age", "20-29", 10],
        ["age", "30-39", 2],
        ["age", "unknown", 1],
        ["code", "0", 7],
        ["code", "1", 8],
    ]
    shares, turned = [k / 20 for k in range(20)], [k / 4 for k in range(20)]  # 0 to 0.95, and 0 to 4.75
    table = subgroup_table([1] * 20, pd.DataFrame(dict(quality=shares, yaw=turned)))
    assert table[["attribute", "group", "images"]].values.tolist() == [
        *(["quality", f"{k / 10:.1f} to {(k + 1) / 10:.1f}", 2] for k in range(10)),
        *(["yaw", f"{k} to {k + 1}", 4] for k in range(5)),
    ]
    years = subgroup_table([1] * 11, pd.DataFrame(dict(born=range(1990, 2001))))
    assert list(years["group"]) == ["1990-1999", "2000-2009"]  # whole numbers
    times = subgroup_table([1] * 11, pd.DataFrame(dict(time=[1e5 + k / 10 for k in range(11)])))
    assert list(times["group"]) == [f"{1e5 + k / 10:.1f} to {1e5 + (k + 1) / 10:.1f}" for k in range(11)]
    few = subgroup_table([1] * 12, pd.DataFrame(dict(age=[*range(18, 29), "old"])))
    assert len(few) == 12  # not all of them are numbers
