import copy
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelValidException,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Learner
from fastai.metrics import accuracy
from fastcore.foundation import L
from PIL import Image
from torch import nn

from ecan_fastai.callbacks import *
from ecan_fastai.losses import ECANLoss, PaperReading
from ecan_fastai.model import ECANModel

EVENTS = []


class Spy(ECANModel):
    "Notes every momentum update and every push"

    def update_keys(self, momentum):
        EVENTS.append("update")
        super().update_keys(momentum)


def small_encoder():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def noise_learner(*cbs, n=12, bs=4, bank=10, momentum=0.9, crops=0):
    torch.manual_seed(0)
    EVENTS.clear()
    g = torch.Generator().manual_seed(0)
    shape = (crops, 1, 32, 32) if crops else (1, 32, 32)
    items = [
        ((torch.randn(shape, generator=g), torch.randn(shape, generator=g)), torch.tensor(i % 3)) for i in range(n)
    ]
    dls = DataLoaders(DataLoader(items, bs=bs, num_workers=0), DataLoader(items, bs=bs, num_workers=0))
    dls.n_inp = 1
    model = Spy(small_encoder(), n_classes=3, in_chans=1, bank_size=bank)
    push = model.bank.push
    model.bank.push = lambda z, y: (EVENTS.append(f"push{len(z)}"), push(z, y))[1]
    learn = Learner(
        dls,
        model,
        loss_func=ECANLoss(),
        lr=1e-3,
        cbs=[MomentumUpdate(momentum), MemoryBankUpdate(), LossPartsRecorder(), CropsAsImages(), *cbs],
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_events_of_a_fit_in_order():
    learn = noise_learner()
    learn.fit(2)
    batch = ["update", "push4"]
    assert (
        EVENTS == ["push4"] * 3 + batch * 3 + batch * 3
    )  # three batches fill ten rows; then an update and a push each


def test_filling_moves_nothing_but_the_bank():
    learn = noise_learner()
    learn.create_opt()
    with torch.no_grad():
        for p in learn.model.key_encoder.parameters():
            p.mul_(1.1)  # a key encoder of its own
    twin = copy.deepcopy(learn.model)
    before = {k: v.clone() for k, v in [*learn.model.named_parameters(), *learn.model.encoder.named_buffers()]}
    learn.model.train()
    learn.n_epoch, learn.epoch = 1, 0
    learn.memory_bank_update.fill()
    assert (
        all(
            torch.equal(before[k], v)
            for k, v in [*learn.model.named_parameters(), *learn.model.encoder.named_buffers()]
        )
        and learn.model.bank.full
    )
    twin.train()
    keys = torch.cat([twin.key_encoder(x_k) for (_, x_k), _ in learn.dls.train])
    assert torch.equal(learn.model.bank.z, torch.cat([keys[10:], keys[2:10]]))
    assert learn.model.bank.y.tolist() == [1, 2, 2, 0, 1, 2, 0, 1, 2, 0]  # 12 labels 0 1 2 0 ... into 10 rows


def test_a_bank_larger_than_the_data_takes_one_pass_and_grows_on():
    learn = noise_learner(bank=100)
    learn.fit(2)
    assert EVENTS.count("push4") == 3 + 6 and len(learn.model.bank) == 36


def test_a_full_bank_is_not_filled_again():
    learn = noise_learner()
    learn.fit(1)
    EVENTS.clear()
    learn.fit(1)
    assert EVENTS == ["update", "push4"] * 3


def test_keys_in_the_bank_are_those_of_the_batch():
    seen = []

    class Look(Callback):
        order = 100

        def after_pred(self):
            if self.training:
                seen.append(self.pred["z_k"].clone())

    learn = noise_learner(Look())
    learn.fit(1)
    bank = learn.model.bank
    assert torch.equal(bank.z[bank.order()][:4].flip(0), seen[-1]) and bank.y[bank.order()][:4].flip(0).tolist() == [
        2,
        0,
        1,
        2,
    ]


def test_the_loss_sees_the_bank_without_the_current_batch():
    filled = []

    class Look(Callback):
        def after_pred(self):
            if self.training:
                filled.append(len(self.pred["bank_z"]))

    learn = noise_learner(Look(), bank=100)
    learn.fit(1)
    assert filled == [12, 16, 20]


def test_key_parameters_follow_equation_1_through_a_fit():
    learn = noise_learner(momentum=0.5)
    expected = [p.detach().double().clone() for p in learn.model.key_encoder.parameters()]

    class Twin(Callback):
        order = 100

        def after_step(self):
            for e, q in zip(expected, self.model.encoder.parameters()):
                e.mul_(0.5).add_(0.5 * q.detach().double())

    learn.add_cb(Twin())
    learn.fit(1)
    assert all(torch.allclose(k.double(), e, atol=1e-6) for k, e in zip(learn.model.key_encoder.parameters(), expected))


def test_gradient_accumulation_updates_once_a_step_and_pushes_every_batch():
    learn = noise_learner(GradientAccumulation(n_acc=8), n=16, bank=10)
    learn.fit(1)
    assert EVENTS == ["push4"] * 3 + ["push4", "update", "push4", "push4", "update", "push4"]


def test_a_skipped_step_moves_no_key_and_still_pushes():
    class Overflow(Callback):
        "What MixedPrecision does when a gradient overflows"

        order = MixedPrecision.order

        def before_step(self):
            if self.iter == 1:
                raise CancelStepException()

    learn = noise_learner(Overflow())
    learn.fit(1)
    assert EVENTS[3:] == ["update", "push4", "push4", "update", "push4"]


class MixedPrecisionOnCPU(MixedPrecision):
    "fastai's, but for the device"

    name = "mixed_precision"

    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.amp.GradScaler("cpu"),
            [],
        )


