"""A training run from its configuration to its folder: what `ecan_train` does. Plain machinery; the method is in
the notebooks."""

import json
import math
import os
import pickle
import platform
import random
import subprocess
import sys
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import default_device, defaults, get_model, num_distrib, rank_distrib, set_seed
from fastcore.foundation import L
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm

from ecan_fastai import __version__
from ecan_fastai.augment import crop_size, uses_five_crops
from ecan_fastai.callbacks import CPUMixedPrecision, ProgressiveResize
from ecan_fastai.config import UNUSED, RunConfig
from ecan_fastai.data import set_stats
from ecan_fastai.fastai_internals import recorder_state, set_recorder_state, undistributed
from ecan_fastai.inference import Predictor
from ecan_fastai.interpret import plot_confusion, plot_history
from ecan_fastai.layers import channels_last_is_faster, fast_precision
from ecan_fastai.learner import baseline_learner, ecan_learner, images_per_step, paper_opt
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.losses import ECANLoss, PaperReading
from ecan_fastai.metrics import per_class_table, split_metrics
from ecan_fastai.model import ECANModel
from ecan_fastai.readers.factory import detect_kind
from ecan_fastai.sample import sample_faces

OPTIMIZER_PRESETS = {
    "paper": paper_opt,
    "adam": dict(opt_func=Adam, lr=2e-3, wd=1e-2),
}  # the rest of Adam's settings are fastai's


# Data and learner


def resolve_config(cfg):
    "Recognise the data of a configuration and fill in the preset of its kind"
    if cfg.kind == "auto" and cfg.data != "sample":
        cfg.kind = detect_kind(cfg.data)
    return cfg.resolve()


def run_loaders(cfg, out):
    "DataLoaders of a resolved configuration; settles precision, batch size and number of workers where none is given"
    _settle_precision(cfg)
    if cfg.workers is None:
        cfg.workers = min(16, defaults.cpus)
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


def run_learner(cfg, dls, out):
    "Learner of a resolved configuration"
    opt = OPTIMIZER_PRESETS[cfg.opt]
    if cfg.lr is None:
        cfg.lr = opt["lr"] * (images_per_step(dls) / 256 if cfg.opt == "paper" else 1)
    if cfg.wd is None:
        cfg.wd = opt["wd"]
    kwargs = {**opt, "lr": cfg.lr, "wd": cfg.wd, "arch": cfg.arch, "pretrained": cfg.pretrained, "path": out}
    if cfg.balance == "positives" and not dls.minority_classes().any():
        warnings.warn(
            "no class has less than three quarters of the faces that a class has on average: balance positives "
            "changes nothing"
        )
    weight = torch.tensor(dls.class_weights(), dtype=torch.float32) if cfg.balance == "weights" else None
    smoothing = cfg.label_smoothing or 0.0
    if cfg.method == "baseline":
        learn = baseline_learner(
            dls, loss_func=CrossEntropyLossFlat(flatten=False, weight=weight, label_smoothing=smoothing), **kwargs
        )
    else:
        settings = {
            k: getattr(cfg, k)
            for k in (
                "l1",
                "l2",
                "n_groups",
                "temperature",
                "center_features",
            )
            if k not in UNUSED[cfg.method]
        }
        names = [f.name for f in fields(PaperReading) if f.name not in UNUSED[cfg.method]]
        settings["reading"] = PaperReading(**{k: getattr(cfg, k) for k in names})
        settings |= dict(
            ecan={}, center=dict(l1=0, compact="center"), supcon=dict(l2=0, contrast="supcon"), ensc=dict(l2=0)
        )[cfg.method]
        loss = ECANLoss(
            **settings,
            weight=weight,
            label_smoothing=smoothing,
            bank_positives=dls.minority_classes() if cfg.balance == "positives" else None,
        )
        groups = 1 if "bank_groups" in UNUSED[cfg.method] else cfg.bank_groups
        learn = ecan_learner(dls, momentum=cfg.momentum, bank_groups=groups, loss_func=loss, **kwargs)
    if cfg.pretrained:
        learn.unfreeze()  # one fit trains everything, as the paper does on RAF-DB
    if cfg.small_size:
        learn.add_cb(ProgressiveResize(cfg.small_size, cfg.small_pct))
    return _set_precision(learn, cfg.precision, dls.device)


