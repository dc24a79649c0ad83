"""Names and settings of a run. This module imports nothing heavy, so that `--help` and wrong arguments are answered
at once."""

import math
import os
import reprlib
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, get_args

LEVELS = ("none", "weak", "strong")
RECIPES = ("rafdb", "fer2013")
CROPS = ("center", "flip", "five", "ten")
KINDS = ("fer2013", "rafdb", "ferplus", "affectnet", "expw", "ckplus", "csv", "folder")
METHODS = ("ecan", "baseline", "center", "supcon", "ensc")  # the rows of the paper's Table 3
GROUPS = ("data", "method", "optimizer", "evaluation", "run")

# defaults by kind of data: the paper's for FER2013, those for RAF-DB for other data, a quick run for the sample
COMMON = dict(arch="resnet18", l2=0.7, temperature=0.1, center_features=False, label_smoothing=0.0)
PRESETS = {
    "sample": dict(size=48, channels=1, recipe="fer2013", level="weak", epochs=12, bs=32, opt="adam", momentum=0.99),
    "fer2013": dict(size=48, channels=1, recipe="fer2013", level="strong", epochs=200, opt="paper", momentum=0.999),
    "ckplus": dict(size=48, channels=1, recipe="fer2013", level="strong", epochs=40, opt="paper", momentum=0.999),
    "other": dict(size=224, channels=3, recipe="rafdb", level="strong", epochs=40, opt="paper", momentum=0.999),
}
PRESETS["ferplus"] = PRESETS["fer2013"]  # the same images
METHOD_PRESETS = {"center": dict(l2=0.003)}

# `--preset tuned`: for forty epochs; centring and the rate did better on FER2013's valid split (nbs/09_fer2013.ipynb)
TUNED = {"fer2013": dict(arch="resnet18_cifar", epochs=40, momentum=0.99, center_features=True)}
TUNED["ferplus"] = TUNED["fer2013"]
TUNED_LR = 0.3  # for each 256 images a step, with the paper's SGD

# allowed ranges of numbers: text of the message, and the test
_POSITIVE = ("above 0", lambda v: 0 < v < math.inf)
_NOT_NEGATIVE = ("0 or more", lambda v: 0 <= v < math.inf)
_COUNT = ("at least 1", lambda v: v >= 1)
_SHARE = ("between 0 and 1", lambda v: 0 <= v <= 1)
_OPEN_SHARE = ("above 0 and below 1", lambda v: 0 < v < 1)

_CONTRAST = ("ecan", "supcon", "ensc")  # methods with a contrastive loss, which reads the keys


def _setting(
    group,  # One of `GROUPS`
    help,  # Meaning in one line; methods and defaults are added to it
    default=None,  # `None`: from the preset
    choices=None,  # Allowed values
    valid=None,  # Range of a number, from above
    methods=METHODS,  # Methods on which it has an effect
) -> Any:
    "A setting of `RunConfig`, with all its documentation"
    return field(default=default, metadata=dict(group=group, help=help, choices=choices, valid=valid, methods=methods))


