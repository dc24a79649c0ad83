import hashlib
import inspect
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.transforms import get_image_files
from PIL import Image

from ecan_fastai.data import read_face
from ecan_fastai.loaders import *
from ecan_fastai.loaders import broken_faces
from ecan_fastai.readers.factory import detect_kind, read_faces
from ecan_fastai.readers.fer2013 import *
from ecan_fastai.readers.folder import *
from ecan_fastai.readers.records import *
from ecan_fastai.readers.records import Face
from ecan_fastai.sample import *

FAST = dict(bs=8, num_workers=0, device="cpu")


def folder_dls(path, **kw):
    return ExpressionDataLoaders.from_folder(path, **{**dict(size=32, channels=1), **FAST, **kw})


def put(file, img=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.full((48, 48), 90, np.uint8) if img is None else img)


def tree(path, n=6, classes=("happy", "sad")):
    for c in classes:
        for i in range(n):
            put(path / c / f"{i}.png")
    return path


# Signatures


@pytest.mark.parametrize(
    "kind,size,channels,recipe",
    [
        ("fer2013", 48, 1, "fer2013"),
        ("ferplus", 48, 1, "fer2013"),
        ("ckplus", 48, 1, "fer2013"),
        ("rafdb", 224, 3, "rafdb"),
    ],
)
def test_signatures_show_the_defaults_that_act(kind, size, channels, recipe):
    shown = inspect.signature(getattr(ExpressionDataLoaders, f"from_{kind}")).parameters
    assert [shown[k].default for k in ("size", "channels", "recipe")] == [size, channels, recipe]


# Drawn faces


def digest(path):
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.rglob("*.png"))}


def test_sample_is_the_same_from_the_same_seed(tmp_path):
    a, b, c = [digest(sample_faces(tmp_path / k, n=40, seed=s)) for k, s in (("a", 0), ("b", 0), ("c", 1))]
    assert a == b and a.keys() == c.keys() and not set(a.values()) & set(c.values())
    assert len(set(a.values())) == len(a)


def test_sample_has_all_classes_as_unequal_as_rafdb(faces):
    counts = {s: {c.name: len(list(c.iterdir())) for c in (faces / s).iterdir()} for s in ("train", "test")}
    for c in counts.values():
        assert set(c) == set(EXPRESSIONS) and min(c.values()) >= 2 and max(c, key=c.get) == "happy"
    assert counts["train"]["happy"] > 10 * counts["train"]["fear"]


@pytest.mark.parametrize("channels", [1, 3])
def test_drawn_faces_vary(channels):
    a, b = [draw_face("happy", np.random.default_rng(i), 48, channels) for i in (0, 1)]
    assert a.shape == (48, 48, channels) and a.dtype == np.uint8 and np.abs(a.astype(int) - b).mean() > 5


