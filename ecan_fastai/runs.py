"""A training run from its configuration to its folder: what `ecan_train` does. The method itself is in the
notebooks."""

import hashlib
import os
import pickle
import re
import sys
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import default_device, num_distrib, rank_distrib, set_seed
from fastcore.foundation import L
from timm.layers import convert_sync_batchnorm

from ecan_fastai.augment import crop_size
from ecan_fastai.callbacks import CPUMixedPrecision, ProgressiveResize
from ecan_fastai.config import TUNED_LR, UNUSED, RunConfig, means_sample
from ecan_fastai.data import default_workers, set_stats
from ecan_fastai.layers import channels_last_is_faster, fast_precision
from ecan_fastai.learner import baseline_learner, check_fits, ecan_learner, images_per_step
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.losses import ECANLoss, PaperReading
from ecan_fastai.model import choose_arch
from ecan_fastai.readers.factory import detect_kind
from ecan_fastai.readers.records import data_root
from ecan_fastai.runfiles import (
    SUMS,
    check_file,
    lock_run,
    read_json,
    read_table,
    remove_parts,
    sha256,
    write_run_file,
    write_table,
)
from ecan_fastai.runresults import environment, note_environment, write_json, write_results
from ecan_fastai.runstate import EpochLines, RunState, StopOnDivergence, WatchTests
from ecan_fastai.sample import sample_faces
from ecan_fastai.weights import NAMES, weights_file, weights_settings

# What a learner does not choose by itself: its default is the paper's optimizer
OPTIMIZERS = {"paper": {}, "adam": dict(opt_func=Adam, lr=2e-3, wd=1e-2)}


# Data and learner


def data_kind(
    data,  # Path of a data set, or `sample`
    kind="auto",  # If it is known
):
    "Kind of data: the given one, `sample`, or the one that its files have"
    if kind != "auto":
        return kind
    return "sample" if means_sample(data) else detect_kind(data)


def resolve_config(cfg):
    """Fill in the settings that are not given, in place, make paths absolute, and return the configuration

    Recognises the kind from the data; the weights of `pretrained` give their settings, the preset all others."""
    cfg.kind = data_kind(cfg.data, cfg.kind)
    if isinstance(cfg.pretrained, str):
        for name, value in weights_settings(cfg.pretrained).items():
            if getattr(cfg, name) is None:
                setattr(cfg, name, value)
    cfg.resolve()
    if cfg.kind != "sample":
        cfg.data = os.path.abspath(cfg.data)  # so that the run can be resumed from anywhere
    if isinstance(cfg.pretrained, str) and cfg.pretrained not in NAMES:
        cfg.pretrained = os.path.abspath(cfg.pretrained)
    return cfg


def run_loaders(cfg, out):
    "Make the DataLoaders of a resolved configuration; sets precision, batch size and workers if not given"
    _settle_precision(cfg)
    if cfg.workers is None:
        cfg.workers = default_workers()
    kwargs = dict(
        size=cfg.size,
        channels=cfg.channels,
        level=cfg.level,
        recipe=cfg.recipe,
        n_views=1 if cfg.method == "baseline" else 2,
        all_crops=cfg.all_crops,
        eval_crops=cfg.eval_crops,
        valid_pct=cfg.valid_pct,
        seed=cfg.seed,
        train_all=cfg.train_all,
        skip_broken=cfg.skip_broken,
        balanced=cfg.balance == "sampler",
        num_workers=cfg.workers,
    )
    data, kind = (
        (sample_faces(Path(out) / "faces", channels=cfg.channels), "folder")
        if cfg.kind == "sample"
        else (cfg.data, cfg.kind)
    )
    dls = ExpressionDataLoaders.from_path(data, kind, bs=cfg.bs, **kwargs)
    cfg.bs = dls.train.bs
    return dls


def _settle_precision(cfg):
    device = default_device().type
    if cfg.precision == "auto":
        cfg.precision = fast_precision(device)
    known = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32", "bf16")}.get(device, ("fp32",))
    if cfg.precision not in known:
        raise ValueError(f"precision {cfg.precision} is not for a device of type {device}: use {' or '.join(known)}")