def test_mixed_precision_keeps_the_bank_exact_and_a_step_that_overflows_moves_no_key():
    dtypes = []

    class Look(Callback):
        order = MixedPrecision.order + 1

        def after_pred(self):
            if self.training:
                dtypes.extend(v.dtype for v in self.pred.values() if v.is_floating_point())

        def before_step(self):
            if self.iter == 1:
                raise AssertionError("the step was not skipped")

    class Overflow(Callback):
        order = MixedPrecision.order - 1

        def before_step(self):
            if self.iter == 1:
                self.model.classifier.weight.grad[0, 0] = torch.inf

    learn = noise_learner(MixedPrecisionOnCPU(), Look(), Overflow())
    learn.fit(1)
    assert (
        EVENTS[3:] == ["update", "push4", "push4", "update", "push4"]
        and set(dtypes) == {torch.float32}
        and learn.model.bank.z.dtype == torch.float32
    )
    assert all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.slow
def test_bfloat16_on_a_cpu_reaches_the_encoders_and_leaves_what_is_kept_in_float32():
    seen = []
    learn, plain = noise_learner(CPUMixedPrecision()), noise_learner()
    for name in ("encoder", "key_encoder"):
        getattr(learn.model, name)[0].register_forward_hook(lambda m, i, o, name=name: seen.append((name, o.dtype)))
    for l in (learn, plain):
        l.fit(1)
    assert set(seen) == {
        ("encoder", torch.bfloat16),
        ("key_encoder", torch.bfloat16),
        ("key_encoder", torch.float32),
    }  # the bank is filled before the first batch
    learn.model.eval()(torch.zeros(1, 1, 32, 32))
    assert seen[-1] == ("encoder", torch.float32) and {
        t.dtype for t in learn.model.state_dict().values() if t.is_floating_point()
    } == {torch.float32}
    half, full = [l.recorder.losses[0].item() for l in (learn, plain)]
    assert half != full and half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("where", ["before_batch", "forward", "after_pred", "after_loss", "before_step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelBatchException])
def test_bfloat16_ends_with_the_model_whatever_ends_the_batch(where, error):
    class Stop(Callback):
        order = 0 if where == "after_loss" else CPUMixedPrecision.order + 1

        def __call__(self, event):
            super().__call__(event)
            if event == where and self.training and self.iter == 1:
                raise error

    class Autocast(Callback):
        order = 100

        def after_train(self):
            seen.append(torch.is_autocast_enabled("cpu"))

    def hook(module, args):
        if where == "forward" and module.training and learn.iter == 1:
            raise error

    seen, learn = [], noise_learner(CPUMixedPrecision(), Stop(), Autocast())
    learn.model.encoder[3].register_forward_pre_hook(hook)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 0.1)
    else:
        learn.fit(1, 0.1)
        assert seen == [False]
    assert not torch.is_autocast_enabled("cpu")
    learn.remove_cb(CPUMixedPrecision)
    x = torch.stack([q for (q, _), _ in learn.dls.train_ds])
    learn.model.eval()(x)  # what an interrupted batch had begun
    with torch.no_grad():
        logits = learn.model.eval()(x)
        exact = copy.deepcopy(learn.model).double()(x.double())
    assert torch.allclose(logits.double(), exact, atol=1e-5)


def test_a_compiled_model_trains_in_bfloat16_too():
    learn = noise_learner(CPUMixedPrecision())
    learn.model = torch.compile(learn.model, backend="eager")
    learn.fit(1)
    twin = noise_learner(CPUMixedPrecision())
    twin.fit(1)
    assert [row[0] for row in learn.recorder.values] == pytest.approx(
        [row[0] for row in twin.recorder.values], rel=1e-3
    )


def test_frozen_layers_of_the_encoder_are_frozen_in_the_key_encoder_and_no_others():
    def losses(*cbs):
        learn = noise_learner(*cbs)
        learn.fit(2)
        return [x.item() for x in learn.recorder.losses]

    assert losses(BnFreeze()) == losses()  # every layer trains, so there is nothing to freeze

    class Evaluates(Callback):
        def before_batch(self):
            self.model.encoder[1].eval()

        def after_pred(self):
            modes.append([self.model.key_encoder[i].training for i in (1, 4)])

    modes = []
    noise_learner(Evaluates()).fit(1)
    assert modes[0] == [False, True]


def test_a_batch_that_is_not_finite_spoils_no_later_step():
    class Skip(Callback):
        order = 0

        def before_batch(self):
            if self.training and self.iter == 1:
                self.learn.xb = ((self.x[0], self.x[1] * torch.nan),)

        def after_loss(self):
            losses.append(self.loss.isfinite().item())
            if self.training and not self.loss.isfinite():
                raise CancelBatchException

    losses: list = []
    learn = noise_learner(Skip())
    learn.fit(2)
    trained = losses[:3] + losses[6:9]
    assert trained == [True, False, True] * 2
    assert learn.model.bank.z.isfinite().all()


def test_weights_of_terms_may_change_in_a_fit():
    class WarmUp(Callback):
        def before_batch(self):
            self.loss_func.l1 = 0.0 if self.epoch == 1 else 0.2

    learn = noise_learner(WarmUp())
    learn.fit(3)
    names, rows = list(learn.recorder.metric_names)[1:-1], learn.recorder.values
    assert {len(row) for row in rows} == {len(names)}
    ensc, mva = ([row[names.index(name)] for row in rows] for name in ("ensc", "mva"))
    assert math.isnan(ensc[1]) and ensc[0] > 0 and ensc[2] > 0 and min(mva) > 0


def test_a_learner_without_recorder_trains():
    learn = noise_learner()
    learn.remove_cb(learn.recorder)
    learn.fit(1)
    assert EVENTS[3:] == ["update", "push4"] * 3


def test_another_loss_validates_and_does_not_train():
    learn = noise_learner()
    expected = learn.validate()[0]
    learn.loss_func = nn.CrossEntropyLoss()
    assert learn.validate()[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected an ECANLoss as loss_func, got CrossEntropyLoss"):
        learn.fit(1)
    learn.loss_func = ECANLoss(reading=PaperReading(key_eval=True))
    with pytest.raises(ValueError, match="key_eval is read when the model is made"):
        learn.fit(1)


@pytest.mark.parametrize(
    "cb,n_epoch,said",
    [
        (ProgressiveResize(16), 1, "no effect: 0.75 of 1 epochs is less than one epoch"),
        (ProgressiveResize(32, 1), 1, "to 32 pixels has no effect on views of 32"),
    ],
)
def test_small_images_that_change_nothing_warn(cb, n_epoch, said):
    with pytest.warns(UserWarning, match=said):
        noise_learner(cb).fit(n_epoch)


def test_a_search_for_the_rate_does_not_say_that_small_images_have_no_effect():
    learn = noise_learner(ProgressiveResize(16), n=60)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn.lr_find(num_it=12, show_plot=False)  # within one epoch
    assert not any("no effect" in str(w.message) for w in said)


def test_a_fit_after_an_interrupted_one_trains_in_bfloat16_as_if_alone():
    class Interrupt(Callback):
        def after_pred(self):
            if self.training:
                raise KeyboardInterrupt

    def losses(interrupted):
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                noise_learner(CPUMixedPrecision(), Interrupt()).fit(1)
        learn = noise_learner(CPUMixedPrecision())
        learn.fit(6, 0.1)
        assert not torch.is_autocast_enabled("cpu")
        return [row[0] for row in learn.recorder.values]

    assert losses(False) == losses(True)


def test_a_batch_cancelled_before_the_model_pushes_nothing():
    class Skip(Callback):
        def before_batch(self):
            if self.training and self.iter == 1:
                raise CancelBatchException()

    learn = noise_learner(Skip())
    learn.fit(1)
    assert EVENTS[3:] == ["update", "push4"] * 2


@pytest.mark.parametrize("cb", [MomentumUpdate(0.5), MemoryBankUpdate()], ids=["MomentumUpdate", "MemoryBankUpdate"])
def test_a_second_update_in_a_fit_is_refused(cb):
    learn = noise_learner()
    with pytest.raises(ValueError, match=f"the learner has its own {type(cb).__name__}: leave it out of cbs"):
        learn.fit(1, cbs=cb)
    assert EVENTS == []


def test_keys_of_an_epoch_that_was_cancelled_are_not_pushed_in_the_next():
    class Cut(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1:
                raise CancelBatchException()

        def after_loss(self):
            if self.training:
                raise CancelEpochException()

    learn = noise_learner(Cut())
    EVENTS.clear()
    learn.fit(2)
    assert [e for e in EVENTS[3:] if e.startswith("push")] == []


def test_keys_of_a_fit_that_failed_are_not_pushed_in_the_next():
    class Fail(Callback):
        def after_loss(self):
            raise RuntimeError("stop here")

    class Skip(Callback):
        def before_batch(self):
            if self.training:
                raise CancelBatchException()

    learn = noise_learner()
    with pytest.raises(RuntimeError, match="stop here"):
        learn.fit(1, cbs=Fail())
    EVENTS.clear()
    learn.fit(1, cbs=Skip())
    assert EVENTS == []


@pytest.mark.parametrize(
    "call",
    [
        lambda l: l.validate(),
        lambda l: l.get_preds(),
        lambda l: l.get_preds(ds_idx=0),
        lambda l: l.get_preds(with_loss=True),
    ],
)
def test_evaluation_moves_nothing(call):
    learn = noise_learner()
    before = snapshot(learn.model)
    call(learn)
    assert EVENTS == [] and same(before, snapshot(learn.model))


@pytest.mark.parametrize("exception", [CancelFitException, CancelEpochException])
def test_a_cancelled_fit_leaves_a_state_that_trains_on(exception):
    class Stop(Callback):
        def after_loss(self):
            if self.training and self.iter == 1:
                raise exception()

    learn = noise_learner(Stop())
    learn.fit(1)
    assert EVENTS[3:] == ["update", "push4"]  # fastai sends no after_batch for the second batch
    learn.remove_cb(Stop)
    EVENTS.clear()
    learn.fit(1)
    assert EVENTS == ["update", "push4"] * 3


@pytest.mark.slow
def test_lr_find_restores_bank_and_key_encoder(tmp_path):
    learn = noise_learner()
    learn.path = tmp_path
    learn.fit(1)
    before = snapshot(learn.model)
    learn.lr_find(num_it=7, show_plot=False, suggest_funcs=SuggestionMethod.Minimum)
    assert "push4" in EVENTS and same(before, snapshot(learn.model))


def test_parts_of_the_loss_are_recorded_as_means_of_the_epoch():
    parts = []

    class Look(Callback):
        order = 100

        def after_loss(self):
            if self.training:
                parts.append({k: v.item() for k, v in self.loss_func.parts.items()})

    rows = []
    learn = noise_learner(Look(), n=15)  # batches of 4, 4, 4 and 3: the last one has no two faces of a class
    learn.logger = rows.append
    learn.fit(2)
    names = learn.recorder.metric_names
    assert names == [
        "epoch",
        "train_loss",
        "valid_loss",
        "ce",
        "ensc",
        "mva",
        "alpha",
        "cos_within",
        "cos_between",
        "time",
    ] and all(len(r) == len(names) for r in rows)
    for epoch in range(2):
        row = dict(zip(names[1:], learn.recorder.values[epoch]))
        batches = parts[4 * epoch : 4 * epoch + 4]
        for k in ("ce", "ensc", "mva", "alpha"):
            assert row[k] == pytest.approx(sum(p[k] for p in batches) / 4, rel=1e-5)
        *pairs, none = [p["cos_within"] for p in batches]
        assert math.isnan(none) and row["cos_within"] == pytest.approx(sum(pairs) / 3, rel=1e-5)
    assert len(learn.validate()) == 1  # validation alone has no parts


def test_all_crops_are_pictures_in_training_and_a_stack_in_evaluation():
    learn = noise_learner(crops=5, bank=70)
    learn.fit(1)
    assert EVENTS == ["push20"] * 3 + ["update", "push20"] * 3
    bank = learn.model.bank
    assert bank.y[bank.order()][:20].flip(0).tolist() == [2] * 5 + [0] * 5 + [1] * 5 + [2] * 5
    assert learn.get_preds()[0].shape == (12, 3)


def test_an_epoch_without_validation_keeps_the_columns_in_place():
    class Skip(Callback):
        def before_validate(self):
            if self.epoch == 1:
                raise CancelValidException()

    learn = noise_learner(Skip())
    learn.metrics = L(AvgMetric(accuracy))
    learn.fit(3)
    names, rows = learn.recorder.metric_names[1:-1], learn.recorder.values
    assert names[:4] == ["train_loss", "valid_loss", "accuracy", "ce"] and {len(r) for r in rows} == {len(names)}
    for epoch, row in enumerate(rows):
        row = dict(zip(names, row))
        assert math.isnan(row["accuracy"]) == math.isnan(row["valid_loss"]) == (epoch == 1) and row["ensc"] > 1


def test_validate_returns_no_parts_of_a_fit_that_was_cancelled():
    class Stop(Callback):
        def after_loss(self):
            if self.training and self.iter == 1:
                raise CancelFitException()

    learn = noise_learner()
    learn.fit(1, cbs=Stop())
    assert len(learn.validate()) == 1


def test_batches_of_a_cancelled_epoch_are_not_in_the_means_of_the_next():
    seen = []

    class Stop(Callback):
        def after_loss(self):
            if self.training and self.epoch == 0 and self.iter == 1:
                raise CancelEpochException()
            if self.training and self.epoch == 1:
                seen.append(self.loss_func.parts["ensc"].item())

    learn = noise_learner(Stop())
    learn.fit(2)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert len(seen) == 3 and row["ensc"] == pytest.approx(sum(seen) / 3, rel=1e-6)


def test_metrics_of_training_batches():
    learn = noise_learner()
    learn.metrics, learn.recorder.train_metrics = L(AvgMetric(accuracy)), True
    learn.fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert 0 <= row["train_accuracy"] <= 1 and row["ce"] > 0 and 0 <= row["valid_accuracy"] <= 1


def test_the_bank_is_filled_in_the_first_epoch_that_trains():
    learn = noise_learner(bank=12)
    learn.fit(3, start_epoch=1)
    assert EVENTS[:3] == ["push4"] * 3 and EVENTS[3] == "update"


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
def test_mixing_of_images_is_refused_in_one_sentence(mixing):
    with pytest.raises(ValueError, match=f"{mixing.__name__} mixes single images, and ECAN trains on pairs"):
        noise_learner(mixing()).fit(1)


@pytest.mark.slow
def test_small_images_come_first_and_only_in_a_fit():
    sides = []

    class Look(Callback):
        order = ProgressiveResize.order + 1

        def before_batch(self):
            x = self.x[0] if isinstance(self.x, tuple) else self.x
            sides.append((self.training, self.epoch, x.shape[-1]))

    learn = noise_learner(ProgressiveResize(16, 0.5), Look())
    full = learn.dls.train_ds[0][0][0].shape[-1]
    learn.validate()
    assert {side for *_, side in sides} == {full}
    sides.clear()
    with learn.no_bar(), learn.no_logging():
        learn.fit(4)
    trained = {(epoch, side) for training, epoch, side in sides if training}
    assert trained == {(0, 16), (1, 16), (2, full), (3, full)}
    assert {side for training, _, side in sides if not training} == {full}
    sides.clear()
    learn.get_preds()
    assert {side for *_, side in sides} == {full}


def test_views_are_resized_each_by_itself():
    resize = ProgressiveResize(8).resize
    q, k = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 24, 24)
    small = resize((q, k))
    assert [tuple(v.shape) for v in small] == [(3, 1, 8, 8)] * 2 and torch.equal(small[1], resize(k))
    assert torch.allclose(resize(torch.full((2, 1, 16, 16), 0.3)), torch.tensor(0.3)) and resize(small[0]) is small[0]
    image = torch.rand(32, 32)
    theirs = np.array(Image.fromarray(image.numpy()).resize((8, 8), Image.Resampling.BILINEAR))
    assert torch.allclose(resize(image[None, None])[0, 0], torch.from_numpy(theirs), atol=1e-5)


def test_small_epochs_are_counted_without_rounding_errors():
    "0.29 * 100 is 28.999999999999996"
    resize, small = ProgressiveResize(16, 0.29), []
    for epoch in (28, 29):
        resize.learn = SimpleNamespace(n_epoch=100, epoch=epoch)
        resize.before_train()
        small.append(resize.is_small)
    assert small == [True, False]


@pytest.mark.parametrize("pct,n_epoch,n_small", [(0.75, 1, 0), (0.75, 2, 1), (0.75, 6, 4), (1, 1, 1), (0, 3, 0)])
def test_the_last_epoch_has_the_full_size_unless_all_are_small(pct, n_epoch, n_small):
    small = []

    class Look(Callback):
        order = ProgressiveResize.order + 1

        def after_train(self):
            small.append(self.progressive_resize.is_small)

    noise_learner(ProgressiveResize(16, pct), Look()).fit(n_epoch)
    assert sum(small) == n_small and sorted(small, reverse=True) == small


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: ProgressiveResize(4), "at least 8 pixels, got 4"),
        (lambda: ProgressiveResize(32, 2), "between 0 and 1, got 2"),
    ],
)
def test_wrong_sizes_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5])
def test_momentum_out_of_range_is_named(momentum):
    with pytest.raises(ValueError, match=f"momentum must be in .0, 1., got {momentum}"):
        MomentumUpdate(momentum)


