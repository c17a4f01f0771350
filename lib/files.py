"""Writes files and directories atomically, locks directories, and reads JSON lines without the truncated ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import InputError, on_rank_0, print0


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields PATH.tmp, where the block writes a file or a directory, and then renames it to PATH.

    Everything is flushed to the disk before the rename, so PATH is complete or absent however the process or the
    machine ends. An older PATH is replaced. If the block fails, PATH.tmp is removed and PATH stays as it was.
    """
    unfinished = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(unfinished)
    try:
        yield unfinished
        flush(unfinished)
    except BaseException:
        remove(unfinished)
        raise
    if unfinished.is_dir():
        remove(path)  # a directory cannot be renamed onto one that is not empty
    unfinished.rename(path)
    flush(path.parent, below=False)


@contextmanager
def locked(directory: Path, in_use: str, wait: bool = False) -> Iterator[None]:
    """Rank 0 holds DIRECTORY/lock inside the block. Collective.

    If another process holds it, `in_use` is raised as an InputError, or with `wait` printed, and the block waits.
    """

    def lock() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((directory / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(in_use) from None
            print0(in_use)
            fcntl.flock(file, fcntl.LOCK_EX)

    with ExitStack() as held:
        on_rank_0(lock)
        yield


def flush(path: Path, below: bool = True) -> None:
    """Makes the system write a file, or a directory with all that is below it, to the disk."""
    for each in [*(path.rglob("*") if below else ()), path]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(out: str) -> None:
    """InputError if directory `out` cannot be made or written to, or is a link to nothing. Makes nothing."""
    existing = next(path for path in (Path(out), *Path(out).absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"--out {out!r} cannot be written ({str(existing)!r} is not a writable directory); name another"
        )


def json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; [] if there is no such file. Truncated and malformed lines are skipped."""
    objects = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [found for found in objects if isinstance(found, dict)]
