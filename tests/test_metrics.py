import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from ecan_fastai.metrics import calibration_error, fit_temperature, split_metrics, subgroup_table


def drawn(n=40000, scale=1.0):
    "Logits, and labels drawn from the probabilities that these logits mean when they are divided by `scale`"
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (n, 5))
    targets = (softmax(logits, 1).cumsum(1) > rng.random((n, 1))).argmax(1)
    return scale * logits, targets


def test_calibration_error_is_zero_for_labels_drawn_from_the_probabilities():
    logits, targets = drawn()
    assert calibration_error(softmax(logits, 1), targets) < 0.01


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65]])
    # bins of a fifth: {0.9, 0.9}: right once, gap 0.4; {0.6, 0.65}: both right, gap 0.375
    assert calibration_error(probabilities, [0, 1, 1, 1], n_bins=5) == pytest.approx((2 * 0.4 + 2 * 0.375) / 4)


def test_the_last_bin_holds_a_confidence_of_one():
    "One image with 1.0, wrong, and one with 0.95, right, lie in one bin of fifteen: gap 1 - 0.05"
    assert calibration_error([[1, 0], [0.95, 0.05]], [1, 0]) == pytest.approx(0.95 / 2)


def test_calibration_error_of_a_sure_and_right_model_is_zero_and_of_a_sure_and_wrong_one_is_one():
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert calibration_error(sure, [0, 1, 2, 0]) == 0
    assert calibration_error(sure, [1, 2, 0, 1]) == 1


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_factor_by_which_logits_are_too_large(scale):
    logits, targets = drawn(scale=scale)
    assert fit_temperature(logits, targets) == pytest.approx(scale, rel=0.03)


def test_the_temperature_is_where_the_cross_entropy_is_smallest():
    logits, targets = drawn(3000, 2.5)
    best = fit_temperature(logits, targets)

    def cross_entropy(t):
        return -np.log(softmax(logits / t, 1)[np.arange(len(targets)), targets]).mean()

    assert all(cross_entropy(best) <= cross_entropy(best * f) for f in (0.9, 0.99, 1.01, 1.1))


def test_a_model_that_is_always_right_keeps_its_probabilities():
    logits = np.array([[2.0, 0, 0], [0, 1.0, 0]])
    assert fit_temperature(logits, [0, 1]) == 1
    assert fit_temperature(np.tile(logits, (10, 1)), [0, 1] * 9 + [0, 2]) != 1


@pytest.mark.parametrize("measure", [calibration_error, fit_temperature])
def test_calibration_refuses_what_is_no_class_index_and_other_lengths(measure):
    outputs = np.full((2, 4), 0.25)
    for targets, message in (
        (["happy", "sad"], "class indices from 0 to 3, got .*happy"),
        ([0, 4], "class indices from 0 to 3, got .*4"),
        ([0], r"a class index for each of 2 rows, got shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(outputs, targets)
    with pytest.raises(ValueError, match=r"a column for each class, got shape \(4,\)"):
        measure(outputs[0], [0])


@pytest.mark.parametrize("logits", [[[2.0, -1.0]], [[2.0, 3.0]]])
def test_calibration_error_refuses_logits(logits):
    with pytest.raises(ValueError, match="expected probabilities, whose rows sum to 1"):
        calibration_error(logits, [0])


def test_calibration_error_takes_probabilities_of_low_precision():
    logits = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)) * 2
    targets = torch.arange(1000) % 7
    exact, rough = (
        calibration_error(logits.to(t).softmax(1).float(), targets) for t in (torch.float32, torch.bfloat16)
    )
    assert rough == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("wrong", ["happy", 2, -1])
def test_what_is_no_class_index_is_refused(wrong):
    for targets, predicted in (([wrong, wrong], [0, 1]), ([0, 1], [wrong, wrong])):
        with pytest.raises(ValueError, match=f"class indices from 0 to 1, got .*{wrong}"):
            split_metrics(targets, predicted, ["happy", "sad"])


def test_the_interval_of_a_group_is_wilsons():
    "8 of 10: (0.490, 0.943), as in Newcombe (1998), formula 3, with z = 1.96; none of 5 begins at 0"
    people = pd.DataFrame(dict(side=["left"] * 11 + ["right"] * 5 + ["up"]))
    table = subgroup_table([1] * 8 + [0] * 2 + [np.nan] + [0] * 5 + [np.nan], people).set_index("group")
    assert table.loc["left", ["accuracy", "low", "high"]].tolist() == pytest.approx([0.8, 0.4902, 0.9433], abs=5e-5)
    assert table.loc["left", ["images", "found", "correct"]].tolist() == [11, 10, 8]
    assert table.loc["right", ["low", "high"]].tolist() == pytest.approx([0, 0.4345], abs=5e-5)
    assert table.loc["up", ["accuracy", "low", "high"]].isna().all()


def test_every_prediction_needs_a_row_of_people():
    with pytest.raises(ValueError, match="expected a row of people for each of 5 predictions, got 2"):
        subgroup_table([1, 0, 1, 1, 1], pd.DataFrame(dict(age=[1, 2])))


def test_groups_of_numbers_are_in_their_order():
    ages = pd.DataFrame(dict(age=[12, 5, 67, 25.5, np.nan], who=["b", "a", "c", "a", "b"]))
    table = subgroup_table([1] * 5, ages)
    assert table["group"].tolist() == ["5.0", "12.0", "25.5", "67.0", "unknown", "a", "b", "c"]
    wide = pd.DataFrame(dict(age=[*range(0, 120, 10), 105]))
    assert subgroup_table([1] * 13, wide)["group"].tolist() == [f"{n}-{n + 9}" for n in range(0, 120, 10)]
