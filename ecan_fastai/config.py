"""Names and settings of a run. Imports wait until they are needed, so that `--help` and a wrong argument are
answered at once."""

import warnings
from dataclasses import dataclass, fields
from typing import get_args

LEVELS = ("none", "weak", "strong")
RECIPES = ("rafdb", "fer2013")
CROPS = {"center": 1, "flip": 2, "five": 5, "ten": 10}
KINDS = ("fer2013", "rafdb", "ferplus", "affectnet", "expw", "ckplus", "csv", "folder")
METHODS = ("ecan", "baseline", "center", "supcon", "ensc")  # the rows of the paper's Table 3
OPTIMIZERS = ("paper", "adam")
SCHEDULES = ("one-cycle", "cosine")
RUN_PRESETS = ("paper", "tuned")
BALANCES = ("none", "sampler", "weights", "positives")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
CHOICES = dict(
    preset=RUN_PRESETS,
    kind=("auto", "sample", *KINDS),
    method=METHODS,
    level=LEVELS,
    recipe=RECIPES,
    eval_crops=tuple(CROPS),
    opt=OPTIMIZERS,
    schedule=SCHEDULES,
    precision=PRECISIONS,
    balance=BALANCES,
    affinity_reduction=("mean", "sum"),
    channels=(1, 3),
)

# settings that decide nothing in a run of the method
_NO_GROUPS = ("n_groups", "bank_groups", "affinity_reduction")
UNUSED = dict(
    ecan=(),
    ensc=("l2", "n_groups", "affinity_reduction", "normalize_compact"),
    supcon=("l2", *_NO_GROUPS, "normalize_compact", "center_features"),
    center=("l1", "temperature", *_NO_GROUPS, "anchors_only", "center_features"),
    baseline=(
        "l1",
        "l2",
        "temperature",
        "momentum",
        "normalize_compact",
        "anchors_only",
        "center_features",
        "key_eval",
        *_NO_GROUPS,
    ),
)

# defaults by kind of data: the paper's for FER2013, those for RAF-DB for other data, a quick run for the sample
COMMON = dict(arch="resnet18", l2=0.7, temperature=0.1, center_features=False, label_smoothing=0.0)
PRESETS = {
    "sample": dict(size=48, channels=1, recipe="fer2013", level="weak", epochs=12, bs=32, opt="adam", momentum=0.99),
    "fer2013": dict(size=48, channels=1, recipe="fer2013", level="strong", epochs=200, opt="paper", momentum=0.999),
    "ckplus": dict(size=48, channels=1, recipe="fer2013", level="strong", epochs=40, opt="paper", momentum=0.999),
    "other": dict(size=224, channels=3, recipe="rafdb", level="strong", epochs=40, opt="paper", momentum=0.999),
}
PRESETS["ferplus"] = PRESETS["fer2013"]  # the same pictures

# `--preset tuned`: what did better in short runs, on FER2013's valid split (nbs/09_fer2013.ipynb)
TUNED = {"fer2013": dict(arch="resnet18_half", level="weak", epochs=40, momentum=0.99, center_features=True)}
TUNED["ferplus"] = TUNED["fer2013"]


def setting_types(config):
    "Each setting of a dataclass to the type of a given value, without `None`"
    return {f.name: (get_args(f.type) or (f.type,))[0] for f in fields(config)}


@dataclass
class RunConfig:
    """Everything that decides a run; what each setting means is what `ecan_train --help` says of its option. `None`
    stands for the preset of the data's kind"""

    data: str
    kind: str = "auto"
    method: str = "ecan"
    preset: str = "paper"
    arch: str | None = None
    pretrained: str | bool = False  # True: timm's weights; else a run's folder or a checkpoint
    epochs: int | None = None
    bs: int | None = None
    lr: float | None = None
    wd: float | None = None
    opt: str | None = None
    schedule: str = "one-cycle"
    size: int | None = None
    channels: int | None = None
    level: str | None = None
    recipe: str | None = None
    small_size: int = 0
    small_pct: float = 0.75
    all_crops: bool = False
    eval_crops: str = "center"
    l1: float = 0.2
    l2: float | None = None
    n_groups: int = 5
    temperature: float | None = None
    momentum: float | None = None
    bank_groups: int = 16
    affinity_reduction: str = "mean"
    normalize_compact: bool = False
    anchors_only: bool = False
    center_features: bool | None = None
    label_smoothing: float | None = None
    key_eval: bool = False
    balance: str = "none"
    valid_pct: float = 0.1
    train_all: bool = False
    skip_broken: bool = False
    seed: int = 0
    precision: str = "auto"
    workers: int | None = None
    watch_tests: bool = False

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(map(str, allowed))}")
        if self.kind == "sample" and self.data != "sample":
            raise ValueError(f"kind sample draws its own faces and takes no data, got {self.data}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"the learning rate must be above 0, got {self.lr}")
        if self.wd is not None and not self.wd >= 0:
            raise ValueError(f"weight decay must not be negative, got {self.wd}")
        if self.balance == "positives" and self.method not in ("ecan", "ensc"):
            raise ValueError(
                f"balance positives is an option of the ENSC loss, which method {self.method} does not have: use ecan "
                "or ensc"
            )
        if self.balance == "positives" and not self.l1:
            raise ValueError("balance positives is an option of the ENSC loss, whose share l1 is 0")
        if self.small_size and self.small_size < 8:
            raise ValueError(f"small_size must be at least 8 pixels, or 0 for none, got {self.small_size}")
        if not self.small_size and self.small_pct != RunConfig.small_pct:
            raise ValueError("small_pct has no effect without small_size: give both")
        if not 0 <= self.small_pct <= 1:
            raise ValueError(f"small_pct must be between 0 and 1, got {self.small_pct}")
        if not 0 <= (self.label_smoothing or 0) <= 1:
            raise ValueError(f"label smoothing must be between 0 and 1, got {self.label_smoothing}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def resolve(self):
        "Fill in the preset of the data's kind, which must be known; what has no effect with the method becomes `None`"
        if self.kind == "auto" and self.data == "sample":
            self.kind = "sample"
        if self.kind == "auto":
            raise ValueError(f"the kind of {self.data} is not known: detect_kind tells it")
        for name in UNUSED[self.method]:
            if getattr(self, name) not in (None, getattr(RunConfig, name)):
                warnings.warn(f"{name} has no effect with method {self.method}; ignored")
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in UNUSED[self.method]:
            setattr(self, name, None)
        if self.method == "ecan" and self.n_groups > self.bank_groups + 1:
            warnings.warn(
                f"n_groups {self.n_groups} asks for {self.n_groups - 1} older groups, and the bank holds "
                f"{self.bank_groups} (bank_groups): MVA sees {self.bank_groups + 1} groups"
            )
        return self

    def _preset(self):
        "Values of the settings that are not given"
        if self.preset == "tuned" and self.kind not in TUNED:
            raise ValueError(
                f"preset tuned is for data of kind {' or '.join(TUNED)}, and {self.data} is of kind {self.kind}"
            )
        values = {**COMMON, **PRESETS.get(self.kind, PRESETS["other"])}
        if self.preset == "tuned":
            values |= TUNED[self.kind]
        if self.method == "center":
            values["l2"] = 0.003
        return values
