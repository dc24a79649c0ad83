"""What each process of `test_distributed.py` runs: `python two_processes.py SCENARIO FOLDER ...`, where the scenario
writes what it saw to FOLDER/<rank>.pt.

fastai's distributed training is written for GPUs in two places. `DistributedDL` sends the shuffled indices with
`.cuda()`: here they are sent as they lie. Its `SyncBatchNorm` refuses CPU tensors: `sync_bn=False` leaves it out."""

import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.distributed import DistributedDL
from fastai.torch_core import rank_distrib, set_seed
from test_distributed import ITEMS, make_learner

from ecan_fastai.cli import ecan_train
from ecan_fastai.learner import ecan_learner
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.losses import ECANLoss
from ecan_fastai.model import ECANModel


def _broadcast(self, idxs, rank):
    idxs = torch.tensor(idxs)
    torch.distributed.broadcast(idxs, rank)
    return idxs.tolist()


DistributedDL._broadcast = _broadcast


def exact(folder):
    "Losses that are means over images, an encoder without batch statistics: comparable with one process"
    learn = make_learner(ITEMS, bs=4, loss=ECANLoss(l1=0, compact="affinity"))
    with learn.distrib_ctx(sync_bn=False):
        learn.fit(2)
    return dict(model=learn.model.state_dict(), values=[list(v) for v in learn.recorder.values])


def whole(folder):
    "The default loss, from loaders of faces; each process has a folder of its own to write to"
    parts = []

    class Look(Callback):
        run_valid = False

        def after_loss(self):
            parts[-1].append(dict(self.loss_func.parts))

        def before_train(self):
            parts.append([])

    set_seed(0)
    dls = ExpressionDataLoaders.from_folder(
        folder / "faces", size=32, channels=1, recipe="fer2013", level="weak", bs=8, num_workers=0, device="cpu"
    )
    learn = ecan_learner(dls, bank_groups=3, cbs=Look(), path=folder / f"process{rank_distrib()}")
    lr = learn.lr
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit(2, 1e-3)
    said = [str(w.message) for w in said if "momentum" in str(w.message)]
    learn.save("weights"), learn.export("learner.pkl")
    written = [p.name for p in (folder / f"process{rank_distrib()}").rglob("*.p*")]
    names = learn.recorder.metric_names[1:-1]
    rows = [dict(zip(names, v)) for v in learn.recorder.values]
    return dict(model=learn.model.state_dict(), rows=rows, parts=parts, written=written, lr=lr, said=said)


def draws(folder):
    "Two passes from one seed over a training set of one image, then one from another seed"
    dls = ExpressionDataLoaders.from_folder(
        folder / "faces", size=48, channels=1, recipe="fer2013", level="strong", bs=8, num_workers=2, device="cpu"
    )
    dls.train_ds.tls[0].items = [dls.train_ds.tls[0].items[0]] * 64
    dls.train.n = 64
    train, passes = DistributedDL(dls.train, device="cpu"), []
    for seed in (0, 0, 1):
        set_seed(seed)
        passes.append(torch.cat([torch.cat(tuple(x)) for x, _ in train]).as_subclass(torch.Tensor))
    return passes


def without_centres(folder):
    "A loss that does not use the class centres"
    learn = make_learner(ITEMS, bs=4, loss=ECANLoss(l2=0))
    before = learn.model.state_dict()["centers"].clone()
    with learn.distrib_ctx(sync_bn=False):
        learn.fit(1)
    return dict(model=learn.model.state_dict(), before=before)


def bank_counters(folder):
    "The bank's counters, which stay on the CPU where NCCL cannot send them, differ here and must stay as they are"
    model = torch.nn.parallel.DistributedDataParallel(make_learner(ITEMS, bs=4, loss=ECANLoss()).model.train())
    model.module.bank.position.fill_(rank_distrib())
    views = torch.stack([torch.stack(pair) for pair, _ in ITEMS[:4]], 1)
    model((views[0], views[1]))
    return int(model.module.bank.position)


def learners(folder):
    "All of the above"
    return {f.__name__: f(folder) for f in (exact, whole, draws, without_centres, bank_counters)}


def train(folder, stop_at, *args):
    "`ecan_train`, interrupted at a training step of this number (0: never)"
    update, steps = ECANModel.update_keys, []

    def counted(self, momentum):
        steps.append(1)
        if len(steps) == int(stop_at):
            raise KeyboardInterrupt
        update(self, momentum)

    ECANModel.update_keys = counted
    ecan_train(list(args))
    return len(steps)


if __name__ == "__main__":
    scenario, folder, *args = sys.argv[1:]
    torch.set_num_threads(1)
    if scenario != "train":  # `ecan_train` meets the other process by itself
        from accelerate import PartialState

        PartialState(cpu=True)
    found = globals()[scenario](Path(folder), *args)
    torch.save(found, Path(folder) / f"{rank_distrib()}.pt")
