"The benchmarks run, on the smallest sizes; what they measure is no test's business"

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def data(tmp_path):
    "FER2013's csv file with 20 images of each class"
    pixels = np.random.default_rng(0).integers(0, 256, (140, 48 * 48))
    rows = dict(emotion=np.arange(140) % 7, pixels=[" ".join(map(str, p)) for p in pixels], Usage="Training")
    pd.DataFrame(rows).to_csv(tmp_path / "fer2013.csv", index=False)
    return tmp_path / "fer2013.csv"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, row",
    [
        ("step --bs 4 --size 32 --rounds 1 --arch resnet10t", "ECAN over its ideal"),
        ("loss --rounds 1 --banks 64 --dims 16", "ecan_fastai"),
        ("epoch DATA --epochs 2 --methods ecan", "**epoch**"),
    ],
)
def test_a_benchmark_gives_its_table(command, row, data):
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command}".replace("DATA", str(data)).split()],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert row in done.stdout
