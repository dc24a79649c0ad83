import inspect
import json
import re
import shutil
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL  # adds weighted_dataloaders
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SuggestionMethod
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize, get_image_files, parent_label
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import error_rate
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch import nn
from torchvision.models import resnet18

from ecan_fastai.callbacks import CPUMixedPrecision, CropsAsImages, LossPartsRecorder, MemoryBankUpdate, MomentumUpdate
from ecan_fastai.data import TwoViewBlock
from ecan_fastai.learner import *
from ecan_fastai.losses import ECANLoss, PaperReading
from ecan_fastai.model import FaceClassifier
from ecan_fastai.runfiles import write_run_file
from ecan_fastai.weights import weights_stats

MAKERS = [ecan_learner, baseline_learner]


@pytest.fixture
def make(make_dls, tmp_path):
    def _make(maker=ecan_learner, **kwargs):
        "A quiet learner of the smallest ResNet, unless `arch` is given"
        set_seed(0)
        views = 1 if maker is baseline_learner else 2
        dls = make_dls(n_views=views, **kwargs.pop("dls", {}))
        learn = maker(dls, path=tmp_path, **{"arch": "resnet10t", **kwargs})
        learn.remove_cb(learn.progress)
        learn.logger = lambda row: None
        return learn

    return _make


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_learner(path)


# The paper's optimizer


def test_paper_optimizer_is_torchs_sgd():
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    data = torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders(*[DataLoader(list(data), bs=16) for _ in range(2)])
    learn = Learner(dls, nets[0], loss_func=CrossEntropyLossFlat(), **paper_opt)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
    opt = torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        for xb, yb in torch.utils.data.DataLoader(data, batch_size=16):
            torch.nn.functional.cross_entropy(nets[1](xb), yb).backward()
            opt.step(), opt.zero_grad()
    for a, b in zip(*[n.parameters() for n in nets]):
        assert torch.allclose(a, b, atol=1e-6)


def test_foreach_sgd_takes_no_closure_like_fastais():
    with pytest.raises(NotImplementedError, match="closure"):
        ForeachSGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step(lambda: 0)


@pytest.mark.parametrize("wd_bn_bias", [True, False])
def test_foreach_sgd_equals_fastais(make, wd_bn_bias):
    "Two groups, a schedule, a fit that goes on: the same weights and the same state to the last bit"
    ends = []
    for opt_func in (ForeachSGD, partial(SGD, mom=0.9, decouple_wd=False)):
        learn = make(opt_func=opt_func, lr=0.05, wd=0.01, wd_bn_bias=wd_bn_bias)
        learn.fit_one_cycle(1, slice(0.01, 0.1))
        learn.fit(1, 0.02)
        state = learn.opt.state_dict()["state"]
        ends.append([*learn.model.state_dict().values(), *[v for s in state for v in s.values() if torch.is_tensor(v)]])
    assert len(ends[0]) == len(ends[1]) and all(torch.equal(a, b) for a, b in zip(*ends))


def test_parameters_frozen_after_a_fit_stay(make):
    learn = make(baseline_learner, train_bn=False)
    learn.fit(1, 0.01)
    learn.freeze()
    before = [p.detach().clone() for p in learn.model.encoder.parameters()]
    classifier = learn.model.classifier.weight.detach().clone()
    learn.fit(1, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.encoder.parameters()))
    assert not torch.equal(classifier, learn.model.classifier.weight)


def test_an_export_does_not_need_the_learners_splitter(make, tmp_path):
    def splitter(model):
        return [list(model.encoder.parameters()), [*model.classifier.parameters(), model.centers]]

    learn = make(splitter=splitter)
    learn.export("e.pkl")
    img = learn.dls.valid_ds.items[0].image
    assert torch.allclose(load(tmp_path / "e.pkl").predict(img)[2], learn.predict(img)[2], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"e.pkl is no file of weights, or needs code to load .*, as an exported learner"
    ):
        make(pretrained=tmp_path / "e.pkl")


def test_one_cycle_leaves_the_papers_momentum_alone(make):
    learn = make(baseline_learner)
    learn.fit_one_cycle(1)
    assert set(np.round(learn.recorder.hps["mom"], 9)) == {0.9} and max(learn.recorder.hps["lr"]) > 0.8 * learn.lr


def test_cosine_schedule():
    rate = cosine_with_warmup(0.1, 200)
    assert rate(0.0) == 0 and rate(0.0025) == pytest.approx(0.05) and rate(0.5) == pytest.approx(0.05)
    assert rate(0.5) == rate(0.5 + 0.9 / 200) > rate(0.5 + 1 / 200)  # one step an epoch
    assert rate(1 - 0.5 / 200) == pytest.approx(0.1 * (1 + np.cos(np.pi * 199 / 200)) / 2)


@pytest.mark.slow
def test_fit_cosine_sets_the_rate_of_every_batch(make):
    learn = make(baseline_learner)
    learn.fit_cosine(4, 0.08)
    n, lrs = len(learn.dls.train), learn.recorder.lrs
    assert np.allclose(lrs[:n], [0.08 * i / n for i in range(n)]) and np.allclose(lrs[2 * n : 3 * n], 0.04)


