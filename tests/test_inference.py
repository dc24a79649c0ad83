import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.foundation import L
from fasttransform import Transform
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import small_config

from ecan_fastai.check import check_data
from ecan_fastai.cli import ecan_evaluate, ecan_predict
from ecan_fastai.inference import Predictor, shared_classes
from ecan_fastai.learner import baseline_learner, ecan_learner
from ecan_fastai.readers.records import image_files
from ecan_fastai.runs import start_run
from ecan_fastai.sample import draw_face


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    "A finished run with FiveCrop, evaluated on ten crops"
    out = tmp_path_factory.mktemp("run") / "run"
    start_run(small_config(faces, size=48, level="strong", eval_crops="ten"), out)
    return out


@pytest.fixture(scope="module")
def colour(faces, tmp_path_factory):
    "A finished run without FiveCrop, on pictures in colour"
    out = tmp_path_factory.mktemp("colour") / "run"
    start_run(small_config(faces, "baseline", size=40, channels=3, recipe="rafdb"), out)
    return out


def test_files(faces):
    return sorted((faces / "test").rglob("*.png"))


test_files.__test__ = False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "colour"])
def test_probabilities_are_those_of_the_runs_own_evaluation(kind, request):
    out = request.getfixturevalue(kind)
    written = pd.read_csv(out / "predictions_test.csv")
    predictor = Predictor(out)
    table = predictor.predict(list(written["image"]), bs=7)
    assert (
        np.allclose(table[predictor.columns], written[[f"p_{v}" for v in predictor.vocab]], atol=2e-5)
        and list(table["label"]) == list(written["predicted"])
        and list(table["image"]) == list(written["image"])
    )
    assert np.allclose(table["probability"], table[predictor.columns].max(1))


@pytest.mark.slow
@pytest.mark.parametrize("crops", ["center", "ten"])
@pytest.mark.parametrize("maker", [ecan_learner, baseline_learner])
def test_a_learner_and_its_predictor_say_the_same(make_dls, maker, crops):
    dls = make_dls(size=48, level="strong", n_views=2 if maker is ecan_learner else 1, eval_crops=crops)
    learn = maker(dls)
    predictor = Predictor.from_learner(learn)
    probs, _ = learn.get_preds(dl=dls["test"])
    assert predictor.crops == crops and predictor.vocab == list(dls.vocab)
    assert np.allclose(predictor.probabilities([f.image for f in dls["test"].dataset.items]), probs, atol=1e-5)
    with torch.no_grad():
        learn.model.classifier.bias.fill_(7)  # a copy: what the learner does later changes nothing
    assert not (predictor.model.classifier.classifier.bias == 7).any()


def test_the_key_encoder_of_a_learner(make_dls):
    learn = ecan_learner(make_dls())
    with torch.no_grad():
        learn.model.key_encoder.conv1.weight.mul_(2)
    keys, queries = (Predictor.from_learner(learn, key=key) for key in (True, False))
    assert torch.equal(keys.model.classifier.encoder.conv1.weight, 2 * queries.model.classifier.encoder.conv1.weight)


def test_looking_at_a_learner_changes_no_random_number_of_its_training(make_dls):
    learn, before = baseline_learner(make_dls(n_views=1), "resnet10t"), torch.get_rng_state()
    Predictor.from_learner(learn)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_can_be_trained_on(make_dls):
    "As a user's own calibration does"
    learn = baseline_learner(make_dls(n_views=1), "resnet10t")
    items = learn.dls.valid_ds.items[:3]
    logits, t = (
        Predictor.from_learner(learn).logits([f.image for f in items]).mean(1),
        torch.ones(1, requires_grad=True),
    )
    torch.nn.functional.cross_entropy(logits / t, torch.tensor([0, 1, 2])).backward()
    assert t.grad is not None and t.grad != 0


def test_classes_are_the_same_in_any_unicode_form():
    "A Mac writes names of folders with combining marks"
    vocab, labels = ([unicodedata.normalize(form, name) for name in ("fröhlich", "traurig")] for form in ("NFD", "NFC"))
    assert vocab[0] != labels[0] and shared_classes(vocab, labels) == dict(zip(labels, vocab))


