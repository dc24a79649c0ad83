import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from ecan_fastai.config import (
    GROUPS,
    METHODS,
    PRESETS,
    TUNED,
    UNUSED,
    RunConfig,
    default_text,
    help_text,
    means_sample,
)
from ecan_fastai.experiments import planned_runs
from ecan_fastai.runs import resolve_config


def by_name():
    return {f.name: f for f in fields(RunConfig)}


def test_every_setting_is_described_once():
    for f in fields(RunConfig):
        assert f.metadata["group"] in GROUPS and len(f.metadata["help"]) > 10
        assert set(f.metadata["methods"]) <= set(METHODS) and "ecan" in f.metadata["methods"]
        line = f"    {f.name}: {help_text(f)}"
        assert RunConfig.__doc__.count(line) == 1
    assert {f.metadata["group"] for f in fields(RunConfig)} == set(GROUPS)
    texts = [f.metadata["help"] for f in fields(RunConfig)]
    assert len(set(texts)) == len(texts)


def test_presets_are_these():
    "The paper's for FER2013 and RAF-DB's for other data; a change here changes what finished runs and records mean"
    fer2013 = dict(size=48, channels=1, recipe="fer2013", level="strong", epochs=200, opt="paper", momentum=0.999)
    assert PRESETS == dict(
        sample=dict(size=48, channels=1, recipe="fer2013", level="weak", epochs=12, bs=32, opt="adam", momentum=0.99),
        fer2013=fer2013,
        ferplus=fer2013,
        ckplus={**fer2013, "epochs": 40},
        other={**fer2013, "size": 224, "channels": 3, "recipe": "rafdb", "epochs": 40},
    )
    tuned = dict(arch="resnet18_cifar", epochs=40, momentum=0.99, center_features=True)
    assert TUNED == dict(fer2013=tuned, ferplus=tuned)


@pytest.mark.parametrize(
    "kind,settings,expected",
    [
        ("ckplus", {}, dict(epochs=40, size=48, l2=0.7, arch="resnet18")),
        ("expw", {}, dict(epochs=40, size=224, channels=3, recipe="rafdb")),
        ("folder", dict(method="center"), dict(l2=0.003, l1=None, bank_groups=None)),
        ("ferplus", dict(preset="tuned"), dict(epochs=40, momentum=0.99, center_features=True)),
        ("ferplus", dict(preset="tuned", method="baseline"), dict(momentum=None, center_features=None)),
    ],
)
def test_resolve_fills_in_the_preset(kind, settings, expected):
    cfg = RunConfig("x", kind, **settings).resolve()
    assert {k: getattr(cfg, k) for k in expected} == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_configuration_is_resolved_again_to_itself(method):
    once = RunConfig("x", "fer2013", method).resolve()
    assert asdict(RunConfig(**asdict(once)).resolve()) == asdict(once)


def test_settings_that_differ_from_those_of_a_run():
    asked = RunConfig("x", "fer2013", lr=0.3).resolve()
    made = asdict(asked)
    assert asked.differs(made) is None
    older = {k: v for k, v in made.items() if k not in ("small_pct", "center_features")}  # newer than the run
    assert asked.differs(older) is None
    assert replace(asked, center_features=True).differs(older) == "center_features"
    assert asked.differs({**made, "epochs": 3}) == "epochs" and asked.differs({**made, "data": "y"}, ("data",)) is None
    assert replace(asked, lr=None, precision="auto").differs({**made, "lr": 0.1, "precision": "bf16"}) is None


def test_defaults_in_the_help_are_those_of_resolve():
    "The numbers that stand in the help are what a configuration of that kind gets"
    for name in ("epochs", "size", "channels", "level", "recipe", "opt", "momentum"):
        text = default_text(by_name()[name])
        other, *rest = re.sub(r"^default |; \S+ with preset tuned", "", text).split("; ")
        for kind in ("folder", "sample", "fer2013", "ferplus", "ckplus"):
            said = next((part.split(" for ")[0] for part in rest if kind in part.split(" for ")[1].split(", ")), other)
            cfg = RunConfig("sample" if kind == "sample" else "x", kind).resolve()
            assert said == str(getattr(cfg, name)), (name, kind, text)
    assert default_text(by_name()["l2"]) == "default 0.7; 0.003 with method center"
    assert default_text(by_name()["bs"]) == "default 32 for sample"
    assert default_text(by_name()["lr"]) == "" and default_text(by_name()["data"]) == ""


