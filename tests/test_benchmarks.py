"The benchmarks run, on the smallest sizes; what they measure is no test's business"

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, row",
    [
        ("step --bs 4 --size 32 --rounds 1 --arch resnet10t", "ECAN over its ideal"),
        ("loss --rounds 1 --banks 64 --dims 16", "bare"),
        ("epoch --epochs 2 --methods ecan", "**epoch**"),
    ],
)
def test_a_benchmark_gives_its_table(command, row):
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command}".split()],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert row in done.stdout