def test_fit_cosine_passes_on_what_a_fit_takes(make):
    learn, seen = make(baseline_learner, lr=0.3), []

    class Note(Callback):
        def before_train(self):
            seen.append(self.epoch)

    learn.fit_cosine(2, wd=0.25, cbs=Note(), start_epoch=1, warmup=0)
    assert seen == [1] and learn.opt.hypers[-1]["wd"] == 0.25
    assert np.allclose(learn.recorder.lrs, 0.15)  # the second epoch of two, from the learner's rate
    opt = learn.opt
    learn.fit_cosine(1)
    assert learn.opt is opt
    learn.fit_cosine(1, reset_opt=True)
    assert learn.opt is not opt


# What fastai's users do


def test_an_interpretation_shows_images(make):
    plt.close("all")
    interp = ClassificationInterpretation.from_learner(make(baseline_learner))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interp.plot_top_losses(4)
        interp.show_results([0, 1])
    assert len(plt.get_fignums()) == 2
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_everything_that_a_learner_does(maker, make, tmp_path):
    learn = make(maker)
    learn.fit(1, 0.01)
    learn.fit_one_cycle(1, 0.01)
    learn.fine_tune(1, 0.01)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=SuggestionMethod.Minimum)
    assert len(learn.validate()) == 4
    probs, y = learn.get_preds()
    assert probs.shape == (len(learn.dls.valid_ds), 7) and torch.allclose(
        probs.sum(1), torch.ones(len(probs)), atol=1e-5
    )
    assert learn.get_preds(with_loss=True)[2].shape == (len(probs),)
    assert learn.tta(n=2)[0].shape == probs.shape
    file = learn.dls.valid_ds.items[0].image
    for item in (file, str(file), learn.dls.valid_ds.items[0]):
        label, index, p = learn.predict(item)
        assert label == learn.dls.vocab[index] and torch.allclose(p, probs[0], atol=1e-5)
    test = learn.dls.test_dl([file] * 3)
    assert torch.allclose(learn.get_preds(dl=test)[0][2], probs[0], atol=1e-5)
    learn.show_results(max_n=4), learn.dls.show_batch(max_n=4)
    assert "Total params" in str(learn.summary())
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == len(probs)
    learn.save("here")
    learn.fit(1, 0.01)
    learn.load("here")
    assert torch.allclose(learn.get_preds()[0], probs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_export_predicts_the_same_and_holds_only_what_inference_needs(maker, make, tmp_path):
    learn = make(maker, dls=dict(level="strong", size=48))
    learn.fit(1, 0.01)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.export("e.pkl")
    plain = load(tmp_path / "e.pkl")
    assert (
        type(plain) is Learner
        and type(plain.model) is FaceClassifier
        and not [c for c in plain.cbs if isinstance(c, (MomentumUpdate, MemoryBankUpdate, LossPartsRecorder))]
    )
    file = learn.dls.valid_ds.items[0].image
    assert plain.predict(file)[0] == learn.predict(file)[0] and torch.allclose(
        plain.predict(file)[2], learn.predict(file)[2], atol=1e-6
    )
    files = [f.image for f in learn.dls.valid_ds.items]
    assert torch.allclose(
        plain.get_preds(dl=plain.dls.test_dl(files, num_workers=0))[0], learn.get_preds()[0], atol=1e-6
    )
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items())
    learn.fit(1, 0.01)  # and training goes on


def test_export_is_smaller_by_key_encoder_and_bank(make, tmp_path):
    learn = make()
    learn.export("e.pkl"), learn.save("m", with_opt=False)
    assert (tmp_path / "e.pkl").stat().st_size < 0.55 * (tmp_path / "models" / "m.pth").stat().st_size


def test_save_and_load_keep_bank_keys_and_centres(make):
    learn = make(bank_groups=3)
    learn.fit(1, 0.01)
    learn.save("here")
    other = make(bank_groups=3)
    other.load("here")
    a, b = learn.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and len(other.model.bank) == 48 and other.model.bank.y.sum() > 0


# Parameters


def totals(learn):
    "The totals of a summary: all parameters, trainable ones, others"
    said = str(learn.summary())
    kinds = ("params", "trainable params", "non-trainable params")
    return [int(re.search(rf"Total {kind}: ([\d,]+)", said)[1].replace(",", "")) for kind in kinds]


def test_the_summary_counts_key_encoder_and_centres(make):
    learn = make()
    encoder, head = sum(p.numel() for p in learn.model.encoder.parameters()), 7 * 512 + 7
    assert totals(learn) == [2 * encoder + head + 7 * 512, encoder + head + 7 * 512, encoder]
    learn.freeze()
    norms = sum(
        p.numel() for m in learn.model.encoder.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )  # fastai trains the normalisation layers of a frozen group
    assert totals(learn)[1] == norms + head + 7 * 512


# Parameter groups


