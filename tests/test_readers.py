import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from ecan_fastai.learner import baseline_learner, ecan_learner
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.readers.affectnet import *
from ecan_fastai.readers.ckplus import *
from ecan_fastai.readers.expw import *
from ecan_fastai.readers.factory import *
from ecan_fastai.readers.ferplus import *
from ecan_fastai.readers.folder import csv_faces, table_faces
from ecan_fastai.readers.rafdb import *
from ecan_fastai.readers.records import *
from ecan_fastai.readers.records import EXPRESSIONS, Face, split_by_group

pytestmark = pytest.mark.filterwarnings("ignore:this .* differs from the published one")
FAST = dict(bs=4, num_workers=0, device="cpu")


def put(file, value=90, shape=(60, 50, 3)):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), np.full(shape, value, np.uint8))


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def rafdb_list(path, n=28):
    lines = []
    for i in range(n):
        split = "test" if i % 4 == 3 else "train"
        put(path / "Image" / "aligned" / f"{split}_{i:05}_aligned.jpg", i)
        lines.append(f"{split}_{i:05}.jpg {i % 7 + 1}")
    write(path / "EmoLabel" / "list_patition_label.txt", "\n".join(lines) + "\n")
    return path


def rafdb_folders(path):
    for split, n in (("train", 3), ("test", 1)):
        for k in range(1, 8):
            for i in range(n):
                put(path / "DATASET" / split / str(k) / f"{split}_{k}{i}_aligned.jpg", k)
    return path


VOTES = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"


def ferplus_csv(path, rows, icml=False):
    "Rows of (usage, image name, votes); every image is grey, its value the row's number"
    write(
        path / "fer2013new.csv",
        "\n".join([VOTES, *(",".join(map(str, (u, name, *votes))) for u, name, votes in rows)]) + "\n",
    )
    pixels = [" ".join([str(i)] * 48 * 48) for i in range(len(rows))]
    if icml:
        write(
            path / "icml_face_data.csv",
            "emotion, Usage, pixels\n" + "".join(f"0,{u},{p}\n" for (u, *_), p in zip(rows, pixels)),
        )
    else:
        write(
            path / "fer2013.csv", "emotion,pixels,Usage\n" + "".join(f"0,{p},{u}\n" for (u, *_), p in zip(rows, pixels))
        )
    return path


def one_hot(i, n=10):
    return [n if k == i else 0 for k in range(10)]


def affectnet_npy(path, n=16):
    for split in ("train_set", "val_set"):
        for i in range(n):
            put(path / split / "images" / f"{i}.jpg", i)
            (path / split / "annotations").mkdir(parents=True, exist_ok=True)
            np.save(
                path / split / "annotations" / f"{i}_exp.npy", np.array(str(i % 8)) if i % 2 else np.int64(i % 8)
            )  # both occur
            np.save(path / split / "annotations" / f"{i}_val.npy", np.array("0.5"))
    return path


def affectnet_csv(path):
    header = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal\n"
    for name in ("training", "validation"):
        rows = []
        for k in range(11):
            put(path / "Manually_Annotated_Images" / name / f"{k}.jpg", k)
            rows.append(f"{name}/{k}.jpg,0,0,50,60,1;2,{k},0.1,0.2")
        write(path / f"{name}.csv", header + "\n".join(rows) + "\n")
    return path


def expw(path, photos=40):
    lines = []
    for i in range(photos):
        img = np.zeros((40, 60, 3), np.uint8)
        img[5:25, 10:40] = 100 + i
        file = path / "image" / "origin" / f"photo_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), img)
        for face in range(2):
            lines.append(f"photo_{i}.png {face} 5 10 40 25 9.9 {(i + face) % 7}")
    write(path / "label.lst", "\n".join(lines) + "\n")
    return path


def ckplus(path, subjects=30):
    names = ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise")
    for s in range(subjects):
        for k in range(3):
            put(path / "CK+48" / names[(s + k) % 7] / f"S{s:03}_00{k}_0000001{k}.png", s, (48, 48))
    return path


def labels(faces):
    return {f.split: sorted({g.label for g in faces if g.split == f.split}) for f in faces}


# Names


@pytest.mark.parametrize(
    "said,meant",
    [
        ("happiness", "happy"),
        ("Anger", "angry"),
        (" SADNESS ", "sad"),
        ("surprised", "surprise"),
        ("contempt", "contempt"),
        ("neutral", "neutral"),
        ("Positive", "Positive"),
        ("7", "7"),
    ],
)
def test_expression_names(said, meant):
    assert expression_name(said) == meant


# RAF-DB


@pytest.mark.parametrize("make", [rafdb_list, rafdb_folders, lambda p: rafdb_list(p / "basic").parent])
def test_rafdb_in_both_layouts(tmp_path, make):
    faces = rafdb_faces(make(tmp_path))
    assert (
        labels(faces) == {"train": list(EXPRESSIONS), "test": list(EXPRESSIONS)}
        and len(faces) == 28
        and detect_kind(tmp_path) == "rafdb"
    )
    dls = ExpressionDataLoaders.from_rafdb(tmp_path, size=32, valid_pct=0.3, **FAST)
    assert (
        dls.split_names == ("train", "valid", "test")
        and tuple(dls.vocab) == EXPRESSIONS
        and dls.one_batch()[0][0].shape == (4, 3, 32, 32)
    )


def test_rafdb_ids_are_its_own(tmp_path):
    named = {int(f.name.split("_")[-2]): f.label for f in rafdb_faces(rafdb_list(tmp_path))}
    assert [named[i] for i in range(7)] == ["surprise", "fear", "disgust", "happy", "sad", "angry", "neutral"]


def test_rafdb_counts_are_checked(tmp_path):
    with pytest.warns(UserWarning, match="this RAF-DB differs.*train happy 3 instead of 4772"):
        rafdb_faces(rafdb_folders(tmp_path))
    from ecan_fastai.readers.rafdb import RAFDB_COUNTS

    assert {k: sum(v.values()) for k, v in RAFDB_COUNTS.items()} == {"train": 12271, "test": 3068}


def test_rafdb_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        rafdb_faces(tmp_path / "x")
    (tmp_path / "e").mkdir()
    with pytest.raises(ValueError, match="is not RAF-DB: expected EmoLabel"):
        rafdb_faces(tmp_path / "e")
    write(tmp_path / "e" / "EmoLabel" / "list_patition_label.txt", "train_00001.jpg 5\n")
    with pytest.raises(ValueError, match="aligned images are missing"):
        rafdb_faces(tmp_path / "e")
    put(tmp_path / "e" / "Image" / "aligned" / "train_00001_aligned.jpg")
    write(tmp_path / "e" / "EmoLabel" / "list_patition_label.txt", "\n")
    with pytest.raises(ValueError, match="list_patition_label.txt is empty"):
        rafdb_faces(tmp_path / "e")
    for line, said in (
        ("train_00001.jpg 9", "line 2: expected a label from 1 to 7, got '9'"),
        ("nonsense", "line 2: expected a line like"),
        ("dev_1.jpg 3", "line 2: expected a line like"),
    ):
        write(tmp_path / "e" / "EmoLabel" / "list_patition_label.txt", f"train_00001.jpg 5\n{line}\n")
        with pytest.raises(ValueError, match=said):
            rafdb_faces(tmp_path / "e")
    put(rafdb_folders(tmp_path / "f") / "DATASET" / "train" / "8" / "x.jpg")
    with pytest.raises(ValueError, match="8: expected a class folder from 1 to 7, got '8'"):
        rafdb_faces(tmp_path / "f")
    (rafdb_list(tmp_path / "g") / "Image" / "aligned" / "test_00003_aligned.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 28 images cannot be used.*test_00003_aligned.jpg"):
        ExpressionDataLoaders.from_rafdb(tmp_path / "g", size=32, **FAST)


# FER+


