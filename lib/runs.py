"""The output of a stage: a checkpoint with its lineage, logs, and the training states from which a run resumes.

A checkpoint is a Hugging Face directory plus `run.json`, which holds the stage's settings and lineage: its parent
checkpoints and the labelled problems that its weights were trained on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import common
from common import AlreadyFinished, InputError, Problem, Rollout, Stopped, on_rank_0, print0, rank
from lib import data
from lib.engines import check_engine, check_lengths
from lib.files import as_json_lines, commit, json_lines, locked, whole
from lib.lineage import new_record, read_run, settings_and_parents
from lib.plots import plot_metrics
from lib.policy import Policy, check_checkpoint, save_pretrained
from lib.scores import TokenizedSets, tokenize_sets
from lib.watch import find_warnings, is_training, one_sample, sample_lines

# Without torch.distributed, PyTorch's checkpoint library warns at every call that it assumes a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def prepare(
    cfg, teacher: str | None = None
) -> tuple[list[Problem], PreTrainedTokenizerBase, dict[str, list[int]], TokenizedSets]:
    """Checks a stage's Config, and loads its training problems, the tokenizer, the prompts' token ids by problem id, and
    the sets of --validate.

    Most invalid input is rejected here with an InputError, before any weight is read. `teacher` is the checkpoint that
    the model learns from.
    """
    common.check_settings(cfg)
    check_engine(cfg)
    tokenizer = data.load_tokenizer(cfg.model)
    data.stop_tokens(tokenizer, cfg.stop)  # raises InputError for a string that cannot end a response
    validation = data.load_sets(cfg.validate, "--validate", cfg.reward)
    problems = data.load_training_problems(cfg, [problem for each in validation.values() for problem in each])
    if teacher:
        data.check_same_tokenizer(cfg.model, teacher, problems, cfg)
    prompts = data.tokenize_prompts(tokenizer, problems, cfg, leave_out_long=True)
    for model in [cfg.model, *([teacher] if teacher else [])]:
        check_checkpoint(model, data.vocab_size(tokenizer))
        check_lengths(cfg, model, prompts.values())
    validation_sets = tokenize_sets(validation, tokenizer, cfg, cfg.model)
    return [problem for problem in problems if problem.id in prompts], tokenizer, prompts, validation_sets


# One step with a non-finite loss or gradient may be bad luck. This many in a row mean that the run has diverged.
STOP_AFTER_SKIPPED = 3

# --resume accepts new values of these settings: they affect at most rounding, and a run that ran out of memory, disk or
# time needs different ones.
MAY_CHANGE = (
    "micro_batch_tokens", "max_num_seqs", "kv_cache_gib", "activation_checkpointing", "save_every", "export_every"
)  # fmt: skip


class Run:
    """The output directory of a stage: OUT.partial while it runs, renamed to OUT at the end.

    So a directory called OUT is always complete, however the process ends, and can be a Makefile target. The run writes

    - `metrics.jsonl`, with a line for each step and each validation, and `samples.jsonl`, with a few responses of each
      step. Both are kept however the run ends;
    - `state-NNNNNN`: weights, optimizer and run.json after NNNNNN steps, every `save_every` steps and when a signal stops
      the run. The previous state is removed when the new one is complete. `--resume` loads the newest loadable state and
      drops later steps from the two logs, because it repeats them;
    - `step-NNNNNN`: intermediate checkpoints, if `export_every` is set;
    - `run.json`: settings and lineage; and at the end the checkpoint itself.

    `cfg` is a stage's Config. `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into
    `run.json`. Use a Run in a `with` block, in this order: `restore`; for each of `steps`, `log` and then `save`;
    finally `finish`.

    Raises InputError if OUT exists, is in use by another run, or holds an interrupted run that cannot be continued. With
    `resume`, an OUT finished with the same settings raises AlreadyFinished, which a stage reports as success.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out = Path(cfg.out)
        self.partial = Path(f"{self.out}.partial")  # from the Path, so that "runs/x/" becomes "runs/x.partial"
        self.save_every, self.export_every = cfg.save_every, cfg.export_every
        self.steps_done = 0
        self.total_steps: int | None = None  # known once `steps` is called
        self._phases: dict[str, float] = defaultdict(float)
        self._tracker = Tracker(cfg.track)
        self._began, self._cpu_began = time.monotonic(), time.process_time()
        in_use = f"--out {cfg.out!r} is being written by another run; name another, or stop that one"
        with ExitStack() as stack:
            stack.enter_context(locked(self.partial, in_use))
            stack.callback(self._remove_without_work)
            # Rank 0 reads and writes the files, and sends the record to the other ranks.
            self.record = on_rank_0(lambda: self._open(cfg, parents))
            self._at_exit = stack.pop_all()

    def _open(self, cfg, parents: dict[str, str]) -> dict:
        """This run's record; raises InputError if the run must not begin or continue."""
        finished = cfg.resume and read_run(self.out)
        if os.path.lexists(self.out) and not finished:  # lexists, because renaming onto a dangling link fails too
            raise InputError(f"--out {cfg.out!r} already exists; name another, or delete it")
        if self._holds_work() and not cfg.resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
        record = new_record(cfg, parents)
        if saved := finished or read_run(self.partial):
            check_unchanged(saved, record, self.out if finished else self.partial)
        if finished:
            raise AlreadyFinished(f"{self.out} is already finished with these settings; there is nothing to resume")
        return record

    def _holds_work(self) -> bool:
        """Whether OUT.partial holds anything worth keeping: logs, a training state, or rollouts."""
        return any(any(self.partial.glob(kind)) for kind in ("*.jsonl", "state-??????", "*/shard-??????.jsonl"))

    def _remove_without_work(self) -> None:
        if rank() == 0 and not self._holds_work():
            shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self._holds_work():
            error.add_note(f"the same command with --resume continues from {self.partial}")
        self._at_exit.close()

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Loads weights, optimizer and record of the interrupted run, if there is one to continue. Collective.

        If any rank fails to load a state, all ranks try the previous one, which exists if the run was killed just before
        removing it.
        """
        states = on_rank_0(lambda: sorted(self.partial.glob("state-??????"), reverse=True))
        for path in states:
            state = dict(zip(("model", "optimizer"), get_state_dict(policy, optimizer)))
            problem = None
            try:
                saved = on_rank_0(lambda path=path: read_run(path))
                dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
                set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            except (Exception, CheckpointException) as error:  # a damaged file may raise anything
                problem = error
            if common.all_max({"failed": problem is not None})["failed"]:
                print0(f"{path} cannot be loaded: {problem or 'another rank failed'}")
                continue
            self.steps_done = saved["steps"]
            kept = ("trained_on", "seconds", "cpu_seconds", "trained_tokens", "warnings", "tracker_run")
            self.record.update({name: saved[name] for name in kept if name in saved})
            self.record["sessions"] = saved["sessions"] + self.record["sessions"]
            self.record["sessions"][-1]["first_step"] = self.steps_done
            print0(f"{self.out}: continuing after step {self.steps_done}")
            return
        if states:
            raise InputError(f"no training state in {self.partial} can be loaded; delete the directory to begin again")

    def _cut_logs(self) -> list[dict]:
        """Drops from both logs the lines that the resumed run repeats; returns the remaining lines of metrics.jsonl.

        A validation has the number of the step after it, and is repeated together with that step.
        """
        for path in list(self.partial.glob("*.jsonl")):
            kept = [line for line in json_lines(path) if line["step"] < self.steps_done]
            with whole(path) as unfinished:
                unfinished.write_text(as_json_lines(kept), encoding="utf-8")
        return json_lines(self.partial / "metrics.jsonl")

    def steps(self, total: int) -> Iterator[int]:
        """Yields the numbers of the remaining steps, with a progress bar. Collective.

        From here on a signal to stop takes effect at the end of a step, in `save`.
        """
        self.total_steps = total
        self.lines = on_rank_0(self._cut_logs)  # of metrics.jsonl
        self._tracker.start(self.record, self.out)
        self._at_exit.callback(self._tracker.call, "finish")
        on_rank_0(lambda: self._write_record(self.partial))
        self._signal = self._at_exit.enter_context(StopSignal())
        transformers.utils.logging.disable_progress_bar()  # its bars would break up the steps' bar
        route = "/".join(self.out.parts[-3:])  # such as 1H/rl/bridge, because many routes share a stage's name
        bar = common.progress_bar(total, route, "step", initial=self.steps_done)
        self._bar = self._at_exit.enter_context(bar)  # closed first at exit, so that the next message gets a new line
        for step in range(self.steps_done, total):
            yield step
            self._bar.update()
        self._bar.close()

    @contextmanager
    def phase(self, name: str):
        """Adds the duration of the block to the next logged line as `seconds_<name>`."""
        began = time.monotonic()
        yield
        self._phases[name] += time.monotonic() - began

    def log(self, step: int, metrics: dict[str, float], rollouts: Sequence[Rollout], show: Sequence[str] = ()) -> None:
        """Appends a line to metrics.jsonl, and shows the metrics named in `show` beside the progress bar.

        The line also holds the rollouts' mean length in tokens, the fraction cut at the length limit, and, if they have
        just been graded, the fractions without an answer and with a failed grading. A few rollouts are written to
        samples.jsonl, and every `save_every` steps one is printed. Each kind of warning (lib.watch) is printed once.
        `metrics` must have `skipped_steps`, the number of skipped optimizer steps. If it is not 0 in STOP_AFTER_SKIPPED
        steps in a row, the last rollouts are written to a file and the run ends with an InputError.
        """
        tokens = common.count_tokens(rollouts)
        self.record["trained_tokens"] += tokens
        line = {
            "step": step,
            **metrics,
            "response_tokens": tokens / len(rollouts),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        }
        if all(rollout.how for rollout in rollouts):  # not set on rollouts that Stage 2a reads from its cache
            for name, kinds in (("no_answer", ("no_answer",)), ("verifier_failed", ("timeout", "error"))):
                line[name] = sum(rollout.how in kinds for rollout in rollouts) / len(rollouts)
        line = self._append(line)
        if rank() == 0:
            samples = sample_lines(step, rollouts)
            self._write_lines("samples.jsonl", samples)
            if step % self.save_every == 0:  # alternates between good and bad ones
                tqdm.write(one_sample(samples[step // self.save_every % len(samples)], chars=400))
            for kind, sentence in find_warnings(self.lines).items():
                if kind not in self.record["warnings"]:
                    self.record["warnings"][kind] = sentence
                    tqdm.write(f"warning: {sentence}")
            shown = {name: f"{line[name]:.3g}" for name in show if line.get(name) is not None}
            self._bar.set_postfix(shown, refresh=False)
        last = [line["skipped_steps"] for line in self.lines if is_training(line)][-STOP_AFTER_SKIPPED:]
        if len(last) == STOP_AFTER_SKIPPED and all(last):
            path = self.partial / f"skipped-{step:06d}.json"
            if rank() == 0:
                path.write_text(json.dumps([dataclasses.asdict(rollout) for rollout in rollouts], default=str))
            raise InputError(
                f"the loss or its gradient was not finite in {STOP_AFTER_SKIPPED} steps in a row, the last of which is step "
                f"{step}; look at its rollouts in {path}, or lower --lr"
            )

    def _append(self, line: dict[str, float]) -> dict[str, float | None]:
        """Appends a line to metrics.jsonl with the seconds of each phase added; returns the line as written."""
        line |= {f"seconds_{name}": round(seconds, 4) for name, seconds in self._phases.items()}
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
        self._phases.clear()
        self.lines.append(line)
        if rank() == 0:
            self._write_lines("metrics.jsonl", [line])
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            self._tracker.call("log", values, step=line["step"])
        return line

    def _write_lines(self, name: str, lines: list[dict]) -> None:
        with (self.partial / name).open("a", encoding="utf-8") as file:
            file.write(as_json_lines(lines))

    def log_validation(self, steps: int, scores: dict[str, dict]) -> None:
        """Appends a line to metrics.jsonl for the validation after `steps` steps, and prints it.

        `scores` maps each set to its statistics (lib.scores.summarise).
        """
        line, said = {"step": steps}, []
        for name, score in scores.items():
            line[f"validation_{name}"] = score["avg"]
            line |= {f"validation_{name}_{key}": score[key] for key in ("se", "truncated", "tokens")}
            average, error, truncated = (f"{100 * score[key]:.1f}" for key in ("avg", "se", "truncated"))
            said.append(f"{name} {average} ± {error} % ({truncated} % truncated, {score['tokens']:.1f} tokens)")
        self._append(line)
        print0(f"Validation after {steps} steps: {', '.join(said)}.")

    def save(
        self,
        steps: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        trained_on: Iterable[Problem],
    ) -> None:
        """Must be called after every step. Usually it only records the step's problems. Every `save_every` steps it writes
        a training state, and every `export_every` steps a checkpoint. If a signal has asked any rank to stop, it writes
        a training state and raises Stopped.

        `steps` counts the finished steps. `trained_on` are problems that the weights have been trained on, whether or
        not their answers were used; Stage 3 refuses them. Every rank writes its own shards of a state, so several nodes
        need a shared directory. Collective; an OSError leaves the previous state in place.
        """
        self.steps_done = steps
        self.record["trained_on"] = sorted({*self.record["trained_on"], *(problem.id for problem in trained_on)})
        # The checkpoint comes first: if the process is killed between the two, the resumed run writes it again.
        if self.export_every and steps % self.export_every == 0 and steps != self.total_steps:
            with whole_for_all(self.partial / f"step-{steps:06d}") as unfinished:
                self._write_checkpoint(unfinished, policy, tokenizer)
        stop = int(common.all_max({"signal": self._signal.number})["signal"])
        if steps % self.save_every == 0 or stop:
            self._write_state(policy, optimizer)
        if stop:
            raise Stopped(stop, f"stopped by {signal.Signals(stop).name} after step {steps}, which is saved")

    def _write_state(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        path = self.partial / f"state-{self.steps_done:06d}"
        state = dict(zip(("model", "optimizer"), get_state_dict(policy, optimizer)))
        with whole_for_all(path) as unfinished:
            dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
            if rank() == 0:
                self._write_record(unfinished)
        for older in self.partial.glob("state-*") if rank() == 0 else ():
            if older != path:
                shutil.rmtree(older)

    def _write_record(self, directory: Path) -> None:
        """Writes run.json: the current record, with the first and last lines of the metrics so far."""
        seconds = self.record["seconds"] + time.monotonic() - self._began
        cpu_seconds = self.record["cpu_seconds"] + time.process_time() - self._cpu_began
        record = {**self.record, "steps": self.steps_done}
        record |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        if trained := [line for line in self.lines if is_training(line)]:
            record |= {"first": trained[0], "last": trained[-1]}
        if validated := [line for line in self.lines if not is_training(line)]:
            record["validation"] = [{k: v for k, v in at.items() if not k.startswith("seconds")} for at in validated]
        with whole(directory / "run.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _write_checkpoint(self, directory: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes weights, tokenizer and run.json. Collective."""
        save_pretrained(policy, directory)
        if rank() == 0:
            tokenizer.save_pretrained(directory)
            self._write_record(directory)

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the checkpoint and its curves, then renames OUT.partial to OUT. Collective."""
        self._write_checkpoint(self.partial, policy, tokenizer)
        if rank() == 0:
            plot_metrics(self.lines, self.partial / "curves.png")
            commit(self.partial, self.out)
            for state in self.out.glob("state-*"):  # removed last: a run killed before the rename still needs it
                shutil.rmtree(state)
            (self.out / "lock").unlink()
            print0(f"wrote {self.out}")
        common.barrier()


def check_unchanged(saved: dict, record: dict, directory: Path) -> None:
    """InputError unless `saved`, the record of the run in `directory`, has the settings, parents and code of `record`.

    --accept-changes accepts changed code, and settings that the new code has added or removed.
    """
    before = settings_and_parents(saved)
    now = json.loads(json.dumps(settings_and_parents(record)))  # turns tuples into lists, as in the saved record
    accepts = record["config"]["accept_changes"]
    differing = [
        f"{name} = {before.get(name)!r}, now it is {now.get(name)!r}"
        for name in before | now
        if before.get(name) != now.get(name) and name not in MAY_CHANGE
        if not accepts or (name in before and name in now)
    ]
    old, new = saved["sessions"][-1]["files"], record["sessions"][-1]["files"]
    changed = ", ".join(name for name, digest in new.items() if old.get(name, digest) != digest)
    if changed and accepts:
        print0(f"{directory}: continuing with changed {changed}")
    elif changed:
        differing.append(f"another {changed} (--accept-changes continues with changed code)")
    if differing:
        raise InputError(
            f"--resume: the run in {directory} had {', and '.join(differing)}; restore its settings and code, name "
            f"another --out, or delete {directory}"
        )


@contextmanager
def whole_for_all(path: Path) -> Iterator[Path]:
    """lib.files.whole for a directory that all ranks write to. Collective."""
    with whole(path) if rank() == 0 else nullcontext(path.with_name(path.name + ".tmp")) as unfinished:
        common.barrier()  # rank 0 has removed any leftovers of an earlier run
        yield unfinished
    common.barrier()  # rank 0 has renamed it


COPY_SECONDS = 1.0  # SLURM and torchrun may both send a signal; a second one within this time counts as a copy


class StopSignal:
    """In a `with` block, stores the first SIGINT (Ctrl-C), SIGTERM, SIGHUP (lost terminal) or SIGUSR1 (from SLURM before it
    ends a job) in `number`, which is 0 before. A later signal has its usual effect, unless it is a copy of the first.

    Files on disk are always consistent, so a process may end at any point; finishing the step only saves its work. A
    rank that waits in a collective runs no handler; torchrun kills it some time after the first signal.
    """

    def __enter__(self) -> StopSignal:
        self.number = 0
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        # A signal that is already ignored stays ignored, such as Ctrl-C in a shell's background job.
        self._usual = {each: signal.getsignal(each) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
        for number in self._usual:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            said = f"\n{signal.Signals(number).name}: the run stops after this step; another signal ends it at once\n"
            os.write(2, said.encode() if rank() == 0 else b"")  # not print, which the signal may have interrupted
        elif time.monotonic() - self._since > COPY_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


class Tracker:
    """Rank 0's connection to the --track package, trackio or wandb, which have the same API; does nothing without one.

    If the package raises an exception, it is printed and the run continues without tracking.
    """

    def __init__(self, package: str | None):
        self._package = package if rank() == 0 else None
        if self._package and importlib.util.find_spec(package) is None:
            raise InputError(f"--track {package}: the package is not installed; run pip install {package}")

    def start(self, record: dict, out: Path) -> None:
        """Begins a run, or continues the one that `record` names as its `tracker_run`."""
        if self._package:
            name = record.setdefault("tracker_run", f"{out.name}-{secrets.token_hex(4)}")
            more = {"id": name} if self._package == "wandb" else {}  # trackio identifies a run by its name
            self.call("init", project="sparse-to-dense", name=name, resume="allow", config=record["config"], **more)

    def call(self, function: str, *arguments, **options) -> None:
        if self._package:
            try:  # import_module, because an import statement would make the package a requirement
                getattr(importlib.import_module(self._package), function)(*arguments, **options)
            except Exception as error:
                said = f"{type(error).__name__}: {common.first_line(error)}"
                print0(f"--track {self._package}: {said}; the run continues without it")
                self._package = None