@dataclass
class RunConfig:
    """All settings of a run. `None` takes the preset of the kind of data, see `RunConfig.resolve`. Raises `ValueError`
    for a value that is not allowed."""

    # a run's name, by which finished runs are found, has its parts in this order: append new fields
    data: str = _setting("data", "folder or csv file, or `sample` for faces that the package draws", MISSING)
    kind: str = _setting("data", "kind of DATA", "auto", ("auto", "sample", *KINDS))
    method: str = _setting(
        "method", "ecan (the paper's method), baseline (cross-entropy), or another row of its Table 3", "ecan", METHODS
    )
    preset: str = _setting(
        "run",
        "set of defaults: the paper's, or tuned for 40 epochs on FER2013 (stem for small images, centred features, "
        "higher learning rate)",
        "paper",
        ("paper", "tuned"),
    )
    arch: str | None = _setting(
        "method",
        "name of a timm model, or resnet18_cifar or resnet18_half (stems for small images)",
        valid=("a name of less than 100 characters", lambda v: len(v) < 100),
    )
    pretrained: str | bool = _setting(
        "method",
        "weights to start from: timm's (no PATH, and DATA before the option), or PATH: fer2013, imagenet, a run folder "
        "or a checkpoint. fer2013 and a run folder also give arch, size, channels and recipe, imagenet arch and "
        "channels, where these are not given",
        False,
    )
    epochs: int | None = _setting("optimizer", "number of epochs", valid=_COUNT)
    bs: int | None = _setting(
        "optimizer",
        "batch size; if not given, 256, or less for small data sets",
        valid=("at least 2", lambda v: v >= 2),
    )
    lr: float | None = _setting(
        "optimizer",
        "highest learning rate; if not given, 0.1 x batch size / 256 (0.3 with preset tuned), or 0.002 with adam",
        valid=_POSITIVE,
    )
    wd: float | None = _setting(
        "optimizer", "weight decay; if not given, 5e-4 (paper) or 1e-2 (adam)", valid=_NOT_NEGATIVE
    )
    opt: str | None = _setting("optimizer", "the paper's SGD, or Adam", choices=("paper", "adam"))
    schedule: str = _setting("optimizer", "learning rate schedule", "one-cycle", ("one-cycle", "cosine"))
    size: int | None = _setting("data", "side of the images in pixels", valid=("at least 8 pixels", lambda v: v >= 8))
    channels: int | None = _setting("data", "1 for grey, 3 for colour", choices=(1, 3))
    level: str | None = _setting("data", "augmentation level of the paper's Table 1", choices=LEVELS)
    recipe: str | None = _setting(
        "data", "augmentations that the paper's Table 1 has for this data set", choices=RECIPES
    )
    small_size: int = _setting(
        "data",
        "side in pixels of smaller views in the first epochs, 0 for none",
        0,
        valid=("0 for none, or at least 8 pixels", lambda v: v == 0 or v >= 8),
    )
    small_pct: float = _setting(
        "data", "fraction of the epochs that use small_size", 0.75, valid=("above 0, at most 1", lambda v: 0 < v <= 1)
    )
    all_crops: bool = _setting("data", "train on all five crops of FiveCrop instead of a random one", False)
    eval_crops: str = _setting(
        "evaluation",
        "views averaged in evaluation: the centre, the centre and its mirror image, five crops, or ten",
        "center",
        CROPS,
    )
    l1: float = _setting(
        "method", "share of the contrastive loss beside cross-entropy (lambda 1)", 0.2, valid=_SHARE, methods=_CONTRAST
    )
    l2: float | None = _setting(
        "method",
        "weight of the MVA or center loss (lambda 2)",
        valid=_NOT_NEGATIVE,
        methods=("ecan", "center"),
    )
    n_groups: int = _setting("method", "feature groups that MVA compares (V)", 5, valid=_COUNT, methods=("ecan",))
    temperature: float | None = _setting(
        "method", "temperature of the contrastive loss", valid=_POSITIVE, methods=_CONTRAST
    )
    momentum: float | None = _setting(
        "method",
        "momentum of the key encoder (m)",
        valid=("from 0 to below 1", lambda v: 0 <= v < 1),
        methods=_CONTRAST,
    )
    bank_groups: int = _setting(
        "method", "batches that the memory bank holds (K)", 16, valid=_COUNT, methods=("ecan", "ensc")
    )
    affinity_reduction: str = _setting(
        "method", "affinity loss as a mean, or as the literal sum of Eq. 8", "mean", ("mean", "sum"), methods=("ecan",)
    )
    normalize_compact: bool = _setting(
        "method", "L2-normalise the features for the MVA or center loss", False, methods=("ecan", "center")
    )
    anchors_only: bool = _setting(
        "method",
        "take the gradient of the contrastive loss through its anchors alone: same value, about half the gradient",
        False,
        methods=_CONTRAST,
    )
    center_features: bool | None = _setting(
        "method",
        "subtract the bank's mean feature from all features of the contrastive loss",
        methods=("ecan", "ensc"),
    )
    label_smoothing: float | None = _setting("method", "label smoothing of cross-entropy, 0 to 1", valid=_SHARE)
    key_eval: bool = _setting(
        "method",
        "run the key encoder in evaluation mode, and update its running statistics like its parameters",
        False,
        methods=_CONTRAST,
    )
    balance: str = _setting(
        "method",
        "for unequal classes: sample them equally often (sampler), weight cross-entropy (weights), or use bank entries "
        "of rare classes as positives (positives)",
        "none",
        ("none", "sampler", "weights", "positives"),
    )
    valid_pct: float = _setting(
        "data", "fraction of train held out if the data has no valid split", 0.1, valid=_OPEN_SHARE
    )
    train_all: bool = _setting("data", "train on the held-out images too; they are then reported as seen", False)
    skip_broken: bool = _setting("data", "leave out images that cannot be read", False)
    seed: int = _setting("run", "seed of all random numbers", 0, valid=_NOT_NEGATIVE)
    precision: str = _setting(
        "run",
        "auto is bf16 if the GPU or processor computes it natively, else fp32; fp16 needs a GPU",
        "auto",
        ("auto", "fp32", "fp16", "bf16"),
    )
    workers: int | None = _setting(
        "run",
        "loader processes; if not given, one per core, at most 16, and none on a CPU of two cores",
        valid=_NOT_NEGATIVE,
    )
    watch_tests: bool = _setting(
        "evaluation",
        "also record test accuracy after every epoch, to compare with published best-epoch results; does not change "
        "training",
        False,
    )

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, os.PathLike):
                setattr(self, f.name, value := os.fspath(value))
            if value is not None:
                _check_value(f, value)
        self._check_together()

    def _check_together(self):
        "Raise `ValueError` for settings that exclude each other"
        if not self.data:
            raise ValueError("the path of the data is empty")
        if self.kind == "sample" and self.data != "sample":
            raise ValueError(f"kind sample draws its own faces and takes no data, got {self.data}")
        if self.balance == "positives" and self.method not in ("ecan", "ensc"):
            raise ValueError(
                f"balance positives is an option of the ENSC loss, which method {self.method} does not have: use ecan "
                "or ensc"
            )
        if self.balance == "positives" and not self.l1:
            raise ValueError("balance positives is an option of the ENSC loss, whose share l1 is 0")
        if not self.small_size and self.small_pct != RunConfig.small_pct:
            raise ValueError("small_pct has no effect without small_size: give both")

    def resolve(self):
        """Fill in the preset of the kind of data; settings that have no effect with the method become `None`"""
        if self.kind == "auto" and means_sample(self.data):
            self.kind = "sample"
        if self.kind == "auto":
            raise ValueError(f"the kind of {self.data} is not known: use resolve_config, which recognises it")
        for name in UNUSED[self.method]:
            if getattr(self, name) not in (None, getattr(RunConfig, name)):
                warnings.warn(f"{name} has no effect with method {self.method}; ignored")
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in UNUSED[self.method]:
            setattr(self, name, None)
        return self

    def differs(
        self,
        made: dict,  # Settings that a run was made with
        free=(),  # Names of settings that may differ
    ) -> str | None:
        """Name the first setting of a run that is not as asked here; None if there is none

        `None` and `auto` ask for nothing. A setting that is newer than the run has its default."""
        made = {f.name: f.default for f in fields(self)} | COMMON | made
        asked = {k: v for k, v in asdict(self).items() if k not in free and v not in (None, "auto")}
        return next((k for k, v in asked.items() if made[k] != v), None)

    def _preset(self):
        "Values for the settings that are not given"
        if self.preset == "tuned" and self.kind not in TUNED:
            raise ValueError(
                f"preset tuned is for data of kind {' or '.join(TUNED)}, and {self.data} is of kind {self.kind}"
            )
        tuned = TUNED[self.kind] if self.preset == "tuned" else {}
        return {**_defaults(self.kind), **tuned, **METHOD_PRESETS.get(self.method, {})}


