"""Files of a run or a report: whole under their names however the process ends, and read as far as they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common import InputError


def check_writable(out: str) -> None:
    """InputError if directory `out` cannot be made or written to, or is a link to nothing. Makes nothing."""
    existing = next(path for path in (Path(out), *Path(out).absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"--out {out!r} cannot be written ({str(existing)!r} is not a writable directory); name another"
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name and renames it, so that it is never half. InputError if it cannot be written."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} could not be written ({error.strerror}); make room, or name another --out, then give the same command "
        "again, which goes on where this one stopped"
    )


def json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, none of no file. A line that is cut short, or is no object, is left out."""
    objects = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [found for found in objects if isinstance(found, dict)]


def drop_steps(path: Path, steps: int) -> list[dict]:
    """Removes the lines of all steps from number `steps` on, which a resumed run will write again; returns the rest."""
    kept = [line for line in json_lines(path) if line["step"] < steps]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
