import resource
from contextlib import contextmanager

import matplotlib
import pytest
import torch

from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.sample import sample_faces

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    "A small drawn data set: train and test, seven classes"
    return sample_faces(tmp_path_factory.mktemp("sample") / "faces", n=150, test_pct=0.3)


@pytest.fixture
def full_disk():
    "Context in which writing fails in the middle of a file of more than so many bytes, as on a full disk"

    @contextmanager
    def _full_disk(n_bytes):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))  # Python ignores the signal, so that writes raise
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return _full_disk


@pytest.fixture
def make_dls(faces):
    def _make(**kwargs):
        kwargs = {
            **dict(size=32, channels=1, recipe="fer2013", level="weak", bs=16, num_workers=0, device="cpu"),
            **kwargs,
        }
        return ExpressionDataLoaders.from_folder(faces, **kwargs)

    return _make
