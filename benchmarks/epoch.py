"""A whole epoch of `ecan_train`, evaluation included: how long, what share the loader, the step and the rest take,
and peak memory, for ECAN and for plain cross-entropy."""

import resource
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from multiprocessing import get_context, set_start_method
from pathlib import Path
from statistics import median

import torch
from fastai.callback.core import Callback

from benchmarks.common import arguments, parser, report, synchronize, table
from ecan_fastai import runs


class Stopwatch(Callback):
    """Seconds an epoch by what they went into; the device is waited for at each change, which costs what overlap
    there was between loader and step"""

    order = 100

    def __init__(self):
        self.epochs, self.last = [], None

    def note(self, name):
        synchronize(self.dls.device)
        now = time.perf_counter()
        if self.last is not None and name:
            self.epochs[-1][name] = self.epochs[-1].get(name, 0) + now - self.last
        self.last = now

    def before_fit(self):
        self.started = time.perf_counter() if self.last is None else self.started

    def before_epoch(self):
        self.note(None)
        self.epochs.append({})

    def before_train(self):
        self.note("bank fill, once")

    def before_batch(self):
        if self.training:
            self.note("waiting for the loader")

    def after_batch(self):
        if self.training:
            self.note("steps")

    def before_validate(self):
        self.note("end of training part")

    def after_validate(self):
        self.note("validation")

    def after_epoch(self):
        self.note("checkpoint and records")


def one_run(config, threads):
    "In a process of its own, so that its peak memory is its own"
    warnings.simplefilter("ignore")
    set_start_method(
        None, force=True
    )  # the loader's workers start as they do in ecan_train; a spawned process would spawn them as well
    if threads:
        torch.set_num_threads(threads)
    watch, made = Stopwatch(), []

    def watched(*args, make=runs.run_learner):
        made.append(make(*args))
        made[0].add_cb(watch)
        return made[0]

    runs.run_learner = watched
    with tempfile.TemporaryDirectory() as tmp, open("/dev/null", "w") as nothing, redirect_stdout(nothing):
        start = time.perf_counter()
        runs.start_run(runs.RunConfig(**config), Path(tmp) / "run")
        cfg = runs.read_config(Path(tmp) / "run")  # with what was not given filled in
        ready, done, dls = watch.started, time.perf_counter(), made[0].dls
    epochs = watch.epochs[: cfg.epochs]  # the evaluation of the test splits has the events of an epoch too
    trained = sum(sum(e.values()) for e in epochs)
    memory = (
        torch.cuda.max_memory_allocated()
        if dls.device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return dict(
        epochs=epochs,
        ready=ready - start,
        results=done - ready - trained,
        memory=memory,
        images=len(dls.train) * dls.train.bs,
        workers=cfg.workers,
        config=asdict(cfg),
    )


def main():
    p = parser("epoch", __doc__)
    p.add_argument(
        "data", nargs="?", default="sample", help="FER2013, or other data that ecan_train takes (default: drawn faces)"
    )
    p.add_argument("--epochs", type=int, default=2, help="epochs a run; the first one warms and is not counted")
    p.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    p.add_argument(
        "--methods", nargs="*", default=["baseline", "ecan"], help="the first one is what others are compared with"
    )
    p.add_argument("--workers", type=int)
    p.set_defaults(rounds=1)
    given = arguments(p)
    if given.epochs < 2:
        p.error("--epochs must be at least 2: the first one is not counted")
    found = {method: [] for method in given.methods}
    for _ in range(given.rounds):
        for method, runs_ in found.items():
            config = dict(
                data=given.data, method=method, epochs=given.epochs, precision=given.precision, workers=given.workers
            )
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                runs_.append(pool.submit(one_run, config, given.threads).result())
    first, last = given.methods[0], given.methods[-1]
    rows, names = [], {n: None for r in found[last] for e in r["epochs"] for n in e}
    seconds = {m: [{n: e.get(n, 0) for n in names} for r in rs for e in r["epochs"][1:]] for m, rs in found.items()}
    whole = {m: median(sum(e.values()) for e in es) for m, es in seconds.items()}
    for n in names:
        part = {
            m: median(r["epochs"][0].get(n, 0) for r in found[m])
            if n == "bank fill, once"
            else median(e[n] for e in seconds[m])
            for m in found
        }
        rows.append(
            [
                n,
                *[
                    f"{part[m]:.2f} s" + ("" if n == "bank fill, once" else f" ({100 * part[m] / whole[m]:.1f} %)")
                    for m in found
                ],
            ]
        )
    rows.append(["**epoch**", *[f"**{whole[m]:.2f} s**" for m in found]])
    rows.append([f"epoch over that of {first}", *[f"{whole[m] / whole[first]:.3f}" for m in found]])

    def trained(m):
        return median(e["waiting for the loader"] + e["steps"] for e in seconds[m])

    rows.append(["training images a second", *[f"{found[m][0]['images'] / trained(m):.0f}" for m in found]])
    rows.append(["before the first epoch, once", *[f"{median(r['ready'] for r in found[m]):.1f} s" for m in found]])
    rows.append(
        ["test splits, pictures, weights, once", *[f"{median(r['results'] for r in found[m]):.1f} s" for m in found]]
    )
    rows.append(
        [
            "peak memory, " + ("of the device" if given.device == "cuda" else "of the process") + ", MiB",
            *[f"{median(r['memory'] for r in found[m]) / 2**20:.0f}" for m in found],
        ]
    )
    cfg = found[last][0]["config"]
    shape = f"{cfg['channels']}x{cfg['size']}x{cfg['size']}"
    settings = [cfg["arch"], shape, f"level {cfg['level']}", f"batch {cfg['bs']}", cfg["precision"]]
    settings += [f"{cfg['workers']} loader processes", f"{found[last][0]['images']} training images an epoch"]
    title = f"{cfg['kind']}: {', '.join(settings)}"
    report("epoch", "Epoch of ecan_train", [title, table(["", *found], rows)], given.device, given.save)


if __name__ == "__main__":
    main()
