"""Files of a run: written whole or not at all, listed with their SHA-256, by one process at a time."""

import csv
import hashlib
import json
import math
import os
from contextlib import suppress

import pandas as pd
from fastai.torch_core import rank_distrib
from filelock import FileLock, Timeout

SUMS = "SHA256SUMS"  # lines of digest, two spaces, name, as `sha256sum -c` reads them


PART = ".part-"  # begins the name of a file that is being written


def part_of(file):
    "Return the name under which `file`, a `Path`, is written until it is whole"
    return file.with_name(f"{PART}{file.name}")


def write_whole(
    file,  # `Path` to write
    write,  # Function that writes to a given path
):
    "Write a file whole or not at all; raises `OSError` naming the file"
    part = part_of(file)
    try:
        write(part)
        with part.open("rb+") as f:
            os.fsync(f.fileno())  # a full disk raises here at the latest
        os.replace(part, file)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise OSError(f"cannot write {file}: {reason}") from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_run_file(
    file,  # `Path` in a run's folder
    write,  # Function that writes to a given path
):
    """Write a file of a run whole, and its SHA-256 to the folder's list. In a distributed run only the process of
    rank 0 writes. Until the file is replaced, the list holds the old and the new digest, so that the files fit it at
    any time"""
    if rank_distrib():
        return
    digests = _sums(file.parent)

    def write_and_note(part):
        write(part)
        new = sha256(part)
        _write_sums(file.parent, {**digests, file.name: [*digests.get(file.name, []), new]})
        digests[file.name] = [new]

    write_whole(file, write_and_note)
    _write_sums(file.parent, digests)


def check_file(
    file,  # `Path` in a run's folder
):
    "Raise `ValueError` if a file differs from what the run wrote; a file that is not listed passes"

    def differs():
        known = _sums(file.parent).get(file.name)
        return known and sha256(file) not in known

    if differs() and differs():  # it may have been rewritten between the two readings
        raise ValueError(
            f"{file} is not as the run wrote it, its SHA-256 is not the one in {SUMS}: put the original back, or train "
            "again in another folder"
        )


def _sums(folder):
    "Map file names to the digests that they may have"
    file, digests = folder / SUMS, {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            digests.setdefault(name, []).append(digest)
    return digests


def _write_sums(folder, digests):
    lines = [f"{digest}  {name}\n" for name, known in sorted(digests.items()) for digest in known]
    write_whole(folder / SUMS, lambda f: f.write_text("".join(lines), encoding="utf-8"))


def sha256(file):
    "Return the SHA-256 of a `Path`, in hexadecimal"
    sha = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()


def remove_parts(folder):
    "Remove files that a killed process left half written; hold the folder's lock when calling"
    for part in folder.glob(f"{PART}*"):
        part.unlink()


# JSON


def as_json(value, **kwargs):
    "Return JSON text; numbers that are not finite become null, because JSON has no NaN"

    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), allow_nan=False, **kwargs)


def read_json(file):
    "Check and read a JSON file of a run; raises `ValueError` naming the file"
    check_file(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is not a JSON file: {e}") from e


# Tables


def write_table(table, file, **kwargs):
    "Write a table that `read_table` reads back; names of files keep bytes that are not UTF-8"
    table.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC, errors="surrogateescape", **kwargs)


def read_table(file, dtype):
    "Read what `write_table` wrote; text like NA or None stays text"
    return pd.read_csv(file, dtype=dtype, keep_default_na=False, encoding_errors="surrogateescape")


# Locks


class InUse(ValueError):
    "Another process holds the lock of a folder"


def lock_run(
    out,  # `Path` of a run's folder, or of any file that processes share
    timeout: float = 0,  # Seconds to wait for another process, -1 without limit
):  # Context manager
    "Lock a run's folder; raises `InUse` if another process holds the lock"
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(out.with_name(f".{out.name}.lock"), is_singleton=True).acquire(timeout=timeout)
    except Timeout:
        raise InUse(f"another process is using {out}: wait until it has finished, or choose another folder") from None
    except OSError as e:
        raise OSError(f"cannot write to {out.parent}: {e.strerror}") from e
