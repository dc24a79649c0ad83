import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch

from ecan_fastai.config import RunConfig
from ecan_fastai.inference import Predictor
from ecan_fastai.learner import baseline_learner, ecan_learner
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.model import FaceClassifier
from ecan_fastai.readers.records import Face
from ecan_fastai.runfiles import read_json
from ecan_fastai.runs import resolve_config
from ecan_fastai.sample import draw_face
from ecan_fastai.weights import (
    NAMES,
    available,
    model_card,
    named_weights,
    shipped_run,
    weights_settings,
    weights_stats,
)

VOCAB = ["happy", "sad"]


def loaders(channels=1, **kwargs):
    faces = [
        Face(draw_face(VOCAB[i % 2], np.random.default_rng(i), 48, channels), VOCAB[i % 2], split, f"{split} {i}")
        for split in ("train", "valid")
        for i in range(8)
    ]
    settings = dict(size=48, channels=channels, recipe="fer2013", level="weak", bs=4, num_workers=0, device="cpu")
    return ExpressionDataLoaders.from_faces(faces, **{**settings, **kwargs})


def test_the_shipped_model_is_small_finite_and_in_half_precision():
    weights = named_weights("fer2013")
    assert all(v.dtype == torch.float16 for v in weights.values() if v.is_floating_point())
    assert all(v.isfinite().all() for v in weights.values())
    assert (shipped_run() / "model.safetensors").stat().st_size < 25e6


def test_the_shipped_files_are_those_of_their_list():
    listed = dict(line.split("  ")[::-1] for line in (shipped_run() / "SHA256SUMS").read_text().splitlines())
    assert set(listed) == {"card.md", "config.json", "metrics.json", "model.safetensors"}
    for name, digest in listed.items():
        assert hashlib.sha256((shipped_run() / name).read_bytes()).hexdigest() == digest


def test_nothing_of_a_machine_is_in_the_shipped_folder():
    for file in shipped_run().glob("*.*"):
        assert b"/home/" not in (text := file.read_bytes()) and b"/tmp/" not in text and b"/root/" not in text


def test_predictor_without_a_run_is_the_shipped_model():
    predictor = Predictor()
    assert predictor.run == shipped_run() and predictor.vocab[3] == "happy"
    weights = named_weights("fer2013")
    for name, value in predictor.model.classifier.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_starts_from_named_weights(name):
    encoder = FaceClassifier.create(n_classes=3, in_chans=len(weights_stats(name)[0]), pretrained=name).encoder
    weights = named_weights(name)
    for key, value in encoder.state_dict().items():
        stored = weights.get(key, weights.get(f"encoder.{key}"))
        assert torch.equal(value, stored.to(value.dtype)), key


def standing_out(weights):
    "Median distance, in standard deviations, of a layer's channel means from the means that its normalisation keeps"
    model = timm.create_model(weights_settings("imagenet")["arch"])
    model.load_state_dict(weights)
    coarse = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    gaps = []
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        norm.register_forward_hook(
            lambda m, x, out: gaps.append(
                (x[0].mean((0, 2, 3)) - m.running_mean).abs() / m.running_var.add(1e-3).sqrt()
            )
        )
    with torch.no_grad():
        model.eval()(torch.nn.functional.interpolate(coarse, size=224, mode="bicubic"))
    return torch.stack([gap.median() for gap in gaps]).median()


def test_tensors_of_imagenet_belong_to_the_layers_that_their_order_gives_them():
    weights, shuffled, alike = named_weights("imagenet"), {}, {}
    for name, value in weights.items():
        alike.setdefault((value.shape, name.rpartition(".")[2]), []).append(name)
    for names in alike.values():
        shuffled |= zip(names, [weights[name] for name in names[1:] + names[:1]])
    assert standing_out(weights) < 0.5 < 1 < standing_out(shuffled)


def test_the_architecture_follows_from_the_name_and_another_is_refused():
    learn = baseline_learner(loaders(), pretrained="fer2013")
    assert tuple(learn.model.encoder.conv1.weight.shape) == (64, 1, 3, 3)
    with pytest.raises(ValueError, match="the weights fer2013 are of resnet18_cifar, and not of resnet18"):
        ecan_learner(loaders(), "resnet18", pretrained="fer2013")


@pytest.mark.parametrize(
    "given,expected",
    [
        (dict(pretrained="fer2013"), dict(arch="resnet18_cifar", size=48, channels=1, recipe="fer2013")),
        (dict(pretrained="fer2013", size=64), dict(arch="resnet18_cifar", size=64, channels=1)),
        (dict(pretrained="imagenet"), dict(arch="tf_efficientnet_lite0", size=224, channels=3, recipe="rafdb")),
    ],
)
def test_a_run_from_named_weights_takes_their_settings_where_none_is_given(given, expected):
    cfg = resolve_config(RunConfig("-", "folder", **given))
    assert {k: getattr(cfg, k) for k in expected} == expected


