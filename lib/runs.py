"""The output of a stage: a checkpoint that records where it comes from, written so that a run can be resumed.

A checkpoint is a Hugging Face directory plus `run.json`, which holds the stage's settings and its lineage: the
checkpoints it came from and the labelled problems that its weights have been trained on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common import (
    AlreadyFinished,
    InputError,
    Problem,
    Rollout,
    all_max,
    check_settings,
    count_tokens,
    exit_process,
    first_line,
    last_words,
    map_over_ranks,
    on_rank_0,
    print0,
    progress_bar,
    rank,
)
from lib.data import (
    check_same_tokenizer,
    load_tokenizer,
    load_training_problems,
    stop_tokens,
    tokenize_prompts,
    vocab_size,
)
from lib.engines import check_engine, check_lengths
from lib.files import drop_steps
from lib.lineage import file_sha256, new_record, read_record, read_run
from lib.plots import plot_metrics
from lib.policy import Policy, check_checkpoint, save_pretrained
from lib.scores import validation_sets
from lib.stopping import Stopping, signal_name
from lib.watch import find_warnings, is_training, one_sample, sample_lines

# In a lone process PyTorch's checkpoint library warns at every call that it assumes a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def prepare(
    cfg, teacher: str | None = None, sampled: str | None = None
) -> tuple[list[Problem], PreTrainedTokenizerBase, dict[str, list[int]]]:
    """Checks a stage's Config, and loads its training problems, the tokenizer, and prompt token ids by problem id.

    Most wrong input is refused here, with an InputError, before any weight is read. `teacher` is the checkpoint that
    the model learns from; `sampled` the one that responses are sampled from (by default the model).
    """
    check_settings(cfg)
    tokenizer = load_tokenizer(cfg.model)
    stop_tokens(tokenizer, cfg.stop)  # raises InputError for a text that could end no response
    validation_sets(cfg, tokenizer)  # raises InputError if they cannot be used
    problems = load_training_problems(cfg)
    if teacher:
        check_same_tokenizer(cfg.model, teacher, problems, cfg)
    for model in filter(None, (cfg.model, teacher)):
        check_checkpoint(model, vocab_size(tokenizer))
    prompts = tokenize_prompts(tokenizer, problems, cfg, leave_out_long=True)
    problems = [problem for problem in problems if problem.id in prompts]
    for model in filter(None, (cfg.model, teacher)):
        check_lengths(cfg, model, prompts.values())
    for model in dict.fromkeys([sampled or cfg.model, *([cfg.model] if cfg.validate else [])]):
        check_engine(cfg, model)
    return problems, tokenizer, prompts


# Training states


def _file_hashes(directory: Path) -> dict[str, str | None]:
    """The sha256 of each file in a directory by its name, None for one that cannot be read. Work is spread;
    collective.
    """
    names = on_rank_0(lambda: sorted(path.name for path in directory.iterdir() if path.name != "SHA256SUMS"))
    return dict(map_over_ranks(lambda share: [(name, file_sha256(directory / name)) for name in share], names))


def _saved_hashes(state: Path) -> dict[str, str]:
    """What `SHA256SUMS` says of a training state's files; {} if it cannot be read."""
    try:
        lines = (state / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError):
        return {}


# Run directories

# A single step whose loss or gradient is not finite may be bad luck. So many in a row mean that the run has diverged.
STOP_AFTER_SKIPPED = 3

# What metrics are called beside the progress bar, where there is little room.
SHORT_NAMES = {
    "frac_reward_zero_std": "no_spread",
    "kl_to_reference": "kl",
    "response_tokens": "tokens",
    "truncated": "cut",
}