def test_the_bank_is_filled_under_a_loss_of_ones_own():
    learn = noise_learner()
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, LossPartsRecorder)])
    learn.loss_func = lambda out, y: nn.functional.cross_entropy(out["logits"] if isinstance(out, dict) else out, y)
    learn.fit(1)
    assert learn.model.bank.full


def short_fits(learn, fit):
    "What a fit says of its momentum"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(learn)
    return [str(w.message) for w in said if "momentum" in str(w.message)]


def test_a_fit_that_is_short_for_its_momentum_says_so_once():
    learn = noise_learner(n=12, bs=4, momentum=0.9)  # 3 steps an epoch, an average over 10
    (said,) = short_fits(learn, lambda learn: learn.fit(2))
    assert said.startswith(
        "6 steps are few for a key encoder of momentum 0.9, which averages over about 10 steps: 53 %"
    )
    assert not short_fits(learn, lambda learn: learn.fit(8))  # with those before, 30 steps
    assert not short_fits(noise_learner(momentum=0.9), lambda learn: learn.fit(10))
    assert not short_fits(noise_learner(momentum=0), lambda learn: learn.fit(1))
    assert not short_fits(learn, lambda learn: (learn.validate(), learn.get_preds()))


def test_only_steps_that_the_keys_can_follow_count():
    learn = noise_learner(momentum=0.9)
    learn.splitter = lambda m: [list(m.encoder.parameters()), [*m.classifier.parameters(), m.centers]]
    assert not short_fits(learn, lambda learn: learn.lr_find(show_plot=False, num_it=40))  # restores the weights
    learn.freeze()
    assert not short_fits(learn, lambda learn: learn.fit(10))
    learn.unfreeze()
    (said,) = short_fits(learn, lambda learn: learn.fit(9))
    assert said.startswith("27 steps are few")
    (said,) = short_fits(noise_learner(GradientAccumulation(12), momentum=0.9), lambda learn: learn.fit(29))
    assert said.startswith("29 steps are few")  # one for three batches
    (said,) = short_fits(noise_learner(GradientAccumulation(6), momentum=0.9), lambda learn: learn.fit(9))
    assert said.startswith("13 steps are few")  # one for two batches of four, of which 6 is no multiple


@pytest.mark.parametrize(
    "loss, reads",
    [
        (ECANLoss(), True),
        (ECANLoss(l1=0), True),  # the older groups of MVA are keys
        (ECANLoss(l1=0, n_groups=1), False),
        (ECANLoss(l1=0, compact="center"), False),
        (ECANLoss(l2=0), True),
        (ECANLoss(l1=0, l2=0), False),
    ],
)
def test_a_loss_knows_whether_it_depends_on_the_keys(loss, reads):
    torch.manual_seed(0)
    z = torch.randn(4, 8, 5)
    out = dict(logits=torch.randn(8, 3), z_q=z[0], bank_y=torch.arange(16) % 3, bank_order=torch.arange(16))
    out |= dict(centers=torch.randn(3, 5), z_k=z[1], bank_z=torch.cat([z[2], z[3]]))
    y = torch.arange(8) % 3
    other = out | dict(z_k=torch.randn(8, 5), bank_z=torch.randn(16, 5))
    assert loss.reads_keys == reads == (not torch.equal(loss(out, y), loss(other, y)))
    learn = noise_learner(momentum=0.999)
    learn.loss_func = loss
    assert bool(short_fits(learn, lambda learn: learn.fit(1))) == reads
