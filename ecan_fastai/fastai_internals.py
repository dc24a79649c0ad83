"""What this package uses of fastai beyond its documented interface, in one place. `tests/test_fastai_internals.py`
names what a release of fastai has changed."""

import math
from types import MethodType

import torch
from fastcore.foundation import L
from plum import NotFoundLookupError


def batch_types(
    dl,  # `TfmdDL`
):  # Type of a batch, and the types of its parts
    "Types to which fastai casts a collated batch, found on a first item"
    if not getattr(dl, "_types", None):
        dl._one_pass()
    ((batch, parts),) = dl._types.items()
    return batch, parts


def undistributed(
    dl,  # Loader of a Learner during a fit
):
    "Return the loader of all items, which in distributed training is inside fastai's loader of a share of them"
    return getattr(dl, "dl", dl)


def add_columns(
    recorder,  # `Recorder`, after its own `before_fit`
    names: list,  # Of the columns
) -> int:  # Number of columns in front of them
    "Add columns to the table of a fit, in front of the time"
    columns = list(recorder.metric_names)
    at = len(columns) - bool(recorder.add_time)
    recorder.metric_names = L([*columns[:at], *names, *columns[at:]])
    return at


def fill_columns(
    recorder,  # `Recorder`, before its own `after_epoch`
    at: int,  # What `add_columns` returned
    values: list,  # Of the columns
):
    "Write an epoch's values into added columns; columns of a validation that did not happen become NaN"
    recorder.log += [math.nan] * (at - len(recorder.log)) + values


def epoch_losses(
    recorder,  # `Recorder`, after its own `after_validate`
) -> dict:  # By name
    "Training and validation loss of the epoch"
    return dict(zip(("training", "validation"), recorder.log[1:3]))


def plain_number(x):
    "Return the number in a tensor or array of one, and anything else as it is"
    return x.item() if hasattr(x, "item") else x


def recorder_state(
    recorder,  # `Recorder`
) -> dict:  # Of plain numbers and lists
    "History and smoothed loss of a fit, as `set_recorder_state` puts them back"
    return dict(
        values=[list(map(plain_number, v)) for v in recorder.values],
        losses=list(map(plain_number, recorder.losses)),
        lrs=list(map(plain_number, recorder.lrs)),
        iters=list(recorder.iters),
        smooth=(recorder.smooth_loss.count, plain_number(recorder.smooth_loss.val)),
    )


def set_recorder_state(
    recorder,  # `Recorder`
    state: dict,  # From `recorder_state`
):
    "Put history and smoothed loss of a fit back"
    recorder.values, recorder.lrs, recorder.iters = L(map(L, state["values"])), state["lrs"], state["iters"]
    recorder.losses = [torch.tensor(x) for x in state["losses"]]
    recorder.smooth_loss.count, recorder.smooth_loss.val = state["smooth"][0], torch.tensor(state["smooth"][1])


def acts_on(
    tfm,  # A fastai transform
    x,  # What it would get
) -> bool:
    "Whether a transform has an `encodes` for the type of `x`; without one, fastai returns `x` as it is"
    encodes = getattr(tfm, "encodes", None)
    if encodes is None:  # a class with a `__call__` of its own
        return True
    bound = isinstance(encodes, MethodType)
    function = encodes._f if bound else encodes  # type: ignore[attr-defined]
    try:
        function.resolve_method((tfm, x) if bound else (x,))
    except NotFoundLookupError:
        return False
    return True
