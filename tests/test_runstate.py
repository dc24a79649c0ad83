import random

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from ecan_fastai import runstate
from ecan_fastai.learner import baseline_learner
from ecan_fastai.runstate import EpochLines, RunState, StopOnDivergence, WatchTests, rng_state, set_rng_state


def draws(dls):
    "A number of every generator that a run draws from"
    return [torch.rand(1).item(), np.random.rand(), random.random(), dls.train.rng.random()]


def test_every_generator_is_restored(make_dls):
    dls = make_dls(n_views=1)
    state = rng_state(dls)
    expected = draws(dls)
    for i in range(4):
        draws(dls)
    other = draws(dls)
    set_rng_state(state, dls)
    assert draws(dls) == expected and all(a != b for a, b in zip(other, expected))


@pytest.mark.parametrize("saved,gpu", [(7, True), (None, True), ([], True), (7, False)])
def test_the_state_of_a_gpu_is_restored_where_there_is_one(make_dls, monkeypatch, saved, gpu):
    dls, restored = make_dls(n_views=1), []
    state = {**rng_state(dls), "cuda": torch.tensor([saved], dtype=torch.uint8) if saved == 7 else saved}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s: restored.append(int(s)))
    set_rng_state(state, dls)
    assert restored == ([7] if saved and gpu else [])


@pytest.fixture
def learn(make_dls, tmp_path):
    def _learn(**kwargs):
        dls = make_dls(n_views=1, **kwargs)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, dls.c))
        return baseline_learner(dls, nn.Sequential(net[0], net[1]), lr=1e-3, path=tmp_path)

    return _learn


def test_run_state_writes_checkpoint_and_history_and_touches_nothing_else(learn, tmp_path, capsys):
    learn, said = learn(), []
    learn.logger = said.append
    with learn.no_bar():
        learn.logger = said.append
        learn.fit(2, cbs=RunState(tmp_path, dict(seed=3)))
    assert capsys.readouterr().out == "" and learn.logger == said.append and [row[0] for row in said] == [0, 1]
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    history = pd.read_csv(tmp_path / "history.csv")
    assert (state["epochs"], state["config"]) == (2, dict(seed=3))
    assert [row["train_loss"] for row in state["rows"]] == pytest.approx(history["train_loss"].tolist())
    assert history["train_loss"].tolist() == pytest.approx([v[0] for v in learn.recorder.values])
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in state["model"].items())
    assert list(history.columns)[-1] == "seconds"


def test_the_checkpoint_of_a_wrapped_model_is_that_of_the_model(learn, tmp_path):
    class Wrap(Callback):
        "As fastai's DistributedTrainer wraps the model"

        order = 11

        def before_fit(self):
            self.learn.model = nn.DataParallel(self.learn.model)

        def after_fit(self):
            self.learn.model = self.learn.model.module

    learn = learn()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[RunState(tmp_path, {}), Wrap()])
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["model"].keys() == learn.model.state_dict().keys()


def test_a_loss_that_is_not_finite_stops_the_fit_before_the_checkpoint(learn, tmp_path):
    learn = learn()
    learn.loss_func = lambda *a, **k: torch.tensor(float("inf"), requires_grad=True)
    with (
        learn.no_bar(),
        learn.no_logging(),
        pytest.raises(ValueError, match="loss became nan in epoch 0: start again in"),
    ):
        learn.fit(1, cbs=[RunState(tmp_path, {}), StopOnDivergence()])
    assert not list(tmp_path.iterdir())


def test_weights_that_the_last_step_spoils_are_not_saved(learn, tmp_path):
    class Spoil(Callback):
        run_valid = False

        def after_step(self):
            if self.epoch == 1 and self.iter == self.n_iter - 1:
                next(self.model.parameters()).data.fill_(torch.nan)

    learn = learn()
    with (
        learn.no_bar(),
        learn.no_logging(),
        pytest.raises(ValueError, match="the validation loss became nan in epoch 1"),
    ):
        learn.fit(3, cbs=[RunState(tmp_path, {}), StopOnDivergence(), Spoil()])
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["epochs"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_watched_tests_are_columns_of_the_recorder(learn, tmp_path):
    learn = learn()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[RunState(tmp_path, {}), WatchTests()])
    history = pd.read_csv(tmp_path / "history.csv")
    names = list(learn.recorder.metric_names)
    preds, y = learn.get_preds(dl=learn.dls["test"])
    assert history["test_accuracy"].iloc[-1] == pytest.approx((preds.argmax(1) == y).float().mean().item())
    assert names[-2:] == ["test_accuracy", "time"]


def test_watching_tests_needs_some(learn, tmp_path):
    learn = learn()
    learn.dls.split_names = learn.dls.split_names[:2]
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match="watch_tests has no effect"):
        learn.fit(1, cbs=[RunState(tmp_path, {}), WatchTests()])


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_split_moves_no_generator_and_keeps_the_mode(learn, training):
    learn = learn()
    learn.model.train(training)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert 0 <= runstate.split_accuracy(learn.model, learn.dls["test"]) <= 1
    assert torch.equal(torch.rand(3), expected) and learn.model.training == training


def test_lines_are_printed_where_there_is_no_bar(learn, capsys):
    learn = learn()
    with learn.no_bar():
        learn.fit(3, cbs=EpochLines(), start_epoch=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1"], ["epoch", "2"]]
    assert all(name in lines[0].split() for name in ("train_loss", "valid_loss", "accuracy", "time"))
    assert learn.logger is print


def test_another_rank_prints_nothing(learn, capsys, monkeypatch):
    learn = learn()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("ecan_fastai.data.rank_distrib", lambda: 0)  # without a launcher there is one process's seed
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=EpochLines())
    assert capsys.readouterr().out == ""
