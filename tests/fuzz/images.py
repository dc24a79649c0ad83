"Image files, whole and broken, and things that only have the name of one"

import contextlib
import io
import os
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

from ecan_fastai.cli import ecan_predict
from ecan_fastai.data import PhotoCrop, read_face
from ecan_fastai.inference import Predictor
from ecan_fastai.loaders import broken_faces
from ecan_fastai.readers.records import Face

from .runs import make_run
from .trial import Trial

NAMES = [
    "a.png",
    "a b.png",
    "\u00fc\u65e5.png",
    "=x.png",
    "a\nb.png",
    "a\x1b[31mb.png",
    "'\".png",
    "$x$.png",
    "a" * 240 + ".png",
]
NAMES += [os.fsdecode(b"caf\xe9.png"), "-x.png", "a,b.png", "a\tb.png"]
LOSSLESS = (".png", ".bmp", ".tiff", ".pgm")


def _encode(rng, ending):
    "A file's bytes, and its grey pixels where they are exact"
    shape = tuple(int(k) for k in rng.integers(1, 70, 2))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    data = cv2.imencode(ending, pixels)[1].tobytes()
    return data, pixels if ending in LOSSLESS else None


def _odd(rng):
    "A whole image of a rare kind"
    mode = ["RGBA", "P", "1", "I;16", "CMYK", "LA", "RGB"][rng.integers(7)]
    img = Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).convert("L" if mode == "I;16" else mode)
    img = img.convert("I").point(lambda v: v * 256).convert("I;16") if mode == "I;16" else img
    file = io.BytesIO()
    img.save(file, "TIFF" if mode == "CMYK" else "PNG")
    return file.getvalue(), mode


def _promise(data, width, height):
    "A PNG or JPEG file with another width and height in its header"
    data = bytearray(data)
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    else:
        at = data.find(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height % 65536, width % 65536)
    return bytes(data)


def _special(rng, file):
    "Something other than a regular file, under an image's name"
    kind = ["folder", "fifo", "nowhere", "circle", "device", "no permission"][rng.integers(6)]
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "nowhere":
        file.symlink_to(file.parent / "gone")
    elif kind == "circle":
        file.symlink_to(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(_encode(rng, ".png")[0])
        file.chmod(0)
    return kind


str.encode("\n", "unicode_escape")  # loads the codec while its file can be read


@contextlib.contextmanager
def as_nobody():
    "Without the rights of root, to whom every file is open"
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def _file(rng, folder):
    "(file, what it is, its pixels if known, whether it is right, wrong or either)"
    ending = [".png", ".jpg", ".bmp", ".webp", ".tiff", ".pgm"][rng.integers(6)]
    file = folder / str(rng.choice(NAMES))
    data, pixels = _encode(rng, ending)
    kind = rng.integers(9)
    if kind == 0:
        file.write_bytes(data)
        return file, f"whole {ending}", pixels, "ok"
    if kind == 1:
        data, mode = _odd(rng)
        file.write_bytes(data)
        return file, f"whole {mode}", None, "ok"
    if kind == 2:
        kind = _special(rng, file)
        return file, kind, None, "refusal"
    if kind == 3:
        cut = int(rng.integers(0, len(data)))
        file.write_bytes(data[:cut])
        wrong = cut < 20 or ending == ".jpg"
        return file, f"{ending} cut to {cut} of {len(data)}", None, "refusal" if wrong else ""
    if kind == 4:
        flipped = bytearray(data)
        for i in rng.integers(0, len(data), int(rng.integers(1, 9))):
            flipped[i] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        return file, f"{ending} with flipped bits", None, ""
    if kind == 5:
        ending = [".png", ".jpg"][rng.integers(2)]
        side = [0, 1, 30000, 65500, 2**31 - 1, 2**20][rng.integers(6)], [0, 1, 30000, 65535, 2**31 - 1][rng.integers(5)]
        file.write_bytes(_promise(_encode(rng, ending)[0], *side))
        return file, f"{ending} that promises {side}", None, ""
    if kind == 6:
        file.write_bytes(rng.integers(0, 256, int(rng.integers(0, 200)), dtype=np.uint8).tobytes())
        return file, "random bytes", None, "refusal"
    if kind == 7:
        text = [b"", b"GIF89a", b"<svg/>", b"version https://git-lfs.github.com/spec/v1\n", b"P5 30000 30000 255\n1"]
        file.write_bytes(text[rng.integers(5)])
        return file, "text", None, "refusal"
    file.write_bytes(data + b"\0" * int(rng.integers(1, 5000)))
    return file, f"{ending} with more after it", pixels, "ok"


def _is(pixels):
    return None if pixels is None else lambda img: np.array_equal(img[..., 0], pixels)


def image(rng, folder):
    "One image file, read in one of the ways in which the package reads them"
    file, about, pixels, must = _file(rng, folder)
    way = rng.integers(5)
    if way == 0 or must == "" and way == 3:
        with_rights = lambda: read_face(file, 1)
        return Trial(f"read_face: {about}", _nobody(with_rights), _is(pixels), must)
    if way == 1:
        box = [int(v) for v in rng.integers(-10, 80, 4)]
        return Trial(f"PhotoCrop {box}: {about}", lambda: PhotoCrop(file, *box).read(3), lambda img: img.size > 0)
    if way == 2:
        check = lambda: broken_faces([Face(file, "x")], 1)
        known = None if must == "" else lambda found: bool(found) == (must == "refusal")
        return Trial(f"broken_faces: {about}", _nobody(check), known)
    run, good = make_run(folder / "run"), folder / "good.png"
    cv2.imwrite(str(good), np.full((32, 32), 90, np.uint8))
    if way == 3:
        predict = lambda: Predictor(run).predict([good, file], skip_broken=True)
        return Trial(f"predict: {about}", _nobody(predict), lambda t: len(t) == 1 + (must == "ok"))
    args = ["--run", str(run), "--", str(good), str(file)]
    must = must if not file.is_dir() else ""
    return Trial(
        f"ecan_predict: {about} {file.name[:20]!r}", _nobody(lambda: ecan_predict(args)), None, must, script=True
    )


def _nobody(act):
    def _act():
        with as_nobody():
            return act()

    return _act


def array(rng, folder):
    "Arrays and objects of all kinds as an image"
    shapes = [(), (0,), (5,), (0, 0), (4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4), (3, 4, 5), (2, 4, 5, 3), (4, 0, 3)]
    shape = shapes[rng.integers(len(shapes))]
    kind = ["uint8", "float32", "int64", "bool", "object", "U3"][rng.integers(6)]
    x = np.zeros(shape, kind)
    others = [None, 5, 2.5, {}, object(), "", "\0", "\ud800", b"", b"\0" * 9, np.uint8(3)]
    if rng.random() < 0.4:
        x, shape, kind = others[rng.integers(len(others))], "", ""
    right = kind == "uint8" and shape in ((4, 5), (4, 5, 1), (4, 5, 3))
    act = lambda: read_face(x, int(rng.choice([1, 3])))
    return Trial(f"read_face: {x!r:.30} {kind} {shape}", act, None, "ok" if right else "refusal")


MAKERS = dict(images=image, arrays=array)
