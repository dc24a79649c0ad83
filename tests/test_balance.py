"Against unequal classes: sampler, class weights, bank entries as positives."

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from small_runs import small_config

from ecan_fastai import runs
from ecan_fastai.config import RunConfig


def labels(dls):
    return [f.label for f in dls.train_ds.items]


def drawn(dl):
    return torch.cat([y for _, y in dl]).tolist()


def test_counts_and_weights_are_those_of_scikit_learn(make_dls):
    dls = make_dls()
    counts = Counter(labels(dls))
    assert (
        list(dls.class_counts()) == [counts[v] for v in dls.vocab] and sum(counts.values()) == dls.class_counts().sum()
    )
    assert np.allclose(
        dls.class_weights(), compute_class_weight("balanced", classes=np.array(dls.vocab), y=labels(dls))
    )


@pytest.mark.parametrize(
    "counts,rare",
    [
        ([4772, 2524, 1982, 1290, 717, 705, 281], [0, 0, 0, 1, 1, 1, 1]),
        ([3995, 436, 4097, 7215, 4965, 4830, 3171], [0, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_minority_classes_are_those_of_the_papers_figure_6(counts, rare, make_dls, monkeypatch):
    dls = make_dls()
    monkeypatch.setattr(dls, "class_counts", lambda: np.array(counts))
    assert list(dls.minority_classes()) == [bool(r) for r in rare]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_balanced_loader_draws_classes_equally_often(make_dls, workers):
    dls = make_dls(balanced=True, num_workers=workers)
    torch.manual_seed(0)
    plain, n = Counter(labels(dls)), len(dls.train) * dls.train.bs
    drawn_ = Counter(y for _ in range(20) for y in drawn(dls.train))
    share = np.array([drawn_[c] for c in range(7)]) / (20 * n)
    assert (
        np.abs(share - 1 / 7).max()
        < 4 * np.sqrt(1 / 7 * 6 / 7 / (20 * n))
        < max(plain.values()) / sum(plain.values()) - 1 / 7
    )
    assert len(drawn(dls.train)) == n  # as long an epoch as without
    assert len(drawn(dls.valid)) == len(dls.valid.dataset)  # evaluation is not touched
    assert drawn(dls.valid) == [dls.vocab.o2i[f.label] for f in dls.valid_ds.items]


def test_balanced_loader_repeats_under_a_seed_and_differs_between_epochs(make_dls):
    def pass_(dls, seed):
        dls.train.rng.seed(seed)
        return drawn(dls.train)

    dls = make_dls(balanced=True)
    a, b, c = pass_(dls, 1), pass_(dls, 1), drawn(dls.train)
    assert a == b != c and pass_(dls, 2) != a


def test_without_balance_every_face_comes_once(make_dls):
    dls = make_dls(drop_last=False)
    assert sorted(drawn(dls.train)) == sorted(dls.vocab.o2i[l] for l in labels(dls))


def learner(faces, tmp_path, **kw):
    cfg = small_config(faces, kind="folder", **kw).resolve()
    dls = runs.run_loaders(cfg, tmp_path)
    return runs.run_learner(cfg, dls, tmp_path), dls


def test_each_choice_reaches_its_place(faces, tmp_path):
    learn, dls = learner(faces, tmp_path)
    assert learn.loss_func.weight is None and learn.loss_func.bank_positives is None and dls.train.item_weights is None
    assert learner(faces, tmp_path, balance="sampler")[1].train.item_weights is not None
    assert np.allclose(learner(faces, tmp_path, balance="weights")[0].loss_func.weight, dls.class_weights())
    assert learner(faces, tmp_path, balance="positives")[0].loss_func.bank_positives.tolist() == list(
        dls.minority_classes()
    )
    assert np.allclose(
        learner(faces, tmp_path, balance="weights", method="baseline")[0].loss_func.func.weight, dls.class_weights()
    )


def test_a_loader_made_anew_stays_balanced(make_dls):
    dls = make_dls(balanced=True)
    assert dls.train.new().item_weights == dls.train.item_weights and dls.train.new(dls.valid_ds).item_weights is None


def test_positives_need_the_ensc_loss():
    for method in ("baseline", "center", "supcon"):
        with pytest.raises(ValueError, match="use ecan or ensc"):
            RunConfig("x", method=method, balance="positives")
    with pytest.raises(ValueError, match="whose share l1 is 0"):
        RunConfig("x", l1=0, balance="positives")


def test_positives_without_a_minority_are_told(tmp_path):
    for c in "ab":
        for i in range(30):
            (tmp_path / "faces" / c).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "faces" / c / f"{i}.png"), np.full((32, 32), i, np.uint8))
    with pytest.warns(UserWarning, match="balance positives changes nothing"):
        learner(tmp_path / "faces", tmp_path, balance="positives")
