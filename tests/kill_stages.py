"""Kills stages with SIGKILL at drawn moments, resumes them, and compares what they end in with an uninterrupted run.

    python tests/kill_stages.py OUT STUDENT TEACHER PROBLEMS KILLS SEED ENGINE STAGE ...

A killed process is a fork of this one, which has imported everything and trained nothing. It kills itself just before a
drawn file operation in its output directory, or in the middle of a line of metrics. The moments are drawn by kind, so
that a rename that happens once in a run is as likely as a write that happens in every step.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tqdm
from helpers import RUNS, cached_rows, made_up_grades, metrics, record

import fkl_warmup
import lib.runs
import lib.scores
import opd
import teacher_grpo
from common import AlreadyFinished

torch.set_num_threads(1)

# Some save in every step, some in every second; one validates and exports.
SETTINGS = {
    "teacher": dict(save_every=2), "warmup": dict(mini_batch_prompts=4, max_num_seqs=6),
    "bridge": dict(save_every=2, epochs=2, validate_every=1, export_every=2), "student": dict(half="full", epochs=1),
}  # fmt: skip


def child(main, config, said: Path, drawn: tuple[str, int] | None) -> None:
    """Runs a stage, with what it says in `said` and the moments that it passed in `said`.json; dies at the drawn one."""
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tqdm.std.tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent, and a killed child would keep it
    seen: Counter[str] = Counter()

    def pass_by(kind: str) -> None:
        seen[kind] += 1
        if drawn == (kind, seen[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        """Python's own report of what it is about to do to files."""
        writes = event == "open" and (arguments[1] or "r")[0] in "wa"
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            path = re.sub(r"\d{6}", "N", str(arguments[0]).replace(config.out, "OUT"))
            if path.startswith(("OUT.partial", "OUT/")):
                pass_by(f"{event.removeprefix('os.')} {path.removeprefix('OUT.partial/')}")

    def halved(run, name: str, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            with (run.partial / name).open("a") as file:
                file.write(part)
            pass_by(f"in or after a line of {name}")

    sys.addaudithook(audit)
    lib.runs.Run._write_lines = halved
    lib.runs.plot_metrics = lambda lines, picture: None  # drawing takes half of a tiny run's time
    teacher_grpo.grade = fkl_warmup.grade = opd.grade = lib.scores.grade = made_up_grades
    status = 0
    try:
        main(config)
    except AlreadyFinished as finished:
        print(finished)
    except BaseException:
        traceback.print_exc()
        status = 1
    Path(f"{said}.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(status)


def outcome(out: Path) -> dict:
    """All that must not depend on interruptions."""
    kept = record(out)
    return {
        "weights": [path.read_bytes() for path in sorted(out.rglob("model.safetensors"))],
        "metrics": metrics(out),
        "record": [kept.get(name) for name in ("trained_on", "steps", "validation", "warnings", "trained_tokens")],
        "samples": (out / "samples.jsonl").read_text(),
        "rollouts": cached_rows(out / "teacher_rollouts"),
        # A process that was killed after the renaming has left its training state.
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*") if not re.search("/(state-|lock)", str(path))),
    }  # fmt: skip


def gauntlet(name: str, make, directory: Path, kills: int, rng: random.Random) -> list[str]:
    """Kills one stage `kills` times, resuming it each time; returns the moments it died at."""
    out, said, died = directory / name, directory / f"{name}.txt", []

    def start(out: Path, drawn=None) -> tuple[int, str]:
        """Exit status (negative for a signal) and output of a run."""
        script, config = make(out)
        pid = os.fork()
        if pid == 0:
            child(script.main, config, said, drawn)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text(errors="replace")

    status, text = start(directory / f"{name}-straight")
    assert status == 0, text
    straight, kinds = outcome(directory / f"{name}-straight"), json.loads(Path(f"{said}.json").read_text())
    surely = [kind for kind in kinds if kind.startswith(("rename OUT.partial", "rename state"))]
    while status or len(died) < kills:
        kind = surely.pop() if surely else rng.choice(sorted(kinds))
        drawn = (kind, rng.randint(1, min(2, kinds[kind]))) if len(died) < kills else None
        states = [int(path.name[6:]) for path in Path(f"{out}.partial").glob("state-??????")]
        status, text = start(out, drawn)
        assert status in (0, -signal.SIGKILL), text
        died += [kind] if status else []
        if states and (not status or "continuing" in text):  # nothing is lost but the unsaved steps
            assert f"continuing after step {max(states)}\n" in text, text
        if out.exists():
            if status:  # killed between its last two operations: the next command finds it done
                status, text = start(out)
                assert status == 0 and "is already finished" in text, text
            found = outcome(out)
            for part in straight:
                assert found[part] == straight[part], f"{name}: {part} differ after a resume from {died}\n{text}"
            shutil.rmtree(out)
    return died


def main(out: str, student: str, teacher: str, problems: str, kills: str, seed: str, engine: str, *names: str) -> None:
    directory, rng = Path(out), random.Random(int(seed))
    directory.mkdir(parents=True, exist_ok=True)
    validation = directory / "validation.jsonl"
    validation.write_text("".join(Path(problems).read_text().splitlines(True)[:3]))  # less for that stage to train on
    SETTINGS["bridge"]["validate"] = (str(validation),)
    for name in names:
        make = partial(RUNS[name], student, teacher, problems, engine=engine, resume=True, **SETTINGS[name])
        for kind in gauntlet(name, make, directory, int(kills), rng):
            print(f"| {name} | {kind} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