def test_shipped_weights_that_have_changed_are_refused(tmp_path, monkeypatch):
    shutil.copytree(shipped_run(), tmp_path / "fer2013")
    monkeypatch.setattr("ecan_fastai.weights.SHIPPED", tmp_path)
    data = bytearray((tmp_path / "fer2013" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "fer2013" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is not as the run wrote it"):
        named_weights("fer2013")


def test_images_are_normalised_as_the_weights_want_it():
    learn = baseline_learner(loaders(channels=3), pretrained="imagenet")
    (norm,) = [t for t in learn.dls.after_batch.fs if hasattr(t, "mean")]
    assert norm.mean.flatten().tolist() == [0.5] * 3 and norm.std.flatten().tolist() == [0.5] * 3


def test_a_missing_extra_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr("ecan_fastai.weights.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs the extra: pip install "ecan_fastai\[imagenet\]"'):
        named_weights("imagenet")
    assert not available().loc["imagenet", "installed"]


def test_a_run_in_a_folder_of_the_name_of_weights_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fer2013").mkdir()  # of images, perhaps
    assert weights_settings("fer2013")["arch"] == "resnet18_cifar"
    (tmp_path / "fer2013" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="a run is in a folder of this name here: give ./fer2013 for the run"):
        weights_settings("fer2013")
    assert weights_settings("./fer2013") == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no shipped model 'vgg'"):
        shipped_run("vgg")


def test_the_card_holds_what_the_records_say():
    written, metrics = (json.loads((shipped_run() / f"{name}.json").read_text()) for name in ("config", "metrics"))
    card = model_card(written, metrics)
    measured = metrics["splits"]["PrivateTest"]
    assert f"{100 * measured['accuracy']:.2f}" in card and f"{100 * measured['ten_crops_accuracy']:.2f}" in card
    for name, m in measured["per_class"].items():
        assert f"| PrivateTest | {name} | {m['n']} | {100 * m['precision']:.2f} | {100 * m['recall']:.2f}" in card
    assert card == (shipped_run() / "card.md").read_text()


def test_a_card_names_the_terms_of_the_weights_that_training_started_from():
    written, metrics = (read_json(shipped_run() / f"{name}.json") for name in ("config", "metrics"))
    terms = {}
    ferplus = {**written["config"], "kind": "ferplus", "pretrained": None}  # FER2013's images with other labels
    assert "FER2013's images were collected" in model_card({**written, "config": ferplus}, metrics)
    for start in (None, "fer2013", "/a/run"):
        config = {**written["config"], "kind": "folder", "pretrained": start}
        terms[start] = re.search(r"\*\*Terms:\*\* (.*)", model_card({**written, "config": config}, metrics))[1]
    assert "started from" not in terms[None] and "FER2013" not in terms[None]
    started = "The terms of the weights that it started from hold, too."
    assert terms["/a/run"] == f"{terms[None]} {started}"
    assert terms["fer2013"].startswith(f"{terms['/a/run']} FER2013's images were collected from the web")


def test_statistics_of_named_weights():
    "ImageNet's are those of timm's own weights of this architecture"
    cfg = timm.get_pretrained_cfg(weights_settings("imagenet")["arch"])
    assert weights_stats("imagenet") == (list(cfg.mean), list(cfg.std)) == ([0.5] * 3, [0.5] * 3)
    assert weights_stats("fer2013") == weights_stats(shipped_run()) == ([0.5], [0.25])


def test_a_card_shows_the_classes_of_valid_where_there_is_no_other_split_and_any_name_of_a_class():
    written = read_json(shipped_run() / "config.json")
    measured = read_json(shipped_run() / "metrics.json")
    split = next(iter(measured["splits"].values()))
    split = {**split, "per_class": {"a|b": next(iter(split["per_class"].values()))}}
    one = model_card(written, {**measured, "splits": dict(valid=split)})
    assert "| valid | a\\|b | " in one
    two = model_card(written, {**measured, "splits": dict(valid=split, valid_b=split)})
    assert "| valid | a" not in two and "| valid_b | a\\|b | " in two
    table = one.partition("## By class")[2].strip().splitlines()[1:]
    assert len({re.sub(r"\\\|", "", line).count("|") for line in table if line}) == 1


def test_settings_of_weights():
    assert (
        weights_settings("fer2013")
        == weights_settings(shipped_run())
        == dict(arch="resnet18_cifar", size=48, channels=1, recipe="fer2013")
    )
    assert weights_settings("some.pth") == {} and weights_stats("some.pth") is None