def _set_precision(learn, precision, device):
    "Mixed precision, and the memory layout that is faster with it"
    if channels_last_is_faster(device, precision):
        learn.add_cb(ChannelsLast())
    if precision != "fp32":
        learn.add_cb(CPUMixedPrecision() if device.type == "cpu" else MixedPrecision(precision))
    return learn


# Several processes, as `accelerate launch` starts them: all train, and the first one writes the files


def first_process_first(load, *args):
    "Result of `load`, which the first process calls before the others do; assigns each process its device"
    if num_distrib() <= 1:
        return load(*args)
    from fastai.distributed import rank0_first

    return rank0_first(load, *args)


def distributed(learn):
    "Context in which `learn` trains in all processes; with one process it does nothing"
    if num_distrib() <= 1:
        return nullcontext()
    import fastai.distributed  # noqa: F401  gives `Learner` its `distrib_ctx`

    if learn.dls.device.type == "cuda":  # by timm: torch's drops the activation of timm's own normalisation layers
        learn.model = convert_sync_batchnorm(learn.model)
    return learn.distrib_ctx(sync_bn=False)


# State between epochs


def _rng_state(dls):
    name, keys, *rest = np.random.get_state()
    return dict(
        torch=torch.get_rng_state(),
        cuda=[torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        numpy=(name, keys.tolist(), *rest),
        python=random.getstate(),
        shuffle=undistributed(dls.train).rng.getstate(),
    )


def _set_rng_state(state, dls):
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    random.setstate(state["python"])
    undistributed(dls.train).rng.setstate(state["shuffle"])


def _plain(x):
    return x.item() if hasattr(x, "item") else x


def write_whole(file, write):
    "Write a file whole or not at all"
    tmp = file.with_name(file.name + ".part")
    write(tmp)
    os.replace(tmp, file)


def _tests(dls):
    return [(name, undistributed(dls[name])) for name in dls.split_names[2:] if len(dls[name].dataset)]


@torch.no_grad()
def _accuracy(model, dl):
    "Outside fastai's events, so that a fit goes on as if nothing had been looked at"
    model.eval()
    with torch.random.fork_rng(devices=[]):  # a loader draws from torch's generator whenever it starts
        right = sum((model(b[0]).argmax(-1) == b[-1]).sum().item() for b in dl)
    return right / len(dl.dataset)


class RunState(Callback):
    "Keep history and checkpoint in the run's folder after every epoch, and put everything back when a run is resumed"

    order = 70  # after the recorder, its parts and the progress bars

    def __init__(self, out, resumed=None, watch_tests=False):
        self.out, self.resumed, self.watch_tests, self.rows, self.started = Path(out), resumed, watch_tests, [], None

    def before_fit(self):
        if rank_distrib():
            return
        show = self.logger if hasattr(self.learn, "progress") else self._print_row
        self.learn.logger = lambda row: (
            show(row) if len(row) > 2 else None
        )  # rows of epochs that a resumed run skips are empty

    def after_fit(self):
        self.learn.logger = print

    def _print_row(self, row):
        "One line an epoch, for output that goes to a file"
        print(
            "  ".join(
                f"{name} {v:.4f}" if isinstance(v, float) else f"{name} {v}"
                for name, v in zip(self.recorder.metric_names, row)
            ),
            flush=True,
        )

    def after_train(self):
        loss = float(self.recorder.smooth_loss.value)
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss became {loss} in epoch {self.epoch}: lower the learning rate (now {self.lr:g}); "
                f"the epochs before it are in {self.out}"
            )

    def before_train(self):
        if self.resumed is not None:
            self._restore(self.resumed)
        self.resumed, self.started = None, time.time()

    def after_epoch(self):
        if self.started is None:
            return
        row = dict(zip(self.recorder.metric_names, [self.epoch, *self.recorder.values[-1]]))
        row["seconds"] = round(time.time() - self.started, 2)
        if self.watch_tests:
            row |= {f"{name}_accuracy": _accuracy(get_model(self.model), dl) for name, dl in _tests(self.dls)}
        self.rows.append(row)
        self.started = None
        if not rank_distrib():
            self._save()

    def _save(self):
        opt = self.opt.state_dict()
        state = dict(
            epochs=self.epoch + 1,
            rows=self.rows,
            model=get_model(self.model).state_dict(),
            rng=_rng_state(self.dls),
            opt=dict(state=opt["state"], hypers=[{k: _plain(v) for k, v in h.items()} for h in opt["hypers"]]),
            scaler=self.learn.scaler.state_dict() if hasattr(self.learn, "scaler") else None,
            recorder=recorder_state(self.recorder),
        )
        write_whole(self.out / "checkpoint.pth", lambda f: torch.save(state, f))
        write_whole(self.out / "history.csv", lambda f: pd.DataFrame(self.rows).to_csv(f, index=False))

    def _restore(self, state):
        set_recorder_state(self.recorder, state["recorder"])
        self.rows = list(state["rows"])
        if state["scaler"] and hasattr(self.learn, "scaler"):
            self.learn.scaler.load_state_dict(state["scaler"])
        _set_rng_state(state["rng"], self.dls)


def read_config(out):
    file = out / "config.json"
    if not file.exists():
        raise ValueError(f"{out} holds no run to resume: expected config.json in it")
    try:
        return RunConfig(**json.loads(file.read_text())["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not the configuration of a run: {e}") from e


def _read_checkpoint(out, device):
    "State after the last finished epoch, or None"
    file = out / "checkpoint.pth"
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location=device, weights_only=True)  # fastai's optimizer moves nothing by itself
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise ValueError(f"{file} is broken: {e}") from e


def _load_weights(learn, state):
    learn.model.load_state_dict(state["model"])
    if learn.opt is None:
        learn.create_opt()
    learn.opt.load_state_dict(dict(state=state["opt"]["state"], hypers=L(state["opt"]["hypers"])))


# Results


def _evaluate(learn, cfg, out):
    "Metrics, predictions and a confusion matrix of every split but train, in float32, in which the model is exported"
    both = cfg.eval_crops == "center" and uses_five_crops(
        cfg.level, cfg.recipe
    )  # published FER2013 code reports ten crops
    predictor, vocab, metrics = Predictor.from_learner(learn, "ten" if both else None), list(learn.dls.vocab), {}
    keys = Predictor.from_learner(learn, key=True) if isinstance(learn.model, ECANModel) else None
    for name in learn.dls.split_names[1:]:
        faces = learn.dls[name].dataset.items
        if not len(faces):
            continue
        images, targets = [f.image for f in faces], np.array([vocab.index(f.label) for f in faces])
        logits = predictor.logits(images, num_workers=cfg.workers)
        shown = logits[:, predictor.center_view] if both else logits.mean(1)
        predicted = shown.argmax(-1).numpy()
        metrics[name] = {**split_metrics(targets, predicted, vocab), "eval_crops": cfg.eval_crops}
        metrics[name]["per_class"] = per_class_table(targets, predicted, vocab).to_dict("index")
        if both:
            metrics[name]["ten_crops_accuracy"] = _share_right(logits.mean(1).argmax(-1), targets)
        if keys:
            metrics[name]["key_encoder_accuracy"] = _share_right(
                keys.probabilities(images, num_workers=cfg.workers).argmax(1), targets
            )
        _write_predictions(faces, targets, shown.softmax(-1).numpy(), vocab, out / f"predictions_{name}.csv")
        title = f"{cfg.method} on {name}: accuracy {100 * metrics[name]['accuracy']:.2f} %"
        _save_figure(plot_confusion(targets, predicted, vocab, title).figure, out / f"confusion_{name}.png")
    return metrics


