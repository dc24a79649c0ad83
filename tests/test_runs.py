import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner, load_learner
from safetensors.torch import load_file
from small_runs import small_config

from ecan_fastai import runfiles, runresults, runs
from ecan_fastai.callbacks import CPUMixedPrecision
from ecan_fastai.cli import ecan_train
from ecan_fastai.config import METHODS, TUNED, RunConfig
from ecan_fastai.data import default_workers
from ecan_fastai.inference import Predictor
from ecan_fastai.layers import fast_precision
from ecan_fastai.metrics import calibration_error, fit_temperature, split_metrics
from ecan_fastai.model import FaceClassifier
from ecan_fastai.runs import resume_run, start_run


def config(faces, method="ecan", **settings):
    return small_config(faces, method, **{"kind": "folder", "epochs": 2, **settings})


def fails(capsys, *args):
    "What `ecan_train` says on its way out"
    with pytest.raises(SystemExit) as e:
        ecan_train(list(map(str, args)))
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "Traceback" not in said
    return said


@pytest.mark.slow
def test_a_run_is_calibrated_on_valid_and_its_card_says_so(faces, tmp_path):
    record, run = start_run(config(faces), tmp_path / "run"), tmp_path / "run"
    about = json.loads((run / "config.json").read_text())["about"]
    predictor = Predictor(run)
    files = sorted((faces / "test").glob("*/*.png"))
    logits, probabilities = predictor.logits(files).mean(1), predictor.probabilities(files)
    assert np.allclose(probabilities, (logits / about["temperature"]).softmax(-1).numpy(), atol=1e-6)
    targets = [predictor.vocab.index(f.parent.name) for f in files]
    measured = record["splits"]["test"]
    assert measured["calibrated_error"] == pytest.approx(calibration_error(probabilities, targets), abs=1e-3)
    assert measured["calibration_error"] == pytest.approx(calibration_error(logits.softmax(-1), targets), abs=1e-3)
    assert about["calibrated_on"] == "valid" and "calibrated_error" not in record["splits"]["valid"]
    valid = pd.read_csv(run / "predictions_valid.csv")
    rows = [predictor.vocab.index(v) for v in valid["label"]]
    assert fit_temperature(np.log(valid[predictor.columns].clip(1e-5)), rows) == pytest.approx(1, rel=0.02)
    card = (run / "card.md").read_text()
    assert f"fitted on valid ({len(valid)} images)" in card and f"{100 * measured['accuracy']:.2f}" in card


def logits_of(right, scale=1.0):
    "Logits of two classes, as many as `right`, and the targets"
    targets = np.arange(len(right)) % 2
    sure = scale * (2 * np.array(right) - 1)
    return torch.tensor(np.stack([np.where(targets == 0, sure, 0), np.where(targets == 1, sure, 0)], 1)), targets


@pytest.mark.parametrize(
    "right,scale,fitted",
    [
        ([True] * 30 + [False] * 10, 2.0, True),
        ([True] * 4, 2.0, False),  # all right: any lower temperature is better
        ([False] * 3 + [True], 2.0, False),  # mostly wrong: the highest one is
        ([True] * 99 + [False], 0.5, True),
    ],
)
def test_a_temperature_at_an_end_of_its_range_is_no_calibration(right, scale, fitted):
    logits, targets = logits_of(right, scale)
    metrics: dict = dict(valid={}, test={})
    found = runresults._calibrate(dict(valid=(logits, targets, None), test=(logits, targets, None)), metrics)
    assert bool(found) == fitted == ("calibrated_error" in metrics["test"])
    if fitted:
        assert found["calibrated_on"] == "valid" and 0.06 < found["temperature"] < 19


def test_a_run_starts_with_the_settings_of_the_run_whose_weights_it_takes(run, faces):
    first = json.loads((run / "config.json").read_text())["config"]
    for pretrained in (run, run / "model.safetensors"):
        cfg = runs.resolve_config(RunConfig(str(faces), "folder", "baseline", pretrained=pretrained))
        for name in ("arch", "size", "channels", "recipe"):
            assert getattr(cfg, name) == first[name] != getattr(RunConfig("x", "folder").resolve(), name)
    cfg = runs.resolve_config(RunConfig(str(faces), "folder", "baseline", pretrained=run, size=40))
    assert (cfg.size, cfg.channels) == (40, 1)