def test_a_compiled_model_of_a_learner(make_dls):
    learn = baseline_learner(make_dls(n_views=1), "resnet10t")
    images = [f.image for f in learn.dls.valid_ds.items[:3]]
    expected = Predictor.from_learner(learn).probabilities(images)
    learn.model = torch.compile(learn.model)
    assert np.array_equal(Predictor.from_learner(learn).probabilities(images), expected)


def test_the_centre_among_ten_crops_is_the_centre(run, faces):
    ten, center = Predictor(run, "ten"), Predictor(run, "center")
    logits = ten.logits(faces / "test")
    assert logits.shape == (len(test_files(faces)), 10, 7)
    assert torch.allclose(logits[:, ten.center_view], center.logits(faces / "test")[:, 0], atol=1e-5)


def test_processes_that_read_change_nothing(run, faces):
    files, predictor = test_files(faces)[:20], Predictor(run)
    assert np.allclose(predictor.probabilities(files, bs=2, num_workers=2), predictor.probabilities(files), atol=1e-5)


def test_broken_images_may_be_left_out_of_an_evaluation(run, faces, tmp_path, capsys):
    data = shutil.copytree(faces / "test", tmp_path / "data")
    (data / "happy" / "broken.png").write_text("no image")
    n = len(test_files(faces))
    with pytest.raises(SystemExit):
        ecan_evaluate(["--run", str(run), str(data)])
    said = capsys.readouterr().err
    assert "broken.png" in said and "--skip-broken" in said
    ecan_evaluate(["--run", str(run), str(data), "--skip-broken", "--out", str(tmp_path / "e.json")])
    said = capsys.readouterr()
    assert "broken.png" in said.err and "the data has no test split" in said.err
    assert json.loads((tmp_path / "e.json").read_text())["splits"]["train"]["n"] == n
    (tmp_path / "none" / "happy").mkdir(parents=True)
    (tmp_path / "none" / "happy" / "broken.png").write_text("no image")
    with pytest.raises(SystemExit):
        ecan_evaluate(["--run", str(run), str(tmp_path / "none"), "--skip-broken"])
    assert "none of the 1 images can be used: cannot decode" in capsys.readouterr().err


def test_other_loaders_are_refused(faces):
    from fastai.vision.all import DataLoader, DataLoaders, ImageDataLoaders, Learner, Resize, nn

    dls = ImageDataLoaders.from_folder(faces, item_tfms=Resize(32), num_workers=0, bs=4, valid_pct=0.2)
    with pytest.raises(ValueError, match="needs DataLoaders built on TwoViewBlock"):
        Predictor.from_learner(Learner(dls, nn.Identity(), loss_func=nn.MSELoss()))
    plain = DataLoaders(*[DataLoader([(torch.randn(1, 32, 32), 0)] * 4, bs=4)] * 2)
    with pytest.raises(ValueError, match="needs DataLoaders built on TwoViewBlock"):
        Predictor.from_learner(Learner(plain, nn.Identity(), loss_func=nn.MSELoss()))


def test_every_form_of_a_picture_gives_the_same(faces, run):
    predictor, file = Predictor(run), test_files(faces)[0]
    grey = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    expected = predictor.probabilities(file)
    assert expected.shape == (1, 7) and expected.sum() == pytest.approx(1, abs=1e-5)
    for x in (
        str(file),
        file.read_bytes(),
        grey,
        grey[..., None],
        np.repeat(grey[..., None], 3, -1),
        Image.fromarray(grey),
        torch.from_numpy(grey)[None],
        [grey],
        grey[None, ..., None],
    ):
        assert np.allclose(predictor.probabilities(x), expected, atol=1e-5)
    for many in (L([file, file]), pd.Series([str(file)] * 2), (file, grey)):
        assert np.allclose(predictor.probabilities(many), np.repeat(expected, 2, 0), atol=1e-5)
    folder = predictor.predict(faces / "test")
    assert list(folder["image"]) == list(map(str, test_files(faces))) and np.allclose(
        folder.iloc[[0]][predictor.columns], expected, atol=1e-5
    )


