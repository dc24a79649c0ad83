"What the package uses of fastai beyond its documented interface; a failure names the release that changed it"

import math
import re
from pathlib import Path

import fastai
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL
from fastai.learner import Recorder
from fastcore.foundation import L

import ecan_fastai
from ecan_fastai.data import TwoView
from ecan_fastai.fastai_internals import *
from ecan_fastai.learner import baseline_learner

RELEASE = f"fastai {fastai.__version__} has changed"


@pytest.fixture
def learn(make_dls, tmp_path):
    learn = baseline_learner(make_dls(n_views=1), "resnet10t", path=tmp_path, lr=1e-3)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def test_a_loader_finds_its_types_and_casts_a_batch_by_retain_dl(make_dls):
    train = make_dls().train
    assert callable(getattr(TfmdDL, "_one_pass", None)), f"{RELEASE}: TfmdDL._one_pass is gone"
    assert callable(getattr(TfmdDL, "_retain_dl", None)), f"{RELEASE}: TfmdDL._retain_dl, which TwoViewDL overrides"
    batch, (image, label) = batch_types(train)
    assert batch is tuple, f"{RELEASE}: what TfmdDL._one_pass leaves in _types"
    called = []
    train._retain_dl = lambda b: called.append(type(b[0])) or type(train)._retain_dl(train, b)
    train.decode(train.one_batch())
    assert called == [TwoView], f"{RELEASE}: batches to show are not cast by _retain_dl"


def test_a_batch_is_seeded_where_fastai_makes_it(make_dls, monkeypatch):
    "`TwoViewDL.create_batches` replaces fastai's, which must still be asked for batches, and by these two methods"
    train, seeds = make_dls().train, []
    monkeypatch.setattr(train, "seed", seeds.append)
    n = len(list(train))
    assert len(seeds) == n > 1, f"{RELEASE}: DataLoader does not make its batches by create_batches"
    for name in ("chunkify", "do_batch", "do_item", "create_item", "before_iter", "shuffle_fn"):
        assert callable(getattr(TfmdDL, name, None)), f"{RELEASE}: DataLoader.{name} is gone"


def test_a_distributed_loader_holds_the_loader_of_all_items(make_dls):
    train = make_dls().train
    assert undistributed(DistributedDL(train, rank=0, world_size=2)) is train, f"{RELEASE}: DistributedDL.dl"
    assert undistributed(train) is train


class Columns(Callback):
    "Two columns of its own; validates in every other epoch"

    order = Recorder.order + 1

    def before_fit(self):
        self.at = add_columns(self.recorder, ["one", "two"])

    def after_validate(self):
        fill_columns(self.recorder, self.at, [1.0, 2.0])


def test_columns_stand_before_the_time(learn):
    rows = []
    learn.logger = rows.append
    learn.fit(1, cbs=Columns())
    assert learn.recorder.metric_names[-4:] == ["f1_score", "one", "two", "time"], f"{RELEASE}: Recorder.metric_names"
    assert rows[0][-3:-1] == [1.0, 2.0] and len(rows[0]) == len(learn.recorder.metric_names), f"{RELEASE}: Recorder.log"
    learn.recorder.log = L(0, 0.5)  # an epoch whose validation was left out
    fill_columns(learn.recorder, 4, [1.0, 2.0])
    assert learn.recorder.log[:2] == [0, 0.5] and learn.recorder.log[4:] == [1.0, 2.0]
    assert all(math.isnan(x) for x in learn.recorder.log[2:4])


def test_history_goes_through_a_file_and_back(learn, tmp_path):
    learn.fit(1)
    recorder = learn.recorder
    torch.save(recorder_state(recorder), tmp_path / "state")
    kept = [list(recorder.values[0]), [x.item() for x in recorder.losses], recorder.smooth_loss.value.item()]
    learn.fit(1)
    assert recorder.smooth_loss.value.item() != kept[2]
    set_recorder_state(recorder, torch.load(tmp_path / "state", weights_only=True))
    found = [list(recorder.values[0]), [x.item() for x in recorder.losses], recorder.smooth_loss.value.item()]
    assert found == kept, f"{RELEASE}: what Recorder and AvgSmoothLoss keep"
    x = torch.tensor(3.0)
    expected = torch.lerp(x, recorder.smooth_loss.val, recorder.smooth_loss.beta)
    learn.loss = x
    recorder.smooth_loss.accumulate(learn)
    assert recorder.smooth_loss.val == expected, f"{RELEASE}: AvgSmoothLoss.accumulate"


def test_no_other_module_uses_them():
    names = r"_types\b|_one_pass|fake_l|_set_device|smooth_loss\.(?:val|count)\b|recorder\.log\b|metric_names ="
    for file in Path(ecan_fastai.__file__).parent.rglob("*.py"):
        found = re.findall(rf"\.({names})", file.read_text())
        assert file.stem == "fastai_internals" or not found, f"{file.name} uses {found[0]} of fastai"
