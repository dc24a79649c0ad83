import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ecan_fastai import runfiles
from ecan_fastai.runfiles import (
    SUMS,
    InUse,
    as_json,
    check_file,
    lock_run,
    read_json,
    read_table,
    remove_parts,
    write_run_file,
    write_table,
    write_whole,
)


def write(folder, name, text):
    write_run_file(folder / name, lambda f: f.write_text(text))


def test_the_list_is_what_sha256sum_reads(tmp_path):
    write(tmp_path, "b.txt", "two")
    write(tmp_path, "a.txt", "one")
    write(tmp_path, "a.txt", "three")
    expected = [
        f"{hashlib.sha256(text).hexdigest()}  {name}" for name, text in (("a.txt", b"three"), ("b.txt", b"two"))
    ]
    assert (tmp_path / SUMS).read_text().splitlines() == expected
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_flipped_byte_is_found(tmp_path):
    text = "0123456789"
    write(tmp_path, "a.txt", text)
    write(tmp_path, "b.txt", "other")
    for i in range(len(text)):
        (tmp_path / "a.txt").write_text(f"{text[:i]}x{text[i + 1 :]}")
        with pytest.raises(
            ValueError, match="a.txt is not as the run wrote it, its SHA-256 is not the one in SHA256SU"
        ):
            check_file(tmp_path / "a.txt")
        check_file(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text(text)
    check_file(tmp_path / "a.txt")


def test_files_without_a_list_or_not_in_it_pass(tmp_path):
    (tmp_path / "old.json").write_text("[1]")
    assert read_json(tmp_path / "old.json") == [1]
    write(tmp_path, "new.json", "[2]")
    assert read_json(tmp_path / "old.json") == [1] and read_json(tmp_path / "new.json") == [2]


@pytest.mark.parametrize("stop_after", ["the list", "the file"])
def test_a_write_that_is_killed_between_list_and_file_leaves_a_file_that_fits(tmp_path, monkeypatch, stop_after):
    write(tmp_path, "a.txt", "old")
    replace, done = os.replace, []

    def killed(src, dst):
        if Path(dst).name == "a.txt" and stop_after == "the list":
            raise KeyboardInterrupt
        replace(src, dst)
        if Path(dst).name == "a.txt":
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        for text in ("new", "newer"):  # twice, as a run that is killed again
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, "a.txt", text)
            done.append((tmp_path / "a.txt").read_text())
            check_file(tmp_path / "a.txt")
    assert done == (["old", "old"] if stop_after == "the list" else ["new", "newer"])
    write(tmp_path, "a.txt", "newest")
    check_file(tmp_path / "a.txt")
    assert len((tmp_path / SUMS).read_text().splitlines()) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_keeps_the_file_and_names_it(tmp_path, error):
    write(tmp_path, "a.txt", "old")

    def fail(part):
        part.write_text("half")
        raise error

    said = error.strerror if isinstance(error, OSError) else str(error)
    for writer in (write_whole, write_run_file):
        with pytest.raises(OSError, match=f"^cannot write {tmp_path / 'a.txt'}: {said}$"):
            writer(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old" and {f.name for f in tmp_path.iterdir()} == {"a.txt", SUMS}
    check_file(tmp_path / "a.txt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_full_disk(tmp_path, kind):
    "A limit on the size of files stands in for it: the write fails in the middle of the file"
    code = f"""
import resource, signal, sys
from pathlib import Path
import torch
from ecan_fastai.runfiles import write_run_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Path(sys.argv[1]) / "a.pth"
make = dict(text=lambda n: lambda f: f.write_text("x" * n), tensors=lambda n: lambda f: torch.save(torch.ones(n), f))
write_run_file(file, make["{kind}"](100))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: write_run_file(file, make["{kind}"](100_000))
except OSError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"cannot write {tmp_path / 'a.pth'}: ")
    assert {f.name for f in tmp_path.iterdir()} == {"a.pth", SUMS}
    check_file(tmp_path / "a.pth")
    assert kind == "text" or torch.equal(torch.load(tmp_path / "a.pth", weights_only=True), torch.ones(100))


def test_a_table_is_read_as_it_was_written(tmp_path):
    names = [
        os.fsdecode(b"f\xe9.png"),
        "a\rb",
        "a\nb",
        "a\r\nb",
        '"a", b',
        "NA",
        "",
        " a ",
        "None",
        "\u00e9\u2028",
        "=1+1",
    ]
    table = pd.DataFrame(dict(image=names, p=np.linspace(0, 1, len(names)).round(5)))
    for file, more in ((tmp_path / "a.csv", {}), (tmp_path / "a.csv.gz", dict(compression="gzip"))):
        write_table(table, file, **more)
        assert list(read_table(file, dict(image=str))["image"]) == names
        assert read_table(file, dict(image=str)).equals(table)
        plain = pd.read_csv(file, keep_default_na=False, encoding_errors="surrogateescape")  # as others read it
        assert plain.equals(table)


def test_parts_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".part-a.txt", "a.part", ".hidden", "b.txt"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    remove_parts(tmp_path / "nowhere")
    assert {f.name for f in tmp_path.iterdir()} == {"a.part", ".hidden", "b.txt"}


def test_only_the_process_of_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(tmp_path, "a.txt", "one")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    write(tmp_path, "a.txt", "one")
    assert (tmp_path / "a.txt").exists()


def test_a_file_has_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path, "a.txt", "one")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o640}


def test_json_has_no_nan():
    text = as_json(dict(a=[1.5, float("nan")], b=dict(c=float("inf")), d="NaN"))
    assert json.loads(text, parse_constant=pytest.fail) == dict(a=[1.5, None], b=dict(c=None), d="NaN")


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not a JSON file: "):
        read_json(tmp_path / "a.json")


def test_a_folder_by_another_spelling_has_the_same_lock(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with lock_run(Path(".")):
        names = {f.name for f in tmp_path.iterdir()}
    with lock_run(tmp_path / "link"):
        assert {f.name for f in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom ecan_fastai.runfiles import lock_run\n"
        "lock = lock_run(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InUse, match="another process is using .*run: wait until it has finished"):
            lock_run(tmp_path / "run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lock_run(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".run.lock"))

    monkeypatch.setattr(runfiles.FileLock, "acquire", denied)
    with pytest.raises(OSError, match=f"^cannot write to {tmp_path}: Permission denied$"):
        lock_run(tmp_path / "run")