def test_pictures_of_another_size_are_resized(run):
    face = draw_face("happy", np.random.default_rng(0), 96, 1)
    assert np.allclose(
        Predictor(run).probabilities(face), Predictor(run).probabilities(cv2.resize(face, (48, 48))), atol=1e-5
    )


@pytest.mark.parametrize(
    "kind,crops,n,side",
    [
        ("run", "center", 1, 48),
        ("run", "flip", 2, 48),
        ("run", "five", 5, 48),
        ("run", "ten", 10, 48),
        ("colour", "center", 1, 40),
        ("colour", "flip", 2, 40),
        ("colour", "five", 5, 48),
        ("colour", "ten", 10, 48),
    ],
)
def test_views_are_those_of_the_evaluation_pipelines(kind, crops, n, side, request):
    from ecan_fastai.augment import eval_pipelines

    out = request.getfixturevalue(kind)
    cfg = json.loads((out / "config.json").read_text())
    predictor = Predictor(out, crops)
    img = np.random.default_rng(0).integers(0, 255, (60, 60, predictor.channels), np.uint8)
    views = predictor.model.views(predictor.pixels(img)[None])
    pipes = eval_pipelines(*(cfg["config"][k] for k in ("level", "recipe", "size")), crops)
    assert len(views) == len(pipes) == n and predictor.model.side == side
    for view, pipe in zip(views, pipes):
        expected = (
            pipe(image=img)["image"].transpose(2, 0, 1) / 255 - np.reshape(cfg["about"]["mean"], (-1, 1, 1))
        ) / np.reshape(cfg["about"]["std"], (-1, 1, 1))
        assert view.shape[-1] == cfg["about"]["view_size"] and np.allclose(view[0], expected, atol=1e-5)


def test_a_mirrored_picture_changes_nothing_under_flips(run):
    face = draw_face("fear", np.random.default_rng(1), 48, 1)
    flip, center = Predictor(run, "flip"), Predictor(run, "center")
    assert np.allclose(flip.probabilities(face), flip.probabilities(face[:, ::-1].copy()), atol=1e-5)
    assert not np.allclose(center.probabilities(face), center.probabilities(face[:, ::-1].copy()), atol=1e-5)


def test_features_are_the_encoders(faces, run):
    predictor = Predictor(run, "flip")
    z = predictor.features(faces / "test")
    assert z.shape == (len(test_files(faces)), 512)
    with torch.no_grad():
        logits = predictor.model.classifier.classifier(torch.from_numpy(z))
    probs = (logits / predictor.model.temperature).softmax(1)
    assert np.allclose(probs, predictor.probabilities(faces / "test"), atol=1e-5)


