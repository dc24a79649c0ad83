"One try of an input, what came of it, and a process that tries many under limits of time and memory"

import contextlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

GOOD = ("ok", "refusal")
BAD = ("traceback", "unclear error", "hang", "memory", "silent wrong result", "wrong refusal", "wrong place")
SECONDS, MEMORY = 30, 1.5 * 2**30  # of one trial
_JARGON = re.compile(
    r"codec can't|NoneType|has no attribute|unhashable|math domain|cannot convert float|out of range|not subscriptable"
    r"|to unpack"
    r"|object is not|must be real|argument of type|<class|broadcast|OpenCV\(|Error tokenizing data. C error: Buf"
)


@dataclass
class Trial:
    "What is tried, and what is known of its outcome beforehand"

    about: str  # What the input is, for a person
    act: Callable  # Gives a result, or raises
    right: Callable | None = None  # Whether a result is the right one, where that is known
    must: str = ""  # "ok" for input that is right, "refusal" for input that is wrong, "" where either may be
    names: str = ""  # Regular expression that a refusal must match: the place that is wrong
    script: bool = False  # Whether `act` is a console script, judged by its exit code and output


@dataclass
class Outcome:
    "What came of a trial"

    room: str
    number: int
    about: str
    verdict: str
    said: str = ""
    seconds: float = field(default=0.0, compare=False)


def _unclear(said):
    "Why a refusal is not one clear sentence, or None"
    if not said.strip():
        return "says nothing"
    if "\n" in said.strip().replace("a\nb", ""):  # a file's name in `images`
        return "several lines"
    if len(said) > 1500:
        return "too long"
    found = _JARGON.search(said)
    return found and f"speaks of {found[0]!r}"


def _refused(trial, said):
    problem = _unclear(said)
    if problem:
        return "unclear error", f"{problem}: {said}"
    if trial.must == "ok":
        return "wrong refusal", said
    if trial.names and not re.search(trial.names, said):
        return "wrong place", f"{said} (expected {trial.names})"
    return "refusal", said


def _accepted(trial, result):
    if trial.must == "refusal":
        return "silent wrong result", f"accepted: {str(result)[:200]}"
    if trial.right is not None and not trial.right(result):
        return "silent wrong result", f"{str(result)[:300]}"
    return "ok", ""


def _script(trial):
    "Run a console script, and judge its exit code and what it prints"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            trial.act()
        except SystemExit as e:
            code = e.code or 0
    raw = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", out.getvalue() + err.getvalue())
    said = err.getvalue().strip()
    if raw:
        return "unclear error", f"prints the code {raw[0]!r}: {(out.getvalue() + said)[-300:]!r}"
    if code == 0:
        return _accepted(trial, out.getvalue())
    if code not in (1, 2):
        return "unclear error", f"exit code {code}: {said[-300:]}"
    last = re.sub(r"(?s)^.*?\n(?=\w+: (error: )?[^\n]*$)", "", said)  # without the usage and the warnings before it
    return _refused(trial, last)


def judge(trial):
    "Try, and say what came of it: (verdict, what was said)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if trial.script:
                return _script(trial)
            return _accepted(trial, trial.act())
    except (ValueError, OSError) as e:
        return _refused(trial, str(e))
    except MemoryError as e:
        return "memory", str(e)
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if "ecan_fastai" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return "traceback", f"{type(e).__name__} at {place}: {str(e)[:300]}"


def draw(maker, room, number, seed, folder):
    "A trial of a maker, drawn from the seed and its own number alone"
    kind = [ord(c) for c in room]
    return maker(np.random.default_rng([seed, number, *kind]), folder)


def _one(maker, room, number, seed, root, memory):
    folder = Path(tempfile.mkdtemp(dir=root))
    os.chmod(folder, 0o755)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    try:
        trial = draw(maker, room, number, seed, folder)
        verdict, said = judge(trial)
    except Exception as e:  # of the generator itself
        trial, verdict, said = Trial("?", print), "traceback", f"the generator: {e!r}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > memory:
        verdict, said = "memory", f"{grown / 2**30:.1f} GiB"
    said = said.encode("ascii", "backslashreplace").decode().replace(str(folder), "...")
    return Outcome(room, number, trial.about, verdict, said, time.time() - started)


def _worker(cases, makers, seed, root, pipe, memory):
    "Try cases one after the other in a forked process, and write each outcome as a line"
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)
    with os.fdopen(pipe, "w") as out:
        for room, number in cases:
            outcome = _one(makers[room], room, number, seed, root, memory)
            out.write(json.dumps(asdict(outcome)) + "\n")
            out.flush()


def _lines(pipe, seconds):
    "Lines of a pipe as they come; ends when it closes, or after some seconds without a line"
    rest = b""
    while select.select([pipe], [], [], seconds)[0]:
        got = os.read(pipe, 2**16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from whole


def run(cases, makers, seed, seconds=SECONDS, memory=MEMORY):
    "Outcomes of cases (room, number); a process that hangs or dies costs the case that it was at, and no other"
    cases, done = list(cases), 0
    root = tempfile.mkdtemp(prefix="fuzz")
    os.chmod(root, 0o755)
    while done < len(cases):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                _worker(cases[done:], makers, seed, root, write, memory)
            finally:
                os._exit(0)
        os.close(write)
        started = time.time()
        for line in _lines(read, seconds):
            yield Outcome(**json.loads(line))
            done, started = done + 1, time.time()
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if done < len(cases):
            room, number = cases[done]
            verdict = "hang" if time.time() - started >= seconds else "traceback"
            yield Outcome(room, number, "?", verdict, "no answer" if verdict == "hang" else "the process died", seconds)
            done += 1
    shutil.rmtree(root, ignore_errors=True)