def test_sample_again_is_found_and_other_content_is_refused(tmp_path):
    path = sample_faces(tmp_path / "s", n=40)
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*.png")}
    sample_faces(path, n=40)
    assert before == {f: f.stat().st_mtime_ns for f in path.rglob("*.png")}
    with pytest.raises(ValueError, match="other settings"):
        sample_faces(path, n=41)
    with pytest.raises(
        ValueError, match="expected a size of at least 8 and 1 or 3 channels, got size=0 and channels=1"
    ):
        sample_faces(tmp_path / "small", size=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        sample_faces(tmp_path / "mine")


def test_a_sample_whose_drawing_was_stopped_is_drawn_again(tmp_path, monkeypatch, full_disk):
    from ecan_fastai import sample

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(sample.cv2, "imencode", stop)
        with pytest.raises(KeyboardInterrupt):
            sample_faces(tmp_path / "s", n=40)
    with full_disk(5), pytest.raises(OSError, match=r"cannot write .*sample_faces.part: File too large"):
        sample_faces(tmp_path / "t", n=40)
    assert sample_faces(tmp_path / "t", n=40) == tmp_path / "t"
    with full_disk(500), pytest.raises(OSError, match=r"cannot write .*happy_0000.png: File too large"):
        sample_faces(tmp_path / "s", n=40)
    with pytest.raises(ValueError, match="is not empty"):
        sample_faces(tmp_path / "s", n=41)
    a, b = sample_faces(tmp_path / "s", n=40), sample_faces(tmp_path / "whole", n=40)
    assert {f.relative_to(a): f.read_bytes() for f in a.rglob("*") if f.is_file()} == {
        f.relative_to(b): f.read_bytes() for f in b.rglob("*") if f.is_file()
    }


# Splits


def test_splits_are_stratified_seeded_and_disjoint(faces):
    dls = folder_dls(faces, valid_pct=0.2)
    assert dls.split_names == ("train", "valid", "test")
    names = [set(map(str, dl.dataset.items)) for dl in dls]
    assert (
        not names[0] & names[1]
        and not names[0] & names[2]
        and len(names[0]) + len(names[1]) == len(list((faces / "train").rglob("*.png")))
    )
    for label in dls.vocab:
        held, kept = (sum(f.label == label for f in ds.items) for ds in (dls.valid_ds, dls.train_ds))
        assert held == max(1, round(0.2 * (held + kept))) and kept
    assert (
        names[1]
        == set(map(str, folder_dls(faces, valid_pct=0.2).valid_ds.items))
        != set(map(str, folder_dls(faces, valid_pct=0.2, seed=1).valid_ds.items))
    )


def test_however_much_is_held_out_every_class_keeps_an_image_to_train_on(faces):
    dls = folder_dls(faces, valid_pct=0.95)
    for label in dls.vocab:
        held, kept = (sum(f.label == label for f in ds.items) for ds in (dls.valid_ds, dls.train_ds))
        assert kept >= 1 and held == min(held + kept - 1, round(0.95 * (held + kept)))


def test_train_all_trains_on_the_tenth_and_calls_it_seen(faces):
    dls = folder_dls(faces, train_all=True)
    assert dls.split_names == ("train", "valid_seen", "test") and len(dls.train_ds) == len(
        list((faces / "train").rglob("*.png"))
    )
    assert set(map(str, dls.valid_ds.items)) == set(map(str, folder_dls(faces).valid_ds.items))


def test_train_all_takes_in_a_valid_split_of_the_data(tmp_path):
    for split, n in (("train", 9), ("valid", 4)):
        for label in ("happy", "sad"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((48, 48), i, np.uint8)).save(tmp_path / split / label / f"{i}.png")
    assert len(folder_dls(tmp_path).train_ds) == 18
    dls = folder_dls(tmp_path, train_all=True)
    assert len(dls.train_ds) == 18 + 8 and dls.split_names == ("train", "valid_seen") and len(dls.valid_ds) == 8


def test_splits_by_name(faces):
    dls = folder_dls(faces)
    assert dls["test"] is dls[2] and dls["train"] is dls.train
    with pytest.raises(ValueError, match="no split 'dev', the splits are train, valid, test"):
        dls["dev"]


@pytest.mark.slow
def test_batch_size_follows_small_data(tmp_path):
    rng, f = (
        np.random.default_rng(0),
        lambda n: [Face(rng.integers(0, 255, (8, 8), np.uint8), "ab"[i % 2]) for i in range(n)],
    )
    sizes = {
        n: ExpressionDataLoaders.from_faces(f(n), size=8, channels=1, num_workers=0, valid_pct=0.5).train.bs
        for n in (10, 128, 1000, 4096, 6000)
    }
    assert sizes == {10: 4, 128: 8, 1000: 32, 4096: 256, 6000: 256}


def test_labels_are_names_and_match_their_pictures(faces):
    dls = folder_dls(faces)
    for dl in dls:
        for item, (_, y) in zip(dl.dataset.items, dl.dataset):
            assert dls.vocab[y] == item.label == item.image.parent.name


def test_a_valid_folder_is_used(tmp_path):
    tree(tmp_path / "train"), tree(tmp_path / "val", 2), tree(tmp_path / "night", 3)
    dls = folder_dls(tmp_path)
    assert dls.split_names == ("train", "valid", "night") and [len(d.dataset) for d in dls] == [12, 4, 6]


# Folders: what can be wrong


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        folder_dls(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images found under"):
        folder_dls(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        folder_dls(tmp_path / "a.txt")


def test_a_class_folder_without_image(tmp_path):
    (tree(tmp_path) / "fear").mkdir()
    with pytest.raises(ValueError, match="class folder .*fear has no image: put images into it, or remove it"):
        folder_dls(tmp_path)
    (tmp_path / "fear").rmdir()
    (tmp_path / "__MACOSX").mkdir()  # of a zip file made by macOS
    assert "__MACOSX" not in folder_dls(tmp_path).vocab


def test_broken_images_are_reported_together_and_can_be_skipped(tmp_path):
    tree(tmp_path)
    (tmp_path / "happy" / "zero.png").write_bytes(b"")
    (tmp_path / "sad" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0nonsense")
    with pytest.raises(ValueError, match="2 of 14 images cannot be used.*(cut.jpg.*zero.png|zero.png.*cut.jpg)"):
        folder_dls(tmp_path)
    with pytest.warns(UserWarning, match="going on without 2 of 14 images"):
        dls = folder_dls(tmp_path, skip_broken=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == 12


def test_a_label_outside_the_vocabulary(tmp_path):
    tree(tmp_path / "train"), tree(tmp_path / "test", 2, ("happy", "contempt"))
    with pytest.raises(ValueError, match=r"contempt.*label 'contempt' is not in the vocabulary \(happy, sad\)"):
        folder_dls(tmp_path)
    with pytest.raises(ValueError, match="'sad' is not in the vocabulary"):
        folder_dls(tmp_path / "train", vocab=["happy", "angry"])


def test_one_class_is_refused_and_two_work(tmp_path):
    with pytest.raises(ValueError, match="at least 2 classes, got only 'happy'"):
        folder_dls(tree(tmp_path / "one", classes=["happy"]))
    assert list(folder_dls(tree(tmp_path / "two")).vocab) == ["happy", "sad"]


def test_one_image_in_a_class_stays_in_train(tmp_path):
    tree(tmp_path), put(tmp_path / "fear" / "only.png")
    with pytest.warns(UserWarning, match="class 'fear' has only one training image"):
        dls = folder_dls(tmp_path)
    assert sum(f.label == "fear" for f in dls.train_ds.items) == 1 and not any(
        f.label == "fear" for f in dls.valid_ds.items
    )


def test_nothing_to_validate_on(tmp_path):
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no class has a second training image"):
        folder_dls(tree(tmp_path, 1), bs=1)


def test_the_folder_where_fastai_saves_models_is_no_class(tmp_path):
    (tree(tmp_path) / "models").mkdir()
    assert list(folder_dls(tmp_path).vocab) == ["happy", "sad"]


@pytest.mark.parametrize(
    "kw,said",
    [
        (dict(bs=500), "batch size 500 is larger than the training split of"),
        (dict(bs=0), "above 0"),
        (dict(size=4), "size must be from 8 to 4096 pixels, got 4"),
        (dict(channels=2), "channels must be 1 or 3"),
        (dict(valid_pct=0), "valid_pct"),
        (dict(n_views=3), "n_views must be 1 or 2"),
        (dict(level="huge"), "unknown augmentation level"),
        (dict(image_size=50), "expected 50x50 pixels, got 48x48"),
    ],
)
def test_wrong_arguments_are_named(faces, kw, said):
    with pytest.raises(ValueError, match=said):
        folder_dls(faces, **kw)


def test_arguments_are_checked_before_images_are_read(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    faces = [Face(tmp_path / "x.png", label, "train") for label in ("happy", "sad") for _ in range(9)]
    for kw, said in [
        (dict(channels="1"), "channels must be 1 or 3, got '1'"),
        (dict(level="huge"), "unknown augmentation level 'huge'"),
        (dict(eval_crops="nine"), "unknown evaluation crops 'nine'"),
    ]:
        with pytest.raises(ValueError, match=f"^{said}"):
            ExpressionDataLoaders.from_faces(faces, **kw)


def test_train_split_must_exist():
    with pytest.raises(ValueError, match="no image in a train split, got the splits test"):
        ExpressionDataLoaders.from_faces([Face(np.zeros((8, 8), np.uint8), "happy", "test")])


# Tables


@pytest.fixture
def table(faces):
    files = sorted((faces / "train").rglob("*.png"))
    return pd.DataFrame(dict(image=[str(f.relative_to(faces)) for f in files], label=[f.parent.name for f in files]))


def test_table_and_folder_give_the_same(faces, table, tmp_path):
    table.to_csv(tmp_path / "t.csv", index=False)
    kw = dict(size=48, channels=1, level="none", recipe="fer2013", **FAST)
    a, b = (
        ExpressionDataLoaders.from_df(table, faces, **kw),
        ExpressionDataLoaders.from_csv(tmp_path / "t.csv", faces, **kw),
    )
    assert list(a.vocab) == sorted(EXPRESSIONS)
    for x, y in zip(a.valid, b.valid):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


def test_table_with_splits_and_arrays():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(
        dict(
            face=[rng.integers(0, 255, (40, 40), np.uint8) for _ in range(20)],
            mood=["glad", "gloomy"] * 10,
            part=["train"] * 12 + ["val"] * 4 + ["mine"] * 4,
        )
    )
    dls = ExpressionDataLoaders.from_df(
        df, image_col="face", label_col="mood", split_col="part", size=32, channels=1, **FAST
    )
    assert dls.split_names == ("train", "valid", "mine") and [len(d.dataset) for d in dls] == [12, 4, 4]


def test_table_mistakes(faces, table, tmp_path):
    make = lambda df, **kw: ExpressionDataLoaders.from_df(df, faces, size=32, channels=1, **FAST, **kw)
    with pytest.raises(ValueError, match="no column 'mood', its columns are image, label"):
        make(table, label_col="mood")
    with pytest.raises(ValueError, match="row 3 of the table has no label"):
        make(table.assign(label=table.label.where(table.index != 3)))
    with pytest.raises(ValueError, match="row 0 of the table: expected a path or an array"):
        make(table.assign(image=5))
    with pytest.raises(ValueError, match="no such image file: .*gone.png"):
        make(pd.concat([table, pd.DataFrame(dict(image=["gone.png"], label=["happy"]))]))
    with pytest.raises(FileNotFoundError, match="no such file: .*none.csv"):
        ExpressionDataLoaders.from_csv(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="empty.csv is empty"):
        ExpressionDataLoaders.from_csv(tmp_path / "empty.csv")


# FER2013


def fer_rows(train=21, test=7):
    rows = []
    for usage, n in (("Training", train), ("PublicTest", test), ("PrivateTest", test)):
        for i in range(n):
            rows.append((i % 7, usage, draw_face(FER2013_IDS[i % 7], np.random.default_rng([len(rows)]))[..., 0]))
    return rows


def write_fer2013(file, rows, icml=False, **changed):
    df = pd.DataFrame([dict(emotion=e, pixels=" ".join(map(str, p.ravel())), Usage=u) for e, u, p in rows])
    for k, (row, v) in changed.items():
        df[k] = [v if i == row else x for i, x in enumerate(df[k])]
    if icml:
        df = df[["emotion", "Usage", "pixels"]].rename(columns={"Usage": " Usage", "pixels": " pixels"})
    df.to_csv(file, index=False)
    return file


def write_folders(path, rows):
    for i, (e, usage, p) in enumerate(rows):
        put(path / ("train" if usage == "Training" else "test") / FER2013_IDS[e] / f"{usage}_{i}.png", p)
    return path


def fer(path, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ExpressionDataLoaders.from_fer2013(path, level="none", **FAST, **kw)


def test_the_three_forms_of_fer2013_are_the_same(tmp_path):
    rows = fer_rows()
    (tmp_path / "d").mkdir()
    forms = [
        fer(write_fer2013(tmp_path / "fer2013.csv", rows)),
        fer(write_fer2013(tmp_path / "d" / "icml_face_data.csv", rows, icml=True).parent),
        fer(write_folders(tmp_path / "f", rows)),
    ]
    for dls in forms:
        assert dls.split_names == ("train", "valid", "PublicTest", "PrivateTest") and tuple(dls.vocab) == EXPRESSIONS
        for split in ("PublicTest", "PrivateTest"):
            got = {x.numpy().tobytes(): dls.vocab[y] for x, y in dls[split].dataset}
            assert got == {p.tobytes(): FER2013_IDS[e] for e, u, p in rows if u == split}


def test_fer2013_counts_are_compared_with_the_published_ones(tmp_path):
    with pytest.warns(UserWarning, match="this FER2013 differs from the published one: train angry 3 instead of 3995"):
        ExpressionDataLoaders.from_fer2013(write_fer2013(tmp_path / "fer2013.csv", fer_rows()), **FAST)
    assert [sum(c.values()) for c in FER2013_COUNTS.values()] == [28709, 3589, 3589]


@pytest.mark.parametrize(
    "changed,said",
    [
        (dict(emotion=(2, 7)), "line 4: expected an emotion from 0 to 6, got '7'"),
        (dict(pixels=(0, "1 2 3")), "line 2: expected 2304 pixels, got 3"),
        (dict(pixels=(1, "1 2 x")), "line 3: pixels are not numbers"),
        (dict(pixels=(1, " ".join(["256"] * 2304))), "line 3: expected pixels from 0 to 255"),
        (dict(Usage=(5, "Test")), "line 7: expected a Usage of Training, PublicTest, PrivateTest, got 'Test'"),
    ],
)
def test_fer2013_csv_mistakes_name_the_line(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        fer(write_fer2013(tmp_path / "fer2013.csv", fer_rows(7, 7), **changed))


def test_fer2013_layout_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        fer(tmp_path / "x")
    with pytest.raises(ValueError, match="is not FER2013: expected train/ and test/"):
        fer(tmp_path)
    (tmp_path / "bad.csv").write_text("emotion,Usage\n1,Training\n")
    with pytest.raises(ValueError, match="bad.csv has no column 'pixels', its columns are emotion, Usage"):
        fer(tmp_path / "bad.csv")
    f = write_folders(tmp_path / "f", fer_rows(7, 7))
    put(f / "test" / "happy" / "Validation_1.png")
    with pytest.raises(
        ValueError, match="Validation_1.png: expected a name that begins with PublicTest_ or PrivateTest_"
    ):
        fer(f)
    (f / "test" / "happy" / "Validation_1.png").unlink()
    put(f / "train" / "happy" / "Training_big.png", np.zeros((50, 60), np.uint8))
    with pytest.raises(ValueError, match="Training_big.png: expected 48x48 pixels, got 60x50"):
        fer(f)


def test_kinds_are_detected(tmp_path, faces):
    rows = fer_rows(7, 7)
    assert detect_kind(write_fer2013(tmp_path / "any.csv", rows, icml=True)) == "fer2013"
    assert detect_kind(write_folders(tmp_path / "f", rows)) == "fer2013"
    assert detect_kind(faces) == "folder"
    (tmp_path / "t.csv").write_text("image,label\na.png,happy\n")
    assert detect_kind(tmp_path / "t.csv") == "csv"
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a folder or a .csv file"):
        detect_kind(tmp_path / "t.txt")
    with pytest.raises(ValueError, match="unknown kind of data 'jaffe'"):
        ExpressionDataLoaders.from_path(faces, "jaffe")


# fastai's arguments work, and anything else is told


def loaders(faces, **kwargs):
    settings = dict(size=32, channels=1, recipe="fer2013", level="none", **FAST)
    return ExpressionDataLoaders.from_folder(faces, **{**settings, **kwargs})


@pytest.mark.parametrize(
    "wrong,near",
    [("lvl", "level"), ("num_worker", "num_workers"), ("validpct", "valid_pct"), ("zzzz", None), ("kwargs", None)],
)
def test_an_argument_that_is_none_is_named_with_the_nearest(faces, wrong, near):
    with pytest.raises(TypeError, match=f"no argument '{wrong}'" + (f", did you mean '{near}'" if near else "$")):
        loaders(faces, **{wrong: 1})


@pytest.mark.parametrize("option", ["val_bs", "val_shuffle", "verbose"])
def test_a_loader_of_other_images_refuses_what_it_would_not_use(faces, option):
    with pytest.raises(TypeError, match=f"no argument {option!r}"):
        loaders(faces).test_dl([faces / "a.jpg"], **{option: 8})


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta"])
def test_a_device_that_is_not_here_is_named_before_any_image_is_read(device):
    with pytest.raises(ValueError, match=rf"no such device here: {device} \(.+\)"):
        ExpressionDataLoaders.from_faces([Face("none.png", "happy"), Face("none.png", "sad")], device=device)


def test_a_test_split_may_be_validated_on(faces):
    plain, own = loaders(faces), loaders(faces, valid="test")
    assert own.split_names == ("train", "valid") and len(own.valid_ds) == len(plain["test"].dataset)
    assert len(own.train_ds) == len(plain.train_ds) + len(plain.valid_ds)
    with pytest.raises(ValueError, match="no split 'tset' to validate on, the splits are train, test"):
        loaders(faces, valid="tset")


def test_item_transforms_see_the_decoded_image(faces):
    from fastai.vision.all import PILImage, Resize, Transform

    sizes = []

    class Look(Transform):
        split_idx, order = 0, 2

        def encodes(self, x: PILImage):
            sizes.append((x.size, x.mode))
            return x

    dls = loaders(faces, item_tfms=[Resize(16), Look()])
    sizes.clear()
    assert dls.train_ds[0][0][0].shape == (1, 32, 32) and sizes == [((16, 16), "L")]
    small = dls.train_ds[0][0][0].float()
    dls.valid_ds[0]
    assert sizes == [((16, 16), "L")] * 2  # none for validation: of the training split alone
    assert not torch.equal(small, loaders(faces).train_ds[0][0][0].float())


def test_random_batch_transforms_draw_for_each_view(faces):
    from fastai.vision.all import RandTransform, TensorImage, set_seed

    class Shift(RandTransform):
        def __init__(self):
            super().__init__(p=1.0)

        def before_call(self, b, split_idx):
            super().before_call(b, split_idx)
            self.by = torch.rand(1).item()

        def encodes(self, x: TensorImage):
            return x + self.by

    set_seed(0)
    (q, k), y = loaders(faces, batch_tfms=Shift(), shuffle=False).train.one_batch()
    (q0, k0), y0 = loaders(faces, shuffle=False).train.one_batch()
    by = [(a - b).flatten() for a, b in ((q, q0), (k, k0))]
    assert (
        all(torch.allclose(d, d[0], atol=1e-4) and d[0] > 0 for d in by)
        and abs(by[0][0] - by[1][0]) > 1e-3
        and torch.equal(y, y0)
    )
    assert type(q) is type(q0)


def test_aug_transforms_of_fastai_work_on_pairs(faces):
    from fastai.vision.all import aug_transforms

    dls = loaders(faces, batch_tfms=aug_transforms())
    (q, k), y = dls.one_batch()
    assert q.shape == k.shape == (8, 1, 32, 32) and not torch.allclose(q, k) and len(y) == 8
    assert dls.valid.one_batch()[0].shape[1:] == (1, 32, 32)


def test_a_test_loader_takes_labels_from_class_folders_and_records(faces):
    dls, files = loaders(faces), sorted((faces / "test").rglob("*.png"))[::9]
    for items in (files, list(map(str, files)), [Face(f, f.parent.name, "x", "x") for f in files]):
        x, y = [torch.cat(part) for part in zip(*dls.test_dl(items, with_labels=True))]
        assert [dls.vocab[i] for i in y] == [f.parent.name for f in files] and x.shape == (len(files), 1, 32, 32)
    assert len(next(iter(dls.test_dl(files)))) == 1
    for item in (faces / "bored" / "loose.png", Face(files[0], "bored", "x", "loose.png")):
        with pytest.raises(ValueError, match="loose.png: no class 'bored', expected one of angry, disgust"):
            dls.test_dl([item], with_labels=True)


def test_a_grid_has_the_asked_rows_and_columns(faces):
    import matplotlib.pyplot as plt

    dls = loaders(faces)
    for kwargs, n in ((dict(nrows=1, ncols=3, max_n=3), 3), (dict(nrows=2, max_n=4), 4), (dict(max_n=5), 6)):
        plt.close("all")
        dls.show_batch(**kwargs)
        assert len(plt.gcf().axes) == n


# Layouts that could be read in two ways


@pytest.mark.parametrize(
    "names,expected",
    [
        (("train", "valid", "test"), ("train", "valid", "test")),
        (("Train", "VAL", "Test"), ("train", "valid", "test")),
        (("training", "Validation", "PublicTest"), ("train", "valid", "PublicTest")),
        (("train_set", "test-set"), ("train", "test")),
    ],
)
def test_split_folders_in_any_spelling(tmp_path, names, expected):
    for name in names:
        tree(tmp_path / name)
    assert sorted({f.split for f in folder_faces(tmp_path)}) == sorted(expected)
    assert {f.label for f in folder_faces(tmp_path)} == {"happy", "sad"}


@pytest.mark.parametrize(
    "names,said",
    [
        (("valid", "test"), "split folder (test and valid|valid and test), but no train folder"),
        (("happy", "TEST"), "split folder TEST, but no train folder"),
        (("Train", "training"), "several folders for the split train: Train and training"),
    ],
)
def test_what_looks_half_like_splits_is_refused(tmp_path, names, said):
    for name in names:
        tree(tmp_path / name)
    with pytest.raises(ValueError, match=said):
        folder_faces(tmp_path)


def test_images_beside_class_folders_are_not_lost_in_silence(tmp_path):
    tree(tmp_path)
    before = folder_faces(tmp_path)
    put(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="images beside its class folders, such as loose.png"):
        folder_faces(tmp_path)
    (tmp_path / "loose.png").rename(tmp_path / "._loose.png")  # archives made on a Mac have such files
    assert folder_faces(tmp_path) == before
    tree(tmp_path / "more" / "train")
    put(tmp_path / "more" / "happy" / "a.png")
    with pytest.raises(ValueError, match="happy holds images beside its class folders"):
        folder_faces(tmp_path / "more")


def test_a_column_of_splits_in_any_spelling_and_one_that_may_be_meant(tmp_path):
    rows = pd.DataFrame(dict(image=["a.png", "b.png"], label=["happy", "sad"], Split=["train", "test"]))
    assert [f.split for f in table_faces(rows)] == ["train", "test"]
    with pytest.warns(UserWarning, match="the column 'is_valid' is not read"):
        faces = table_faces(rows.drop(columns="Split").assign(is_valid=[False, True]))
    assert [f.split for f in faces] == ["train", "train"]


def test_splits_of_a_table_in_any_spelling(tmp_path):
    tree(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    splits = ["Training", "train", " VAL", "test", "extra", "TEST"]
    df = pd.DataFrame(dict(image=list(map(str, files[:6])), label="x", split=splits))
    assert [f.split for f in table_faces(df)] == ["train", "train", "valid", "test", "extra", "test"]


def test_labels_of_a_csv_stay_what_they_are(tmp_path):
    tree(tmp_path)
    names = ["NA", "None", "01", "2.50", "null", "true"]
    rows = [f"{f.relative_to(tmp_path)},{name}" for f, name in zip(sorted(tmp_path.rglob("*.png")), names)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *rows]))
    assert [f.label for f in csv_faces(tmp_path / "t.csv")] == names
    (tmp_path / "t.csv").write_text(f"image,label\n{rows[0]}\n{sorted(tmp_path.rglob('*.png'))[1].name},")
    with pytest.raises(ValueError, match="t.csv, line 3 has no label"):
        csv_faces(tmp_path / "t.csv")


def test_linked_folders_are_read_once(tmp_path):
    tree(tmp_path / "data")
    tree(tmp_path / "more")
    before = Counter(f.label for f in folder_faces(tmp_path / "data"))
    happy, more = tmp_path / "data" / "happy", tmp_path / "more" / "happy"
    for name in ("linked", "again"):
        (happy / name).symlink_to(more, target_is_directory=True)
    (more / "back").symlink_to(happy, target_is_directory=True)  # a loop over two folders
    faces = folder_faces(tmp_path / "data")
    added = [f.image for f in faces if f.image.parent.name == "again"]
    assert Counter(f.label for f in faces) == before + Counter(happy=len(added))
    assert sorted(f.name for f in added) == sorted(f.name for f in more.glob("*.png"))


def test_links_and_special_files(tmp_path):
    tree(tmp_path / "data")
    n = len(folder_faces(tmp_path / "data"))
    happy = tmp_path / "data" / "happy"
    (happy / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (happy / "twin.png").symlink_to(sorted(happy.glob("*.png"))[0])
    assert len(folder_faces(tmp_path / "data")) == n  # no folder is read in a loop, and each image is there once
    os.mkfifo(happy / "pipe.png")
    (happy / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (happy / "circle.png").symlink_to(happy / "circle.png")
    with pytest.raises(
        ValueError, match="3 of 15 images cannot be used.*circle.png: Too many levels of symbolic links"
    ):
        folder_dls(tmp_path / "data")
    with pytest.warns(UserWarning, match="no such image file: .*nowhere.png; .*pipe.png is not a regular file"):
        dls = folder_dls(tmp_path / "data", skip_broken=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == n


@pytest.mark.parametrize("file", ["/dev/zero", "pipe.png"])
def test_reading_from_what_has_no_end_is_refused(tmp_path, file):
    path = Path(file) if file.startswith("/") else tmp_path / file
    if not path.exists():
        os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        read_face(path)


def test_a_file_far_too_large_is_refused(tmp_path):
    with open(tmp_path / "huge.png", "wb") as f:
        f.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="huge.png has 268435457 bytes: expected an image of at most"):
        read_face(tmp_path / "huge.png")


def test_all_of_several_batch_transforms_are_applied(faces):
    from fastai.vision.all import TensorImage, Transform

    class Add(Transform):
        def __init__(self, by, order):
            super().__init__()
            self.by, self.order = by, order

        def encodes(self, x: TensorImage):
            return x * self.by if self.order > 20 else x + self.by

    (q, k), _ = loaders(faces, batch_tfms=[Add(3.0, 25), Add(1.0, 15)], shuffle=False).train.one_batch()
    (q0, k0), _ = loaders(faces, shuffle=False).train.one_batch()
    for a, b in ((q, q0), (k, k0)):
        assert torch.allclose(a * 0.25 + 0.5, 3 * (b * 0.25 + 0.5 + 1), atol=1e-5)


def test_a_normalize_among_batch_transforms_replaces_that_of_the_block(faces):
    from fastai.vision.all import Normalize

    dls = loaders(faces, batch_tfms=Normalize.from_stats([0.2], [0.1]))
    norms = [t for t in dls.after_batch.fs if isinstance(t, Normalize)]
    assert len(norms) == 1 and norms[0].mean.item() == pytest.approx(0.2) and not norms[0].by_default
    plain = loaders(faces).valid.one_batch()[0]
    assert torch.allclose(dls.valid.one_batch()[0] * 0.1 + 0.2, plain * 0.25 + 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="one Normalize with statistics"):
        loaders(faces, batch_tfms=Normalize)


def test_files_without_permission_and_headers_without_end_are_broken_images(faces, tmp_path, monkeypatch):
    from ecan_fastai import data

    files = sorted(faces.rglob("*.png"))[:3]
    read = data._bytes

    def fails(file):
        if file == files[0]:
            raise PermissionError(f"permission denied: {file}")
        return read(file)

    monkeypatch.setattr(data, "_bytes", fails)
    header = bytearray(files[1].read_bytes())
    header[16:24] = (2**30).to_bytes(4, "big") * 2
    (tmp_path / "huge.png").write_bytes(header)
    found = broken_faces([Face(f, "x") for f in (*files, tmp_path / "huge.png")], 1)
    assert list(found) == [0, 3] and "permission denied" in found[0] and "huge.png" in found[3]


def test_a_folder_that_cannot_be_listed_is_a_broken_image(tmp_path, monkeypatch):
    tree(tmp_path), tree(tmp_path / "happy" / "closed", 1, ("x",))
    closed, walk, access = tmp_path / "happy" / "closed", os.walk, os.access

    def walks(folder, onerror=None, followlinks=False):
        for root, folders, files in walk(folder, followlinks=followlinks):
            if Path(root) == closed:
                onerror(PermissionError(13, "Permission denied", str(closed)))
                folders.clear()
            else:
                yield root, folders, files

    monkeypatch.setattr(os, "walk", walks)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    said = "1 of 13 images cannot be used.*got the folder .*closed, which cannot be listed"
    with pytest.raises(ValueError, match=said):
        folder_dls(tmp_path)
    with pytest.warns(UserWarning, match="going on without 1 of 13"):
        folder_dls(tmp_path, skip_broken=True)


# Headers that promise too much, and files that hold too little


def jpeg(width=48, height=48):
    "A JPEG file of 48x48 pixels whose header promises others"
    data = bytearray(cv2.imencode(".jpg", np.arange(48 * 48, dtype=np.uint8).reshape(48, 48))[1].tobytes())
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def test_a_header_of_too_many_pixels_is_refused_before_there_is_memory_for_them():
    import tracemalloc

    png = bytearray(cv2.imencode(".png", np.zeros((48, 48), np.uint8))[1].tobytes())
    png[16:24] = (30000).to_bytes(4, "big") * 2
    tracemalloc.start()
    for data in (jpeg(30000, 30000), bytes(png)):
        with pytest.raises(ValueError, match="an image of bytes has 30000x30000 pixels: expected .* at most 268435456"):
            read_face(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert read_face(jpeg(), 1).shape == (48, 48, 1)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.98])
def test_a_jpeg_file_that_was_cut_short_is_broken(tmp_path, share):
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (48, 48), np.uint8))[1].tobytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cannot decode .*cut.jpg: the file was cut short"):
        read_face(tmp_path / "cut.jpg")
    (tmp_path / "more.jpg").write_bytes(whole + b"\0" * 100)  # some cameras append
    assert read_face(tmp_path / "more.jpg").shape == (48, 48, 3)


# Names


@pytest.mark.parametrize(
    "names,said",
    [
        (("Happy", "happy"), "the class names 'Happy' and 'happy' differ only in case or blanks"),
        (("sad ", "sad"), "the class names 'sad' and 'sad ' differ|the class names 'sad ' and 'sad' differ"),
        (("caf\u00e9", "cafe\u0301"), "differ only in case or blanks"),
        (("a\x1b[31m", "b"), r"the class name 'a\\x1b\[31m' has characters that cannot be printed"),
    ],
)
def test_class_names_that_cannot_be_told_apart_or_printed_are_refused(tmp_path, names, said):
    for make in (folder_dls, lambda path: read_faces(path, "folder")):
        with pytest.raises(ValueError, match=said):
            make(tree(tmp_path, 2, names))


def test_blanks_around_the_names_of_a_table_are_no_part_of_them(tmp_path):
    tree(tmp_path)
    rows = [f"happy/{i}.png, happy ,train " for i in range(3)] + [f"sad/{i}.png,sad,train" for i in range(3)]
    (tmp_path / "t.csv").write_text("image,label,split\n" + "\n".join(rows))
    assert {(f.label, f.split) for f in csv_faces(tmp_path / "t.csv")} == {("happy", "train"), ("sad", "train")}


@pytest.mark.parametrize("split", ["a/b", "a\\b", "..", ".hidden", "x" * 101])
def test_splits_that_cannot_be_part_of_a_file_name_are_refused(split):
    faces = [Face(np.zeros((8, 8), np.uint8), "ab"[i % 2], "train" if i < 8 else split) for i in range(9)]
    with pytest.raises(ValueError, match="files are named after the split"):
        ExpressionDataLoaders.from_faces(faces, size=8)


def test_class_names_may_have_slashes_and_dollars_and_are_drawn_as_they_are(tmp_path):
    import matplotlib.pyplot as plt

    names = ["$\\frac$", "fear/surprise"]
    rng = np.random.default_rng(0)
    faces = [Face(rng.integers(0, 255, (32, 32), np.uint8), names[i % 2]) for i in range(24)]
    dls = ExpressionDataLoaders.from_faces(faces, size=32, channels=1, **FAST)
    for dl in dls:
        plt.close("all")
        dl.show_batch(max_n=2)
        plt.gcf().canvas.draw()  # raises for what mathtext cannot read
        assert {ax.get_title() for ax in plt.gcf().axes} <= set(names)


# Tables: what can be wrong


@pytest.mark.parametrize(
    "text,said",
    [
        ("image,label\n", "t.csv has no row below its header"),
        ("", "t.csv is empty"),
        (" \n\n", "t.csv is empty"),
        ("image,label\na.png,happy,train\nb.png,sad,train\n", "t.csv is not a table"),
        ("image,label,label\na.png,happy,sad\n", "t.csv has several columns 'label'"),
        ("image,label\n" + "\n" * 20 + "a.png,\n", "t.csv, line 22 has no label"),
        ("image,label\n,happy\n", "t.csv, line 2: expected a path or an array in 'image', got nan"),
        ("image,label,split\na.png,happy,train\nb.png,sad\n", "t.csv, line 3 has no split"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_its_line(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_faces(tmp_path / "t.csv", "csv")


@pytest.mark.parametrize("sep", [";", "\t"])
def test_semicolons_and_tabs_separate_cells_too(tmp_path, sep):
    rows = ["", "image,label,note", "a.png,happy,2", "b.png,sad,"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "s.csv").write_text("\n".join(r.replace(",", sep) for r in rows).replace("2", "1,5"))
    table, other = read_csv(tmp_path / "t.csv"), read_csv(tmp_path / "s.csv", ("image", "label", "note"))
    assert other["note"].tolist()[0] == "1,5" and list(other.index) == [3, 4]
    pd.testing.assert_frame_equal(other.drop(columns="note"), table.drop(columns="note"))


def test_cells_that_a_spreadsheet_would_run_are_written_as_text(tmp_path):
    cells = ["=1+2", "+x", "-x", "@x", "\t=x", "-1", "+2.5", "plain", "a=b"]
    write_csv(pd.DataFrame(dict(image=cells, n=range(9))), tmp_path / "t.csv")
    back = pd.read_csv(tmp_path / "t.csv", dtype=str)
    assert list(back["image"]) == ["'=1+2", "'+x", "'-x", "'@x", "'\t=x", "-1", "+2.5", "plain", "a=b"]
    assert list(back["n"]) == list(map(str, range(9)))


# Arguments that do not go together


def test_balanced_needs_shuffling(faces):
    with pytest.raises(ValueError, match="balanced samples the training images at random: leave out shuffle"):
        loaders(faces, balanced=True, shuffle=False)
    assert loaders(faces, balanced=True, shuffle=True).train.item_weights


def test_a_split_called_valid_seen_is_not_overwritten(tmp_path):
    tree(tmp_path / "train"), tree(tmp_path / "valid_seen", 2)
    assert folder_dls(tmp_path).split_names == ("train", "valid", "valid_seen")
    with pytest.raises(ValueError, match="the data has a split of that name"):
        folder_dls(tmp_path, train_all=True)


def test_a_class_all_of_whose_images_are_broken_is_no_class(tmp_path):
    tree(tmp_path, classes=("happy", "sad", "fear"))
    for file in (tmp_path / "fear").iterdir():
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="going on without 6 of 18"):
        assert list(folder_dls(tmp_path, skip_broken=True).vocab) == ["happy", "sad"]


def test_a_loader_of_other_images_takes_a_list_and_known_options(faces):
    dls, files = loaders(faces), sorted((faces / "test").rglob("*.png"))[:5]
    assert dls.test_dl(files, bs=2).bs == 2
    with pytest.raises(TypeError, match="no argument 'batch_size'"):
        dls.test_dl(files, batch_size=2)
    for items in ([], faces):
        with pytest.raises(ValueError, match="expected a list of images"):
            dls.test_dl(items)


def test_faces_are_records(faces):
    records = (f for f in folder_faces(faces))
    assert len(ExpressionDataLoaders.from_faces(records, size=32, channels=1, bs=8, num_workers=0).train_ds) > 50
    with pytest.raises(TypeError, match="expected `Face` records, got 'a.png': files in class folders are read by"):
        ExpressionDataLoaders.from_faces(["a.png"])


def test_a_share_to_hold_out_is_told_to_have_no_effect_beside_a_valid_split(faces):
    with pytest.warns(UserWarning, match="valid_pct has no effect: the data has a split 'test' to validate on"):
        folder_dls(faces, valid="test", valid_pct=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder_dls(faces, valid="test")


def test_images_are_found_without_the_systems_table_of_types(tmp_path):
    for suffix in ("webp", "jfif", "png", "JPG", "avif", "jp2", "txt"):
        (tmp_path / f"a.{suffix}").write_bytes(b"x")
    code = (
        "import mimetypes; mimetypes.knownfiles = []\n"
        "from ecan_fastai.readers.records import image_files; import sys\n"
        "print(sorted(f.suffix for f in image_files(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == str([".JPG", ".avif", ".jfif", ".jp2", ".png", ".webp"]), done.stderr


def test_names_of_classes_and_images_to_test_are_checked(faces):
    table = pd.DataFrame({"image": map(str, get_image_files(faces / "train"))})
    table["label"] = [Path(f).parent.name for f in table.image]
    with pytest.raises(ValueError, match="expected text as the names of classes in the vocabulary, got 0"):
        ExpressionDataLoaders.from_df(table, vocab=[0, 1])
    dls = ExpressionDataLoaders.from_df(table, size=16, channels=1, num_workers=0)
    with pytest.raises(ValueError, match="got a table: use the list of its column"):
        dls.test_dl(table)
    with pytest.raises(ValueError, match="expected a list of images, got"):
        dls.test_dl(o for o in table.image)
    assert len(dls.test_dl(list(table.image[:3])).dataset) == 3