@pytest.mark.slow
def test_a_run_that_trained_on_valid_is_not_calibrated(faces, tmp_path):
    start_run(config(faces, train_all=True), tmp_path / "run")
    assert Predictor(tmp_path / "run").model.temperature == 1
    assert "not calibrated" in (tmp_path / "run" / "card.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_holds_everything(faces, tmp_path, method):
    record = start_run(config(faces, method=method), tmp_path / "run")
    out = tmp_path / "run"
    assert {f.name for f in out.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "predictions_valid.csv",
        "predictions_test.csv",
        "confusion_valid.png",
        "confusion_test.png",
        "curves.png",
        "model.safetensors",
        "export.pkl",
        "checkpoint.pth",
        "data.csv.gz",
        "card.md",
        "SHA256SUMS",
    }
    assert record == json.loads((out / "metrics.json").read_text()) and set(record["splits"]) == {"valid", "test"}
    about = json.loads((out / "config.json").read_text())
    cosines = ["cos_within", "cos_between"]
    parts = dict(
        ecan=["ce", "ensc", "mva", "alpha", *cosines],
        baseline=[],
        center=["ce", "center"],
        supcon=["ce", "supcon", *cosines],
        ensc=["ce", "ensc", *cosines],
    )[method]
    history = pd.read_csv(out / "history.csv")
    assert list(history.columns) == [
        "epoch",
        "train_loss",
        "valid_loss",
        "accuracy",
        "balanced_accuracy_score",
        "f1_score",
        *parts,
        "seconds",
    ] and list(history.epoch) == [0, 1]
    if method == "ecan":
        first, last = history["alpha"]
        assert record["alpha"] == pytest.approx(dict(first=first, last=last, highest=max(first, last)), rel=1e-6)
    assert ("alpha" in record) == (method == "ecan")
    assert ("mean_cosines" in record) == (method in ("ecan", "supcon", "ensc"))
    if "mean_cosines" in record:
        assert record["mean_cosines"]["within"]["last"] == history["cos_within"].iloc[-1]
    assert about["config"]["precision"] == fast_precision("cpu") and about["config"]["precision"] != "auto"
    # predictions, metrics, weights and exported learner agree
    table = pd.read_csv(out / "predictions_test.csv")
    vocab = about["about"]["vocab"]
    probs = table[[f"p_{v}" for v in vocab]].to_numpy()
    y, p = [vocab.index(l) for l in table.label], [vocab.index(l) for l in table.predicted]
    assert list(probs.argmax(1)) == p and all(l in f for l, f in zip(table.label, table.image))
    m = {
        k: v
        for k, v in record["splits"]["test"].items()
        if k not in ("per_class", "eval_crops", "key_encoder_accuracy", "calibration_error", "calibrated_error")
    }
    assert m == pytest.approx(split_metrics(y, p, vocab))
    model = FaceClassifier.create("resnet10t", 7, 1)
    model.load_state_dict(load_file(out / "model.safetensors"))
    plain = load_learner(out / "export.pkl")
    for a, b in zip(model.encoder.state_dict().values(), plain.model.encoder.state_dict().values()):
        assert torch.equal(a, b)
    assert np.allclose(plain.predict(table.image[0])[2], probs[0], atol=1e-4)  # calibrated, too


@pytest.mark.slow
def test_same_seed_same_run(faces, tmp_path):
    a, b, c = [
        start_run(config(faces, seed=s, epochs=1), tmp_path / k)["splits"] for k, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert a == b != c


def start_and_stop(cfg, out, monkeypatch):
    "A run that is interrupted after its second epoch"

    class Stop(runs.RunState):
        def after_epoch(self):
            super().after_epoch()
            if self.epoch == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(runs, "RunState", Stop)
        with pytest.raises(KeyboardInterrupt):
            start_run(cfg, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(workers=0),
        dict(workers=2, schedule="cosine"),
        dict(workers=0, balance="sampler", precision="bf16", size=24, level="weak"),
        dict(workers=2, balance="positives", key_eval=True, watch_tests=True),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(faces, tmp_path, monkeypatch, options):
    cfg = lambda: config(faces, epochs=4, **{"level": "strong", "size": 36, **options})
    whole = start_run(cfg(), tmp_path / "whole")
    start_and_stop(cfg(), tmp_path / "cut", monkeypatch)
    assert not (tmp_path / "cut" / "metrics.json").exists() and len(pd.read_csv(tmp_path / "cut" / "history.csv")) == 2
    torch.manual_seed(99), np.random.seed(99)
    resumed = resume_run(tmp_path / "cut")
    assert resumed["splits"] == whole["splits"]
    drop = lambda p: pd.read_csv(p / "history.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(drop(tmp_path / "cut"), drop(tmp_path / "whole"))
    a, b = [torch.load(tmp_path / k / "checkpoint.pth", weights_only=True)["model"] for k in ("cut", "whole")]
    assert all(torch.equal(a[k], b[k]) for k in a) and int(a["bank.filled"]) == len(a["bank.z"])


@pytest.mark.slow
def test_a_checkpoint_is_read_onto_the_device_of_the_data(faces, tmp_path):
    start_run(config(faces, epochs=1), tmp_path)
    state = runs._read_checkpoint(tmp_path, torch.device("meta"))  # stands in for a GPU
    assert (
        {t.device.type for s in state["opt"]["state"] for t in s.values() if torch.is_tensor(t)}
        == {t.device.type for t in state["model"].values()}
        == {"meta"}
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_is_resumed_on_a_gpu(faces, tmp_path, monkeypatch, precision):
    start_and_stop(config(faces, epochs=3, precision=precision), tmp_path, monkeypatch)
    assert resume_run(tmp_path)["epochs"] == 3


@pytest.mark.slow
def test_a_resumed_run_keeps_the_statistics_of_its_weights(faces, tmp_path, monkeypatch):
    import timm

    create, seen = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda arch, pretrained=False, **kw: create(arch, pretrained=False, **kw))
    cfg = config(faces, method="baseline", arch="tf_efficientnet_lite0", pretrained=True)
    monkeypatch.setattr(
        runs.RunState,
        "after_epoch",
        lambda self, f=runs.RunState.after_epoch: (
            f(self),
            self.epoch == 0 and not seen and (_ for _ in ()).throw(KeyboardInterrupt),
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        start_run(cfg, tmp_path / "run")
    mean = json.loads((tmp_path / "run" / "config.json").read_text())["about"]["mean"]
    learner = runs.run_learner

    def look(cfg, dls, out):
        seen.append([t.mean.item() for dl in dls.loaders for t in dl.after_batch.fs if hasattr(t, "mean")])
        return learner(cfg, dls, out)

    monkeypatch.setattr(runs, "run_learner", look)
    resume_run(tmp_path / "run")
    expected = create("tf_efficientnet_lite0").pretrained_cfg["mean"]
    assert mean == pytest.approx([sum(expected) / 3]) and seen == [pytest.approx(mean * len(seen[0]))]


@pytest.mark.slow
def test_a_run_stopped_after_its_last_checkpoint_keeps_its_history(faces, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(runs, "write_results", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start_run(config(faces, epochs=1), tmp_path)
    (tmp_path / "history.csv").unlink()
    resume_run(tmp_path)
    assert list(pd.read_csv(tmp_path / "history.csv").epoch) == [0]


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_says_so(faces, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(runs, "write_results", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        m.setattr(runresults, "package_commit", lambda: "a")
        with pytest.raises(KeyboardInterrupt):
            start_run(config(faces, epochs=1), tmp_path)
        m.setattr(runresults, "package_commit", lambda: "b")
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                resume_run(tmp_path)
    monkeypatch.setattr(runresults, "package_commit", lambda: "c")
    record = resume_run(tmp_path)
    assert [e["commit"] for e in [record["environment"], *record["resumed"]]] == ["a", "b", "c"] and record[
        "environment"
    ]["device"] not in ("cpu: x86_64", "cpu: ")


@pytest.mark.parametrize(
    "options,where",
    [
        (dict(l1=0.3), lambda l: l.loss_func.l1),
        (dict(l2=0.4), lambda l: l.loss_func.l2),
        (dict(n_groups=3), lambda l: l.loss_func.n_groups),
        (dict(temperature=0.3), lambda l: l.loss_func.contrast_loss.temperature),
        (dict(affinity_reduction="sum"), lambda l: l.loss_func.reading.affinity_reduction),
        (dict(normalize_compact=True), lambda l: l.loss_func.reading.normalize_compact),
        (dict(anchors_only=True), lambda l: l.loss_func.reading.anchors_only),
        (dict(key_eval=True), lambda l: l.model.key_eval),
        (dict(momentum=0.7), lambda l: l.momentum_update.momentum),
        (dict(bank_groups=3), lambda l: l.model.bank.size / l.dls.bs),
        (dict(lr=0.03), lambda l: l.lr),
        (dict(wd=0.02), lambda l: l.wd),
        (dict(center_features=True), lambda l: l.loss_func.center_features),
        (dict(label_smoothing=0.2), lambda l: l.loss_func.label_smoothing),
        (dict(method="baseline", label_smoothing=0.2), lambda l: l.loss_func.func.label_smoothing),
        (dict(small_size=24, small_pct=0.5), lambda l: l.progressive_resize.pct),
        (
            dict(precision="bf16"),
            lambda l: (
                isinstance(l.mixed_precision, CPUMixedPrecision) == (l.dls.device.type == "cpu")
                and l.mixed_precision.amp_mode.value
            ),
        ),
        (dict(arch="resnet10t"), lambda l: l.model.encoder.default_cfg["architecture"]),
        (dict(method="supcon", temperature=0.3), lambda l: l.loss_func.contrast_loss.temperature),
        (dict(method="center", l2=0.1), lambda l: l.loss_func.l2),
    ],
)
def test_settings_arrive(faces, tmp_path, options, where):
    cfg = config(faces, **options).resolve()
    assert where(runs.run_learner(cfg, runs.run_loaders(cfg, tmp_path), tmp_path)) == list(options.values())[-1]


def test_settings_of_the_data_arrive(faces, tmp_path):
    def loaders(data=faces, **options):
        return runs.run_loaders(config(data, **options).resolve(), tmp_path)

    n = len(loaders(valid_pct=0.2).train_ds) + len(loaders(valid_pct=0.2).valid_ds)
    for pct in (0.1, 0.3):
        assert len(loaders(valid_pct=pct).valid_ds) == pytest.approx(pct * n, abs=3)
    x, _ = loaders(all_crops=True, level="strong", size=48, bs=8).one_batch()
    assert x[0].shape == x[1].shape == (8, 5, 1, 40, 40)
    broken = shutil.copytree(faces, tmp_path / "broken")
    (broken / "train" / "happy" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png"):
        loaders(broken)
    with pytest.warns(UserWarning, match="broken.png"):
        dls = loaders(broken, skip_broken=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == n


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_the_schedule_is_the_one_that_was_asked_for(faces, tmp_path, monkeypatch, schedule):
    called = []
    for name in ("fit_one_cycle", "fit_cosine"):
        monkeypatch.setattr(Learner, name, lambda *args, name=name, **kwargs: called.append(name))
    monkeypatch.setattr(runs, "write_results", lambda *args: None)
    start_run(config(faces, schedule=schedule, method="baseline"), tmp_path / "run")
    assert called == ["fit_cosine" if schedule == "cosine" else "fit_one_cycle"]


@pytest.mark.parametrize(
    "options,said",
    [
        (
            dict(small_size=48, size=48),
            "small_size must be below the 48 pixels that the network sees .size 48, level weak",
        ),
        (
            dict(small_size=40, size=48, level="strong"),
            "below the 40 pixels that the network sees .size 48, level strong",
        ),
        (dict(small_size=24, epochs=1), "small_pct 0.75 of the epochs .1. is less than one epoch"),
        (
            dict(small_size=24, method="baseline", arch="vit_tiny_patch16_224", size=224),
            r"small_size 24: vit_tiny_patch16_224 does not take images of shape \(1, 24, 24\)",
        ),
    ],
)
def test_small_images_that_do_nothing_or_fit_no_model_are_refused_before_training(faces, tmp_path, options, said):
    cfg = config(faces, **options).resolve()
    with pytest.raises(ValueError, match=said):
        start_run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_five_crops_is_measured_over_ten_too(faces, tmp_path):
    one, ten = [
        start_run(config(faces, epochs=1, level="strong", size=48, eval_crops=c), tmp_path / c)["splits"]["test"]
        for c in ("center", "ten")
    ]
    assert one["ten_crops_accuracy"] == ten["accuracy"] and "ten_crops_accuracy" not in ten
    center = Predictor(tmp_path / "center", "center")
    assert one["accuracy"] == pytest.approx(center.evaluate(faces)["splits"]["test"]["accuracy"])
    classifier = center.model.classifier
    state = torch.load(tmp_path / "center" / "checkpoint.pth", weights_only=True)["model"]
    classifier.encoder.load_state_dict(
        {k.removeprefix("key_encoder."): v for k, v in state.items() if k.startswith("key_encoder.")}
    )
    keys = center.evaluate(faces)["splits"]["test"]["accuracy"]
    assert one["key_encoder_accuracy"] == pytest.approx(keys)
    assert "ten_crops_accuracy" not in start_run(config(faces, epochs=1), tmp_path / "weak")["splits"]["test"]


def test_weights_to_start_from_are_found_from_any_folder(faces, tmp_path, monkeypatch):
    torch.save(FaceClassifier.create("resnet10t", 7, 1).encoder.state_dict(), tmp_path / "w.pth")
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        m.setattr(runs, "_train", lambda learn, cfg, out, state: cfg.pretrained)
        assert start_run(config(faces, "baseline", pretrained="w.pth"), Path("run")) == str(tmp_path / "w.pth")
    monkeypatch.setattr(runs, "_train", lambda learn, cfg, out, state: learn.model.encoder.state_dict())
    started = resume_run(tmp_path / "run")
    assert all(torch.equal(v, started[k]) for k, v in torch.load(tmp_path / "w.pth", weights_only=True).items())


@pytest.mark.slow
def test_pictures_from_a_table_and_an_architecture_of_this_package_go_the_whole_way(tmp_path):
    "fer2013.csv holds pixels instead of files"
    g = np.random.default_rng(0)
    rows = [
        (i % 7, " ".join(map(str, g.integers(0, 256, 48 * 48))), usage)
        for usage, n in (("Training", 70), ("PublicTest", 14), ("PrivateTest", 14))
        for i in range(n)
    ]
    pd.DataFrame(rows, columns=["emotion", "pixels", "Usage"]).to_csv(tmp_path / "fer2013.csv", index=False)
    splits = start_run(
        RunConfig(str(tmp_path / "fer2013.csv"), method="baseline", arch="resnet18_cifar", epochs=1, bs=8, workers=0),
        tmp_path / "run",
    )["splits"]
    assert {0 <= m["ten_crops_accuracy"] <= 1 for m in splits.values()} == {True} and set(splits) == {
        "valid",
        "PublicTest",
        "PrivateTest",
    }
    assert Predictor(tmp_path / "run").model.classifier.encoder.conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    "method,terms",
    [
        ("ecan", ["ensc", "mva", 0.2, 0.7]),
        ("ensc", ["ensc", "mva", 0.2, 0]),
        ("supcon", ["supcon", "mva", 0.2, 0]),
        ("center", ["ensc", "center", 0, 0.003]),
    ],
)
def test_methods_are_the_rows_of_table_3(faces, tmp_path, method, terms):
    cfg = config(faces, method=method).resolve()
    loss = runs.run_learner(cfg, runs.run_loaders(cfg, tmp_path), tmp_path).loss_func
    assert [loss.contrast, loss.compact, loss.l1, loss.l2] == terms


def test_a_setting_that_decides_nothing_is_told_and_not_recorded():
    with pytest.warns(UserWarning, match="l1 has no effect with method center; ignored"):
        cfg = RunConfig("x", "folder", "center", l1=0.5).resolve()
    assert cfg.l1 is None and cfg.temperature is None and cfg.l2 == 0.003
    for method in ("center", "baseline"):
        with pytest.warns(UserWarning, match=f"anchors_only has no effect with method {method}"):
            assert RunConfig("x", "folder", method, anchors_only=True).resolve().anchors_only is None


@pytest.mark.slow
def test_a_run_cut_before_its_first_checkpoint_starts_over(faces, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(runs, "_train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start_run(config(faces, epochs=1), tmp_path / "run")
    assert resume_run(tmp_path / "run")["splits"] == start_run(config(faces, epochs=1), tmp_path / "other")["splits"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is_and_says_how_to_go_on(faces, tmp_path):
    out = tmp_path / "run"
    cmd = [
        sys.executable,
        "-c",
        "from ecan_fastai.cli import ecan_train; ecan_train()",
        str(faces),
        "--out",
        str(out),
        "--epochs",
        "500",
        "--bs",
        "16",
        "--size",
        "32",
        "--channels",
        "1",
        "--level",
        "weak",
        "--opt",
        "adam",
        "--momentum",
        "0.9",
        "--workers",
        "0",
    ]
    process = subprocess.Popen(
        cmd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    try:
        for _ in range(1200):
            if (out / "history.csv").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and f"--resume {out}" in stderr and "Traceback" not in stderr
    assert len(pd.read_csv(out / "history.csv")) == torch.load(out / "checkpoint.pth", weights_only=True)["epochs"] >= 1


@pytest.mark.slow
def test_what_was_not_given_is_written_down(faces, tmp_path):
    cfg = config(faces, epochs=1, bs=None, workers=None, level=None, recipe=None, size=32)
    start_run(cfg, tmp_path / "run")
    assert cfg == config(faces, epochs=1, bs=None, workers=None, level=None, recipe=None, size=32)  # may be used again
    written = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (
        all(v is not None for v in written.values())
        and written["workers"] == default_workers()
        and written["recipe"] == "rafdb"
        and written["level"] == "strong"
    )


def test_presets():
    assert {
        k: getattr(RunConfig("sample").resolve(), k) for k in ("kind", "epochs", "bs", "size", "opt", "level")
    } == dict(kind="sample", epochs=12, bs=32, size=48, opt="adam", level="weak")
    fer = RunConfig("x", kind="fer2013").resolve()
    assert (fer.epochs, fer.level, fer.recipe, fer.opt, fer.momentum, fer.l1, fer.l2, fer.n_groups) == (
        200,
        "strong",
        "fer2013",
        "paper",
        0.999,
        0.2,
        0.7,
        5,
    )
    assert (
        RunConfig("x", kind="folder").resolve().epochs == 40
        and RunConfig("x", kind="folder", method="center").resolve().l2 == 0.003
    )


def test_the_tuned_preset_gives_way_to_what_is_typed():
    tuned = RunConfig("x", "fer2013", preset="tuned").resolve()
    assert {k: getattr(tuned, k) for k in TUNED["fer2013"]} == TUNED["fer2013"]
    typed = RunConfig("x", "fer2013", preset="tuned", arch="resnet18", center_features=False, epochs=3).resolve()
    assert (typed.arch, typed.center_features, typed.epochs, typed.level) == ("resnet18", False, 3, tuned.level)
    paper = RunConfig("x", "fer2013").resolve()
    assert (paper.arch, paper.center_features, paper.label_smoothing, paper.epochs) == ("resnet18", False, 0, 200)
    with pytest.raises(
        ValueError, match="preset tuned is for data of kind fer2013 or ferplus, and x is of kind folder"
    ):
        RunConfig("x", "folder", preset="tuned").resolve()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(arch="resnet81"), "timm has no model 'resnet81'"),
        (dict(pretrained="best.pth"), "no such file: .*best.pth"),
        (dict(pretrained="."), "is not the folder of a finished run: no model.safetensors in it"),
    ],
)
def test_wrong_networks_are_told_before_images_are_read(faces, tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run_loaders", lambda *args: pytest.fail("images are read"))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        start_run(config(faces, **wrong), tmp_path / "run")


def test_batch_size_and_rate_follow_the_data(faces, tmp_path):
    cfg = config(faces, bs=None, opt="paper").resolve()
    dls = runs.run_loaders(cfg, tmp_path)
    runs.run_learner(cfg, dls, tmp_path)
    assert cfg.bs == dls.bs == 8 and cfg.lr == pytest.approx(0.1 * 8 / 256) and cfg.wd == 5e-4


@pytest.mark.parametrize(
    "settings,lr",
    [({}, 0.3 * 8 / 256), (dict(opt="adam"), 2e-3), (dict(lr=0.05), 0.05), (dict(preset="paper"), 0.1 / 32)],
)
def test_the_rate_of_the_tuned_preset(faces, tmp_path, settings, lr):
    loaders = runs.run_loaders(config(faces, bs=8).resolve(), tmp_path)
    cfg = config(faces, **{**dict(opt="paper", preset="tuned", kind="fer2013"), **settings}).resolve()
    runs.run_learner(cfg, loaders, tmp_path)
    assert cfg.lr == pytest.approx(lr)


def test_a_pretrained_encoder_is_trained_too(faces, tmp_path, monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda arch, pretrained, **kw: create(arch, pretrained=False, **kw))
    for method in ("ecan", "baseline"):
        cfg = config(faces, method=method, pretrained=True).resolve()
        learn = runs.run_learner(cfg, runs.run_loaders(cfg, tmp_path), tmp_path)
        assert learn.model.encoder.conv1[0].weight.requires_grad


def test_a_run_prints_its_data_model_and_steps_first(faces, tmp_path, capsys):
    start_run(config(faces, method="baseline", epochs=1, level="strong", size=48, train_all=True), tmp_path / "run")
    said, history = capsys.readouterr().out.splitlines(), pd.read_csv(tmp_path / "run" / "history.csv")
    n = len(list((faces / "train").glob("*/*")))
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert said[0].startswith(f"folder: train {n}, valid_seen ") and said[0].endswith(
        " images; grey, 48x48 pixels, views of 40x40"
    )
    assert said[1] == (
        f"baseline, {cfg['arch']}: epochs 0 to 0, {n // cfg['bs']} steps each, {cfg['bs']} images a step, "
        f"{cfg['precision']} on cpu"
    )
    assert said[2].startswith("epoch 0  train_loss") and len(history) == 1


@pytest.mark.slow
def test_short_runs_are_told(faces, tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"5 steps are few for a key encoder of momentum 0.999, which averages over about 1000 steps: 100 % of it",
    ):
        start_run(config(faces, epochs=1, momentum=0.999), tmp_path / "run")


def test_mistakes_are_one_sentence(faces, tmp_path, capsys):
    run = tmp_path / "old"
    run.mkdir(), (run / "config.json").write_text("{}")
    assert (
        fails(capsys, faces, "--out", run) == f"ecan_train: error: {run} already holds a run: "
        f"give another folder with --out, or resume it with --resume {run}"
    )
    (run / "metrics.json").write_text("{}")
    assert (
        fails(capsys, faces, "--out", run)
        == f"ecan_train: error: {run} already holds a finished run: give another folder with --out"
    )
    assert fails(capsys, tmp_path / "nowhere") == f"ecan_train: error: no such file or folder: {tmp_path / 'nowhere'}"
    assert (
        fails(capsys, "--resume", tmp_path)
        == f"ecan_train: error: {tmp_path} holds no run to resume: expected config.json in it"
    )
    assert "DATA is missing" in fails(capsys)
    assert "--resume takes all settings from the run's folder" in fails(capsys, "--resume", run, "--epochs", 3)
    assert "invalid choice: 'mixup'" in fails(capsys, faces, "--method", "mixup")
    assert "timm has no model 'resnet-18'" in fails(
        capsys, faces, "--arch", "resnet-18", "--out", tmp_path / "new", "--workers", 0
    )
    assert "kind sample draws its own faces" in fails(capsys, faces, "--kind", "sample")
    assert "lr must be above 0, got -1.0" in fails(capsys, faces, "--lr", "-1")
    (tmp_path / "bin.csv").write_bytes(b"\xff\xfe\x00\x80")
    assert "bin.csv is not a table in UTF-8" in fails(capsys, tmp_path / "bin.csv")
    assert "does not take images of shape" in fails(
        capsys,
        faces,
        "--arch",
        "vit_tiny_patch16_224",
        "--size",
        32,
        "--bs",
        8,
        "--out",
        tmp_path / "new",
        "--workers",
        0,
    )
    assert "epochs must be at least 1, got 0" in fails(capsys, faces, "--epochs", 0)
    if not torch.cuda.is_available():
        assert "precision fp16 is not for a device of type cpu: use fp32 or bf16" in fails(
            capsys, faces, "--precision", "fp16"
        )
    assert not (tmp_path / "new").exists()


def test_a_damaged_run_folder_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not a JSON file" in fails(capsys, "--resume", tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"data": "x", "colour": 1}}')
    assert "config.json is not the configuration of a run" in fails(capsys, "--resume", tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="checkpoint.pth is broken"):
        runs._read_checkpoint(tmp_path, "cpu")


def test_no_run_is_resumed_from_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no run to resume: no such folder: .*nope"):
        resume_run(tmp_path / "nope")
    assert not list(tmp_path.iterdir())  # nor a lock


def test_a_finished_run_is_not_resumed(tmp_path):
    (tmp_path / "config.json").write_text("{}"), (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="is finished: its results are in metrics.json"):
        resume_run(tmp_path)


# A run's folder and its data


def interrupted(faces, out, **kwargs):
    "A run that was stopped after its first epoch"
    save = runs.RunState.after_epoch

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs.RunState, "after_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            start_run(config(faces, **kwargs), out)


def copied(faces, to):
    shutil.copytree(faces, to)
    return to


@pytest.mark.slow
def test_a_run_goes_on_from_elsewhere_and_with_data_that_was_moved(faces, tmp_path, monkeypatch):
    data = copied(faces, tmp_path / "here" / "faces")
    monkeypatch.chdir(tmp_path / "here")
    interrupted("faces", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"] == str(data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()  # another folder of that name
    data.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resume_run(tmp_path / "run")
    assert resume_run(tmp_path / "run", tmp_path / "moved")["epochs"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"] == str(tmp_path / "moved")


@pytest.mark.parametrize("name", [b"f\xe9.png", b"a\rb.png", b"a\nb.png", b'"a,b.png', b"NA.png", b" a.png"])
def test_data_with_any_name_of_a_file_is_recognised(faces, tmp_path, name):
    data, out = copied(faces, tmp_path / "faces"), tmp_path / "run"
    out.mkdir()
    file = sorted((data / "train" / "happy").glob("*.png"))[0]
    file.rename(file.with_name(os.fsdecode(name)))
    cfg = config(data).resolve()
    dls = runs.run_loaders(cfg, out)
    runfiles.write_table(runs._data_table(dls, cfg), out / "data.csv.gz", compression="gzip")
    runs._check_data(dls, cfg, out)


def relabel(data):
    file = sorted((data / "train" / "happy").glob("*.png"))[0]
    file.rename(data / "train" / "sad" / file.name)


def rename_class(data):
    for split in ("train", "test"):
        (data / split / "sad").rename(data / split / "blue")


def overwrite(data):
    file = sorted((data / "train" / "happy").glob("*.png"))[0]
    file.write_bytes(sorted((data / "train" / "sad").glob("*.png"))[0].read_bytes())


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda data: sorted((data / "test" / "happy").glob("*.png"))[0].unlink(), "1 missing .such as test.happy."),
        (
            lambda data: shutil.copy(data / "test/happy/happy_0000.png", data / "test/happy/x.png"),
            "1 new .such as test",
        ),
        (relabel, "1 missing .*; 1 new "),
        (overwrite, "1 with another split, label or size .such as train.happy."),
        (rename_class, " missing .*; .* new "),
    ],
)
def test_a_run_does_not_go_on_with_other_data(run, faces, tmp_path, change, said):
    change(data := copied(faces, tmp_path / "faces"))
    with pytest.raises(ValueError, match="is not the data with which the run in .* began: .*" + said):
        resume_run(run, data)


def test_a_new_run_wants_an_empty_folder(faces, tmp_path):
    for name in ("history.csv", "checkpoint.pth", "thesis.txt"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"expected a new or empty folder for the run, and .* holds {name}"):
            start_run(config(faces), out)
        assert [f.name for f in out.iterdir()] == [name] and (out / name).read_text() == "mine"


@pytest.mark.slow
def test_one_process_holds_a_run(faces, tmp_path):
    code = (
        "import sys, time, pathlib\nfrom ecan_fastai.runfiles import lock_run\n"
        "lock = lock_run(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is using .*run: wait until it has finished"):
            start_run(config(faces), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    finally:
        process.kill()
    process.wait()


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_epochs_before_it(faces, tmp_path, monkeypatch):
    from ecan_fastai.losses import ECANLoss

    forward, calls = ECANLoss.forward, []

    def diverge(self, out, y):
        calls.append(isinstance(out, dict))
        loss = forward(self, out, y)
        return loss * float("nan") if sum(calls) > 8 else loss

    monkeypatch.setattr(ECANLoss, "forward", diverge)
    with pytest.raises(ValueError, match="^the training loss became nan in epoch 1: start again in another folder"):
        start_run(config(faces), tmp_path / "run")
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1 and not (tmp_path / "run" / "metrics.json").exists()
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert state["epochs"] == 1 and all(v.isfinite().all() for v in state["model"].values())


# What has changed since the run wrote it


def flip(file):
    "One bit in the middle of a file"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def interrupted_run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "run"
    interrupted(faces, out, method="baseline")
    return out


@pytest.fixture
def run(interrupted_run, tmp_path):
    "A copy of a run that was stopped after the first of two epochs"
    return Path(shutil.copytree(interrupted_run, tmp_path / "run"))


def test_another_number_of_processes_is_warned_of(run, monkeypatch):
    monkeypatch.setattr(runs, "num_distrib", lambda: 2)
    monkeypatch.setattr(runs, "_first_process_first", lambda load, *args: load(*args))
    monkeypatch.setattr(runs, "_train", lambda *args: None)
    with pytest.warns(
        UserWarning, match="processes of the run: 1 at its start, 2 now, so a step has 2 times the images"
    ):
        resume_run(run)


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pth", "data.csv.gz"])
def test_a_changed_file_is_refused_by_name(run, capsys, name):
    flip(run / name)
    said = fails(capsys, "--resume", run)
    assert said.startswith(f"ecan_train: error: {run / name} is not as the run wrote it") and "\n" not in said
    assert not (run / "metrics.json").exists()


@pytest.mark.slow
def test_changed_weights_are_refused_by_name(faces, tmp_path):
    out = tmp_path / "run"
    start_run(config(faces, method="baseline", epochs=1), out)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(list(out.iterdir())) - 1
    modes = {f.name: f.stat().st_mode & 0o777 for f in out.iterdir()}
    old = os.umask(0)
    os.umask(old)
    assert set(modes.values()) == {0o666 & ~old}, modes
    flip(out / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is not as the run wrote it"):
        Predictor(out)
    with pytest.raises(ValueError, match="model.safetensors is not as the run wrote it"):
        FaceClassifier.create("resnet10t", 7, 1, pretrained=out)


def edit(run, **settings):
    "Change config.json of a folder, which then has no checksums"
    (run / "SHA256SUMS").unlink()
    written = json.loads((run / "config.json").read_text())
    written["config"] |= settings
    (run / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    "changed,said",
    [
        (dict(arch="resnet18"), "checkpoint.pth was made with arch resnet10t, and config.json says resnet18"),
        (dict(method="center"), "checkpoint.pth was made with method baseline, and config.json says center"),
        (dict(bs=8), "checkpoint.pth was made with bs 16, and config.json says 8"),
        (dict(lr=0.5), "checkpoint.pth was made with lr .*, and config.json says 0.5"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(run, capsys, changed, said):
    edit(run, **changed)
    text = fails(capsys, "--resume", run)
    assert re.search(said, text) and "\n" not in text.strip()


def test_a_checkpoint_that_is_none_or_of_another_model_is_refused(run, capsys):
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    (run / "SHA256SUMS").unlink()
    torch.save(
        {**state, "model": {k: v for k, v in state["model"].items() if "layer4" not in k}}, run / "checkpoint.pth"
    )
    text = fails(capsys, "--resume", run)
    assert f"{run / 'checkpoint.pth'} is not of the model that config.json describes: " in text and "\n" not in text
    torch.save(state["model"], run / "checkpoint.pth")
    assert "checkpoint.pth is not the checkpoint of a run: no settings in it" in fails(capsys, "--resume", run)


# Disks that are full, and processes that are killed


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(faces, tmp_path):
    "A limit on the size of files stands in for a full disk; history and settings fit, the checkpoint does not"
    code = (
        "import resource, signal, sys\nfrom ecan_fastai.cli import ecan_train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\necan_train(sys.argv[1:])"
    )
    args = "--method baseline --epochs 1 --size 32 --channels 1 --level weak --bs 16 --opt adam --workers 0"
    done = subprocess.run(
        [sys.executable, "-c", code, str(faces), "--out", str(tmp_path / "run"), *args.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("ecan_train: error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(said) == 1 and said[0].startswith(
        f"ecan_train: error: cannot write {tmp_path / 'run' / 'checkpoint.pth'}: "
    )
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"config.json", "data.csv.gz", "SHA256SUMS"}
    assert resume_run(tmp_path / "run")["epochs"] == 1


@pytest.mark.slow
def test_a_failed_export_leaves_none_and_is_made_when_the_run_is_resumed(run, monkeypatch):
    def fail(self, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Learner, "export", fail)
        with pytest.raises(OSError, match=f"cannot write {run / 'export.pkl'}: No space left on device"):
            resume_run(run)
    assert not [f for f in run.iterdir() if "export" in f.name] and not (run / "metrics.json").exists()
    assert resume_run(run)["epochs"] == 2 and (run / "export.pkl").exists()


@pytest.mark.slow
def test_what_a_killed_write_left_is_removed(run, faces, tmp_path):
    (run / ".part-checkpoint.pth").write_bytes(b"half")
    resume_run(run)
    assert not list(run.glob(".*"))
    new = tmp_path / "new"
    new.mkdir()
    for name in (".part-data.csv.gz", "data.csv.gz", "SHA256SUMS"):  # killed before its settings were written
        (new / name).write_bytes(b"")
    start_run(config(faces, method="baseline", epochs=1), new)
    assert not list(new.glob(".*"))


def test_a_file_is_no_folder(faces, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder for the run, got the file"):
        start_run(config(faces), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


# Names


def table(faces, tmp_path, rename_class=str, rename_split=str):
    rows = [
        (str(f), rename_class(f.parent.name), rename_split(f.parent.parent.name)) for f in sorted(faces.rglob("*.png"))
    ]
    pd.DataFrame(rows, columns=["image", "label", "split"]).to_csv(tmp_path / "faces.csv", index=False)
    return tmp_path / "faces.csv"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_class_name_lets_a_run_finish(faces, tmp_path):
    odd = dict(angry="$\\frac{a$", disgust="a/b", fear="50 %_{", happy="$x$", neutral="..", sad="NA", surprise="日")
    start_run(config(table(faces, tmp_path, odd.get), kind="csv", method="baseline", epochs=1), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["splits"]["test"]["per_class"]) == set(odd.values())
    assert (tmp_path / "run" / "confusion_test.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["lab/wild", "x" * 250])
def test_a_split_that_names_no_file_is_found_before_the_first_epoch(faces, tmp_path, name):
    file = table(faces, tmp_path, rename_split=lambda s: name if s == "test" else s)
    with pytest.raises(ValueError, match=f"files are named after the split '{name}'"):
        start_run(config(file, kind="csv"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Several processes


def test_other_ranks_train_and_write_nothing(faces, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("ecan_fastai.data.rank_distrib", lambda: 0)  # without a launcher there is one process's seed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("of rank 0")
    with runfiles.lock_run(tmp_path / "run"):
        assert start_run(config(faces, method="baseline", epochs=1), tmp_path / "run") is None
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]
    assert (tmp_path / "run" / "config.json").read_text() == "of rank 0"


def test_several_processes_need_accelerate(faces, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs the extra: pip install "ecan_fastai\[distributed\]"'):
        start_run(config(faces, method="baseline", epochs=1), tmp_path / "run")


def test_the_name_of_an_image_leaves_out_the_root_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "1.png"
    file.write_bytes(b"123")
    root = tmp_path / "a"
    assert runs._image_mark(file, root) == (os.path.join("b", "1.png"), 3)
    inner = Path(f"{root}{os.sep}{str(root).lstrip(os.sep)}") / "1.png"  # the root's path again, below the root
    inner.parent.mkdir(parents=True)
    inner.write_bytes(b"")
    assert runs._image_mark(inner, root) == (str(inner.relative_to(root)), 0)