class Run:
    """The output directory of a stage while it runs.

    Everything is written to OUT.partial: `metrics.jsonl` (one line for each step and one for each validation),
    `samples.jsonl` (a few responses of each step), `run.json` and, every `save_every` steps, the training state from
    which `--resume` continues. Only a complete checkpoint is renamed to OUT. So a directory called OUT is always whole,
    however the process ends, and a Makefile can use it as a target. Beside them are the checkpoints along the way,
    `step-NNNNNN`, of `--export-every`.

    The files of a training state are hashed when it is saved, and a state is resumed from only if the hashes still fit.

    `cfg` is a stage's Config. `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into
    `run.json`. Use it in a `with` block: at its end the directory is free for another run, and if bad input ended the
    run before there was anything to keep, OUT.partial is removed.

    Raises InputError when OUT exists, is in use by another run, or holds an interrupted run that cannot be continued.
    With `resume`, an OUT that the same settings have made raises AlreadyFinished, on which a stage ends as a success.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out = Path(cfg.out)
        self.partial = Path(f"{self.out}.partial")  # of the Path, so that "runs/x/" becomes "runs/x.partial"
        self.save_every, self.export_every = cfg.save_every, cfg.export_every
        self.total_steps: int | None = None  # known once `steps` is called
        self._stopping = Stopping(f"the same command with --resume continues from what {self.partial} holds")
        self._lock = self._metrics = self._bar = None
        try:
            # Rank 0 reads and writes the files; the other ranks learn what it found.
            self.record, states = on_rank_0(lambda: self._open(cfg, parents))
            self.state, saved = self._newest_whole(states)
            if saved:
                self._compare_settings(saved, self.record, self.partial)
            self.steps_done = saved.get("steps", 0)
            kept = ("consumed", "seconds", "cpu_seconds", "trained_tokens", "warnings")
            self.record.update({name: saved[name] for name in kept if name in saved})
            self.lines = on_rank_0(self._open_metrics)  # of metrics.jsonl
        except InputError as error:
            self.__exit__(InputError, error, None)
            raise
        skipped = [bool(line["skipped_steps"]) for line in self.lines if is_training(line)]
        self._skipped_in_a_row = len(skipped) if all(skipped) else skipped[::-1].index(False)
        self._began, self._cpu_began = time.monotonic(), time.process_time()
        self._phases: dict[str, float] = defaultdict(float)

    def _open(self, cfg, parents: dict[str, str]) -> tuple[dict, list[tuple[Path, dict | None]]]:
        """Locks the directory; returns this run's record, and the training states with their records, newest first."""
        if os.path.lexists(self.out):  # also a link to nothing, in whose place the finished run could not be put
            finished = read_run(cfg.out)
            if finished:
                _tidy(self.out)  # a process that was killed after it had renamed OUT.partial has left its states
            if finished and cfg.resume:
                self._compare_settings(finished, new_record(cfg, parents), self.out)
                raise AlreadyFinished(
                    f"{self.out} is already finished, with these settings; there is nothing to resume"
                )
            raise InputError(f"--out {cfg.out!r} already exists; name another, or delete it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = (self.partial / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = lock
        except BlockingIOError:
            raise InputError(
                f"--out {cfg.out!r} is being written by another run; name another, or stop that one"
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {cfg.out!r} cannot be written ({error.strerror}); name another directory"
            ) from None
        paths = self._states()[::-1]
        if (paths or self._holds_work()) and not cfg.resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
        states = [(path, read_record(path)) for path in paths]
        return new_record(cfg, parents), states

    def _states(self) -> list[Path]:
        """The training states, oldest first."""
        return sorted(self.partial.glob("state-??????"))

    def _compare_settings(self, saved: dict, record: dict, directory: Path) -> None:
        """InputError unless `saved`, the record of the run in `directory`, is of the settings and parents in `record`."""
        if saved["stage"] != record["stage"]:
            raise InputError(
                f"--resume: {directory} holds a run of {saved['stage']}.py, not of {record['stage']}.py; "
                "name another --out, or delete it"
            )
        config = json.loads(json.dumps(record["config"]))  # with lists for tuples, as in the saved one
        for name, value in config.items():
            before = saved.get("config", {}).get(name)
            # The size of micro-batches changes nothing but rounding, and may have to be lowered to go on.
            if name not in ("resume", "out", "micro_batch_tokens") and before != value:
                raise InputError(
                    f"--resume: the run in {directory} had {name} = {before!r}, now it is {value!r}; "
                    f"give the same settings, name another --out, or delete {directory}"
                )
        for role, parent in record["parents"].items():
            if saved["parents"].get(role, {}).get("sha256") != parent["sha256"]:
                content = "texts" if Path(parent["path"]).is_file() else "weights"
                raise InputError(
                    f"--resume: --{role} {parent['path']!r} has other {content} than in the run in {directory}; put "
                    f"the old {content} back, or delete {directory}"
                )
        if saved.get("reward_sha256") != record["reward_sha256"]:
            raise InputError(
                f"--resume: the file of --reward {config['reward']!r} is not what it was in the run in {directory}; put "
                f"the old one back, or delete {directory}"
            )

    def _newest_whole(self, states: list[tuple[Path, dict | None]]) -> tuple[Path | None, dict]:
        """The newest training state whose files have the hashes in its SHA256SUMS, and its record. Collective."""
        for path, saved in states:
            kept, found = _saved_hashes(path), _file_hashes(path)
            differing = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
            damaged = differing if kept else ["SHA256SUMS"]
            if not damaged and saved:
                return path, saved
            print0(f"{path} is damaged: {damaged[0]} is not what was written")
        if states:
            raise InputError(
                f"no training state in {self.partial} is whole, {damaged[0]} of {path.name} is not what was written; "
                "delete the directory to begin again"
            )
        return None, {}

    def _open_metrics(self) -> list[dict]:
        """Removes what will be written again from metrics.jsonl and samples.jsonl; returns what is left of the first.

        The validation before a step has the step's number, and is made again with it.
        """
        drop_steps(self.partial / "samples.jsonl", self.steps_done)
        lines = drop_steps(self.partial / "metrics.jsonl", self.steps_done)
        self._metrics = (self.partial / "metrics.jsonl").open("a", encoding="utf-8")
        return lines

    def _holds_work(self) -> bool:
        """Whether OUT.partial holds anything worth keeping: a training state, a checkpoint along the way, rollouts, or
        those of a skipped step.
        """
        patterns = ("state-??????", "step-??????", "*/shard-??????", "skipped-*")
        return any(any(self.partial.glob(pattern)) for pattern in patterns)

    def __enter__(self) -> Run:
        self._stopping.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stopping.__exit__()
        if self._bar is not None:
            self._bar.close()  # so that the next message begins on a new line
        if self._metrics is not None:
            with suppress(OSError):  # closing writes what is left, which fails again on a full disk
                self._metrics.close()
        if self._lock is not None:
            if isinstance(error, InputError) and self.partial.exists() and not self._holds_work():
                shutil.rmtree(self.partial)
            self._lock.close()

    @contextmanager
    def _writing(self, what: str):
        """Turns a failed write into one sentence that says from where the run can be continued."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            states = self._states()
            remedy = f"--resume to continue after step {int(states[-1].name[6:])}" if states else "begin again"
            raise InputError(
                f"{what} could not be written to {self.partial} ({_reason(error)}); make room, then {remedy}"
            ) from None

    @contextmanager
    def _new_directory(self, name: str):
        """NAME.tmp, for the block to fill and to rename. It is removed if that fails, because half of it is no use."""
        unfinished = self.partial / f"{name}.tmp"
        on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        try:
            yield unfinished
        except InputError:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Loads the weights and optimizer state of the interrupted run, if there is one to continue. Collective."""
        if self.state is not None:
            model_state, optimizer_state = get_state_dict(policy, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=self.state, no_dist=not dist.is_initialized())
            set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            print0(f"{self.out}: continuing after step {self.steps_done}")

    def steps(self, total: int) -> Iterable[int]:
        """The numbers of the steps still to do, while a progress bar shows how many are done. Collective.

        From here on a signal to stop waits for the end of the step, which `save` is told of.
        """
        self.total_steps = total
        on_rank_0(lambda: self._write_record(self.partial))
        self._stopping.patient = True
        transformers.utils.logging.disable_progress_bar()  # one for each checkpoint would tear that of the steps
        route = "/".join(self.out.parts[-3:])  # such as 1H/rl/bridge, because many routes have a stage of one name
        self._bar = progress_bar(total, route, "step", initial=self.steps_done)
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

        The line also holds the rollouts' mean length in tokens, the share that was cut at the length limit, and, if they
        have just been graded, the share in which no answer was found. A few of them are written to samples.jsonl, and
        every `save_every` steps one is printed. Warnings (lib.watch) are printed once in a run.
        `metrics` must have `skipped_steps`, the number of optimizer steps that were skipped. After STOP_AFTER_SKIPPED
        steps in a row with any, the rollouts of the last are written to a file and the run ends with an InputError.
        """
        tokens = count_tokens(rollouts)
        self.record["trained_tokens"] += tokens
        line = {
            "step": step,
            **metrics,
            "response_tokens": tokens / len(rollouts),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        }
        if all(rollout.how for rollout in rollouts):  # those that Stage 2a reads from its cache do not have it
            line["no_answer"] = sum(rollout.how == "no_answer" for rollout in rollouts) / len(rollouts)
        line = self._append(line)
        if rank() == 0:
            self._show_samples(step, rollouts)
            self._warn()
            if self._bar is not None:
                shown = {SHORT_NAMES.get(name, name): line[name] for name in show if line.get(name) is not None}
                self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped_steps"] else 0
        if self._skipped_in_a_row == STOP_AFTER_SKIPPED:
            self._stop(step, rollouts)

    def _append(self, line: dict[str, float]) -> dict[str, float | None]:
        """Appends a line to metrics.jsonl, with the seconds of each phase added; returns it as it is written."""
        line |= {f"seconds_{name}": round(seconds, 4) for name, seconds in self._phases.items()}
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
        self._phases.clear()
        self.lines.append(line)
        if rank() == 0:
            with self._writing("metrics.jsonl"):
                self._metrics.write(json.dumps(line) + "\n")
                self._metrics.flush()
        return line

    def log_validation(self, steps: int, scores: dict[str, dict]) -> None:
        """Appends a line of its own to metrics.jsonl for the validation after `steps` steps, and says what it found.

        `scores` has what lib.scores.summarise says of each set.
        """
        line, said = {"step": steps}, []
        for name, score in scores.items():
            line |= {f"validation_{name}": score["avg"], f"validation_{name}_se": score["se"]}
            line |= {f"validation_{name}_{key}": score[key] for key in ("truncated", "tokens")}
            error = "" if math.isnan(score["se"]) else f" ± {100 * score['se']:.1f}"
            said.append(
                f"{name} {100 * score['avg']:.1f}{error} % ({100 * score['truncated']:.1f} % truncated, "
                f"{score['tokens']:.1f} tokens on average)"
            )
        self._append(line)
        if rank() == 0:
            tqdm.write(f"Validation after {steps} steps: {', '.join(said)}.")  # above the progress bar

    def _show_samples(self, step: int, rollouts: Sequence[Rollout]) -> None:
        lines = sample_lines(step, rollouts)
        with self._writing("samples.jsonl"), (self.partial / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if step % self.save_every == 0:
            tqdm.write(one_sample(lines[step // self.save_every % len(lines)], chars=400))  # a good one, a bad one, ...

    def _warn(self) -> None:
        """Prints the warnings that the metrics so far give reason to, and records them."""
        for kind, sentence in find_warnings(self.lines).items():
            if kind not in self.record["warnings"]:
                self.record["warnings"][kind] = sentence
                tqdm.write(f"warning: {sentence}")

    def _stop(self, step: int, rollouts: Sequence[Rollout]) -> None:
        path = self.partial / f"skipped-{step:06d}.json"

        def write() -> None:
            with self._writing(path.name):
                path.write_text(
                    json.dumps([dataclasses.asdict(rollout) for rollout in rollouts], indent=1, default=str)
                )

        on_rank_0(write)
        raise InputError(
            f"the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row, the last of them step "
            f"{step}, whose rollouts are in {path}; look at them, or lower --lr"
        )

    def save(self, steps: int, policy: Policy, optimizer: torch.optim.Optimizer, trained_on: Iterable[Problem]) -> None:
        """Call it after every step: it records the step's problems, and saves the training state every `save_every`
        steps. If a signal has asked any rank to stop, it saves the state, too, and then ends the process.

        `steps` counts the finished steps. `trained_on` are problems that the weights have been trained on, whether or
        not their answers were used; Stage 3 refuses them. The previous state is removed once the new one is complete.
        Every rank writes its own shards, so on several nodes the directory must be one that all of them see.
        Collective; InputError when the state cannot be written, and then the previous one is still there.
        """
        self.steps_done = steps
        self.record["consumed"] = sorted({*self.record["consumed"], *(problem.id for problem in trained_on)})
        stop = int(all_max({"signal": self._stopping.number})["signal"])
        if steps % self.save_every and not stop:
            return
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        with self._new_directory(f"state-{steps:06d}") as unfinished:
            with self._writing(f"the training state of step {steps}"):
                dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
            on_rank_0(lambda: self._write_record(unfinished))
            hashes = _file_hashes(unfinished)
            on_rank_0(lambda: self._accept_state(unfinished, hashes))
        if stop:
            self._leave(stop)

    def _leave(self, number: int) -> None:
        """Ends the process in a sentence, after a signal and once the state is saved."""
        if rank() == 0:
            self._bar.close()
            last_words(
                f"stopped by {signal_name(number)} after step {self.steps_done}, which is saved; the same command with "
                "--resume continues"
            )
        exit_process(128 + number)

    def _accept_state(self, unfinished: Path, hashes: dict[str, str]) -> None:
        state = unfinished.with_suffix("")
        with self._writing(f"the training state of step {self.steps_done}"):
            lines = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
            (unfinished / "SHA256SUMS").write_text(lines, encoding="utf-8")
            shutil.rmtree(state, ignore_errors=True)  # an older, damaged state of the same step
            unfinished.rename(state)
        for older in self.partial.glob("state-*"):
            if older != state:
                shutil.rmtree(older)

    def _write_record(self, directory: Path) -> None:
        """Writes run.json: the record as it is after this step, with the first and last line of the metrics so far."""
        seconds = self.record["seconds"] + time.monotonic() - self._began
        cpu_seconds = self.record["cpu_seconds"] + time.process_time() - self._cpu_began
        record = {**self.record, "steps": self.steps_done}
        record |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        if trained := [line for line in self.lines if is_training(line)]:
            record |= {"first": trained[0], "last": trained[-1]}
        if validated := [line for line in self.lines if not is_training(line)]:
            record["validation"] = [
                {k: v for k, v in line.items() if not k.startswith("seconds")} for line in validated
            ]
        with self._writing("run.json"):
            (directory / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def export(self, steps: int, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the checkpoint OUT/step-NNNNNN every `export_every` steps. Collective.

        Call it before each step, with the number of steps that are finished. A run that is resumed from the state of
        the same step then writes the checkpoint again, in case the kill came between the two.
        """
        if self.export_every and steps and steps % self.export_every == 0:
            self._write_checkpoint(f"step-{steps:06d}", policy, tokenizer)

    def _write_checkpoint(self, name: str, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a checkpoint with its own run.json, and gives it its name once it is whole. Collective."""
        with self._new_directory(name) as unfinished:
            with self._writing(f"the checkpoint {name}"):
                save_pretrained(policy, unfinished)
            on_rank_0(lambda: self._accept_checkpoint(unfinished, tokenizer))

    def _accept_checkpoint(self, unfinished: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        checkpoint = unfinished.with_suffix("")
        with self._writing(f"the checkpoint {checkpoint.name}"):
            tokenizer.save_pretrained(unfinished)
            self._write_record(unfinished)
            shutil.rmtree(checkpoint, ignore_errors=True)  # the same one, of the run before it was resumed
            unfinished.rename(checkpoint)

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the checkpoint, its curves and its record, and gives the directory its final name. Collective.

        With `--keep-best` it has the weights that scored best in validation.
        """
        with self._writing("the checkpoint"):
            save_pretrained(policy, self.partial)
        on_rank_0(lambda: self._complete(tokenizer))

    def _complete(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with self._writing("the checkpoint"):
            tokenizer.save_pretrained(self.partial)
            self._metrics.close()
            plot_metrics(self.lines, self.partial / "curves.png")
        self._write_record(self.partial)
        self.partial.rename(self.out)
        _tidy(self.out)  # last, because a run that is killed before the renaming continues from the training state
        print(f"wrote {self.out}")


def _tidy(checkpoint: Path) -> None:
    """Removes what a finished run no longer needs."""
    for directory in checkpoint.glob("state-*"):
        shutil.rmtree(directory, ignore_errors=True)
    (checkpoint / "lock").unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What went wrong in a write, in a few words; libraries wrap the system's error in their own."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        seen.append(error)
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        error = failures[0][0] if failures else error.__cause__ or error.__context__
    return first_line(seen[-1])
