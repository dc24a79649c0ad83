"Folders of runs: settings of all kinds, and weights that are whole, broken, or others"

import functools
import json
import struct

import numpy as np
import torch
from safetensors.torch import save, save_file

from ecan_fastai.inference import Predictor
from ecan_fastai.model import FaceClassifier

from .trial import Trial

ARCH = "mobilenetv3_small_050"
CONFIG = dict(
    config=dict(arch=ARCH, level="weak", recipe="fer2013", size=32, channels=1, eval_crops="center"),
    about=dict(vocab=["happy", "sad", "fear"], mean=[0.5], std=[0.25], view_size=32),
)
NASTY = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2.5,
    10**9,
    10**30,
    -0.0,
    float("nan"),
    float("inf"),
    1e-320,
    "",
    "x",
    "1",
    "NaN",
]
NASTY += [
    "weak",
    "center",
    "vit_giant_patch14_dinov2",
    "hf-hub:a/b",
    "../..",
    "\x1b[31m",
    "\u65e5",
    "\ud800",
    [],
    [[]],
    {},
]
NASTY += [
    [0.5] * 3,
    [0.5, 0.5],
    [1],
    ["a", "b", "c"],
    ["a", "a", "a"],
    ["a", "A", "b"],
    ["a"] * 10**5,
    {"a": 1},
    "y" * 10**5,
]


@functools.cache
def _weights():
    torch.manual_seed(0)
    return FaceClassifier.create(ARCH, 3, 1).state_dict()


@functools.cache
def _saved():
    return save(_weights())


def make_run(folder):
    "A finished run of a small model, as far as inference needs it"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(_saved())
    return folder


def _predicts(run):
    def _act():
        predictor = Predictor(run)
        return predictor.probabilities(np.full((32, 32), 90, np.uint8))

    return _act


def _sane(probs):
    return probs.ndim == 2 and len(probs) == 1 and np.isfinite(probs).all() and abs(probs.sum() - 1) < 1e-4


def settings(rng, folder):
    "A run one or two of whose settings are something else, or missing"
    run = make_run(folder / "run")
    written = json.loads(json.dumps(CONFIG))
    changed = []
    for _ in range(int(rng.integers(0, 3))):
        part = ["config", "about"][rng.integers(2)]
        key = sorted(CONFIG[part])[rng.integers(len(CONFIG[part]))]
        value = NASTY[rng.integers(len(NASTY))]
        changed.append((key, str(value)[:20]))
        if rng.random() < 0.15:
            written[part] = {k: v for k, v in CONFIG[part].items() if k != key}
            changed[-1] = (key, "missing")
        elif rng.random() < 0.1 or not isinstance(written[part], dict):
            written[part] = value
        else:
            written[part][key] = value
    (run / "config.json").write_text(json.dumps(written))
    must = "refusal" if [value for _, value in changed] == ["missing"] else "" if changed else "ok"
    return Trial(f"settings: {changed}", _predicts(run), _sane, must)


def text(rng, folder):
    "A config.json that is cut, flipped, or something else altogether"
    run = make_run(folder / "run")
    data = bytearray(json.dumps(CONFIG).encode())
    kind = rng.integers(4)
    if kind == 0:
        data = data[: int(rng.integers(0, len(data)))]
    elif kind == 1:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data = rng.integers(0, 256, 50, dtype=np.uint8).tobytes()
    else:
        others = [b"", b"null", b"[]", b"5", b"[" * 10**5, b'{"a":' * 10**4, b"\xef\xbb\xbf{}", b"1" * 5000, b"\0"]
        data = others[rng.integers(len(others))]
    (run / "config.json").write_bytes(data)
    return Trial(f"text: {bytes(data)[:30]!r}", _predicts(run), _sane, "" if kind == 1 else "refusal")


def _other_tensors(rng):
    "Weights with something wrong in one tensor"
    weights = {k: v.clone() for k, v in _weights().items()}
    names = [k for k in weights if weights[k].is_floating_point()]
    name = names[rng.integers(len(names))]
    kind = ["missing", "more", "shape", "dtype", "half", "nan", "inf", "none", "empty", "whole"][rng.integers(10)]
    if kind == "missing":
        del weights[name]
    elif kind == "more":
        weights[name + ".x"] = torch.zeros(3)
    elif kind == "shape":
        weights[name] = torch.zeros(*weights[name].shape, 2)
    elif kind == "dtype":
        weights[name] = weights[name].to([torch.int8, torch.bool, torch.complex64][rng.integers(3)])
    elif kind == "half":
        weights[name] = weights[name].half()
    elif kind in ("nan", "inf"):
        weights[name].view(-1)[0] = float(kind)
    elif kind == "none":
        weights = {}
    elif kind == "empty":
        weights[name] = torch.zeros(0)
    return weights, f"{kind} {name}", "ok" if kind in ("half", "whole") else "refusal"


def _other_bytes(rng):
    "A file of weights whose bytes are cut, flipped or others"
    data = bytearray(_saved())
    kind = rng.integers(4)
    if kind == 0:
        data = data[: int(rng.integers(0, len(data)))]
    elif kind == 1:
        data[int(rng.integers(0, 5000))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data = rng.integers(0, 256, int(rng.integers(0, 2000)), dtype=np.uint8).tobytes()
    else:
        length = [0, 1, 2**20, 2**40, 2**63][rng.integers(5)]
        data[:8] = struct.pack("<Q", length)
    return bytes(data), ["cut", "flipped", "random", "header"][kind], "" if kind == 1 else "refusal"


def weights(rng, folder):
    "A run with other weights"
    run = make_run(folder / "run")
    file = run / "model.safetensors"
    if rng.random() < 0.5:
        tensors, about, must = _other_tensors(rng)
        save_file(tensors, file)
    else:
        data, about, must = _other_bytes(rng)
        file.write_bytes(data)
    return Trial(f"weights: {about}", _predicts(run), _sane, must)


def pretrained(rng, folder):
    "Weights to start from: files that are whole, broken, or of another model"
    kind = rng.integers(5)
    file = folder / ["w.safetensors", "w.pth", "w.bin", "w"][rng.integers(4)]
    must = "refusal"
    if kind == 0:
        tensors, about, _ = _other_tensors(rng)
        about, must = f"tensors: {about}", ""
        save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    elif kind == 1:
        data, about, must = _other_bytes(rng)
        file.write_bytes(data)
    elif kind == 2:
        objects = [None, 5, [], {}, {"state_dict": None}, {"model": {"a": 1}}, {1: torch.zeros(2)}, "x", torch.zeros(3)]
        content = objects[rng.integers(len(objects))]
        about = repr(content)
        torch.save(content, file)
    elif kind == 3:
        about = "folder" if rng.random() < 0.5 else "nothing"
        file.mkdir() if about == "folder" else None
    else:
        about = "another model"
        save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, file)
    act = lambda: FaceClassifier.create(ARCH, 3, 1, pretrained=file)
    finite = lambda m: all(bool(v.isfinite().all()) for v in m.state_dict().values())
    return Trial(f"pretrained {file.name}: {about}", act, finite, must)


MAKERS = dict(settings=settings, config_text=text, weights=weights, pretrained=pretrained)