def test_unused_settings_follow_from_the_methods():
    for f in fields(RunConfig):
        assert {m for m in METHODS if f.name not in UNUSED[m]} == set(f.metadata["methods"])
    assert UNUSED["ecan"] == () and "momentum" in UNUSED["baseline"] and {"momentum", "key_eval"} <= {*UNUSED["center"]}


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(kind="zip"), "unknown kind 'zip', expected one of auto, sample, fer2013"),
        (dict(method="mixup"), "unknown method 'mixup', expected one of ecan, baseline"),
        (dict(channels=2), "unknown channels 2, expected one of 1, 3"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(bs=1), "bs must be at least 2, got 1"),
        (dict(lr=0.0), "lr must be above 0, got 0.0"),
        (dict(lr=float("nan")), "lr must be above 0, got nan"),
        (dict(lr=float("inf")), "lr must be above 0, got inf"),
        (dict(wd=-1e-9), "wd must be 0 or more"),
        (dict(size=7), "size must be at least 8 pixels, got 7"),
        (dict(small_size=4), "small_size must be 0 for none, or at least 8 pixels, got 4"),
        (dict(small_size=24, small_pct=1.5), "small_pct must be above 0, at most 1, got 1.5"),
        (dict(small_size=24, small_pct=0.0), "small_pct must be above 0, at most 1, got 0.0"),
        (dict(small_pct=0.5), "small_pct has no effect without small_size"),
        (dict(l1=1.01), "l1 must be between 0 and 1, got 1.01"),
        (dict(l2=-0.1), "l2 must be 0 or more"),
        (dict(n_groups=0), "n_groups must be at least 1"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(momentum=1.0), "momentum must be from 0 to below 1, got 1.0"),
        (dict(bank_groups=0), "bank_groups must be at least 1"),
        (dict(label_smoothing=1.2), "label_smoothing must be between 0 and 1"),
        (dict(valid_pct=1.0), "valid_pct must be above 0 and below 1, got 1.0"),
        (dict(seed=-1), "seed must be 0 or more, got -1"),
        (dict(workers=-1), "workers must be 0 or more"),
        (dict(epochs=True), "epochs must be of type int, got True"),
        (dict(lr=False), "lr must be of type float, got False"),
        (dict(epochs="3"), "epochs must be of type int, got '3'"),
        (dict(epochs=3.0), "epochs must be of type int, got 3.0"),
        (dict(seed=np.int64(3)), "seed must be of type int"),
        (dict(balance="positives", method="center"), "which method center does not have"),
        (dict(balance="positives", l1=0.0), "whose share l1 is 0"),
        (dict(kind="sample"), "kind sample draws its own faces and takes no data, got x"),
    ],
)
def test_a_wrong_value_is_named(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        RunConfig("x", **settings)


def test_the_ends_of_the_ranges_are_allowed():
    RunConfig("x", epochs=1, bs=2, wd=0, size=8, small_size=8, small_pct=1, l1=1, l2=0, momentum=0, seed=0, workers=0)
    RunConfig("x", lr=1, label_smoothing=1, n_groups=1, bank_groups=1, valid_pct=0.001, temperature=1e-9)


@pytest.mark.parametrize("folder", [True, False])
def test_data_called_sample_is_not_passed_over(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert means_sample("sample") and not means_sample("faces")
    assert RunConfig("sample").resolve().kind == "sample"
    (tmp_path / "sample").symlink_to(tmp_path) if folder else (tmp_path / "sample").write_text("image,label")
    for resolve in (lambda cfg: cfg.resolve(), resolve_config, lambda cfg: planned_runs("affinity", cfg.data)):
        with pytest.raises(ValueError, match="write its full path to use it, or give it another name to draw faces"):
            resolve(RunConfig("sample"))
    assert RunConfig("sample", "sample").resolve().kind == "sample"
    assert RunConfig(tmp_path / "sample", "folder").resolve().kind == "folder"


def test_paths_become_text(tmp_path):
    cfg = RunConfig(tmp_path, pretrained=tmp_path / "a.pth")
    assert (cfg.data, cfg.pretrained) == (str(tmp_path), str(tmp_path / "a.pth"))


def test_the_order_of_the_fields_is_kept():
    "Runs are found by names whose parts stand in this order"
    order = """data kind method preset arch pretrained epochs bs lr wd opt schedule size channels level recipe
        small_size small_pct all_crops eval_crops l1 l2 n_groups temperature momentum bank_groups affinity_reduction
        normalize_compact anchors_only center_features label_smoothing key_eval balance valid_pct train_all skip_broken
        seed precision workers watch_tests"""
    assert list(asdict(RunConfig("x"))) == order.split()
