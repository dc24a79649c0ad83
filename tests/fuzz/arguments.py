"Command lines with values and options of all kinds"

from dataclasses import fields

import cv2
import numpy as np

from ecan_fastai.cli import ecan_check, ecan_evaluate, ecan_predict, ecan_reproduce, ecan_train
from ecan_fastai.config import RunConfig, setting_types

from .runs import ARCH, make_run
from .trial import Trial

VALUES = ["-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "", " ", "x", "9" * 30, "1e-320", "true", "None"]
VALUES += [
    "\u0663",
    "\x1b[31mx",
    "\u65e5",
    "a\nb",
    "sample",
    "/dev/null",
    "/nowhere/x",
    "1,2",
    "--",
    "-x",
    "resnet18",
    "[",
    "*",
]
CHOICES = {f.name: f.metadata["choices"] for f in fields(RunConfig) if f.metadata["choices"]}
SETTINGS = [k for k in setting_types(RunConfig) if k != "data"]
FAST = [
    "--arch",
    ARCH,
    "--epochs",
    "1",
    "--size",
    "16",
    "--workers",
    "0",
    "--opt",
    "adam",
    "--bs",
    "8",
    "--channels",
    "1",
]
GOOD = {  # for an option of each script, values that work
    ecan_predict: {"--crops": ["five", "flip"], "--device": ["cpu"], "--out": ["t.csv", "t.json"]},
    ecan_evaluate: {
        "--crops": ["ten"],
        "--device": ["cpu"],
        "--out": ["t.json"],
        "--kind": ["folder"],
        "--split": ["train"],
    },
    ecan_check: {"--kind": ["auto", "folder"], "--distance": ["0", "5"], "--out": ["t.csv"], "--figure": ["t.png"]},
    ecan_reproduce: {"--kind": ["folder"], "--seeds": ["1"], "--records": ["r"], "--set": ["epochs=1", "bs=8"]},
}
GOOD[ecan_predict] |= {"--every": ["1"], "--faces": []}
TRAIN = {f"--{k.replace('_', '-')}": [] for k in SETTINGS if k != "workers"}
TRAIN |= {f"--{k.replace('_', '-')}": list(map(str, v)) for k, v in CHOICES.items()}
TRAIN |= {
    f"--{k}": ["0.1", "0.5"] for k in ("lr", "wd", "l1", "l2", "temperature", "momentum", "valid-pct", "small-pct")
}
TRAIN |= {f"--{k}": ["1", "2", "9"] for k in ("n-groups", "bank-groups", "seed", "bs")} | {"--small-size": ["12"]}


def _data(folder, n=8):
    rng = np.random.default_rng(0)
    for name in ("happy", "sad", "fear"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            img = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            (folder / name / f"{i}.png").write_bytes(cv2.imencode(".png", img)[1].tobytes())
    return folder


def _some(rng, options, folder):
    "A few options, with values that work or others"
    args = []
    for k in rng.integers(0, len(options), int(rng.integers(0, 4))):
        option, good = list(options.items())[k]
        args.append(option)
        if rng.random() < 0.6:
            value = good[rng.integers(len(good))] if good else None
            args += [str(folder / value) if option in ("--out", "--figure", "--records") else value] if good else []
        elif rng.random() < 0.8:
            args.append(VALUES[rng.integers(len(VALUES))])
    return args


def train(rng, folder):
    "`ecan_train` of a small model for an epoch, with other settings"
    data = _data(folder / "data")
    given = _some(rng, TRAIN, folder)
    where = [str(data)] if rng.random() < 0.9 else [VALUES[rng.integers(len(VALUES))]] * int(rng.integers(0, 3))
    if where == ["sample"]:
        where = [str(data)]
    args = [*where, "--out", str(folder / "run"), *FAST, *given]
    wrote = lambda _: (folder / "run" / "metrics.json").exists() or "--help" in given
    return Trial(
        f"ecan_train {' '.join(given)!r} {where[:1] if where != [str(data)] else ''}",
        lambda: ecan_train(args),
        wrote,
        script=True,
    )


def others(rng, folder):
    "The other console scripts"
    script = list(GOOD)[rng.integers(len(GOOD))]
    run, data = make_run(folder / "run"), _data(folder / "data", 2)
    whole = {
        ecan_predict: ["--run", str(run), str(data)],
        ecan_evaluate: ["--run", str(run), str(data)],
        ecan_check: [str(data)],
        ecan_reproduce: ["table5", "--out", str(folder / "out")],
    }[script]
    args = list(whole)
    if rng.random() < 0.3:
        args[rng.integers(len(args))] = VALUES[rng.integers(len(VALUES))]
    args += [a if a != "sample" else "x" for a in _some(rng, GOOD[script], folder)]
    if script is ecan_reproduce and rng.random() < 0.5:
        args += ["--data", str(folder / VALUES[rng.integers(len(VALUES))].replace("\0", ""))]
    about = " ".join(a.replace(str(folder), "...") for a in args)
    return Trial(f"{script.__name__} {about!r}", lambda: script(args), None, script=True)


MAKERS = dict(train=train, scripts=others)
