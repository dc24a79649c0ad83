"""Callbacks between the epochs of a run: write checkpoint and history, print a line, evaluate the test splits, and
stop a run that diverges."""

import math
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import get_model, rank_distrib

from ecan_fastai.callbacks import LossPartsRecorder
from ecan_fastai.fastai_internals import (
    add_columns,
    epoch_losses,
    fill_columns,
    plain_number,
    recorder_state,
    set_recorder_state,
    undistributed,
)
from ecan_fastai.runfiles import write_run_file

# States of the random number generators


def rng_state(dls):
    "Return the states of all random generators of a run, as plain values and tensors"
    name, keys, *rest = np.random.get_state()
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        numpy=(name, keys.tolist(), *rest),
        python=random.getstate(),
        shuffle=undistributed(dls.train).rng.getstate(),
    )


def set_rng_state(state, dls):
    "Restore `rng_state`; the GPU in use takes the state of the GPU that was in use"
    torch.set_rng_state(state["torch"].cpu())
    if torch.is_tensor(state["cuda"]) and torch.cuda.is_available():  # older runs kept a list
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    random.setstate(state["python"])
    undistributed(dls.train).rng.setstate(state["shuffle"])


# Checkpoint and history


class RunState(Callback):
    "Write checkpoint and history to the run's folder after every epoch, and restore both when the run is resumed"

    order = LossPartsRecorder.order + 1  # after all that is recorded

    def __init__(
        self,
        out,  # Folder of the run
        config: dict,  # Settings of the run, kept in the checkpoint
        resumed: dict | None = None,  # Checkpoint to resume from
    ):
        self.out, self.config, self.resumed = Path(out), config, resumed
        self.rows: list[dict] = list(resumed["rows"]) if resumed else []
        self.started = None

    def before_train(self):
        if self.resumed is not None:
            self._restore(self.resumed)
        self.resumed, self.started = None, time.time()

    def after_validate(self):
        if self.started is not None:
            self.seconds = round(time.time() - self.started, 2)

    def after_epoch(self):
        if self.started is None:  # an epoch that a resumed run skips
            return
        self.started = None
        row = dict(zip(self.recorder.metric_names, [self.epoch, *self.recorder.values[-1]]))
        self.rows.append({**row, "seconds": self.seconds})
        state = self._state()
        write_run_file(self.out / "checkpoint.pth", lambda f: torch.save(state, f))
        write_run_file(self.out / "history.csv", lambda f: pd.DataFrame(self.rows).to_csv(f, index=False))

    def _state(self):
        opt = self.opt.state_dict()
        return dict(
            epochs=self.epoch + 1,
            config=self.config,
            rows=self.rows,
            model=get_model(self.model).state_dict(),
            rng=rng_state(self.dls),
            opt=dict(state=opt["state"], hypers=[{k: plain_number(v) for k, v in h.items()} for h in opt["hypers"]]),
            scaler=self.learn.scaler.state_dict() if hasattr(self.learn, "scaler") else None,
            recorder=recorder_state(self.recorder),
        )

    def _restore(self, state):
        set_recorder_state(self.recorder, state["recorder"])
        if state["scaler"] and hasattr(self.learn, "scaler"):
            self.learn.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], self.dls)


# The other parts


class Diverged(ValueError):
    "A loss of a run is not finite"


class StopOnDivergence(Callback):
    """Raise `Diverged` after an epoch whose training or validation loss is not finite, before it is saved

    Weights that the last step of an epoch spoils show in the validation loss alone."""

    order = RunState.order

    def after_validate(self):
        for name, loss in epoch_losses(self.recorder).items():
            if not math.isfinite(loss):
                raise Diverged(
                    f"the {name} loss became {loss} in epoch {self.epoch}: start again in another folder, with a "
                    f"learning rate below {self.lr:g}"
                )


@torch.no_grad()
def split_accuracy(model, dl):
    "Measure accuracy outside fastai's events, so that the fit is not affected"
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):  # a loader draws from torch's generator when it starts
        right = sum((model(b[0]).argmax(-1) == b[-1]).sum().item() for b in dl)
    model.train(was_training)
    return right / len(dl.dataset)


class WatchTests(Callback):
    "Evaluate the test splits after every epoch, each into a column of the recorder"

    order = RunState.order + 1  # after the epoch's time is taken, before the progress bar shows the columns

    def before_fit(self):
        self.splits = [name for name in self.dls.split_names[2:] if len(self.dls[name].dataset)]
        if not self.splits:
            warnings.warn("watch_tests has no effect: the data has no test split")
        self.at = add_columns(self.recorder, [f"{name}_accuracy" for name in self.splits])

    def after_validate(self):
        model = get_model(self.model)
        accuracies = [split_accuracy(model, undistributed(self.dls[name])) for name in self.splits]
        fill_columns(self.recorder, self.at, accuracies)


class EpochLines(Callback):
    "Print a line per epoch if there is no progress bar, as for output to a file"

    order = ProgressCallback.order + 1

    def before_fit(self):
        if not rank_distrib():
            show = self.learn.logger if hasattr(self.learn, "progress") else self._print_row
            self.learn.logger = lambda row: show(row) if len(row) > 2 else None  # epochs that a resumed run skips

    def after_fit(self):
        self.learn.logger = print

    def _print_row(self, row):
        texts = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        print("  ".join(f"{name} {text}" for name, text in zip(self.recorder.metric_names, texts)), flush=True)