def test_key_encoder_is_in_no_group_and_stays_without_gradient(make):
    learn = make(arch="resnet18")
    learn.fit(1, 0.01)
    learn.freeze()
    assert [
        p.requires_grad for p in (learn.model.encoder.conv1.weight, learn.model.classifier.weight, learn.model.centers)
    ] == [False, True, True]
    learn.unfreeze()
    assert learn.model.encoder.conv1.weight.requires_grad and not any(
        p.requires_grad for p in learn.model.key_encoder.parameters()
    )
    groups = face_splitter(learn.model)
    assert len(groups) == 2 and sum(len(g) for g in groups) == sum(
        1 for p in learn.model.parameters() if p.requires_grad
    )


def test_frozen_encoder_stays_and_centres_train(make):
    learn = make(arch="resnet18")
    learn.freeze()
    conv, centers = learn.model.encoder.conv1.weight.clone(), learn.model.centers.clone()
    learn.fit(1, 0.01)
    assert torch.equal(conv, learn.model.encoder.conv1.weight) and not torch.equal(centers, learn.model.centers)


# The factory


@pytest.mark.slow
def test_settings_arrive(make):
    learn = make(l1=0.1, l2=0.3, n_groups=3, temperature=0.2, momentum=0.5, bank_groups=2, opt_func=Adam, lr=1e-3)
    loss = learn.loss_func
    assert (loss.l1, loss.l2, loss.n_groups, loss.contrast_loss.temperature) == (0.1, 0.3, 3, 0.2)
    assert (
        learn.momentum_update.momentum == 0.5
        and learn.model.bank.size == 32
        and learn.opt_func is Adam
        and learn.lr == 1e-3
    )
    assert learn.moms == (0.95, 0.85, 0.95) and learn.wd_bn_bias is False  # fastai's own, not those of the paper's SGD
    assert make(lr=0.05).wd == 5e-4 and make(lr=0.05).lr == 0.05
    assert make(loss_func=ECANLoss(l2=0)).loss_func.l2 == 0
    for given in (dict(reading=PaperReading(key_eval=True)), dict(loss_func=ECANLoss(reading=PaperReading(True)))):
        assert make(**given).model.key_eval and not make().model.key_eval
    assert make(dls=dict(level="strong", size=48, all_crops=True)).model.bank.size == 16 * 16 * 5


def test_metrics_are_scikit_learns(make):
    learn = make(baseline_learner)
    probs, y = learn.get_preds()
    expected = [
        accuracy_score(y, probs.argmax(1)),
        balanced_accuracy_score(y, probs.argmax(1)),
        f1_score(y, probs.argmax(1), average="macro"),
    ]
    assert np.allclose(learn.validate()[1:], expected)


def test_one_view_is_refused(make_dls):
    with pytest.raises(ValueError, match="needs two views.*n_views=2"):
        ecan_learner(make_dls(n_views=1))


def test_one_view_is_refused_where_the_loaders_come_later(make, make_dls):
    learn = make()
    learn.dls = make_dls(n_views=1)
    with learn.no_bar(), pytest.raises(ValueError, match="the memory bank needs two views.*n_views=2"):
        learn.fit(1)
    learn.dls = make_dls()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.dls = make_dls(n_views=1)  # the bank is full now
    with learn.no_bar(), pytest.raises(ValueError, match="the memory bank needs two views.*n_views=2"):
        learn.fit(1, cbs=CPUMixedPrecision())
    assert not torch.is_autocast_enabled("cpu")


def test_what_a_model_does_not_take_is_told_before_training(make_dls):
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take images of shape \(1, 32, 32\)"):
        ecan_learner(make_dls(), "vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="batch size of at least 2, got 1"):
        baseline_learner(make_dls(n_views=1, bs=1))


@pytest.mark.slow
def test_colour_pictures(make):
    learn = make(arch="resnet18", dls=dict(channels=3))
    learn.fit(1, 0.01)
    assert learn.model.encoder.conv1.in_channels == 3


@pytest.mark.slow
def test_all_crops_train_and_several_crops_evaluate(make):
    for maker in MAKERS:
        learn = make(maker, dls=dict(level="strong", size=48, all_crops=True, eval_crops="ten", bs=8))
        learn.fit(1, 0.01)
        assert learn.get_preds()[0].shape == (len(learn.dls.valid_ds), 7)
        assert learn.get_preds(ds_idx=0)[0].shape == (len(learn.dls.train_ds), 7)


@pytest.mark.slow
def test_ecan_learns_the_sample(tmp_path):
    from ecan_fastai.loaders import ExpressionDataLoaders
    from ecan_fastai.sample import sample_faces

    set_seed(0)
    dls = ExpressionDataLoaders.from_folder(
        sample_faces(tmp_path / "f", n=700, test_pct=0.4),
        size=48,
        channels=1,
        level="weak",
        recipe="fer2013",
        bs=16,
        num_workers=0,
    )
    learn = ecan_learner(dls, momentum=0.9, opt_func=Adam, lr=2e-3, moms=(0.95, 0.85, 0.95), wd=1e-2, wd_bn_bias=False)
    untrained = learn.validate(dl=dls["test"])[1]
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(10)
    assert untrained < 0.5 and learn.validate(dl=dls["test"])[1] > 0.75


# Layout and precision


@pytest.mark.slow
def test_channels_last_changes_the_layout_and_not_the_training(make, tmp_path):
    values, steps = [], []
    for cbs in ([], [ChannelsLast()]):
        learn = make(cbs=cbs)
        start = torch.cat([p.detach().flatten() for p in learn.model.encoder.parameters()])  # a copy
        learn.fit(1, 1e-4)  # a higher rate lets rounding grow
        steps.append(torch.cat([p.detach().flatten() for p in learn.model.encoder.parameters()]) - start)
        values.append(learn.recorder.values[0][:2] + [v.item() for v in learn.loss_func.parts.values()])
    for encoder in (learn.model.encoder, learn.model.key_encoder):
        assert encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(*values, rtol=1e-3)
    assert steps[0].norm() > 0 and (steps[0] - steps[1]).norm() < 0.01 * steps[0].norm()
    learn.export("e.pkl")
    img = learn.dls.valid_ds.items[0].image
    assert torch.allclose(load(tmp_path / "e.pkl").predict(img)[2], learn.predict(img)[2], atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(make, precision):
    learn = make(dls=dict(device="cuda"), bank_groups=3).to_channelslast(amp_mode=precision)
    learn.fit(1, 0.01)
    assert (
        learn.model.bank.z.dtype == torch.float32
        and learn.model.bank.full
        and np.isfinite(learn.recorder.values[0]).all()
    )


# What a user of fastai types


def timm_fn():
    from timm.models.resnet import resnet10t

    return resnet10t


def torchvision_fn():
    from torchvision.models import resnet18

    return resnet18


def pooled():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def timm_module():
    import timm

    return timm.create_model("resnet10t", num_classes=0, in_chans=1)


def maps():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, stride=2), torch.nn.ReLU())


