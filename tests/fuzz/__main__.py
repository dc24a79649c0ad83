"`python -m tests.fuzz`: draw bad input from a seed, try it, and print what came of it"

import argparse
import sys
import time
from collections import Counter

import matplotlib
import torch

from . import arguments, folders, images, runs, tables
from .trial import BAD, GOOD, run

MAKERS = images.MAKERS | tables.MAKERS | folders.MAKERS | runs.MAKERS | arguments.MAKERS
SHARES = dict(images=4, arrays=1, tables=2, loaders=2, published=3, annotations=1, classes=3, splits=2, evaluated=1)
SHARES |= dict(paths=1, settings=3, config_text=1, weights=2, pretrained=1, train=2, scripts=3)


def cases(n, only=()):
    "About n cases, shared out over the kinds of input"
    shares = {room: k for room, k in SHARES.items() if not only or room in only}
    for room, k in shares.items():
        yield from ((room, i) for i in range(round(n * k / sum(shares.values()))))


def table(outcomes):
    "Number of outcomes of each kind of input"
    counts = Counter((o.room, o.verdict) for o in outcomes)
    columns = [v for v in (*GOOD, *BAD) if any(counts[r, v] for r in MAKERS)]
    lines = [f"{'input':<14}{'tried':>7}" + "".join(f"{c:>{len(c) + 3}}" for c in columns)]
    for room in [r for r in MAKERS if any(o.room == r for o in outcomes)]:
        numbers = [counts[room, c] for c in columns]
        lines.append(f"{room:<14}{sum(numbers):>7}" + "".join(f"{k:>{len(c) + 3}}" for c, k in zip(columns, numbers)))
    numbers = [sum(counts[r, c] for r in MAKERS) for c in columns]
    lines.append(f"{'all':<14}{sum(numbers):>7}" + "".join(f"{k:>{len(c) + 3}}" for c, k in zip(columns, numbers)))
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    p.add_argument("--n", type=int, default=1200, help="inputs to try; default 1200")
    p.add_argument("--seed", type=int, default=0, help="the same seed draws the same inputs")
    p.add_argument("--only", nargs="+", default=(), choices=tuple(MAKERS), help="kinds of input to try")
    p.add_argument("--number", type=int, help="try this one input of each kind alone")
    p.add_argument("--all", action="store_true", help="print every outcome, not only the bad ones")
    given = p.parse_args()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    started, outcomes = time.time(), []
    chosen = [c for c in cases(given.n, given.only)]
    if given.number is not None:
        chosen = [(room, given.number) for room in given.only or MAKERS]
    for o in run(chosen, MAKERS, given.seed):
        outcomes.append(o)
        if given.all or o.verdict in BAD:
            print(f"{o.room} {o.number}: {o.verdict}: {o.about.encode('ascii', 'backslashreplace').decode()}")
            print(f"    {o.said!r}", flush=True)
    print(f"\n{table(outcomes)}\n{time.time() - started:.0f} s")
    sys.exit(any(o.verdict in BAD for o in outcomes))


if __name__ == "__main__":
    main()
