"Tables and lists of labels, in the forms of every data set, with something wrong in a cell, a line, or the file"

import csv
import functools
import io

import cv2
import numpy as np

from ecan_fastai.check import check_data
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.readers.affectnet import AFFECTNET_IDS, affectnet_faces
from ecan_fastai.readers.expw import expw_faces
from ecan_fastai.readers.factory import read_faces
from ecan_fastai.readers.fer2013 import FER2013_IDS, fer2013_faces
from ecan_fastai.readers.ferplus import FERPLUS_VOTES, ferplus_faces
from ecan_fastai.readers.rafdb import RAFDB_IDS, rafdb_faces

from .trial import Trial

LABELS = ["NA", "None", "nan", "null", "01", "1e5", "2.50", "-1", "=1", "true", "label", "image", "file", "p_x", "all"]
LABELS += [
    "a/b",
    "$x$",
    "\u00fc",
    "\u65e5\u672c",
    "a,b",
    'a"b',
    "a b",
    "a'b",
    "#x",
    "0x10",
    "inf",
    "split",
    "models",
    "train",
]
WRONG = ["", " ", "nan", "x", "2.5", "-1", "99", "1_0", "1e1", "\u0663", "0x1", "9" * 30, "1;2", "[1]", "None"]


def _csv(rows, rng=None):
    "Rows as text, in one of the ways in which tables are written"
    file = io.StringIO()
    quoting = csv.QUOTE_ALL if rng is not None and rng.random() < 0.3 else csv.QUOTE_MINIMAL
    end = "\r\n" if rng is not None and rng.random() < 0.3 else "\n"
    csv.writer(file, quoting=quoting, lineterminator=end).writerows(rows)
    return file.getvalue()


def _spoil(rng, data):
    "The bytes of a table that is no longer one"
    kind = rng.integers(8)
    if kind == 0:
        return data[: int(rng.integers(0, len(data)))], "cut"
    if kind == 1:
        at = int(rng.integers(0, len(data)))
        return data[:at] + b"\0" + data[at:], "NUL"
    if kind == 2:
        return data.decode("utf-8").encode("utf-16"), "UTF-16"
    if kind == 3:
        at = int(rng.integers(0, len(data)))
        return data[:at] + b"\xe9\xff" + data[at:], "not UTF-8"
    if kind == 4:
        return data.replace(b",", b";"), "semicolons"
    if kind == 5:
        return data + b'"' + b"x" * 100, "open quote"
    if kind == 6:
        return rng.integers(0, 256, 300, dtype=np.uint8).tobytes(), "random bytes"
    return data.split(b"\n")[0] + b"\n", "header alone"


@functools.cache
def _png():
    return cv2.imencode(".png", np.full((12, 12), 90, np.uint8))[1].tobytes()


def _images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_png())


def _same(expected):
    return lambda faces: sorted((f.split, f.label) for f in faces) == sorted(expected)


def plain(rng, folder):
    "A csv file that is right, with labels and splits that could be taken for something else"
    labels = list(rng.permutation(LABELS))[: int(rng.integers(2, 8))]
    splits = [
        ("train", "train"),
        ("Training", "train"),
        (" VAL", "valid"),
        ("test_set", "test"),
        ("NA", "NA"),
        ("night", "night"),
    ]
    rows, expected = [["image", "label", "split"]], []
    for i in range(int(rng.integers(8, 20))):
        given, split = splits[rng.integers(len(splits))] if i > 3 else splits[0]
        rows.append([f"{i}.png", labels[i % len(labels)], given])
        expected.append((split, labels[i % len(labels)]))
    rows = [list(map(str, row)) for row in rows]
    if rng.random() < 0.5:  # columns in another order
        order = rng.permutation(3)
        rows = [[row[k] for k in order] for row in rows]
    text = _csv(rows, rng)
    if rng.random() < 0.3:
        at = text.index("\n") + 1
        text = text[:at] + "\n" * int(rng.integers(1, 20)) + text[at:]
    bom = b"\xef\xbb\xbf" if rng.random() < 0.2 else b""
    (folder / "t.csv").write_bytes(bom + text.encode())
    if rng.random() < 0.5:
        return Trial(f"csv {labels}", lambda: read_faces(folder / "t.csv"), _same(expected), "ok")
    _images(folder, [f"{i}.png" for i in range(len(rows))])
    right = lambda report: report.counts.loc["all", "all"].max() == len(expected) and not report.broken
    return Trial(f"check csv {labels}", lambda: check_data(folder / "t.csv"), right, "ok")


def loaders(rng, folder):
    "Loaders of a csv file, whole or spoiled"
    labels = [str(v) for v in rng.permutation(LABELS)[:3]]
    rows = [["image", "label"], *([f"{i}.png", labels[i % 3]] for i in range(24))]
    _images(folder, [f"{i}.png" for i in range(24)])
    data, about, must = _csv(rows, rng).encode(), "whole", "ok"
    if rng.random() < 0.5:
        data, about = _spoil(rng, data)
        must = "" if about in ("cut", "open quote", "NUL") else "refusal"
    (folder / "t.csv").write_bytes(data)

    def _act():
        dls = ExpressionDataLoaders.from_csv(folder / "t.csv", size=12, channels=1, bs=4, num_workers=0, device="cpu")
        dls.one_batch()
        return [(dls.vocab[int(y)], f.image.name) for dl in dls for f, (_, y) in zip(dl.dataset.items, dl.dataset)]

    true = {image: label for image, label in rows[1:]}
    return Trial(f"loaders: {about} {labels}", _act, lambda got: all(true.get(n) == y for y, n in got), must)


