"""Writes files and directories atomically, locks directories, and reads JSON lines, skipping truncated ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import InputError, on_rank_0, print0


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields PATH.tmp, to which the block writes a file or a directory, then renames it to PATH, replacing an older one.

    Everything is flushed to disk before the rename, so PATH is never incomplete, even if the process is killed or the
    machine crashes.
    """
    unfinished = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    yield unfinished
    commit(unfinished, path)


def commit(unfinished: Path, path: Path) -> None:
    """Flushes a file or directory to disk and renames it to `path`, replacing an older one."""
    for each in [*unfinished.rglob("*"), unfinished]:
        flush(each)
    if unfinished.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a directory cannot be renamed onto one that is not empty
    unfinished.rename(path)
    flush(path.parent)


@contextmanager
def locked(directory: Path, in_use: str, wait: bool = False) -> Iterator[None]:
    """Rank 0 holds DIRECTORY/lock inside the block. Collective.

    If another process holds the lock, raises InputError(in_use), or with `wait` prints `in_use` and waits.
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


def flush(path: Path) -> None:
    """Makes the system write a file, or a directory's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json_lines(objects: Iterable[dict]) -> str:
    """The objects as JSON, one per line, as `json_lines` reads them."""
    return "".join(json.dumps(each) + "\n" for each in objects)


def json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; [] if there is no such file. Truncated and malformed lines are skipped."""
    objects = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects
