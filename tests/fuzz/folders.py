"Folders of classes and splits, as people have them"

import os

import cv2
import numpy as np

from ecan_fastai.check import check_data
from ecan_fastai.cli import ecan_check, ecan_evaluate
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.readers.factory import detect_kind, read_faces

from .images import as_nobody
from .runs import make_run
from .trial import Trial

CLASSES = [
    "happy",
    "sad",
    "fear",
    "Happy",
    "happy ",
    "HAPPY",
    "Happiness",
    "NA",
    "01",
    "label",
    "image",
    "$x$",
    "$\\frac$",
]
CLASSES += [
    "=x",
    "-x",
    "a\nb",
    "a\x1b[31mb",
    os.fsdecode(b"caf\xe9"),
    "caf\u00e9",
    "cafe\u0301",
    "\u65e5",
    "x" * 200,
    "all",
    ".x",
]
SPLITS = [
    "train",
    "Train",
    "training",
    "valid",
    "val",
    "test",
    "TEST",
    "night",
    "Night",
    "all",
    "\u65e5",
    "-x",
    "valid_seen",
    "x" * 150,
]


def _key(name):
    import unicodedata

    return "".join(unicodedata.normalize("NFKC", name).split()).casefold()


def _tree(rng, folder, classes, n):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            img = rng.integers(0, 256, (14, 14), dtype=np.uint8)
            (folder / name / f"{i}.png").write_bytes(cv2.imencode(".png", img)[1].tobytes())


def _usable(names):
    "Whether the names of classes can be told apart and printed"
    seen = [n for n in names if not n.startswith(".")]
    printable = all(n.isprintable() for n in seen)
    return printable and len({_key(n) for n in seen}) == len(seen)


def _extra(rng, folder):
    "Something beside the images, or None"
    kind = ["none", "none", "empty class", "loose image", "link in a circle", "closed folder", "text", "fifo"][
        rng.integers(8)
    ]
    if kind == "empty class":
        (folder / "empty").mkdir()
    elif kind == "loose image":
        (folder / "loose.png").write_bytes(b"x")
    elif kind == "link in a circle":
        (folder / "happy" / "circle.png").symlink_to(folder / "happy" / "circle.png")
    elif kind == "closed folder":
        (folder / "happy" / "closed").mkdir(mode=0)
    elif kind == "text":
        (folder / "readme.txt").write_text("x")
    elif kind == "fifo":
        os.mkfifo(folder / "happy" / "pipe.png")
    return kind


def _labels(faces):
    return {(f.split, f.label) for f in faces}


def _read(rng, folder, about, expected, must, broken):
    "Read a folder in one of the ways in which the package reads it"
    way = rng.integers(4)
    if way == 0:
        return Trial(f"read: {about}", lambda: read_faces(folder), lambda f: _labels(f) == expected, must)
    if way == 1:
        right = lambda r: _labels(r.faces) == expected and len(r.broken) == broken
        return Trial(f"check: {about}", lambda: _nobody(check_data, folder), right, must)
    if way == 2:
        act = lambda: _nobody(ecan_check, [str(folder)])
        return Trial(f"ecan_check: {about}", act, None, must, script=True)
    options = dict(size=14, channels=1, bs=4, num_workers=0, device="cpu", skip_broken=bool(rng.integers(2)))

    def _load():
        dls = ExpressionDataLoaders.from_path(folder, **options)
        batch = dls.one_batch()[1]
        dls.show_batch(max_n=2)
        return set(dls.vocab), batch

    must = "refusal" if broken and not options["skip_broken"] else must
    return Trial(
        f"loaders {options['skip_broken']}: {about}",
        lambda: _nobody(_load),
        lambda got: got[0] == {c for _, c in expected},
        must,
    )


def _nobody(act, *args):
    with as_nobody():
        return act(*args)


def classes(rng, folder):
    "Class folders, some of which have names that are hard to tell apart"
    folder = folder / "data"
    names = ["happy", "sad", *(str(c) for c in rng.permutation(CLASSES)[: int(rng.integers(0, 4))])]
    names = list(dict.fromkeys(names))
    _tree(rng, folder, names, 6)
    extra = _extra(rng, folder)
    broken = int(extra in ("link in a circle", "closed folder", "fifo"))
    usable = _usable(names) and extra not in ("empty class", "loose image")
    expected = {("train", n) for n in names if not n.startswith(".")}
    must = "refusal" if not usable else "ok" if expected else ""
    return _read(rng, folder, f"{names} {extra}", expected, must, broken)


def splits(rng, folder):
    "Split folders in many spellings"
    folder = folder / "data"
    names = list(dict.fromkeys(str(s) for s in rng.permutation(SPLITS)[: int(rng.integers(1, 5))]))
    for name in names:
        _tree(rng, folder / name, ["happy", "sad"], 6)
    plain = {n: {"Train": "train", "training": "train", "val": "valid", "TEST": "test"}.get(n, n) for n in names}
    known = [s for s in plain.values() if s in ("train", "valid", "test")]
    if not known:  # then they are class folders with folders in them
        expected = {("train", n) for n in names}
        must = "refusal" if not _usable(names) else ""
    else:
        twice = len(set(known)) < len(known)
        unusable = not _usable(plain.values()) or any(len(s) > 100 for s in plain.values())
        must = "refusal" if "train" not in known or twice or unusable else "ok"
        expected = {(s, c) for s in plain.values() for c in ("happy", "sad")}
    right = lambda faces: _labels(faces) == expected
    return Trial(f"splits {names}", lambda: read_faces(folder), right, must)


def evaluated(rng, folder):
    "A model evaluated on a folder of other classes"
    run, data = make_run(folder / "run"), folder / "data"
    names = list(dict.fromkeys(str(c) for c in rng.permutation(CLASSES)[: int(rng.integers(1, 4))]))
    _tree(rng, data, names, 2)
    known = _usable(names) and any(n.lower() in ("happy", "sad", "fear", "happy ", "happiness") for n in names)
    act = lambda: ecan_evaluate(["--run", str(run), str(data)])
    return Trial(f"ecan_evaluate: {names}", act, None, "ok" if known else "refusal", script=True)


def odd(rng, folder):
    "A path that is neither a data set nor a table"
    paths = [
        "",
        ".",
        "nowhere",
        "\0",
        "a\nb",
        "\x1b[31m",
        "x" * 300,
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "data.txt",
    ]
    path = paths[rng.integers(len(paths))]
    (folder / "data.txt").write_text("x")
    path = path if path.startswith("/") else str(folder) + "/" + path
    act = [lambda: detect_kind(path), lambda: read_faces(path), lambda: check_data(path)][rng.integers(3)]
    return Trial(f"path {path[-20:]!r}", act, None, "")


MAKERS = dict(classes=classes, splits=splits, evaluated=evaluated, paths=odd)