def test_ferplus_label_needs_a_majority_of_the_votes_that_are_not_single():
    cases = {
        (0, 6, 0, 0, 0, 0, 0, 0, 0, 4): "happy",
        (5, 5, 0, 0, 0, 0, 0, 0, 0, 0): None,
        (5, 1, 1, 1, 1, 1, 0, 0, 0, 0): "neutral",
        (2, 2, 2, 2, 2, 0, 0, 0, 0, 0): None,
        (0, 0, 0, 0, 0, 0, 0, 8, 2, 0): "contempt",
        (0, 0, 0, 0, 0, 0, 0, 0, 9, 1): None,
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 10): None,
        (1,) * 10: None,
    }
    for votes, label in cases.items():
        assert ferplus_label(votes) == label, votes


@pytest.mark.parametrize("icml", [False, True])
def test_ferplus_over_fer2013(tmp_path, icml):
    rows = [("Training", f"fer{i:07}.png", one_hot(i % 8)) for i in range(24)] + [
        ("Training", "", one_hot(9)),
        ("Training", "fer1.png", [5, 5, *[0] * 8]),
    ]
    rows += [(u, f"fer{u}{i}.png", one_hot(i)) for u in ("PublicTest", "PrivateTest") for i in range(8)]
    faces = ferplus_faces(ferplus_csv(tmp_path, rows, icml))
    assert (
        Counter(f.split for f in faces) == {"train": 24, "PublicTest": 8, "PrivateTest": 8}
        and detect_kind(tmp_path) == "ferplus"
    )
    assert [f.label for f in faces[:8]] == [
        "neutral",
        "happy",
        "surprise",
        "sad",
        "angry",
        "disgust",
        "fear",
        "contempt",
    ]
    assert (
        all(f.image[0, 0] == i for i, f in enumerate(faces[:24])) and faces[24].image[0, 0] == 26
    )  # the pixels are those of the same row
    dls = ExpressionDataLoaders.from_path(tmp_path, **FAST)
    assert (
        len(dls.vocab) == 8
        and dls.one_batch()[0][0].shape[1] == 1
        and dls.split_names == ("train", "valid", "PublicTest", "PrivateTest")
    )


def test_ferplus_folders(tmp_path):
    for folder in ("FER2013Train", "FER2013Valid", "FER2013Test"):
        lines = []
        for i in range(16):
            put(tmp_path / folder / f"fer{i:07}.png", i, (48, 48))
            lines.append(f'fer{i:07}.png,"(0, 0, 48, 48)",' + ",".join(map(str, one_hot(i % 8))))
        write(tmp_path / folder / "label.csv", "\n".join(lines) + "\n")
    faces = read_faces(tmp_path)
    assert (
        labels(faces) == {s: sorted(EXPRESSIONS_8) for s in ("train", "PublicTest", "PrivateTest")} and len(faces) == 48
    )
    assert len(ExpressionDataLoaders.from_ferplus(tmp_path, **FAST)["PrivateTest"].dataset) == 16


def test_ferplus_mistakes_are_named(tmp_path):
    rows = [("Training", "a.png", one_hot(0)), ("PublicTest", "b.png", one_hot(1))]
    path = ferplus_csv(tmp_path / "a", rows)
    (path / "fer2013.csv").unlink()
    with pytest.raises(ValueError, match="has votes alone: expected fer2013.csv or icml_face_data.csv"):
        ferplus_faces(path)
    ferplus_csv(path, rows[::-1])
    write(path / "fer2013new.csv", (ferplus_csv(tmp_path / "b", rows) / "fer2013new.csv").read_text())
    with pytest.raises(ValueError, match="line 2: Usage is Training, but .* is of PublicTest"):
        ferplus_faces(path)
    write(path / "fer2013new.csv", f"{VOTES}\nTraining,a.png,1,2,3,4,5,6,7,8,9,10\n")
    with pytest.raises(ValueError, match="has 1 rows and .* 2: expected one for each image"):
        ferplus_faces(path)
    with pytest.raises(ValueError, match="is not FER"):
        ferplus_faces(tmp_path)