def test_calibrate_finds_the_temperature_of_labels_drawn_from_softer_probabilities(run, faces):
    predictor, images = Predictor(run, "flip"), test_files(faces) * 8
    with torch.no_grad():
        for p in predictor.model.classifier.classifier.parameters():
            p.mul_(8)  # a model that is too sure
    logits = predictor.logits(images).mean(1)
    drawn = torch.multinomial((logits / 3).softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    before = predictor.probabilities(images[:4])
    assert predictor.calibrate(images, [predictor.vocab[k] for k in drawn]) == pytest.approx(3, rel=0.2)
    after = predictor.probabilities(images[:4])
    softened = (logits[:4] / predictor.model.temperature).softmax(1).numpy()
    assert np.allclose(after, softened, atol=1e-5) and (after.argmax(1) == before.argmax(1)).all()


def test_too_few_images_leave_the_calibration_as_it_is(run, faces):
    predictor = Predictor(run)
    predictor.model.temperature = 2.5
    images = image_files(faces / "train")[:8]
    right = predictor.predict(images)["label"]
    (wrong, *_) = [v for v in predictor.vocab if v not in set(right)]
    for labels in (right, [wrong] * 8):  # the best temperature is without bound
        with pytest.raises(ValueError, match="8 images are too few to calibrate on.*the temperature stays 2.5"):
            predictor.calibrate(images, labels)
    assert predictor.model.temperature == 2.5


def test_calibrate_finds_the_smallest_loss_of_the_probabilities_over_all_views(run, faces):
    predictor, images = Predictor(run, "ten"), test_files(faces)
    with torch.no_grad():
        for p in predictor.model.classifier.classifier.parameters():
            p.mul_(8)
    labels = [f.parent.name for f in images]

    def loss(temperature):
        predictor.model.temperature = temperature
        probs = predictor.probabilities(images)
        return -np.log(probs[range(len(images)), [predictor.vocab.index(v) for v in labels]]).mean()

    found = predictor.calibrate(images, labels)
    assert 0.1 < found < 19 and loss(found) < min(loss(found * 1.05), loss(found / 1.05))


@pytest.mark.parametrize(
    "n,labels,message",
    [
        (2, ["happy"], "a label for each of 2 images, got 1"),
        (2, ["happy", "bored"], "no class bored in this model, the classes are angry"),
        (1, ["bored"], "the model knows none of the data's classes: it has angry"),
        (2, [0, 1], "expected names of classes as labels, got 0"),
        (2, ["happy", float("nan")], "expected names of classes as labels, got nan"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_calibration(run, faces, n, labels, message):
    with pytest.raises(ValueError, match=message):
        Predictor(run).calibrate(test_files(faces)[:n], labels)


def test_calibration_takes_the_names_that_evaluation_takes(run, faces):
    images = test_files(faces)
    labels, found = [f.parent.name for f in images], []
    for named in (str, lambda v: {"happy": "Happiness", "sad": "sadness"}.get(v, v)):
        predictor = Predictor(run)
        with torch.no_grad():
            for p in predictor.model.classifier.classifier.parameters():
                p.mul_(8)
        found.append(predictor.calibrate(images, [named(v) for v in labels]))
    assert found[0] == found[1] != 1


def test_images_come_in_any_iterable(run, faces):
    predictor, files = Predictor(run), test_files(faces)[:3]
    expected = predictor.probabilities(files)
    for images in (
        iter(files),
        map(str, files),
        (f for f in files),
        dict(zip("abc", files)).values(),
        pd.Index(map(str, files)),
        np.array(list(map(str, files))),
    ):
        assert np.array_equal(predictor.probabilities(images), expected)
    assert len(predictor.probabilities(files[0].read_bytes())) == 1
    for other in (io.BytesIO, bytearray):
        with pytest.raises(ValueError, match="expected a path, bytes, .* as an image, got .{,60}$"):
            predictor.probabilities(other(files[0].read_bytes()))


def test_a_learner_is_no_run_and_an_export_needs_its_folder(run, tmp_path):
    with pytest.raises(TypeError, match="expected the folder of a run, got Linear: use from_learner for a learner"):
        Predictor(torch.nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        Predictor(run).export(tmp_path / "nowhere" / "model.onnx")


def test_an_export_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def half(file, data):
        with file.open("wb") as f:
            f.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="cannot write .*model.pt2: No space left"):
        Predictor(run).export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_opened_without_running_code(run, tmp_path):
    code = (
        "import sys\nfrom ecan_fastai.inference import Predictor\nseen = []\nsys.addaudithook(lambda event, args: "
        "seen.append(str(args)) if event == 'pickle.find_class' else None)\n"
        "Predictor(sys.argv[1])\nsys.exit(' '.join(seen) or 0)"
    )
    copy = tmp_path / "stranger"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, copy / name)  # nothing else is needed
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_damaged_runs_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a finished run: no config.json"):
        Predictor(tmp_path)
    shutil.copy(run / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="no model.safetensors in it"):
        Predictor(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="model.safetensors is broken"):
        Predictor(tmp_path)
    weights = load_file(run / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "classifier.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit its config.json in 1 tensors: .* as classifier.bias, got none"):
        Predictor(tmp_path)
    for wrong, said in (
        (torch.full((7,), torch.nan), "has values in classifier.bias that are not finite"),
        (
            torch.zeros(7, dtype=torch.int64),
            r"expected float \(7,\) as classifier.bias, got torch.int64 \(7,\)",
        ),
        (torch.zeros(8), r"expected float \(7,\) as classifier.bias, got float \(8,\)"),
    ):
        save_file({**weights, "classifier.bias": wrong}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            Predictor(tmp_path)
    for text in ("{}", "[]", '{"config": {"arch": "resnet18"}, "about": {}}', "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is not the configuration of a run"):
            Predictor(tmp_path)
    for device in ("gpu", "cuda:7", "meta"):
        with pytest.raises(ValueError, match=rf"no such device here: {device} \(.+\)"):
            Predictor(run, device=device)
    with pytest.raises(ValueError, match="unknown evaluation crops 'six'"):
        Predictor(run, "six")


@pytest.mark.parametrize(
    "part,key,value,said",
    [
        ("config", "arch", 5, "arch must be of type str, got 5"),
        ("config", "arch", "resnet1", "timm has no model 'resnet1'"),
        ("config", "arch", "vit_giant_patch14_clip_224", "no vit_giant_patch14_clip_224 for images of shape"),
        ("config", "level", ["strong"], r"level must be of type str, got .'strong'."),
        ("config", "size", 10**9, "size must be from 8 to 4096 pixels, got 1000000000"),
        ("config", "size", True, "size must be of type int, got True"),
        ("config", "channels", True, "channels must be of type int, got True"),
        ("config", "channels", 2, "unknown channels 2, expected one of 1, 3"),
        ("config", "eval_crops", {}, "eval_crops must be of type str, got {}"),
        ("config", "eval_crops", None, "no eval_crops in its config"),
        ("about", "vocab", ["happy ", "happy", *"abcde"], "differ only in case or blanks"),
        ("about", "vocab", "abcdefg", "expected a list of at least two different class names"),
        ("about", "vocab", ["a"] * 7, "expected a list of at least two different class names"),
        ("about", "mean", [float("nan")], "expected a list of numbers as about.mean, got"),
        ("about", "mean", [0.5] * 3, r"expected a number for each channel .1. as about.mean, got 3"),
        ("about", "std", [0.0], "expected a list of numbers above 0 as about.std"),
        ("about", "view_size", 48, "about.view_size is 48, expected 40 at size 48"),
        ("about", "std", None, "no std in its about"),
        ("about", "temperature", 0, "expected a number above 0 as about.temperature, got 0"),
        ("about", "temperature", "warm", "expected a number above 0 as about.temperature, got 'warm'"),
    ],
)
def test_every_setting_of_a_run_is_checked(run, tmp_path, part, key, value, said):
    written = json.loads((run / "config.json").read_text())
    written[part][key] = value
    if value is None:
        del written[part][key]
    (tmp_path / "config.json").write_text(json.dumps(written))
    shutil.copy(run / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=f"config.json.*{said}"):
        Predictor(tmp_path)


@pytest.mark.parametrize("text", [b"\xff\xfe{", b"[" * 100000, b'{"config": 5, "about": []}', b'{"config": {}}'])
def test_what_is_no_configuration_is_told(run, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    shutil.copy(run / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="config.json is not the configuration of a run"):
        Predictor(tmp_path)


def test_class_names_overwrite_no_column(run, faces):
    predictor, file = Predictor(run), test_files(faces)[0]
    expected = predictor.predict(file)
    predictor.vocab = ["label", "image", "probability", "file", "p_image", "a/b", "$x$"]
    table = predictor.predict(file)
    assert list(table.columns) == ["image", "label", "probability", *(f"p_{v}" for v in predictor.vocab)]
    assert np.array_equal(table.iloc[:, 2:], expected.iloc[:, 2:]) and table["image"][0] == str(file)
    assert table["label"][0] == predictor.vocab[table.iloc[0, 3:].astype(float).argmax()]


def test_images_that_cannot_be_read_may_be_left_out(run, faces, tmp_path):
    predictor, (a, b) = Predictor(run), test_files(faces)[:2]
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out: cannot decode .*broken.png"):
        table = predictor.predict([a, tmp_path / "broken.png", b], skip_broken=True)
    assert table.equals(predictor.predict([a, b]))
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        predictor.predict(tmp_path, skip_broken=True)
    with pytest.raises(ValueError, match="bs must be at least 1, got 0"):
        predictor.predict(a, bs=0)


def test_bad_pictures_are_named(run, tmp_path):
    predictor = Predictor(run)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.jpg: not an image"):
        predictor.predict(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such image file: .*b.jpg"):
        predictor.predict(tmp_path / "b.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images found under"):
        predictor.predict(tmp_path / "empty")
    with pytest.raises(ValueError, match="no images to predict"):
        predictor.predict([])


# Measuring


@pytest.mark.slow
def test_evaluation_equals_the_runs_own(faces, run):
    own, again = json.loads((run / "metrics.json").read_text())["splits"]["test"], Predictor(run).evaluate(faces)
    assert set(again["splits"]) == {"test"} and again["left_out"] == {} and again["unseen"] == []
    for k in ("accuracy", "average_accuracy", "macro_f1", "n"):
        assert again["splits"]["test"][k] == pytest.approx(own[k])
    assert Predictor(run).evaluate(faces, splits="train")["splits"]["train"]["n"] == len(
        list((faces / "train").rglob("*.png"))
    )
    with pytest.raises(ValueError, match="no split 'dev' in .*, the splits are test, train"):
        Predictor(run).evaluate(faces, splits=["dev"])


def test_splits_for_training_are_left_out_of_an_evaluation(run, faces, tmp_path):
    for split in ("train", "valid", "test"):
        shutil.copytree(faces / "test" / "sad", tmp_path / "d" / split / "sad")
    assert set(Predictor(run).evaluate(tmp_path / "d")["splits"]) == {"test"}
    with pytest.raises(ValueError, match="expected a split to measure, the splits are test, train, valid"):
        Predictor(run).evaluate(tmp_path / "d", splits=[])
    shutil.rmtree(tmp_path / "d" / "test")
    assert set(Predictor(run).evaluate(tmp_path / "d")["splits"]) == {"train", "valid"}


def test_a_split_without_a_class_of_the_model_is_said(run, faces, tmp_path):
    images = sorted((faces / "test" / "sad").iterdir())[:2]
    rows = dict(image=list(map(str, images)), label=["sad", "contempt"], split=["test", "clinic"])
    pd.DataFrame(rows).to_csv(tmp_path / "d.csv", index=False)
    with pytest.warns(UserWarning, match="no face of split 'clinic' has a class that the model knows"):
        assert set(Predictor(run).evaluate(tmp_path / "d.csv")["splits"]) == {"test"}
    with pytest.raises(ValueError, match="no face of split 'clinic'"):
        Predictor(run).evaluate(tmp_path / "d.csv", splits=["test", "clinic"])


def test_pixels_do_not_share_the_memory_of_the_image(run):
    predictor = Predictor(run)
    image = np.full((48, 48, 1), 9, np.uint8)
    predictor.pixels(image).zero_()
    assert (image == 9).all()


def test_classes_are_matched_by_meaning(faces, run, tmp_path):
    for new, old in (("Happiness", "happy"), ("anger", "angry"), ("contempt", "fear")):
        shutil.copytree(faces / "test" / old, tmp_path / "d" / "test" / new)
    shutil.copytree(faces / "train" / "happy", tmp_path / "d" / "train" / "Happiness")
    record = Predictor(run).evaluate(tmp_path / "d")
    assert (
        record["classes"] == {"Happiness": "happy", "anger": "angry"}
        and record["left_out"] == {"contempt": len(list((faces / "test" / "fear").iterdir()))}
        and "sad" in record["unseen"]
    )
    table = Predictor(run).predict(faces / "test" / "happy")
    assert record["splits"]["test"]["per_class"]["happy"]["recall"] == pytest.approx((table["label"] == "happy").mean())
    assert shared_classes(["happy", "Happiness"], ["Happiness", "happy"]) == {
        "Happiness": "Happiness",
        "happy": "happy",
    }
    with pytest.raises(ValueError, match="class 'joy' can be any of the model's classes happy, Happiness"):
        shared_classes(["happy", "Happiness"], ["joy"])
    with pytest.raises(ValueError, match="knows none of the data's classes: it has angry"):
        shared_classes(["angry"], ["cat"])


# Export


@pytest.mark.slow
@pytest.mark.parametrize("kind,crops", [("run", "center"), ("run", "ten"), ("colour", "five")])
def test_onnx_gives_the_same_for_any_number_of_pictures(kind, crops, request, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    predictor = Predictor(request.getfixturevalue(kind), crops)
    predictor.model.temperature = 2.5
    file = predictor.export(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(file))
    assert [i.name for i in session.get_inputs()] == ["pixels"] and [o.name for o in session.get_outputs()] == [
        "probabilities"
    ]
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == predictor.vocab and int(about["side"]) == predictor.model.side
    rng = np.random.default_rng(0)
    for n in (1, 2, 5):
        x = rng.integers(0, 255, (n, predictor.channels, predictor.model.side, predictor.model.side), np.uint8)
        expected = predictor.probabilities([torch.from_numpy(image) for image in x])
        assert np.allclose(session.run(None, {"pixels": x})[0], expected, atol=1e-5)
    assert file.stat().st_size < 60 * 2**20


@pytest.mark.slow
def test_torch_export_gives_the_same(run, tmp_path):
    predictor = Predictor(run, "five")
    predictor.model.temperature = 2.5
    facts = dict.fromkeys(("labels", "side", "channels"), "")
    program = torch.export.load(predictor.export(tmp_path / "m.pt2"), extra_files=facts).module()
    assert json.loads(facts["labels"]) == predictor.vocab and facts["side"] == "48" and facts["channels"] == "1"
    for n in (1, 3):
        x = torch.randint(0, 255, (n, 1, 48, 48), dtype=torch.uint8)
        with torch.no_grad():
            assert np.allclose(program(x).numpy(), predictor.probabilities(list(x)), atol=1e-5)
    with pytest.raises(ValueError, match="expected a name ending in .onnx or .pt2, got .*m.tflite"):
        predictor.export(tmp_path / "m.tflite")


# Console


def fails(capsys, script, *args):
    with pytest.raises(SystemExit) as e:
        script(list(map(str, args)))
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "Traceback" not in said
    return said


@pytest.mark.slow
def test_ecan_predict_prints_and_writes(faces, run, tmp_path, capsys):
    a, b = test_files(faces)[:2]
    ecan_predict(list(map(str, ("--run", run, a, b))))
    printed = capsys.readouterr().out
    assert str(a) in printed and str(b) in printed and "probability" in printed
    ecan_predict(list(map(str, ("--run", run, faces / "test", "--out", tmp_path / "p.csv"))))
    ecan_predict(list(map(str, ("--run", run, faces / "test", "--out", tmp_path / "p.json"))))
    table, records = pd.read_csv(tmp_path / "p.csv"), json.loads((tmp_path / "p.json").read_text())
    assert (
        len(table) == len(records) == len(test_files(faces))
        and records[0]["label"] == table["label"][0]
        and set(Predictor(run).columns) < set(table.columns)
    )
    assert "expected a name ending in .csv or .json, got p.txt" in fails(
        capsys, ecan_predict, "--run", run, a, "--out", "p.txt"
    )
    assert "no such folder" in fails(capsys, ecan_predict, "--run", run, a, "--out", tmp_path / "x" / "p.csv")
    evil = tmp_path / "x\x1b]0;owned\x07.png"
    evil.write_bytes(a.read_bytes()[:40])
    with pytest.raises(SystemExit) as e:  # what can be read is labelled, and the exit says that something could not
        ecan_predict(list(map(str, ("--run", run, a, evil, b, "--out", tmp_path / "some.csv"))))
    said = capsys.readouterr().err
    assert e.value.code == 1 and list(pd.read_csv(tmp_path / "some.csv")["image"]) == [str(a), str(b)]
    assert "1 of 3 files are left out" in said and "cannot decode" in said
    assert "x\\x1b]0;owned\\x07.png" in said and "\x1b" not in said
    evil.write_bytes(a.read_bytes())
    ecan_predict(list(map(str, ("--run", run, evil))))
    assert "\x1b" not in (printed := capsys.readouterr().out) and "owned" in printed
    assert "no such image file" in fails(capsys, ecan_predict, "--run", run, tmp_path / "none.png")
    assert "is not the folder of a finished run" in fails(capsys, ecan_predict, "--run", tmp_path, a)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_was_changed_after_its_run_is_refused(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / name
    if name == "config.json":
        file.write_text(file.read_text().replace('"temperature": ', '"temperature": 1'))
    else:
        save_file({k: v + 0.01 if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=f"{name} is not as the run wrote it"):
        Predictor(tmp_path / "run")


def test_ecan_predict_writes_the_name_of_any_file(faces, run, tmp_path):
    file = shutil.copy(test_files(faces)[0], tmp_path / os.fsdecode(b"f\xe9.png"))
    for out in ("p.csv", "p.json"):
        ecan_predict(list(map(str, ("--run", run, file, "--out", tmp_path / out))))
    table = pd.read_csv(tmp_path / "p.csv", encoding_errors="surrogateescape")
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["image"] == table["image"][0] == str(file) and table.iloc[0].to_dict() == row


def test_ecan_evaluate_prints_and_writes(faces, run, tmp_path, capsys):
    ecan_evaluate(list(map(str, ("--run", run, faces, "--out", tmp_path / "e.json"))))
    own = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    printed = capsys.readouterr().out
    assert f"{100 * own['accuracy']:.2f}%" in printed and "that the model has: angry, disgust" in printed
    assert json.loads((tmp_path / "e.json").read_text())["splits"]["test"]["accuracy"] == pytest.approx(own["accuracy"])
    assert "no split 'dev'" in fails(capsys, ecan_evaluate, "--run", run, faces, "--split", "dev")


def resized():
    from fastai.vision.augment import aug_transforms

    return aug_transforms(size=24)


def brighter():
    return [lambda x: 2 * x]


@pytest.mark.parametrize("made,is_refused", [(resized, True), (brighter, True), ("aug_transforms", False)])
@pytest.mark.parametrize("drawn", [False, True])
def test_batch_transforms_that_act_in_evaluation_are_refused(make_dls, made, is_refused, drawn):
    "Whatever fastai's `split_idx` says, which its affine transforms set anew with every batch"
    from fastai.vision.augment import aug_transforms

    dls = make_dls(n_views=1, batch_tfms=aug_transforms() if made == "aug_transforms" else made())
    learn = baseline_learner(dls, "resnet10t")
    if drawn:
        dls.train.one_batch()
    if is_refused:
        with pytest.raises(ValueError, match="cannot apply batch_tfms that act in evaluation"):
            Predictor.from_learner(learn)
    else:
        probs, _ = learn.get_preds(dl=dls["test"])
        images = [f.image for f in dls["test"].dataset.items]
        assert np.allclose(Predictor.from_learner(learn).probabilities(images), probs, atol=1e-4)


@pytest.mark.parametrize("of", ["valid", "all"])
def test_transforms_that_were_added_to_the_loaders_are_refused(make_dls, of):
    dls = make_dls(n_views=1)
    dls.add_tfms([Transform(t) for t in brighter()], "after_batch", *([of] if of == "valid" else []))
    with pytest.raises(ValueError, match="cannot apply batch_tfms that act in evaluation"):
        Predictor.from_learner(baseline_learner(dls, "resnet10t"))


def test_data_is_measured_and_checked_as_it_is_read(tmp_path):
    predictor, n_images = Predictor(), [1] * 29 + [5]  # of each person
    for person, k in ((p, k) for p, n in enumerate(n_images) for k in range(n)):
        folder = tmp_path / "CK+48" / ("anger", "happy")[person % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"S{person:03}_00{k}_0000001{k}.png"), np.full((48, 48), person, np.uint8))
    tested = [predictor.evaluate(tmp_path, "ckplus", fold=fold)["splits"]["test"]["n"] for fold in range(10)]
    assert sum(tested) == sum(n_images) and len({*tested}) > 1  # else any fold would do
    with pytest.raises(TypeError, match="no argument 'fold' for data of kind folder"):
        predictor.evaluate(tmp_path / "CK+48", "folder", fold=1)
    for reads in (predictor.evaluate, check_data):
        with pytest.raises(ValueError, match="expected a fold from 0 to 9, got 10"):
            reads(tmp_path, "ckplus", fold=10)


def test_learners_of_other_models_are_refused(make_dls):
    with pytest.raises(ValueError, match="expected a learner from ecan_learner, got one with a model of type FaceCl"):
        Predictor.from_learner(baseline_learner(make_dls(n_views=1), "resnet10t"), key=True)