class NoEffect(ValueError):
    "A setting would change nothing in a run"


def _check_small(cfg):
    "Raise `NoEffect` if `small_size` would change nothing"
    view = crop_size(cfg.level, cfg.recipe, cfg.size)
    if cfg.small_size >= view:
        raise NoEffect(
            f"small_size must be below the {view} pixels that the network sees (size {cfg.size}, level {cfg.level}), "
            f"got {cfg.small_size}"
        )
    if cfg.small_size and cfg.small_pct * cfg.epochs < 1:
        raise NoEffect(
            f"small_size has no effect: small_pct {cfg.small_pct} of the epochs ({cfg.epochs}) is less than one epoch"
        )


def run_learner(cfg, dls, out):
    "Make the learner of a resolved configuration, and note its learning rate and weight decay in the configuration"
    given = {k: v for k in ("lr", "wd") if (v := getattr(cfg, k)) is not None}
    defaults = OPTIMIZERS[cfg.opt]
    if (cfg.preset, cfg.opt) == ("tuned", "paper"):
        defaults = {"lr": TUNED_LR * images_per_step(dls) / 256}
    kwargs = {**defaults, **given, "arch": cfg.arch, "pretrained": cfg.pretrained, "path": out}
    if cfg.balance == "positives" and not dls.minority_classes().any():
        warnings.warn(
            "balance positives changes nothing: no class has less than three quarters of the average number of faces"
        )
    weight = torch.tensor(dls.class_weights(), dtype=torch.float32) if cfg.balance == "weights" else None
    terms = dict(weight=weight, label_smoothing=cfg.label_smoothing or 0.0)
    if cfg.method == "baseline":
        learn = baseline_learner(dls, loss_func=CrossEntropyLossFlat(flatten=False, **terms), **kwargs)
    else:
        groups = 1 if "bank_groups" in UNUSED[cfg.method] else cfg.bank_groups
        loss = _ecan_loss(cfg, dls, **terms)
        momentum = {} if "momentum" in UNUSED[cfg.method] else dict(momentum=cfg.momentum)
        learn = ecan_learner(dls, bank_groups=groups, loss_func=loss, **momentum, **kwargs)
    cfg.lr, cfg.wd = learn.lr, learn.wd
    if cfg.pretrained:
        learn.unfreeze()  # one fit trains everything, as the paper does on RAF-DB
    if cfg.small_size:
        try:
            check_fits(learn.model, torch.zeros(cfg.channels, cfg.small_size, cfg.small_size), cfg.arch)
        except ValueError as e:
            raise ValueError(f"small_size {cfg.small_size}: {e}") from e
        learn.add_cb(ProgressiveResize(cfg.small_size, cfg.small_pct))
    return _set_precision(learn, cfg.precision, dls.device)


def _ecan_loss(cfg, dls, **terms):
    "Make the loss of a method other than the baseline"
    settings = {k: getattr(cfg, k) for k in ("l1", "l2", "n_groups", "temperature", "center_features")}
    settings = {k: v for k, v in settings.items() if k not in UNUSED[cfg.method]}
    names = [f.name for f in fields(PaperReading) if f.name not in UNUSED[cfg.method]]
    settings["reading"] = PaperReading(**{k: getattr(cfg, k) for k in names})
    settings |= dict(
        ecan={}, center=dict(l1=0, compact="center"), supcon=dict(l2=0, contrast="supcon"), ensc=dict(l2=0)
    )[cfg.method]
    positives = dls.minority_classes() if cfg.balance == "positives" else None
    return ECANLoss(**settings, bank_positives=positives, **terms)


def _set_precision(learn, precision, device):
    "Add mixed precision and the faster memory layout"
    if channels_last_is_faster(device, precision):
        learn.add_cb(ChannelsLast())
    if precision != "fp32":
        learn.add_cb(CPUMixedPrecision() if device.type == "cpu" else MixedPrecision(precision))
    return learn


# Reading a run's folder