@pytest.mark.parametrize("maker", [ecan_learner, baseline_learner])
def test_soft_labels_train_on_shares_and_evaluate_on_labels(tmp_path, maker):
    rows = [
        ("Training", f"fer{i}.png", [7 if k == i % 8 else 3 if k == (i + 1) % 8 else 0 for k in range(10)])
        for i in range(32)
    ] + [("PublicTest", f"p{i}.png", one_hot(i)) for i in range(8)]
    dls = ExpressionDataLoaders.from_ferplus(
        ferplus_csv(tmp_path, rows), soft_labels=True, n_views=2 if maker is ecan_learner else 1, valid_pct=0.25, **FAST
    )
    face = dls.train_ds.items[0]
    y = dls.train_ds[0][1]
    assert (
        y.shape == (8,)
        and y.sum() == pytest.approx(1)
        and float(y.max()) == pytest.approx(0.7)
        and dls.vocab[int(y.argmax())] == face.label
    )
    assert dls.valid_ds[0][1].ndim == 0 and dls.train.decode_batch(dls.one_batch())[0][1] in EXPRESSIONS_8
    learn = maker(dls, "resnet10t", path=tmp_path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit(1, 0.01)
    assert torch.isfinite(torch.tensor(learn.recorder.values[0][:2])).all()
    assert all(0 <= v <= 1 for v in learn.validate(0)[1:])  # on the training images, whose targets are shares
    assert learn.get_preds(ds_idx=0)[1].ndim == 1
    if maker is ecan_learner:
        assert learn.model.bank.y.dtype == torch.long and set(learn.model.bank.rows()[1].tolist()) <= set(range(8))


def test_soft_labels_go_with_all_crops_and_need_the_classes_in_order(tmp_path):
    rows = [("Training", f"fer{i}.png", one_hot(i % 8)) for i in range(16)]
    path = ferplus_csv(tmp_path, rows)
    dls = ExpressionDataLoaders.from_ferplus(path, soft_labels=True, all_crops=True, valid_pct=0.4, **FAST)
    learn = ecan_learner(dls, "resnet10t", path=tmp_path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit(1, 0.01)
    assert torch.isfinite(torch.tensor(learn.recorder.values[0][0]))
    with pytest.raises(ValueError, match="its largest share is not that of"):
        ExpressionDataLoaders.from_ferplus(
            path,
            soft_labels=True,
            vocab=["neutral", "happy", "surprise", "sad", "angry", "disgust", "fear", "contempt"],
            **FAST,
        )


def test_soft_cross_entropy_is_that_of_the_shares_and_the_rest_sees_the_largest():
    from ecan_fastai.losses import ECANLoss

    torch.manual_seed(0)
    out = dict(
        logits=torch.randn(6, 3),
        z_q=torch.randn(6, 4),
        z_k=torch.randn(6, 4),
        bank_z=torch.randn(12, 4),
        bank_y=torch.arange(12) % 3,
        bank_order=torch.arange(12),
        centers=torch.randn(3, 4),
    )
    hard, shares = torch.tensor([0, 1, 2, 0, 1, 2]), torch.full((6, 3), 0.1)
    shares[range(6), hard] = 0.8
    soft, plain = ECANLoss(), ECANLoss()
    a, b = soft(out, shares), plain(out, hard)
    ce = -(shares.double() * out["logits"].double().log_softmax(1)).sum(1).mean()
    assert (
        soft.parts["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
        and soft.parts["ensc"] == plain.parts["ensc"]
        and soft.parts["mva"] == plain.parts["mva"]
    )
    assert (a - b).item() == pytest.approx(0.8 * (soft.parts["ce"] - plain.parts["ce"]).item(), rel=1e-4)


def test_soft_labels_need_votes(tmp_path):
    with pytest.raises(ValueError, match="soft labels need a share of votes for each of the 7 classes, got 0"):
        ExpressionDataLoaders.from_rafdb(rafdb_folders(tmp_path), size=32, soft_labels=True, **FAST)


# FER+ as a table over FER2013's folders


def ferplus_table(path, splits=("Training", "PublicTest"), order=None):
    "FER2013's folders with a table of votes beside them, 16 images a split"
    header = ["split", "class", "file", "ambiguous", *VOTES.split(",")[2:]]
    rows = []
    for usage in splits:
        for i in range(16):
            put(path / ("train" if usage == "Training" else "test") / "happy" / f"{usage}_{i}.png", i, (48, 48))
            votes = [7 if k == i % 8 else 3 if k == (i + 1) % 8 else 0 for k in range(10)]
            rows.append(dict(zip(header, (usage, "happy", f"{usage}_{i}.png", 0, *votes))))
    order = order or header
    lines = [",".join(order), *(",".join(str(row[c]) for c in order) for row in rows)]
    return write(path / "ferplus_votes.csv", "\n".join(lines) + "\n").parent


def test_ferplus_votes_over_the_folders_of_fer2013(tmp_path):
    faces = ferplus_faces(ferplus_table(tmp_path / "a"))
    assert detect_kind(tmp_path / "a") == "ferplus" and Counter(f.split for f in faces) == dict(train=16, PublicTest=16)
    names = [FERPLUS_VOTES[i % 8] for i in range(16)] * 2
    assert [f.label for f in faces] == names and [f.image.stem.split("_")[1] for f in faces[:16]] == [
        *map(str, range(16))
    ]
    assert dict(zip(EXPRESSIONS_8, faces[0].shares)) == {
        **dict.fromkeys(EXPRESSIONS_8, 0),
        "neutral": 0.7,
        "happy": 0.3,
    }
    (tmp_path / "a" / "ferplus_votes.csv").rename(tmp_path / "votes.csv")
    assert ferplus_faces(tmp_path / "a", tmp_path / "votes.csv") == faces and detect_kind(tmp_path / "a") == "fer2013"
    for soft in (False, True):
        dls = ExpressionDataLoaders.from_ferplus(
            tmp_path / "a", votes=tmp_path / "votes.csv", soft_labels=soft, valid_pct=0.4, **FAST
        )
        assert dls.split_names == ("train", "valid", "PublicTest") and dls.train_ds[0][1].ndim == int(soft)


def test_votes_are_read_by_the_names_of_their_columns(tmp_path):
    header = ["split", "class", "file", "ambiguous", *VOTES.split(",")[2:]]
    plain = ferplus_faces(ferplus_table(tmp_path / "a"))
    mixed = ferplus_faces(ferplus_table(tmp_path / "b", order=header[::-1]))
    assert [(f.label, f.shares) for f in plain] == [(f.label, f.shares) for f in mixed]
    rows = [("Training", f"{i}.png", one_hot(i % 8)) for i in range(8)]
    path = ferplus_csv(tmp_path, rows)
    before = ferplus_faces(path)
    cells = [line.split(",") for line in (path / "fer2013new.csv").read_text().splitlines()]
    write(path / "fer2013new.csv", "\n".join(",".join([*c[:2], *c[:1:-1]]) for c in cells))
    assert [(f.label, f.shares) for f in ferplus_faces(path)] == [(f.label, f.shares) for f in before]


def test_mistakes_in_a_table_of_votes_are_named(tmp_path):
    path = ferplus_table(tmp_path)
    text = (path / "ferplus_votes.csv").read_text()
    for old, new, said in (
        ("happiness", "joyful", "expected one column of votes for happy, got 0"),
        ("Training_1.png,0,0", "Training_1.png,0,many", "line 3: expected ten numbers of votes, got many"),
        ("Training,happy,Training_2.png", "Test,happy,x.png", "line 4: expected a Usage of Training"),
        ("Training,happy,Training_2.png", "Training,,x.png", "line 4: expected a class and a file, got nan"),
        ("split,class", "part,class", "has no column 'split'"),
    ):
        write(path / "ferplus_votes.csv", text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            ferplus_faces(path)
    with pytest.raises(ValueError, match="is about FER2013's folders: expected train/ and test/"):
        ferplus_faces(tmp_path / "train", path / "ferplus_votes.csv")


# AffectNet


def test_affectnet_in_both_layouts(tmp_path):
    faces = affectnet_faces(affectnet_npy(tmp_path / "a"))
    assert (
        Counter(f.split for f in faces) == {"train": 16, "val_set": 16} and detect_kind(tmp_path / "a") == "affectnet"
    )
    assert [next(f.label for f in faces if f.image.stem == str(i)) for i in range(8)] == [
        "neutral",
        "happy",
        "sad",
        "surprise",
        "fear",
        "disgust",
        "angry",
        "contempt",
    ]
    old = affectnet_faces(affectnet_csv(tmp_path / "b"))
    assert [f.label for f in old] == [
        f.label for f in sorted(faces, key=lambda f: (f.split, int(f.image.stem))) if int(f.image.stem) < 8
    ] and detect_kind(tmp_path / "b") == "affectnet"
    for path in (tmp_path / "a", tmp_path / "b"):
        assert {f.label for f in affectnet_faces(path)} - {f.label for f in affectnet_faces(path, contempt=False)} == {
            "contempt"
        }
    dls = ExpressionDataLoaders.from_affectnet(
        tmp_path / "a", contempt=False, size=32, train_all=True, valid_pct=0.5, **FAST
    )
    assert len(dls.vocab) == 7 and dls.split_names == ("train", "valid_seen", "val_set")


def test_published_counts_add_up_and_are_checked(tmp_path):
    "Totals as their papers give them: 287,651 (283,901 without contempt) and 4,000; 91,793"
    train = AFFECTNET_COUNTS["train"]
    assert (
        sum(train.values()) == 287651
        and sum(train.values()) - train["contempt"] == 283901
        and sum(AFFECTNET_COUNTS["val_set"].values()) == 4000
        and sum(EXPW_COUNTS.values()) == 91793
    )
    for i, (load, make, said) in enumerate(
        [
            (
                affectnet_faces,
                affectnet_npy,
                r"this AffectNet differs.*instead of 134415.*val_set contempt \d+ instead of 499",
            ),
            (affectnet_faces, affectnet_csv, r"this AffectNet differs.*val_set contempt \d+ instead of 500"),
            (expw_faces, expw, "this ExpW differs.*train happy .* instead of 30537"),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        with pytest.warns(UserWarning, match=said):
            load(make(tmp_path / str(i)))
    (tmp_path / "f").mkdir()
    with pytest.warns(UserWarning, match="this FER.* 1 rows of train instead of 28709"):
        ferplus_faces(ferplus_csv(tmp_path / "f", [("Training", "a.png", one_hot(0))]))


def test_affectnet_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not AffectNet"):
        affectnet_faces(tmp_path)
    path = affectnet_npy(tmp_path / "a")
    before = affectnet_faces(path)
    (path / "val_set" / "annotations" / "._3_exp.npy").write_bytes(b"of a Mac's archive")
    assert affectnet_faces(path) == before
    np.save(path / "val_set" / "annotations" / "3_exp.npy", np.array("12"))
    with pytest.raises(ValueError, match="3_exp.npy: expected a label from 0 to 7, got '12'"):
        affectnet_faces(path)
    (path / "val_set" / "annotations" / "3_exp.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="3_exp.npy is not an annotation"):
        affectnet_faces(path)
    np.save(
        path / "val_set" / "annotations" / "3_exp.npy", np.array([object()]), allow_pickle=True
    )  # a pickle is never loaded
    with pytest.raises(ValueError, match="3_exp.npy is not an annotation"):
        affectnet_faces(path)
    for wrong, said in (
        (np.float64(2.5), "expected a label from 0 to 7, got 2.5"),
        (np.zeros(3), "got an array of shape"),
    ):
        np.save(path / "val_set" / "annotations" / "3_exp.npy", wrong)
        with pytest.raises(ValueError, match=said):
            affectnet_faces(path)
    with open(path / "val_set" / "annotations" / "3_exp.npy", "wb") as f:  # a header of a petabyte
        np.lib.format.write_array_header_1_0(f, dict(descr="<f8", fortran_order=False, shape=(2**47,)))
    with pytest.raises(ValueError, match="3_exp.npy is not an annotation"):
        affectnet_faces(path)
    old = affectnet_csv(tmp_path / "b")
    text = (old / "validation.csv").read_text()
    for wrong, said in (
        ("1;2,2.5,", "line 4: expected a label from 0 to 10, got '2.5'"),
        ("1;2,,", "line 4: .*got nan"),
    ):
        write(old / "validation.csv", text.replace("1;2,2,", wrong))
        with pytest.raises(ValueError, match=said):
            affectnet_faces(old)
    write(old / "validation.csv", text.replace("validation/2.jpg,", ","))
    with pytest.raises(ValueError, match="line 4 has no subDirectory_filePath"):
        affectnet_faces(old)
    write(old / "validation.csv", text)
    (old / "Manually_Annotated_Images").rename(old / "images")
    with pytest.raises(ValueError, match="images are missing: expected the folder Manually_Annotated_Images"):
        affectnet_faces(old)
    (old / "validation.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no such file: .*validation.csv"):
        affectnet_faces(old)


# Sets without splits


def test_expw_faces_are_cut_out_and_split_by_photograph(tmp_path):
    faces = expw_faces(expw(tmp_path))
    assert (
        len(faces) == 80 and {f.split for f in faces} == {"train", "valid", "test"} and detect_kind(tmp_path) == "expw"
    )
    where = {}
    for f in faces:
        where.setdefault(f.image.file, set()).add(f.split)
    assert all(len(splits) == 1 for splits in where.values())
    dls = ExpressionDataLoaders.from_expw(tmp_path, size=32, level="none", **FAST)
    x, _ = dls.valid_ds[0]
    assert x.shape == (3, 32, 32) and x.min() == x.max() == 100 + int(
        dls.valid_ds.items[0].image.file.stem.split("_")[1]
    )  # the box alone, none of the black around it
    assert len(dls["test"].dataset) + len(dls.valid_ds) + len(dls.train_ds) == 80


def test_expw_mistakes_are_named(tmp_path):
    path = expw(tmp_path)
    for line, said in (
        ("photo_0.png 0 5 10 40 25 9.9", "line 1: expected image_name"),
        ("photo_0.png 0 5 10 40 25 9.9 7", "line 1: expected a label from 0 to 6"),
        ("photo_0.png 0 5 ten 40 25 9.9 1", "line 1: expected a box in whole pixels"),
    ):
        write(path / "label.lst", line)
        with pytest.raises(ValueError, match=said):
            expw_faces(path)
    with pytest.raises(ValueError, match="is not ExpW"):
        expw_faces(tmp_path / "image")


def test_a_box_outside_the_photograph_is_named(tmp_path):
    from ecan_fastai.data import PhotoCrop, read_face

    put(tmp_path / "a.png", 7, (20, 30))
    assert read_face(PhotoCrop(tmp_path / "a.png", -5, -5, 10, 8), 1).shape == (8, 10, 1)
    with pytest.raises(
        ValueError, match="left 40, top 0, right 50, bottom 10.: the box lies outside the image of 30x20"
    ):
        read_face(PhotoCrop(tmp_path / "a.png", 40, 0, 50, 10), 1)
    for box in ((-20, 0, -5, 10), (0, -20, 10, -5)):
        with pytest.raises(ValueError, match="the box lies outside the image"):
            read_face(PhotoCrop(tmp_path / "a.png", *box), 1)


@pytest.mark.parametrize("blank", ["", "\n", "\n \n\n"])
def test_rows_of_a_table_have_the_numbers_of_their_lines(tmp_path, blank):
    (tmp_path / "a.csv").write_text(f"{blank}image,label\na.png,happy\n\nb.png,sad\n")
    first = blank.count("\n") + 2
    assert list(read_csv(tmp_path / "a.csv").index) == [first, first + 2]


def test_ckplus_folds_hold_every_subject_once(tmp_path):
    path, tested = ckplus(tmp_path), []
    for fold in range(10):
        faces = ckplus_faces(path, fold)
        subjects = {s: {f.image.name[:4] for f in faces if f.split == s} for s in ("train", "valid", "test")}
        assert (
            not subjects["train"] & subjects["valid"]
            and not subjects["train"] & subjects["test"]
            and not subjects["valid"] & subjects["test"]
        )
        tested += subjects["test"]
    assert sorted(tested) == [f"S{i:03}" for i in range(30)] and {f.label for f in faces} == set(EXPRESSIONS_8) - {
        "neutral"
    }
    dls = ExpressionDataLoaders.from_path(path / "CK+48", **FAST)
    assert dls.train.one_batch()[0][0].shape == (4, 1, 40, 40)
    with pytest.raises(ValueError, match="expected a fold from 0 to 9, got 10"):
        ckplus_faces(path, 10)
    put(path / "CK+48" / "fear" / "me.png")
    with pytest.raises(ValueError, match="me.png: expected a name like S010_004_00000017.png"):
        ckplus_faces(path)


def test_the_valid_split_of_a_fold_is_the_test_split_of_the_next(tmp_path):
    path = ckplus(tmp_path)
    folds = [ckplus_faces(path, fold) for fold in range(10)]
    for fold, faces in enumerate(folds):
        valid, following = [f.split == "valid" for f in faces], [f.split == "test" for f in folds[(fold + 1) % 10]]
        assert valid == following and any(valid)


def test_too_few_groups_are_told():
    with pytest.raises(ValueError, match="10 folds need as many groups .*, got 3"):
        split_by_group([Face(str(i), "ab"[i % 2]) for i in range(9)], [i % 3 for i in range(9)])


def test_a_column_of_splits_that_is_named_must_be_there(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8), np.uint8))
    (tmp_path / "t.csv").write_text("\nimage,label,part\na.png ,happy,test\n")
    (face,) = csv_faces(tmp_path / "t.csv", split_col="part")
    assert face.split == "test" and Path(face.image) == tmp_path / "a.png"
    assert csv_faces(tmp_path / "t.csv")[0].split == "train"
    with pytest.raises(ValueError, match="t.csv has no column 'parts', its columns are image, label, part"):
        csv_faces(tmp_path / "t.csv", split_col="parts")
    with pytest.raises(ValueError, match="the table has no column 'parts'"):
        table_faces(pd.read_csv(tmp_path / "t.csv"), tmp_path, split_col="parts")


def test_the_folders_of_runs_are_no_data(faces, tmp_path):
    def run(folder):
        folder.mkdir(parents=True)
        shutil.copy(image, folder / "confusion_test.png")
        for name in ("config.json", "SHA256SUMS"):
            (folder / name).write_text("{}")

    image = next((faces / "train").rglob("*.png"))
    for where in ("split", "classes"):
        shutil.copytree(faces if where == "split" else faces / "train", tmp_path / where)
        before = read_faces(tmp_path / where)
        (tmp_path / where / "runs").mkdir()
        assert read_faces(tmp_path / where) == before
        for folder in ("runs/a", "runs/reproduce/folder/b", "mine"):
            run(tmp_path / where / folder)
        assert read_faces(tmp_path / where) == before
        assert len(image_files(tmp_path / where)) == len(before)


def test_photographs_of_a_format_that_is_not_read_are_told(faces):
    (faces / "train" / "happy" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    try:
        with pytest.warns(UserWarning, match=r"photographs under .*happy are passed over \(1, such as IMG_1.HEIC\)"):
            assert not [f for f in read_faces(faces) if str(f.image).endswith(".HEIC")]
    finally:
        (faces / "train" / "happy" / "IMG_1.HEIC").unlink()


@pytest.mark.parametrize("mark, sep", [("sep=;\n", ";"), ("SEP=,\r\n", ","), ("\nsep=\t\n", "\t")])
def test_a_line_that_names_the_separator_is_no_header(tmp_path, mark, sep):
    write(tmp_path / "a.csv", mark + f"image{sep}label\na.png{sep}happy\n")
    table = read_csv(tmp_path / "a.csv", ("image", "label"))
    assert table.values.tolist() == [["a.png", "happy"]] and table.index[0] == mark.count("\n") + 2


def test_expw_without_its_images_names_their_folder(tmp_path):
    path = expw(tmp_path / "e")
    (path / "image").rename(path / "images")
    with pytest.raises(ValueError, match="images are missing: expected the folder .*image/origin"):
        expw_faces(path)