def _share_right(predicted, targets):
    return float((np.asarray(predicted) == targets).mean())


def _write_predictions(faces, targets, probs, vocab, file):
    table = pd.DataFrame(
        dict(
            image=list(map(str, faces)),
            label=[vocab[t] for t in targets],
            predicted=[vocab[p] for p in probs.argmax(1)],
        )
    )
    table[[f"p_{v}" for v in vocab]] = probs.round(5)
    write_whole(file, lambda f: table.to_csv(f, index=False))


def _first_and_last(column):
    return dict(first=float(column.iloc[0]), last=float(column.iloc[-1]))


def _save_figure(fig, file):
    fig.savefig(file, dpi=110)
    matplotlib.pyplot.close(fig)


@cache  # of the code that this process runs, whatever is committed while it does
def _commit():
    "Commit of the package's code, where it lies in a repository of its own; with a + where files differ from it"

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent.parent), *args], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return (
            git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "ecan_fastai") else "")
            if git("ls-files", "ecan_fastai/runs.py")
            else None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _environment(dls):
    import albumentations
    import cv2
    import fastai
    import sklearn
    import timm

    device = torch.device(dls.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return dict(
        ecan_fastai=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        fastai=fastai.__version__,
        timm=timm.__version__,
        albumentations=albumentations.__version__,
        numpy=np.__version__,
        sklearn=sklearn.__version__,
        opencv=cv2.__version__,
        commit=_commit(),
        device=f"{device.type}: {name}",
        cpus=os.cpu_count(),
        **({"processes": num_distrib()} if num_distrib() > 1 else {}),
    )


def _processor():
    "Model of the processor, as Linux or else Python tells it"
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return models[0] if models else platform.processor() or platform.machine()


def _note_environment(dls, out):
    "Where a run goes on in another environment than it was in, that one is kept too, under `resumed`"
    file, now = out / "config.json", _environment(dls)
    written = json.loads(file.read_text())
    known = [written["environment"], *written.get("resumed", [])]
    if known[-1] != now:
        write_json(file, {**written, "resumed": [*known[1:], now]})


def _environments(out):
    written = json.loads((out / "config.json").read_text())
    return {k: written[k] for k in ("environment", "resumed") if k in written}


def as_json(value, **kwargs):
    "JSON text; what is not a finite number becomes null, because JSON has no NaN"

    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), allow_nan=False, **kwargs)


def write_json(file, value):
    write_whole(file, lambda f: f.write_text(as_json(value, indent=1)))


def _write_results(learn, cfg, out, rows):
    history = pd.DataFrame(rows)
    write_whole(
        out / "history.csv", lambda f: history.to_csv(f, index=False)
    )  # a run may have been stopped between its last checkpoint and this file
    _save_figure(plot_history(history), out / "curves.png")
    metrics = _evaluate(learn, cfg, out)
    for name, m in metrics.items():
        if f"{name}_accuracy" in history:
            m["accuracy_of_best_epoch_chosen_on_this_split"] = float(history[f"{name}_accuracy"].max())
    model = learn.model.inference()
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_whole(out / "model.safetensors", lambda f: save_file(weights, f))
    learn.remove_cbs([MixedPrecision, ChannelsLast])
    learn.export("export.pkl")
    seconds = history["seconds"]
    record = dict(
        method=cfg.method,
        epochs=len(history),
        splits=metrics,
        seconds=dict(training_and_validation=round(float(seconds.sum()), 1), median_epoch=float(seconds.median())),
        **_environments(out),
    )
    if "alpha" in history:
        record["alpha"] = {**_first_and_last(history["alpha"]), "highest": float(history["alpha"].max())}
    if "cos_within" in history:
        record["mean_cosines"] = {pairs: _first_and_last(history[f"cos_{pairs}"]) for pairs in ("within", "between")}
    write_json(out / "metrics.json", record)
    return record


