"""Kills every stage at random moments, resumes it, and compares what it ends in with an uninterrupted run.

    python tests/kill_stages.py OUT STUDENT TEACHER PROBLEMS KILLS SEED [ENGINE]

A killed process is a fork of this one, which has imported everything and trained nothing. It kills itself at a drawn
file operation in its output directory (before it, or halfway through a write), around a line of metrics and around the
last save; or it is killed from outside after a drawn time. The list of moments is drawn by kind, so that a rename that
happens once in a run is as likely as a write that happens in every step. Prints a table of what was done.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import torch
import tqdm
from torch.distributed.checkpoint.filesystem import FileSystem

import fkl_warmup
import lib.runs
import lib.scores
import opd
import student_grpo
import teacher_grpo
from common import AlreadyFinished, InputError
from lib.rollouts import RolloutCache

torch.set_num_threads(1)

SHARED = dict(exclude=(), max_prompt_tokens=64, max_response_tokens=8, lr=1e-2)
GRPO = dict(prompts_per_step=4, mini_batch_prompts=2, rollouts_per_prompt=4, require_finished=False, **SHARED)


def stages(student: str, teacher: str, data: str, engine: str, validation: str) -> dict:
    """Script and settings by name; some save in every step, some in every second; one validates and keeps the best."""
    shared = dict(data=data, engine=engine)
    return {
        "teacher": (teacher_grpo, dict(model=teacher, passes=2, save_every=2, **GRPO, **shared)),
        "warmup": (fkl_warmup, dict(model=student, teacher=teacher, passes=2, mini_batch_prompts=4, max_sequences=6,
                                    rollouts_per_prompt=2, save_every=1, **SHARED, **shared)),
        "bridge": (opd, dict(model=student, teacher=teacher, prompts_per_step=3, rollouts_per_prompt=2, save_every=2,
                             passes=2, validate=(validation,), validate_every=1, keep_best=True, export_every=2,
                             **SHARED, **shared)),
        "student": (student_grpo, dict(model=student, half="full", passes=1, save_every=1, **GRPO, **shared)),
    }  # fmt: skip


# In the process that is to die


class Moments:
    """Counts moments by kind, and does something at the one that was drawn."""

    def __init__(self, out: Path, drawn: tuple[str, int] | None, action):
        self.out, self.drawn, self.action = out, drawn, action
        self.seen: Counter[str] = Counter()

    def pass_by(self, kind: str) -> None:
        self.seen[kind] += 1
        if self.drawn == (kind, self.seen[kind]):
            self.drawn = None  # what the action does passes by here, too
            self.action(kind)

    def audit(self, event: str, arguments: tuple) -> None:
        """Python's own report of what it is about to do to files."""
        writes = event == "open" and (arguments[1] or "r")[0] in "wa"
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            path = re.sub(r"\d{6}", "N", str(arguments[0]).replace(str(self.out), "OUT"))
            if path.startswith(("OUT.partial", "OUT/")):
                self.pass_by(f"{event.removeprefix('os.')} {path.removeprefix('OUT.partial/')}")