def only_at_32():
    "An encoder that takes images of 32x32 pixels and no others"
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 4, stride=4), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 9))


@pytest.mark.parametrize(
    "arch,d", [(timm_fn, 512), (timm_module, 512), (torchvision_fn, 512), (pooled, 5), (maps, 6), (only_at_32, 9)]
)
def test_an_architecture_may_be_a_function_or_a_module(make, arch, d):
    learn = make(arch=arch(), lr=1e-3)
    assert learn.model.classifier.in_features == learn.model.bank.z.shape[1] == d
    learn.fit(1)
    assert len(learn.get_preds()[0]) == len(learn.dls.valid_ds)


@pytest.mark.parametrize(
    "kwargs,said",
    [
        (dict(arch=3), "name of a timm model, a function that makes a model, or a module, got 3"),
        (dict(arch=torch.nn.Linear(3, 3)), r"Linear does not take an image of shape \(1, 1, 32, 32\)"),
        (dict(arch=torch.nn.Flatten(0)), r"got \(1024,\) from Flatten"),
        (dict(arch=torch.nn.Conv2d(1, 4, 3), pretrained=True), "pretrained=True has no effect with a module"),
        (
            dict(loss_func=CrossEntropyLossFlat()),
            "trains with an ECANLoss, got CrossEntropyLossFlat: use baseline_learner",
        ),
        (dict(loss_func=ECANLoss(), l1=0.2, temperature=0.2), "l1, temperature has no effect beside loss_func"),
        (dict(loss_func=ECANLoss(), reading=PaperReading()), "reading has no effect beside loss_func"),
    ],
)
def test_what_cannot_be_used_is_told_at_once(make, kwargs, said):
    with pytest.raises(ValueError, match=said):
        make(**kwargs)


def test_an_unknown_argument_is_no_argument(make):
    with pytest.raises(TypeError, match="lerning_rate"):
        make(lerning_rate=1)


def test_the_rate_follows_the_batch_size(make):
    for maker in MAKERS:
        assert make(maker).lr == pytest.approx(0.1 * 16 / 256)
    assert make(lr=0.3).lr == 0.3 and make(opt_func=Adam).lr == 1e-3


def test_fastais_own_loaders_train_a_baseline(faces, tmp_path):
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms

    dls = ImageDataLoaders.from_folder(
        faces, valid="test", item_tfms=Resize(32), batch_tfms=aug_transforms(), bs=16, num_workers=0
    )
    learn = baseline_learner(dls, path=tmp_path, lr=1e-3)
    assert learn.model.encoder.conv1.in_channels == 3
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(learn.get_preds()[0]) == len(dls.valid_ds)
    with pytest.raises(ValueError, match="two views of every training face"):
        ecan_learner(dls)


def other_targets(faces, kind):
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        ImageBlock,
        MultiCategoryBlock,
        RegressionBlock,
        Resize,
        get_image_files,
    )

    block, target = dict(
        several=((MultiCategoryBlock,), lambda f: [f.parent.name]),
        number=((RegressionBlock,), lambda f: 1.0),
        two=((CategoryBlock, CategoryBlock), None),
    )[kind]
    getters = dict(get_y=target) if target else dict(getters=[lambda f: f, *[lambda f: f.parent.name] * 2])
    made = DataBlock((ImageBlock, *block), get_items=get_image_files, item_tfms=Resize(32), n_inp=1, **getters)
    return made.dataloaders(faces, bs=4, num_workers=0)