# The run


def start_run(
    cfg,  # `RunConfig`
    out,  # Folder of the run, new or empty
) -> dict | None:  # The record that is written to `metrics.json`; of several processes the first one returns it
    "Train, evaluate and write a new run; a folder that is not empty is refused"
    out = Path(out)
    if rank_distrib():
        return _start(cfg, out)
    with lock_run(out):
        _check_new(out)
        return _start(cfg, out)


def _check_new(out):
    if (out / "metrics.json").exists():
        raise ValueError(f"{out} already holds a finished run: give another folder with --out")
    if (out / "config.json").exists():
        raise ValueError(
            f"{out} already holds a run: give another folder with --out, or go on with it by --resume {out}"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder for the run, got the file {out}")
    others = sorted(p.name for p in out.iterdir() if p.name != "faces") if out.exists() else []
    if others:
        raise ValueError(f"expected a new or empty folder for the run, and {out} holds {', '.join(others[:5])}")


def _start(cfg, out):
    resolve_config(cfg)
    if cfg.kind != "sample":
        cfg.data = os.path.abspath(cfg.data)  # so that the run can go on from anywhere
    set_seed(cfg.seed, reproducible=True)
    dls = first_process_first(run_loaders, cfg, out)
    learn = run_learner(cfg, dls, out)
    if not rank_distrib():
        _write_start(cfg, dls, out)
    return _train(learn, cfg, out, None)


def _write_start(cfg, dls, out):
    "Configuration, environment and list of images of a new run"
    out.mkdir(parents=True, exist_ok=True)
    side = crop_size(cfg.level, cfg.recipe, cfg.size)
    stats = next(t for t in dls.after_batch.fs if hasattr(t, "mean"))
    about = dict(
        vocab=list(dls.vocab),
        view_size=side,
        mean=stats.mean.flatten().tolist(),
        std=stats.std.flatten().tolist(),
        images={name: len(dl.dataset) for name, dl in zip(dls.split_names, dls.loaders)},
    )
    write_whole(out / _DATA_FILE, lambda f: _data_table(dls, cfg).to_csv(f, index=False, compression="gzip"))
    write_json(out / "config.json", dict(config=asdict(cfg), about=about, environment=_environment(dls)))


def resume_run(
    out,  # Folder of a run that was interrupted
    data=None,  # Where the same data lies now, if it was moved
) -> dict | None:  # The record that is written to `metrics.json`; of several processes the first one returns it
    "Resume a run from its last finished epoch, as if it had not stopped; raises `ValueError` if its data has changed"
    out = Path(out)
    with nullcontext() if rank_distrib() else lock_run(out):
        return _resume(out, data)


def _resume(out, data):
    if (out / "metrics.json").exists():
        raise ValueError(f"the run in {out} is finished: its results are in metrics.json")
    cfg = read_config(out)
    moved = data is not None and cfg.kind != "sample"
    if data is not None and cfg.kind == "sample" and data != "sample":
        raise ValueError(f"the run in {out} is on faces that it draws itself, and takes no data, got {data}")
    if moved:
        cfg.data = os.path.abspath(data)
    set_seed(cfg.seed, reproducible=True)
    dls = first_process_first(run_loaders, cfg, out)
    _check_data(dls, cfg, out)
    if moved and not rank_distrib():
        written = json.loads((out / "config.json").read_text())
        written["config"]["data"] = cfg.data
        write_json(out / "config.json", written)
    if not rank_distrib():
        _note_environment(dls, out)
    about = json.loads((out / "config.json").read_text())["about"]
    set_stats(dls, about["mean"], about["std"])
    state = _read_checkpoint(out, dls.device)
    learn = run_learner(replace(cfg, pretrained=False) if state else cfg, dls, out)  # a checkpoint has its own weights
    return _train(learn, cfg, out, state)


def lock_run(out, wait=None):
    "Lock a run's folder; if another process holds it, call `wait` and wait, or raise `ValueError` without `wait`"
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), is_singleton=True)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise ValueError(f"another process is training in {out}: give another folder with --out") from None
    wait()
    return lock.acquire()