def read_config(
    out,  # `Path` of a run's folder
) -> RunConfig:
    "Read the settings of a run; raises `ValueError` if they are missing, edited, or of another version"
    file = out / "config.json"
    if not file.exists():
        raise ValueError(f"{out} holds no run to resume: expected config.json in it")
    try:
        return RunConfig(**read_json(file)["config"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{file} is not the configuration of a run: {e}") from e


def _read_checkpoint(out, device):
    "Read the state after the last finished epoch; None if there is none"
    file = out / "checkpoint.pth"
    if not file.exists():
        return None
    check_file(file)
    try:
        return torch.load(file, map_location=device, weights_only=True)  # fastai's optimizer moves nothing by itself
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise ValueError(f"{file} is broken: {str(e).partition(chr(10))[0]}") from e


def check_start(
    about: dict,  # Of config.json, or a record
    cfg,  # Settings of the run
    name,  # Its folder or record, for the message
):
    "Raise `ValueError` if the weights that a run started from have changed"
    if "pretrained_sha256" not in about or not isinstance(cfg.pretrained, str):
        return
    try:
        found = sha256(weights_file(cfg.pretrained))
    except (FileNotFoundError, ValueError):  # a missing one is told where it is needed
        return
    if found != about["pretrained_sha256"]:
        raise ValueError(
            f"{name} started from other weights than {cfg.pretrained} holds now: put the original back, or choose "
            "another folder"
        )


def _check_state(state, cfg, out):
    "Raise `ValueError` if a checkpoint was made with settings other than config.json's"
    if not isinstance(state, dict) or "config" not in state:
        raise ValueError(f"{out / 'checkpoint.pth'} is not the checkpoint of a run: no settings in it")
    if name := cfg.differs(state["config"], ("data", "workers")):  # which may change when a run is resumed
        raise ValueError(
            f"{out / 'checkpoint.pth'} was made with {name} {state['config'].get(name)}, and config.json says "
            f"{getattr(cfg, name)}: put the original back, or train again in another folder"
        )


def _load_state(learn, state, out):
    "Load weights and optimizer state from a checkpoint"
    try:
        learn.model.load_state_dict(state.pop("model"))  # the device needs no second copy
        if learn.opt is None:
            learn.create_opt()
        opt = state.pop("opt")
        learn.opt.load_state_dict(dict(state=opt["state"], hypers=L(opt["hypers"])))
    except (RuntimeError, KeyError, IndexError, AssertionError) as e:
        raise ValueError(
            f"{out / 'checkpoint.pth'} is not of the model that config.json describes: {' '.join(str(e).split())[:200]}"
        ) from e


# The data of a run

_DATA_FILE = "data.csv.gz"


def _data_table(dls, cfg):
    "List split, label, name and size of every image, in the order of the loaders"
    root = data_root(cfg.data)
    rows = []
    for split, dl in zip(dls.split_names, dls.loaders):
        rows += [(split, face.label, *_image_mark(face.image, root)) for face in dl.dataset.items]
    return pd.DataFrame(rows, columns=["split", "label", "image", "size"]).astype(str)


def _data_sha256(table):
    "Return the checksum of a table of `_data_table`, the same for every seed and for `train_all`"
    table = table[table["split"] != "valid_seen"].replace({"split": {"valid": "train"}})
    return hashlib.sha256("\n".join(sorted(map("\t".join, table.to_numpy()))).encode()).hexdigest()


def _image_mark(image, root):
    "Return name and size in bytes of an image file; for an array checksum and size"
    if isinstance(image, np.ndarray):
        return f"pixels {zlib.crc32(image.tobytes()):08x}", image.size
    file = Path(getattr(image, "file", image))
    name = str(image).removeprefix(f"{root}{os.sep}")
    return name, file.stat().st_size


def _check_data(dls, cfg, out):
    "Raise `ValueError` naming how the data differs from that of the run"
    file = out / _DATA_FILE
    if cfg.kind == "sample":
        return
    if not file.exists():
        return warnings.warn(f"{file} is missing: cannot check whether the data of the run has changed")
    columns = ["split", "label", "image", "size"]
    check_file(file)
    before = read_table(file, dtype=str)[columns]
    now = _data_table(dls, cfg)
    if before.equals(now):
        return
    old, new = ({row.image: (row.split, row.label, row.size) for row in t.itertuples()} for t in (before, now))
    groups = {
        "missing": [k for k in old if k not in new],
        "new": [k for k in new if k not in old],
        "with another split, label or size": [k for k in old if k in new and old[k] != new[k]],
    }
    differences = [f"{len(names)} {what} (such as {names[0]})" for what, names in groups.items() if names]
    found = "; ".join(differences) or "the same images in another order"
    raise ValueError(f"the data in {cfg.data} is not the data with which the run in {out} began: {found}")


# The run


@contextmanager
def _alone(out):
    """Lock a run's folder and remove files that a killed process left half written. In a distributed run the process
    of rank 0 holds the lock for all"""
    if rank_distrib():
        yield
        return
    with lock_run(out):
        remove_parts(out)
        yield


def start_run(
    cfg,  # `RunConfig`; config.json holds what is filled in for settings that are not given
    out,  # Folder of the run, new or empty
) -> dict | None:  # Record written to `metrics.json`; None in processes of ranks other than 0
    """Train, evaluate and write a new run

    Raises `ValueError` if a setting does not fit, if the folder is not empty, if another process uses it (`InUse`), or
    if the training or validation loss is not finite (`Diverged`)."""
    cfg, out = replace(cfg), Path(out)
    with _alone(out):
        if not rank_distrib():
            _check_new(out)
        return _start(cfg, out)


def _check_new(out):
    "Raise `ValueError` if a folder is not empty, except for files of a start that was killed early"
    if (out / "metrics.json").exists():
        raise ValueError(f"{out} already holds a finished run: give another folder with --out")
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run: give another folder with --out, or resume it with --resume {out}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder for the run, got the file {out}")
    others = sorted({p.name for p in out.iterdir()} - {"faces", _DATA_FILE, SUMS}) if out.exists() else []
    if others:
        raise ValueError(f"expected a new or empty folder for the run, and {out} holds {', '.join(others[:5])}")


def _start(cfg, out):
    resolve_config(cfg)
    _check_small(cfg)
    choose_arch(cfg.arch, cfg.pretrained)  # its errors, before images are read
    if isinstance(cfg.pretrained, str):
        weights_file(cfg.pretrained)
    set_seed(cfg.seed, reproducible=True)
    dls = _first_process_first(run_loaders, cfg, out)
    learn = run_learner(cfg, dls, out)
    out.mkdir(parents=True, exist_ok=True)
    stats = next(t for t in dls.after_batch.fs if hasattr(t, "mean"))
    about = dict(
        vocab=list(dls.vocab),
        view_size=crop_size(cfg.level, cfg.recipe, cfg.size),
        mean=stats.mean.flatten().tolist(),
        std=stats.std.flatten().tolist(),
        images={name: len(dl.dataset) for name, dl in zip(dls.split_names, dls.loaders)},
    )
    if isinstance(cfg.pretrained, str):
        about["pretrained_sha256"] = sha256(weights_file(cfg.pretrained))
    table = _data_table(dls, cfg)
    if cfg.kind != "sample":
        about["data_sha256"] = _data_sha256(table)
    write_run_file(out / _DATA_FILE, lambda f: write_table(table, f, compression="gzip"))
    write_json(out / "config.json", dict(config=asdict(cfg), about=about, environment=environment(dls)))
    return _train(learn, cfg, out, None)


def resume_run(
    out,  # Folder of a run that was interrupted
    data=None,  # New path of the same data, if it was moved
) -> dict | None:  # Record written to `metrics.json`; None in processes of ranks other than 0
    """Resume a run from its last finished epoch; raises `ValueError` if its data, settings or files have changed

    In one process the result is the same as without the stop."""
    out = Path(out)
    if not out.is_dir():
        raise ValueError(f"no run to resume: no such folder: {out}")
    with _alone(out):
        return _resume(out, data)


def _resume(out, data):
    if (out / "metrics.json").exists():
        raise ValueError(f"the run in {out} is finished: its results are in metrics.json")
    cfg = read_config(out)
    if cfg.kind == "sample" and data not in (None, "sample"):
        raise ValueError(f"the run in {out} is on faces that it draws itself, and takes no data, got {data}")
    moved = data is not None and cfg.kind != "sample"
    if moved:
        cfg.data = os.path.abspath(data)
    set_seed(cfg.seed, reproducible=True)
    dls = _first_process_first(run_loaders, cfg, out)
    _check_data(dls, cfg, out)
    written = read_json(out / "config.json")
    if moved:
        written["config"]["data"] = cfg.data
        write_json(out / "config.json", written)
    before, now = written["environment"].get("processes", 1), max(1, num_distrib())
    if before != now:
        warnings.warn(
            f"processes of the run: {before} at its start, {now} now, so a step has {now / before:g} times the images"
        )
    if not rank_distrib():
        note_environment(dls, out)
    set_stats(dls, written["about"]["mean"], written["about"]["std"])
    state = _read_checkpoint(out, dls.device)
    if state:
        _check_state(state, cfg, out)
    else:
        check_start(written["about"], cfg, out)
    learn = run_learner(replace(cfg, pretrained=False) if state else cfg, dls, out)  # a checkpoint has its own weights
    if state:
        _load_state(learn, state, out)
    return _train(learn, cfg, out, state)


def _first_process_first(load, *args):
    "Call `load` in the process of rank 0 before the others; gives each process its device"
    if num_distrib() < 2:
        return load(*args)
    if find_spec("accelerate") is None:
        raise ValueError('training in several processes needs the extra: pip install "ecan_fastai[distributed]"')
    from fastai.distributed import rank0_first

    return rank0_first(load, *args)


def _distributed(learn):
    "Return the context of a fit: fastai's distributed training if several processes were launched"
    if num_distrib() < 2:
        return nullcontext()
    import fastai.distributed  # noqa: F401  adds `distrib_ctx`, and cannot be imported without accelerate

    if learn.dls.device.type == "cuda":  # by timm: torch's drops the activation of timm's own normalisation layers
        learn.model = convert_sync_batchnorm(learn.model)
    return learn.distrib_ctx(sync_bn=False)


@contextmanager
def _own_messages():
    "Remove the prefix that fastai puts before the errors of callbacks"
    try:
        yield
    except (ValueError, OSError) as e:
        e.args = tuple(re.sub(r"^Exception occured in `\w+` when calling event `\w+`:\s+", "", str(a)) for a in e.args)
        raise


def _print_plan(dls, cfg, done):
    "Print the data, model and number of steps of a run"
    view, channels = crop_size(cfg.level, cfg.recipe, cfg.size), {1: "grey", 3: "colour"}[cfg.channels]
    images = ", ".join(f"{name} {len(dl.dataset)}" for name, dl in zip(dls.split_names, dls.loaders))
    steps = -(-len(dls.train) // max(1, num_distrib()))
    print(f"{cfg.kind}: {images} images; {channels}, {cfg.size}x{cfg.size} pixels, views of {view}x{view}")
    print(
        f"{cfg.method}, {cfg.arch}: epochs {done} to {cfg.epochs - 1}, {steps} steps each, "
        f"{images_per_step(dls)} images a step, {cfg.precision} on {dls.device}",
        flush=True,
    )


def _train(learn, cfg, out, state):
    "Train the remaining epochs, then write the results in the process of rank 0"
    keeper, done = RunState(out, asdict(cfg), state), state["epochs"] if state else 0
    with warnings.catch_warnings():
        # a small split may lack a class
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        if done < cfg.epochs:
            if not rank_distrib():
                _print_plan(learn.dls, cfg, done)
            cbs = [keeper, StopOnDivergence(), EpochLines(), *([WatchTests()] if cfg.watch_tests else [])]
            fit = learn.fit_cosine if cfg.schedule == "cosine" else learn.fit_one_cycle
            with _own_messages(), _distributed(learn), nullcontext() if sys.stdout.isatty() else learn.no_bar():
                fit(cfg.epochs, cfg.lr, cbs=cbs, start_epoch=done)
        return None if rank_distrib() else write_results(learn, cfg, out, keeper.rows)