@pytest.mark.parametrize(
    "kind,said",
    [
        ("several", "target of type TensorMultiCategory"),
        ("number", "expected one class an image"),
        ("two", "take one target"),
    ],
)
def test_other_targets_are_refused(faces, kind, said):
    with pytest.raises(ValueError, match=said):
        baseline_learner(other_targets(faces, kind))


@pytest.mark.slow
def test_weights_go_to_another_batch_size_and_the_bank_fills_again(make, tmp_path):
    first = make(lr=1e-3)
    first.fit(1)
    first.save("first")
    second = make(dls=dict(bs=8), lr=1e-3)
    second.load("first", with_opt=False)
    assert not len(second.model.bank) and second.model.bank.size == first.model.bank.size // 2
    for part in ("encoder", "key_encoder", "classifier"):
        for a, b in zip(
            getattr(first.model, part).state_dict().values(), getattr(second.model, part).state_dict().values()
        ):
            assert torch.equal(a, b)
    second.fit(1)
    assert second.model.bank.full or len(second.model.bank) >= len(second.dls.train) * 8
    # a file of `save` with its optimizer is a start for an encoder, too
    third = make(pretrained=tmp_path / "models" / "first.pth")
    assert torch.equal(third.model.encoder.layer1[0].conv1.weight, first.model.encoder.layer1[0].conv1.weight)


def pretend_hub(monkeypatch, error=None):
    "timm's weights without a network: random ones, or an error"
    import timm

    create = timm.create_model

    def fake(arch, pretrained=False, **kwargs):
        if pretrained and error:
            raise error
        return create(arch, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)


def stats_of(dls):
    "Mean and deviation of the one Normalize of all loaders"
    (norm,) = {id(t): t for dl in dls.loaders for t in dl.after_batch.fs if isinstance(t, Normalize)}.values()
    assert norm.mean.shape == norm.std.shape == (1, norm.mean.numel(), 1, 1)
    return norm.mean.flatten().tolist(), norm.std.flatten().tolist()


def run_of(folder, channels, mean, std):
    "What a run's folder holds of a start: weights, and what images had"
    folder.mkdir()
    encoder = FaceClassifier.create("resnet10t", 7, channels).encoder
    save_file({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(about=dict(mean=mean, std=std))))
    return folder


COLOUR = [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]


@pytest.mark.parametrize("channels, stats", [(3, COLOUR), (1, ([0.4], [0.2]))])
@pytest.mark.parametrize("maker", MAKERS)
def test_weights_of_timm_and_of_a_run_bring_their_statistics(make, monkeypatch, tmp_path, maker, channels, stats):
    folder = run_of(tmp_path / "colour", 3, *COLOUR)
    for pretrained in (folder, str(folder), folder / "model.safetensors"):
        dls = make(maker, pretrained=pretrained, dls=dict(channels=channels)).dls
        assert np.allclose(stats_of(dls), stats)
    dls = make(maker, pretrained=run_of(tmp_path / "grey", 1, [0.6], [0.2]), dls=dict(channels=channels)).dls
    assert np.allclose(stats_of(dls), ([0.6] * channels, [0.2] * channels))
    dls = make(maker, pretrained="fer2013", arch=None, dls=dict(channels=channels, size=48)).dls
    assert np.allclose(stats_of(dls), np.repeat(weights_stats("fer2013"), channels, 1))
    pretend_hub(monkeypatch)
    learn = make(maker, pretrained=True, dls=dict(channels=channels))
    own = learn.model.encoder.pretrained_cfg
    if channels == 3:
        assert np.allclose(stats_of(learn.dls), (own["mean"], own["std"]))
    else:
        assert np.allclose(stats_of(learn.dls), ([np.mean(own["mean"])], [np.mean(own["std"])]))


def test_torchvisions_weights_bring_fastais_statistics(make, monkeypatch):
    state = resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: state)  # no network
    mean, std = imagenet_stats
    assert np.allclose(
        stats_of(make(arch=resnet18, pretrained=True, dls=dict(channels=1)).dls), ([np.mean(mean)], [np.mean(std)])
    )


def test_given_statistics_and_those_of_weights_of_no_run_stay(make, tmp_path):
    folder = run_of(tmp_path / "run", 1, [0.6], [0.2])
    given = dict(batch_tfms=Normalize.from_stats([0.3], [0.7]))
    assert np.allclose(stats_of(make(pretrained=folder, dls=given).dls), ([0.3], [0.7]))
    default = stats_of(make().dls)
    shutil.copy(folder / "model.safetensors", folder / "celeb.safetensors")
    assert stats_of(make(pretrained=folder / "celeb.safetensors").dls) == default
    (tmp_path / "hub").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "hub")
    assert stats_of(make(pretrained=tmp_path / "hub").dls) == default
    for text in (
        '{"architecture": "resnet10t"}',
        "[1]",
        '{"about": "faces"}',
        '{"about": {"author": "me"}}',
        "no json",
    ):
        (tmp_path / "hub" / "config.json").write_text(text)  # as others write it
        for pretrained in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
            assert stats_of(make(pretrained=pretrained).dls) == default


