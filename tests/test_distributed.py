"Two processes on the CPU, joined by gloo: what `learn.distrib_ctx()` and `accelerate launch` do with this package"

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from safetensors.torch import load_file

from ecan_fastai.callbacks import *
from ecan_fastai.losses import ECANLoss
from ecan_fastai.model import ECANModel

SCRIPT = Path(__file__).with_name("two_processes.py")

pytestmark = pytest.mark.slow


def noise(n=16):
    g = torch.Generator().manual_seed(0)
    image = lambda: torch.randn(1, 16, 16, generator=g)
    return [((image(), image()), torch.tensor(i % 3)) for i in range(n)]


ITEMS = noise()


def make_learner(items, bs, loss):
    "A learner whose encoder has no batch statistics, with a bank that keeps all keys of two epochs"
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, stride=2), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()
    )
    dls = DataLoaders(DataLoader(items, bs=bs, num_workers=0), DataLoader(items, bs=bs, num_workers=0), device="cpu")
    dls.n_inp = 1
    model = ECANModel(encoder, n_classes=3, in_chans=1, bank_size=60)
    cbs = [MomentumUpdate(0.5), MemoryBankUpdate(), LossPartsRecorder(), CropsAsImages()]
    learn = Learner(dls, model, loss_func=loss, lr=1e-2, cbs=cbs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def two_processes(scenario, folder, *args, fails=False):
    "What each of two processes saw"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-W", "ignore", str(SCRIPT), scenario, str(folder), *map(str, args)]
    running = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=300) for p in running]
    assert all(bool(p.returncode) == fails for p in running), said
    return said if fails else [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def close(a, b):
    return all(torch.allclose(a[k].double(), b[k].double(), atol=1e-5) for k in a) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def seen(faces, tmp_path_factory):
    "What each of two processes saw in each scenario with learners"
    folder = tmp_path_factory.mktemp("two")
    (folder / "faces").symlink_to(faces)
    return two_processes("learners", folder)


def test_two_processes_train_as_one_on_the_joined_batches(seen):
    first, second = (s["exact"] for s in seen)
    joined = [i for start in range(0, 8, 4) for half in (0, 8) for i in range(half + start, half + start + 4)]
    one = make_learner([ITEMS[i] for i in joined], bs=8, loss=ECANLoss(l1=0, compact="affinity"))
    one.fit(2)
    assert same(first["model"], second["model"])  # bank, key encoder, centres and all else
    assert close(first["model"], one.model.state_dict()) and len(one.model.bank) == 48
    assert torch.equal(first["model"]["bank.y"], one.model.bank.y)
    names = one.recorder.metric_names[1:-1]
    for epoch, values in enumerate(one.recorder.values):
        expected, a, b = [dict(zip(names, v)) for v in (values, first["values"][epoch], second["values"][epoch])]
        for name in ("valid_loss", "ce", "affinity"):
            assert a[name] == b[name] == pytest.approx(expected[name], rel=1e-4)


def test_bank_and_encoders_agree_after_a_fit_with_the_default_loss(seen):
    first, second = (s["whole"]["model"] for s in seen)
    parameters = [k for k in first if "running" not in k]  # statistics follow the first process, from batch to batch
    assert all(torch.equal(first[k], second[k]) for k in parameters)
    assert int(first["bank.filled"]) == len(first["bank.z"]) == 3 * 16 and first["bank.z"].unique(dim=0).shape[0] == 48


def test_parts_of_the_loss_are_means_over_the_batches_of_both_processes(seen):
    first, second = (s["whole"] for s in seen)
    for epoch, row in enumerate(first["rows"]):
        own = [[{k: v.item() for k, v in parts.items()} for parts in s["parts"][epoch]] for s in (first, second)]
        assert len(own[0]) == len(own[1]) > 1
        for name in ("ce", "ensc", "mva", "alpha", "cos_within", "cos_between"):
            values = [[parts[name] for parts in batches if not math.isnan(parts[name])] for batches in own]
            assert row[name] == second["rows"][epoch][name] == pytest.approx(mean(values[0] + values[1]), rel=1e-5)
            assert mean(values[0]) != mean(values[1])


def test_only_the_first_process_writes(seen):
    assert [sorted(s["whole"]["written"]) for s in seen] == [["learner.pkl", "weights.pth"], []]


def test_the_rate_follows_the_images_of_a_step(seen):
    assert [s["whole"]["lr"] for s in seen] == [pytest.approx(0.1 * 16 / 256)] * 2


def test_steps_are_counted_in_one_process_and_told_once(seen):
    first, second = (s["whole"] for s in seen)
    (said,) = first["said"]
    taken = sum(map(len, first["parts"]))
    assert taken <= int(said.split()[0]) <= taken + 2 and not second["said"]  # fastai counts the last batch of an epoch


def test_draws_differ_between_processes_and_repeat_from_the_seed(seen):
    first, second = (s["draws"] for s in seen)
    views = torch.cat([first[0], second[0], first[2], second[2]])
    assert len(first[0]) == 64 and len(views.flatten(1).unique(dim=0)) == 256
    assert torch.equal(first[0], first[1]) and torch.equal(second[0], second[1])


def test_a_loss_without_centres_trains(seen):
    first, second = (s["without_centres"] for s in seen)
    assert same(first["model"], second["model"]) and first["model"]["bank.filled"] == 32


def test_the_bank_is_not_broadcast(seen):
    assert [s["bank_counters"] for s in seen] == [0, 1]


def test_ecan_train_in_two_processes_resumes_as_if_it_had_not_stopped(faces, tmp_path):
    options = "--kind folder --size 32 --channels 1 --recipe fer2013 --level weak --opt adam --momentum 0.9".split()
    options = [faces, *options, "--epochs", 2, "--bs", 16, "--workers", 0, "--precision", "fp32"]
    two_processes("train", tmp_path, 0, *options, "--out", tmp_path / "whole")
    steps = torch.load(tmp_path / "0.pt")
    said = two_processes("train", tmp_path, steps, *options, "--out", tmp_path / "cut", fails=True)
    assert "interrupted" in said[0][1] and len(pd.read_csv(tmp_path / "cut" / "history.csv")) == 1
    two_processes("train", tmp_path, 0, "--resume", tmp_path / "cut")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    rows = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (cut, whole)]
    pd.testing.assert_frame_equal(*rows)
    assert same(*[load_file(run / "model.safetensors") for run in (cut, whole)])
    assert {f.name for f in cut.iterdir()} == {f.name for f in whole.iterdir()}