def means_sample(
    data,  # DATA of a command
) -> bool:
    "Whether DATA names the faces that the package draws; raises `ValueError` if it also names something here"
    if str(data) == "sample" and os.path.exists("sample"):
        raise ValueError(
            "sample means faces that the package draws, but something of this name is here: write its full path to use "
            "it, or give it another name to draw faces"
        )
    return str(data) == "sample"


def _defaults(kind):
    "Preset of a kind of data"
    return {**COMMON, **PRESETS.get(kind, PRESETS["other"])}


def _check_value(f, value):
    types, allowed, valid = get_args(f.type) or (f.type,), f.metadata["choices"], f.metadata["valid"]
    allowed_types = (*types, int) if float in types else types
    if not isinstance(value, allowed_types) or isinstance(value, bool) and bool not in types:
        raise ValueError(f"{f.name} must be of type {types[0].__name__}, got {reprlib.repr(value)}")
    if allowed and value not in allowed:
        raise ValueError(f"unknown {f.name} {reprlib.repr(value)}, expected one of {', '.join(map(str, allowed))}")
    if valid and not valid[1](value):
        raise ValueError(f"{f.name} must be {valid[0]}, got {reprlib.repr(value)}")


# Settings that have no effect in a run of a method
UNUSED = {m: tuple(f.name for f in fields(RunConfig) if m not in f.metadata["methods"]) for m in METHODS}


def setting_types(config):
    "Map each setting of a dataclass to its type, without `None`"
    return {f.name: (get_args(f.type) or (f.type,))[0] for f in fields(config)}


def _shown(value):
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def default_text(
    f,  # A field of `RunConfig`
) -> str:  # Empty for settings that are off or depend on other settings
    "Return the default of a setting, by preset"
    if f.default is not None:
        return "" if isinstance(f.default, bool) or f.default is MISSING else f"default {f.default}"
    if f.name not in _defaults("other") and all(f.name not in values for values in PRESETS.values()):
        return ""
    other = _defaults("other").get(f.name)
    kinds: dict = {}
    for kind in PRESETS:
        if (value := _defaults(kind).get(f.name)) != other:
            kinds.setdefault(value, []).append(kind)
    parts = [] if other is None else [_shown(other)]
    parts += [f"{_shown(value)} for {', '.join(names)}" for value, names in kinds.items()]
    parts += [f"{_shown(TUNED['fer2013'][f.name])} with preset tuned"] if f.name in TUNED["fer2013"] else []
    parts += [f"{_shown(own[f.name])} with method {m}" for m, own in METHOD_PRESETS.items() if f.name in own]
    return f"default {'; '.join(parts)}"


def help_text(
    f,  # A field of `RunConfig`
) -> str:
    "Return the help of a setting: its meaning, the methods on which it has an effect, its default"
    methods = f.metadata["methods"]
    parts = [f.metadata["help"]]
    if methods != METHODS:
        parts.append(f"for {', '.join(methods)}")
    return "; ".join([*parts, *([text] if (text := default_text(f)) else [])])


def _described():
    "Describe every setting in a line, by group"
    for group in GROUPS:
        yield f"\n{group.capitalize()}:"
        yield from (f"    {f.name}: {help_text(f)}" for f in fields(RunConfig) if f.metadata["group"] == group)


RunConfig.__doc__ = f"{RunConfig.__doc__}\n" + "\n".join(_described())