def test_a_run_whose_statistics_were_edited_is_refused(make, tmp_path):
    folder = run_of(tmp_path / "run", 1, [0.6], [0.2])
    write_run_file(folder / "config.json", lambda f: f.write_text('{"about": {"mean": [0.6], "std": [0.2]}}'))
    make(pretrained=folder)
    (folder / "config.json").write_text('{"about": {"mean": [0.5], "std": [0.2]}}')
    with pytest.raises(ValueError, match="config.json is not as the run wrote it"):
        make(pretrained=folder)


def fastais(faces):
    return ImageDataLoaders.from_folder(faces, valid_pct=0.3, seed=0, bs=8, num_workers=0, item_tfms=Resize(32))


def test_fastais_own_loaders_are_normalised_as_weights_need_it(faces, tmp_path):
    folder, dls = run_of(tmp_path / "run", 3, *COLOUR), fastais(faces)
    plain = dls.valid.one_batch()[0]
    baseline_learner(dls, "resnet10t", pretrained=folder, path=tmp_path)
    assert np.allclose(stats_of(dls), COLOUR)
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in COLOUR)
    assert torch.allclose(dls.valid.one_batch()[0], (plain - mean) / std, atol=1e-6)


@pytest.mark.parametrize("ours", [True, False])
def test_a_learner_does_not_change_what_another_on_its_loaders_sees(make_dls, faces, tmp_path, ours):
    def new():
        return make_dls(channels=3, n_views=1) if ours else fastais(faces)

    def learner(dls, *pretrained, **kwargs):
        return baseline_learner(dls, "resnet10t", *pretrained, path=tmp_path, **kwargs)

    a, b = (run_of(tmp_path / name, 3, *stats) for name, stats in (("a", COLOUR), ("b", ([0.6] * 3, [0.25] * 3))))
    starts = [(False, r"\[0.485, " if ours else "images that are not normalised"), (a, r"\[0.5, 0.4, 0.3\]")]
    for start, has in starts:
        dls = new()
        first = learner(dls, start)
        before = first.dls.valid.one_batch()[0]
        with pytest.raises(
            ValueError, match=r"need .* \[0.6, 0.6, 0.6\] and \[0.25, .*, but an earlier learner .* has " + has
        ):
            learner(dls, b)
        learner(dls)  # takes the images as they are
        if start:
            learner(dls, start)  # a notebook's cell, run again
        assert torch.equal(first.dls.valid.one_batch()[0], before)


def test_a_learner_that_could_not_be_made_does_not_hold_its_loaders(make_dls, tmp_path):
    dls = make_dls()
    with pytest.raises(TypeError):
        ecan_learner(dls, "resnet10t", pretrained=run_of(tmp_path / "a", 1, [0.3], [0.2]), no_argument=1)
    ecan_learner(dls, "resnet10t", pretrained=run_of(tmp_path / "b", 1, [0.6], [0.25]))
    assert np.allclose(stats_of(dls), ([0.6], [0.25]))


def test_loaders_of_one_data_block_are_not_changed_under_a_learner(faces, tmp_path):
    block = DataBlock(
        (TwoViewBlock(size=32, channels=1, level="none"), CategoryBlock), get_items=get_image_files, get_y=parent_label
    )
    one, other = (block.dataloaders(faces, bs=8, num_workers=0) for _ in range(2))
    before = stats_of(ecan_learner(one, "resnet10t").dls)
    with pytest.raises(ValueError, match="on the same DataLoaders or DataBlock has .* make new ones"):
        ecan_learner(other, "resnet10t", pretrained=run_of(tmp_path / "run", 1, [0.6], [0.2]))
    assert stats_of(one) == before


def test_a_test_loader_made_before_the_learner_has_its_statistics(make_dls, faces, tmp_path):
    dls, files = make_dls(), get_image_files(faces)[:8]
    early = dls.test_dl(files)
    learn = ecan_learner(dls, "resnet10t", pretrained=run_of(tmp_path / "run", 1, [0.3], [0.1]), path=tmp_path)
    assert torch.equal(early.one_batch()[0], learn.dls.test_dl(files).one_batch()[0])


def test_without_a_network_the_message_names_the_way_out(make, monkeypatch):
    pretend_hub(monkeypatch, OSError("no route to host"))
    with pytest.raises(
        ValueError, match=r"cannot load timm's weights of resnet18 \(no route to host\): use pretrained=PATH"
    ):
        make(arch="resnet18", pretrained=True)


def test_an_export_keeps_the_users_metrics(make, tmp_path):
    assert not make(metrics=[]).metrics
    learn = make(metrics=[error_rate], lr=1e-3)
    learn.export("mine.pkl")
    assert [m.name for m in load(tmp_path / "mine.pkl").metrics] == ["error_rate"]


