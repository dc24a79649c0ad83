"""What every benchmark shares: contenders that alternate in one run, tables of medians and ratios, and the name of
the machine."""

import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, asked for memory alone, has nothing to say

import torch


def parser(name, about):
    p = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=about)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=7, help="times that every contender runs; the median counts")
    p.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    p.add_argument("--save", action="store_true", help="write the tables to benchmarks/results")
    return p


def arguments(parser):
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def alternate(contenders, rounds, device="cpu", seconds_each=0.05):
    """Median seconds a call of each contender (name to function); one call of each in turn, repeated within a turn
    while a call is short"""
    repeats = {}
    for name, f in contenders.items():
        f()  # warm
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        repeats[name] = max(1, round(seconds_each / max(time.perf_counter() - start, 1e-9)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, f in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                f()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(f, device):
    "Bytes that torch holds at most while `f` runs, above what it held before"
    f()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        f()
    held = peak = 0
    for event in sorted(
        (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def table(header, rows):
    "Markdown"
    rows = [list(map(str, r)) for r in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells):
        return (
            "| "
            + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
            + " |"
        )

    return "\n".join(
        [
            line(header),
            "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|",
            *map(line, rows),
        ]
    )


def cpu_name():
    try:
        return next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device):
    cores = f"{os.cpu_count()} CPU cores ({cpu_name()})"
    return (
        f"{torch.cuda.get_device_name()}, {cores}"
        if torch.device(device).type == "cuda"
        else f"{cores}, {torch.get_num_threads()} threads"
    )


def versions(*packages):
    found = []
    for p in ("torch", "fastai", "timm", "albumentations", *packages):
        try:
            found.append(f"{p} {version(p)}")
        except PackageNotFoundError:
            found.append(f"{p} not installed")
    return ", ".join([f"Python {platform.python_version()}", *found])


def report(module, title, parts, device, save, packages=(), name=None):
    "Print the tables, and keep them under results/ with the command, the machine and the versions"
    command = f"python -m benchmarks.{module} " + " ".join(a for a in sys.argv[1:] if a != "--save")
    text = (
        "\n\n".join(
            [
                f"# {title}",
                f"`{command.strip()}`, {time.strftime('%Y-%m-%d')}, {hardware(device)}; {versions(*packages)}",
                *parts,
            ]
        )
        + "\n"
    )
    print(text)
    if save:
        kind = (
            torch.cuda.get_device_name().replace(" ", "-").lower()
            if torch.device(device).type == "cuda"
            else f"cpu-{os.cpu_count()}-cores"
        )
        file = Path(__file__).parent / "results" / f"{name or module}-{kind}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        print(f"written to {file}")