# The data of a run

_DATA_FILE = "data.csv.gz"


def _data_table(dls, cfg):
    "Split, label, name and size of every image, in the order of the loaders"
    root = Path(cfg.data) if Path(cfg.data).is_dir() else Path(cfg.data).parent
    rows = []
    for split, dl in zip(dls.split_names, dls.loaders):
        rows += [(split, face.label, *_image_mark(face.image, root)) for face in dl.dataset.items]
    return pd.DataFrame(rows, columns=["split", "label", "image", "size"]).astype(str)


def _image_mark(image, root):
    "Name and size in bytes of an image file; of pixels their checksum"
    if isinstance(image, np.ndarray):
        return f"pixels {zlib.crc32(image.tobytes()):08x}", image.size
    file = Path(getattr(image, "file", image))
    name = str(image).replace(f"{root}{os.sep}", "")
    return name, file.stat().st_size


def _check_data(dls, cfg, out):
    "Raise `ValueError` naming what differs between the data of a run and what lies there now"
    file = out / _DATA_FILE
    if cfg.kind == "sample":
        return
    if not file.exists():
        return warnings.warn(f"{file} is missing: whether the data of the run has changed cannot be checked")
    columns = ["split", "label", "image", "size"]
    before = pd.read_csv(file, dtype=str, keep_default_na=False)[columns]
    now = _data_table(dls, cfg)
    if before.equals(now):
        return
    old, new = ({row.image: (row.split, row.label, row.size) for row in t.itertuples()} for t in (before, now))
    groups = {
        "missing": [k for k in old if k not in new],
        "new": [k for k in new if k not in old],
        "with another split, label or size": [k for k in old if k in new and old[k] != new[k]],
    }
    said = [f"{len(names)} {what} (such as {names[0]})" for what, names in groups.items() if names]
    found = "; ".join(said) or "the same images in another order"
    raise ValueError(f"the data in {cfg.data} is not the data with which the run in {out} began: {found}")


def _settle_precision(cfg):
    device = default_device().type
    if cfg.precision == "auto":
        cfg.precision = fast_precision(device)
    known = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32", "bf16")}.get(device, ("fp32",))
    if cfg.precision not in known:
        raise ValueError(f"precision {cfg.precision} is not for a device of type {device}: use {' or '.join(known)}")


def _warn_short(learn, cfg):
    if cfg.method in ("baseline", "center"):
        return
    steps, memory = cfg.epochs * len(learn.dls.train) // max(1, num_distrib()), 1 / (1 - cfg.momentum)
    if steps < 3 * memory:
        warnings.warn(
            f"{steps} steps are few for a key encoder of momentum {cfg.momentum}, which averages over about "
            f"{memory:.0f}: {100 * cfg.momentum**steps:.0f} % of it will still be its start; "
            "train longer or give a smaller momentum"
        )


def _train(learn, cfg, out, state):
    if state:
        _load_weights(learn, state)
    keeper, done = RunState(out, state, cfg.watch_tests), state["epochs"] if state else 0
    with warnings.catch_warnings():
        if done < cfg.epochs and not rank_distrib():
            _warn_short(learn, cfg)
        warnings.filterwarnings(
            "ignore", message="y_pred contains classes not in y_true"
        )  # a small split may lack a class
        if done < cfg.epochs:
            fit = learn.fit_cosine if cfg.schedule == "cosine" else learn.fit_one_cycle
            with distributed(learn), nullcontext() if sys.stdout.isatty() else learn.no_bar():
                fit(cfg.epochs, cfg.lr, cbs=keeper, start_epoch=done)
        return None if rank_distrib() else _write_results(learn, cfg, out, keeper.rows or state["rows"])