# fastai's extras


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_tensorboard_gets_graph_terms_and_predictions(maker, make, tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = make(maker)
    learn.fit(1, 0.01, cbs=TensorBoardCallback(tmp_path / "logs"))
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags, terms = events.Tags(), ["ce", "ensc", "mva", "alpha"] if maker is ecan_learner else []
    assert tags["graph"] and tags["images"]
    assert {"train_loss", "valid_loss", "accuracy", *terms} <= {*tags["scalars"]}
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    for name in ("accuracy", *terms):
        assert events.Scalars(name)[0].value == pytest.approx(row[name], rel=1e-5)


def test_tracing_moves_neither_keys_nor_bank(make):
    learn = make()
    (q, k), _ = learn.dls.one_batch()
    learn.model.train()
    before = {n: v.clone() for n, v in learn.model.state_dict().items() if n.startswith(("key_encoder.", "bank."))}
    traced = torch.jit.trace(learn.model, (q, k), check_trace=False)
    assert all(torch.equal(v, learn.model.state_dict()[n]) for n, v in before.items())
    assert torch.allclose(traced(q, k), learn.model.classifier(learn.model.encoder(q)), atol=1e-5)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_cleaner_lists_a_class_by_its_losses(maker, make, monkeypatch):
    from fastai.vision import widgets
    from PIL import Image

    monkeypatch.setattr(widgets, "display", lambda *args: None, raising=False)  # a notebook's
    learn = make(maker)
    cleaner = widgets.ImageClassifierCleaner(learn, max_n=1000)
    for i, split in enumerate(("Train", "Valid")):
        cleaner.dd_ds.value, cleaner.dd_cats.value = split, "happy"
        faces = [f for f in learn.dls[i].dataset.items if f.label == "happy"]
        assert {*cleaner.fns} == {*faces} and Image.open(cleaner.fns[0]).size == Image.open(faces[0].image).size
    probs = learn.get_preds()[0][[f.label == "happy" for f in learn.dls.valid_ds.items]]
    order = probs[:, learn.dls.vocab.o2i["happy"]].argsort()  # the least likely has the largest loss
    assert [f.image for f in cleaner.fns] == [faces[i].image for i in order]


@pytest.mark.parametrize("make", [ecan_learner, baseline_learner])
def test_signatures_show_no_default_that_does_not_act(make):
    shown = inspect.signature(make).parameters
    assert [shown[k].default for k in ("opt_func", "lr", "wd", "wd_bn_bias", "moms")] == [None] * 5
    assert "model" not in shown and shown["model_dir"].default == "models"


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
def test_a_baseline_mixes_images_also_of_loaders_with_two_views(make_dls, tmp_path, mixing):
    learn = baseline_learner(make_dls(n_views=2), "resnet10t", path=tmp_path, cbs=mixing(), lr=1e-3)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert np.isfinite(learn.recorder.losses).all()


def test_plain_loaders_of_fastai_have_no_transforms_to_settle(tmp_path):
    items = [(torch.randn(1, 32, 32), torch.tensor(i % 2)) for i in range(8)]
    dls = DataLoaders(*[DataLoader(items, bs=4) for _ in range(2)])
    dls.vocab = ["happy", "sad"]
    learn = baseline_learner(dls, "resnet10t", path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.recorder.values[0][-1] >= 0


def test_loaders_of_another_type_are_warned_of_and_item_weights_take_their_place(faces, tmp_path):
    block = DataBlock((TwoViewBlock(size=32, channels=1), CategoryBlock), get_items=get_image_files, get_y=parent_label)
    options = dict(bs=8, num_workers=0, device="cpu")
    with pytest.warns(
        UserWarning, match=f"{WeightedDL.__name__} gives pairs of views for training, but .* dls.train.item_weights"
    ):
        ecan_learner(block.weighted_dataloaders(faces, wgts=np.ones(1000), **options), "resnet10t", bank_groups=4)
    dls = block.dataloaders(faces, **options)
    dls.train.item_weights = [f.parent.name == "happy" for f in dls.train_ds.items]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learn = ecan_learner(dls, "resnet10t", bank_groups=4, path=tmp_path)
    assert {dls.vocab[i] for _, y in dls.train for i in y} == {"happy"}
    assert learn.predict(dls.train_ds.items[0])[0] in dls.vocab


@pytest.mark.parametrize("maker", MAKERS)
def test_a_splitter_of_ones_own(maker, make):
    def head_first(model):
        return face_splitter(model)[::-1]

    assert make(maker, splitter=head_first).splitter is head_first and make(maker).splitter is face_splitter


def test_more_groups_than_the_bank_holds_are_warned_of(make):
    with pytest.warns(UserWarning, match="n_groups 4 needs 3 older groups, but the bank holds 2 .*: MVA sees 3 groups"):
        make(n_groups=4, bank_groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(n_groups=3, bank_groups=2)
    with pytest.raises(ValueError, match="bank_groups must be a whole number of at least 1, got 2.5"):
        make(bank_groups=2.5)


@pytest.mark.parametrize(
    "settings, unread",
    [
        (dict(contrast="supcon", compact="center"), True),
        (dict(l1=0, n_groups=1), True),
        (dict(l1=0, l2=0), True),
        (dict(contrast="supcon", compact="mva"), False),
        (dict(contrast="esc", compact="center"), False),
    ],
)
def test_a_size_of_a_bank_that_no_term_reads_is_warned_of(make, settings, unread):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(loss_func=ECANLoss(**settings), bank_groups=8)
        make(loss_func=ECANLoss(**settings), bank_groups=1 if unread else 16)
    assert [str(w.message) for w in seen if "no term of the loss reads" in str(w.message)] == [
        "bank_groups has no effect: no term of the loss reads the bank"
    ] * unread


@pytest.mark.parametrize(
    "settings, unread", [(dict(l1=0, compact="center"), True), (dict(l1=0), False), (dict(l2=0), False)]
)
def test_a_momentum_of_a_key_encoder_that_no_term_reads_is_warned_of(make, settings, unread):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(loss_func=ECANLoss(**settings), momentum=0.9)
        make(loss_func=ECANLoss(**settings))
    assert [str(w.message) for w in seen if "no term of the loss reads" in str(w.message)] == [
        "momentum has no effect: no term of the loss reads the key encoder"
    ] * unread


def test_another_loss_of_an_ecan_learner_is_refused_before_training(make):
    learn = make()
    learn.loss_func = CrossEntropyLossFlat()
    with pytest.raises(ValueError, match="expected an ECANLoss as loss_func, got CrossEntropyLossFlat"):
        learn.fit(1)


@pytest.mark.parametrize("maker", MAKERS)
def test_an_export_has_the_settings_of_its_learner(maker, make, tmp_path):
    terms = dict(weight=torch.linspace(0.5, 2, 7), label_smoothing=0.2)
    loss = ECANLoss(**terms) if maker is ecan_learner else CrossEntropyLossFlat(flatten=False, **terms)
    learn = make(maker, loss_func=loss, lr=3e-3, wd=0.03, opt_func=Adam, moms=(0.8, 0.7, 0.8))
    learn.export("e.pkl")
    again = load(tmp_path / "e.pkl")
    again.dls = learn.dls
    with again.no_bar():
        assert again.validate()[0] == pytest.approx(learn.validate()[0], rel=1e-5)
    assert (again.lr, again.wd, again.moms, again.opt_func) == (3e-3, 0.03, (0.8, 0.7, 0.8), Adam)
    again.freeze()
    trained = {name for name, p in again.model.named_parameters() if p.requires_grad}
    norms = {
        f"encoder.{n}.{k}"
        for n, m in again.model.encoder.named_modules()
        for k, _ in m.named_parameters(recurse=False)
        if isinstance(m, nn.BatchNorm2d)
    }
    assert trained == norms | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_compiled_model_is_in_the_same_parameter_groups(maker, make):
    learn = make(maker)
    expected = [[id(p) for p in group] for group in learn.splitter(learn.model)]
    learn.model = torch.compile(learn.model, backend="eager")
    assert [[id(p) for p in group] for group in learn.splitter(learn.model)] == expected
    keys = {id(p) for name, p in learn.model.named_parameters() if "key_encoder" in name}
    assert not keys & {*sum(expected, [])} and len(keys) == (len(expected[0]) if maker is ecan_learner else 0)


@pytest.mark.parametrize(
    "maker,cb,name",
    [
        (ecan_learner, MomentumUpdate(0.5), "MomentumUpdate"),
        (ecan_learner, [MemoryBankUpdate], "MemoryBankUpdate"),
        (baseline_learner, CropsAsImages(), "CropsAsImages"),
    ],
)
def test_a_second_callback_of_the_learners_own_kind_is_refused(maker, cb, name, make):
    with pytest.raises(ValueError, match=f"the learner has its own {name}: leave it out of cbs"):
        make(maker, cbs=cb)


def test_what_a_baseline_does_not_use_is_refused(make, make_dls):
    with pytest.raises(ValueError, match="plain cross-entropy on the output of baseline_learner: use ecan_learner"):
        make(baseline_learner, loss_func=ECANLoss(l1=0.9))
    plain = torch.utils.data.DataLoader([(torch.zeros(1, 32, 32), 0)] * 4, batch_size=2)
    with pytest.raises(ValueError, match="expected fastai's DataLoaders, got loaders of type DataLoader"):
        baseline_learner(DataLoaders(plain, plain), "resnet10t")


class _Encoder3(torch.nn.Module):
    "An encoder that holds all layers, its pooling included, in one part"

    def __init__(self, pretrained=False):
        super().__init__()
        conv = torch.nn.Conv2d(3, 8, 3)
        self.layers = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    def forward(self, x):
        return self.layers(x)


def test_a_function_whose_network_would_be_lost_is_refused(make_dls):
    dls = make_dls(channels=3)
    for maker in MAKERS:
        with pytest.raises(ValueError, match="_Encoder3 keeps 0 of 224 parameters below its head: give a module"):
            maker(dls, _Encoder3)
        assert maker(dls, _Encoder3()).model.classifier.in_features == 8
    with pytest.raises(ValueError, match="gives no body for 3 channels .*pretrained.*: give a module"):
        baseline_learner(dls, lambda: _Encoder3())
    body = baseline_learner(dls, torchvision.models.mobilenet_v3_small).model.encoder  # most of it is its head
    assert sum(p.numel() for p in body.parameters()) == 927_008


def test_a_splitter_without_the_centres_is_refused(make):
    def without(model):
        return [list(model.encoder.parameters()), list(model.classifier.parameters())]

    with pytest.raises(ValueError, match="splitter: no group has the class centres"):
        make(splitter=without)
    make(splitter=without, loss_func=ECANLoss(l2=0))