class Halved:
    """A file whose every write passes a moment halfway."""

    def __init__(self, file, name: str, moments: Moments):
        self._file, self._name, self._moments = file, name, moments

    def write(self, data):
        data = memoryview(data).cast("B") if not isinstance(data, str) else data
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._moments.pass_by(f"halfway through writing {self._name}")
        self._file.write(data[len(data) // 2 :])
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def instrument(moments: Moments) -> None:
    sys.addaudithook(moments.audit)
    log, open_metrics, create_stream = lib.runs.Run.log, lib.runs.Run._open_metrics, FileSystem.create_stream
    save_pretrained, append = lib.runs.save_pretrained, RolloutCache.append

    @contextmanager
    def halved_stream(filesystem, path, mode):
        with create_stream(filesystem, path, mode) as stream:
            yield Halved(stream, "a training state", moments) if mode == "wb" else stream

    def around_log(*arguments, **options):
        moments.pass_by("before a line of metrics")
        log(*arguments, **options)
        moments.pass_by("after a line of metrics")

    def around_save(*arguments):
        moments.pass_by("before saving the weights")
        save_pretrained(*arguments)
        moments.pass_by("after saving the weights")

    def around_append(*arguments):
        append(*arguments)
        moments.pass_by("after a shard of teacher rollouts")

    def halved_metrics(run):
        result = open_metrics(run)
        run._metrics = Halved(run._metrics, "metrics.jsonl", moments)
        return result

    lib.runs.plot_metrics = lambda _, picture: picture.write_text("")  # drawing takes half of a tiny run's time
    FileSystem.create_stream = halved_stream
    lib.runs.Run.log, lib.runs.Run._open_metrics = around_log, halved_metrics
    lib.runs.save_pretrained, RolloutCache.append = around_save, around_append


def made_up_grades(rollouts, verifier):
    """Rewards with spread: random models solve nothing."""
    for rollout in rollouts:
        rollout.correct = sum(rollout.response_ids) % 2 == 0


def child(script, settings: dict, out: Path, drawn, action, said: Path) -> None:
    """Runs a stage as the command line would, with what it says in `said` and the moments it passed in `said`.json."""
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # tqdm's own lock is shared with the process that this one was forked from, and a child that is killed would keep it.
    tqdm.std.tqdm.set_lock(threading.RLock())
    status = 1
    try:
        teacher_grpo.grade = fkl_warmup.grade = opd.grade = lib.scores.grade = made_up_grades
        moments = Moments(out, drawn, action)
        instrument(moments)
        script.main(script.Config(out=str(out), resume=True, **settings))
        status = 0
    except AlreadyFinished as finished:
        print(finished, file=sys.stderr, flush=True)
        status = 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except BaseException:
        traceback.print_exc()
    Path(f"{said}.json").write_text(json.dumps(moments.seen))
    sys.stdout.flush()
    os._exit(status)


# In the process that watches

# Moments of which each stage that passes them dies at the first: teacher rollouts that lack only their name, and a
# checkpoint that lacks only its name.
SURELY = ("rename teacher_rollouts/shard-N.tmp", "rename OUT.partial")


def start(script, settings, out, said, drawn=None, action=None, after: float | None = None) -> tuple[int, str]:
    """Exit status (negative for a signal) and output of a run; `after`: kill it after so many seconds."""
    pid = os.fork()
    if pid == 0:
        child(script, settings, out, drawn, action, said)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")


def newest_state(out: Path) -> int:
    return max((int(path.name[6:]) for path in Path(f"{out}.partial").glob("state-??????")), default=0)


def outcome(out: Path) -> dict:
    """All that must not depend on interruptions."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((out / "run.json").read_text())
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines],
        "record": [record[name] for name in ("consumed", "steps", "validation", "kept_step", "warnings") if name in record],
        "exports": [path.read_bytes() for path in sorted(out.glob("step-??????/model.safetensors"))],
        "samples": (out / "samples.jsonl").read_text(),
        "rollouts": [row for shard in sorted(out.glob("teacher_rollouts/shard-??????"))
                     for row in datasets.load_from_disk(str(shard)).to_list()],
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
    }  # fmt: skip


def check(out: Path, straight: dict, said: str) -> None:
    found = outcome(out)
    assert not Path(f"{out}.partial").exists()
    for name in straight:
        assert found[name] == straight[name], f"{out.name}: {name} differ after a resume\n{said}"


def gauntlet(name: str, script, settings: dict, directory: Path, kills: int, rng: random.Random) -> list[str]:
    """Kills one stage `kills` times, resuming it each time, until it has been through; the moments it died at."""
    out, said = directory / name, directory / f"{name}.txt"
    began = time.monotonic()
    status, text = start(script, settings, directory / f"{name}-straight", said)
    seconds = time.monotonic() - began
    assert status == 0, text
    straight = outcome(directory / f"{name}-straight")
    kinds = json.loads(Path(f"{said}.json").read_text())
    died: list[str] = []
    surely = [kind for kind in SURELY if kind in kinds]

    def die(kind: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    tries = reached = 0
    while len(died) < kills:
        tries += 1
        assert tries < 20 * kills
        kind = rng.choice(sorted(kinds))
        before = newest_state(out)
        assert before >= reached, f"{name} had saved step {reached}, and after {died[-1]} has {before}"
        reached = before
        if surely:
            kind = surely.pop(0)
            status, text = start(script, settings, out, said, (kind, 1), die)
        elif rng.random() < 0.25:
            kind = f"after {rng.uniform(0.1, 0.9) * seconds:.2f} s"
            status, text = start(script, settings, out, said, after=float(kind.split()[1]))
        else:
            status, text = start(script, settings, out, said, (kind, rng.randint(1, min(2, kinds[kind]))), die)
        assert status in (0, -signal.SIGKILL), text
        if status:
            died.append(kind)
        if before and "continuing after" in text:
            assert f"continuing after step {before}\n" in text, text  # nothing is lost but the unsaved steps
        if out.exists():
            if status:  # killed between its last two steps: the next command finds it done, and tidies up
                status, text = start(script, settings, out, said)
                assert status == 0 and "is already finished" in text, text
            check(out, straight, text)
            shutil.rmtree(out)
            reached = 0
    status, text = start(script, settings, out, said)
    assert status == 0, text
    check(out, straight, text)
    return died


def full_disk(script, settings: dict, directory: Path, straight: dict, kind: str, occurrence: int) -> str:
    """Lets writes fail from a moment on, as on a full disk; then resumes. Returns the sentence it ended in."""
    out, said = directory / "full", directory / "full.txt"

    def fill(kind: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # less than the weights, more than what is said

    status, text = start(script, settings, out, said, (kind, occurrence), fill)
    assert status == 2, text
    [sentence] = [line for line in text.splitlines() if line.startswith("error: ")]
    left = sorted(path.name for path in Path(f"{out}.partial").glob("state-*"))
    assert len(left) == 1 and not left[0].endswith(".tmp"), left
    status, text = start(script, settings, out, said)
    assert status == 0 and f"continuing after step {int(left[0][6:])}" in text, text
    check(out, straight, text)
    shutil.rmtree(out)
    return sentence.replace(str(directory), "")


def main(out: str, student: str, teacher: str, problems: str, kills: str, seed: str, engine: str = "torch") -> None:
    directory, rng, total = Path(out), random.Random(int(seed)), int(kills)
    directory.mkdir(parents=True, exist_ok=True)
    validation = directory / "validation.jsonl"
    validation.write_text("".join(Path(problems).read_text().splitlines(True)[:3]))  # less for that stage to train on
    every = stages(student, teacher, problems, engine, str(validation))
    print("| stage | killed at |\n|---|---|")
    for index, (name, (script, settings)) in enumerate(every.items()):
        died = gauntlet(name, script, settings, directory, (total + len(every) - 1 - index) // len(every), rng)
        for kind, count in sorted(Counter(died).items()):
            print(f"| {name} | {kind}{f' ({count} times)' if count > 1 else ''} |", flush=True)
    script, settings = every["teacher"]
    straight = outcome(directory / "teacher-straight")
    print("\nWrites made to fail, and what was said:\n")
    for kind, occurrence in (("open state-N.tmp/__0_0.distcp", 2), ("before saving the weights", 1)):
        sentence = full_disk(script, settings, directory, straight, kind, occurrence)
        print(f"- {kind}: `{sentence}`", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