def _rafdb(folder):
    lines = [[f"train_{i:05}.jpg", str(i % 7 + 1)] for i in range(14)]
    (folder / "Image" / "aligned").mkdir(parents=True)
    (folder / "EmoLabel").mkdir()
    return lines, folder / "EmoLabel" / "list_patition_label.txt", " ", [RAFDB_IDS[i % 7 + 1] for i in range(14)]


def _expw(folder):
    lines = [[f"p{i}.jpg", "0", "5", "10", "40", "25", "9.9", str(i % 7)] for i in range(80)]
    (folder / "image" / "origin").mkdir(parents=True)
    names = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    return lines, folder / "label.lst", " ", [names[i % 7] for i in range(80)]


def _affectnet(folder):
    header = ["subDirectory_filePath", "face_x", "expression"]
    lines = [header, *([f"1/{i}.jpg", "0", str(i % 8)] for i in range(16))]
    (folder / "validation.csv").write_text(_csv(lines))
    (folder / "Manually_Annotated_Images").mkdir()
    return lines, folder / "training.csv", ",", [AFFECTNET_IDS[i % 8] for i in range(16)] * 2


def _fer2013(folder):
    lines = [["emotion", "Usage", "pixels"]]
    lines += [[str(i % 7), "Training", " ".join([str(i)] * 2304)] for i in range(14)]
    return lines, folder / "fer2013.csv", ",", [FER2013_IDS[i % 7] for i in range(14)]


def _ferplus(folder):
    names = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF"]
    lines = [["split", "class", "file", "ambiguous", *names]]
    for i in range(16):
        lines.append(["Training", "happy", f"{i}.jpg", "0", *(str(10 * (k == i % 8)) for k in range(10))])
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    return lines, folder / "ferplus_votes.csv", ",", [FERPLUS_VOTES[i % 8] for i in range(16)]


# (reader, what it reads, columns that it needs, cells that are wrong there)
SETS = [
    (rafdb_faces, _rafdb, {1: WRONG}),
    (expw_faces, _expw, {2: ["x", "2.5", "nan"], 7: WRONG}),
    (affectnet_faces, _affectnet, {0: ["", " "], 2: WRONG}),
    (fer2013_faces, _fer2013, {0: WRONG, 1: ["", "Test", "train"], 2: ["", "1 2", "a b", "300 " * 2304, "-1 " * 2304]}),
    (ferplus_faces, _ferplus, {0: ["", "x"], 1: [""], 2: [""], 5: [w for w in WRONG if w != "99"], 12: WRONG[:6]}),
]


def published(rng, folder):
    "The table or list of a published data set: right, with a wrong cell, in another order of columns, or spoiled"
    reader, make, cells = SETS[rng.integers(len(SETS))]
    lines, file, separator, expected = make(folder)
    has_header = separator == ","
    kind = ["right", "cell", "cell", "columns", "rows", "file"][rng.integers(6)]
    must, names, about = "ok", "", kind
    if kind == "cell":
        column = list(cells)[rng.integers(len(cells))]
        row = int(rng.integers(has_header, len(lines)))
        wrong = cells[column][rng.integers(len(cells[column]))]
        lines[row][column] = wrong
        must, names, about = "refusal", f"line {row + 1}\\b", f"line {row + 1}, column {column}: {wrong[:20]!r}"
    elif kind == "columns" and has_header:
        order = rng.permutation(len(lines[0]))
        lines = [[line[k] for k in order] for line in lines]
    elif kind == "rows":
        lines = lines[:has_header]
        must = "" if file.name == "training.csv" else "refusal"
    text = _csv(lines) if has_header else "\n".join(separator.join(line) for line in lines)
    data = text.encode()
    if kind == "file":
        data, about = _spoil(rng, data)
        must = ""
    file.write_bytes(data)
    known = sorted(expected)
    right = (lambda faces: sorted(f.label for f in faces) == known) if must == "ok" else None
    return Trial(f"{reader.__name__}: {about}", lambda: reader(folder), right, must, names)


def annotation(rng, folder):
    "AffectNet's .npy files, one of them another"
    for split in ("train_set", "val_set"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "annotations").mkdir()
        np.save(folder / split / "annotations" / "1_exp.npy", np.array("3"))
    file = folder / "val_set" / "annotations" / "2_exp.npy"
    values = [
        np.float64(3.0),
        np.int8(3),
        np.array("3"),
        np.array(b"3"),
        2.5,
        np.nan,
        np.zeros(3),
        np.zeros(0),
        True,
        "x",
        1j,
    ]
    k = int(rng.integers(len(values) + 3))
    about = "cut or huge"
    if k < len(values):
        np.save(file, values[k])
        about = repr(values[k])
    elif k == len(values):
        with open(file, "wb") as f:
            shape = (int(2 ** rng.integers(1, 60)),)
            np.lib.format.write_array_header_1_0(f, dict(descr="<f8", fortran_order=False, shape=shape))
    else:
        np.save(file, np.arange(9))
        file.write_bytes(file.read_bytes()[: int(rng.integers(0, 150))])
    right = lambda faces: [f.label for f in faces] == ["surprise"] * 3
    must = "ok" if k in (0, 1, 2) else "" if k == 3 else "refusal"
    return Trial(
        f"annotation: {about}", lambda: affectnet_faces(folder), right, must, "" if must == "ok" else "2_exp.npy"
    )


MAKERS = dict(tables=plain, loaders=loaders, published=published, annotations=annotation)
