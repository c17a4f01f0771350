"""The graded samples of an evaluation, kept in files, so that nothing is sampled twice.

A report has a directory for each checkpoint (`sample_directories`), and in it a file for each data set (`SampleFile`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from common import InputError, Problem, Rollout, on_rank_0, print0, rank
from lib import verifier as verifier_source
from lib.files import json_lines, not_written, write_whole
from lib.rollouts import grade
from lib.verifier import Verifier

FIELDS = {"id", "sample", "prompt", "answer", "response", "correct", "finish_reason", "tokens"}  # of every sample


def sample_directories(out: str | Path, labels: Sequence[str]) -> dict[str, Path]:
    """The directory inside the report `out` for each label's samples, named like the label without blanks and quotes.

    A label may hold anything, and its directory must be neither outside the report nor in the place of another label's
    or of one of the report's own files. Raises InputError if that cannot be.
    """
    names = {label: re.sub(r"[^\w.+-]+", "-", label).strip("-.") for label in labels}
    for label, name in names.items():
        if not 0 < len(name.encode()) <= 200 or Path(name).suffix in (".json", ".jsonl", ".md", ".png"):
            raise InputError(
                f"--labels: {label!r} cannot be the name of a directory in the report; give one of letters and digits"
            )
    if len(set(names.values())) < len(names):
        raise InputError(
            f"--labels {list(labels)}: two of them would share a directory of the report, because only letters, digits "
            "and the signs ._+- name one; give others"
        )
    return {label: Path(out) / name for label, name in names.items()}


def prompts_key(problems: Sequence[Problem], prompts: dict[str, list[int]]) -> str:
    """A sha256 of all that samples depend on in a data set: the problems and their prompts as the model reads them.

    Rendered token ids stand for the chat template, the instruction, the system's turn and the thinking mode.
    """
    return _sha256(json.dumps([[problem.id, problem.prompt, prompts[problem.id]] for problem in problems]))


def grading_key(problems: Sequence[Problem], reward: str | None) -> str:
    """A sha256 of all that a grading depends on, apart from the response: the verifier and the right answers.

    The verifier's version is that of its source text and of the packages behind it. With `reward` (FILE.py:function)
    the text of its file counts, too, and the rows of the data set, which that function may read.
    """
    source = Path(verifier_source.__file__)
    facts = [source.read_text(encoding="utf-8"), source.with_name("verifier_worker.py").read_text(encoding="utf-8")]
    facts += [metadata.version(name) for name in ("math-verify", "latex2sympy2-extended", "sympy")]
    facts += [[problem.id, problem.answer] for problem in problems]
    if reward:
        facts += [reward, Path(reward.rpartition(":")[0]).read_text(encoding="utf-8")]
        facts += [problem.row for problem in problems]
    return _sha256(json.dumps(facts, default=str))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def as_sample(rollout: Rollout) -> dict:
    return {
        "id": rollout.problem.id,
        "sample": rollout.sample,
        "prompt": rollout.problem.prompt,
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response_ids),
        **_graded(rollout),
    }


def _graded(rollout: Rollout) -> dict:
    """The part of a sample that a new grading changes."""
    return {
        "answer": rollout.problem.answer,
        "correct": rollout.correct,
        "how": rollout.how,
        "reward": rollout.reward,
    }


def read_samples(path: Path) -> tuple[dict, list[dict]]:
    """The header and the samples of a file. A line that a kill has cut short is left out; of no file it is ({}, [])."""
    lines = json_lines(path)
    header = lines[0] if lines and not FIELDS <= lines[0].keys() else {}
    return header, [line for line in lines if FIELDS <= line.keys()]


class SampleFile:
    """The graded samples of one checkpoint on one data set: a header, then one sample a line, in order of the problems.

    The header holds the `settings` that the samples follow from and the key of their grading. Samples that are there
    with the same settings are used again, and are graded again if only the grading differs. While samples are made
    they are appended to PATH.partial, so that a process that is killed loses at most the part it was at; PATH itself is
    always whole. Rank 0 reads and writes. All methods are collective, and raise InputError if a file cannot be written.
    """

    def __init__(self, path: Path, settings: dict, grading: str, problems: Sequence[Problem], k: int):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.header = json.loads(json.dumps({"settings": settings, "grading": grading}))  # as the file will give it
        self.problems, self.k = {problem.id: problem for problem in problems}, k
        self._samples: dict[tuple[str, int], dict] = {}  # by problem and number; on rank 0 only
        self._appends = False  # whether the partial file holds all samples so far and can be appended to
        whole, self._outdated = on_rank_0(self._read)
        self.missing = [problem for problem in problems if problem.id not in whole]

    def _read(self) -> tuple[set[str], bool]:
        """Ids of the problems whose samples are all there, and whether any of them was graded otherwise."""
        outdated = False
        for path in (self.path, self.partial):
            header, samples = read_samples(path)
            if header.get("settings") == self.header["settings"]:
                outdated |= header != self.header
                self._samples |= {(sample["id"], sample["sample"]): sample for sample in samples}
        whole = {name for name in self.problems if all((name, number) in self._samples for number in range(self.k))}
        self._samples = {key: sample for key, sample in self._samples.items() if key[0] in whole}
        return whole, outdated

    def grade_again(self, verifier: Verifier) -> None:
        """Grades what is there anew if it was graded by another version of the verifier, or against other answers."""
        if not self._outdated:
            return
        rollouts = on_rank_0(lambda: [self._as_rollout(sample) for sample in self._samples.values()])
        grade(rollouts, verifier)
        changed = 0
        for rollout in rollouts if rank() == 0 else ():
            sample = self._samples[rollout.problem.id, rollout.sample]
            changed += sample["correct"] != rollout.correct
            sample |= _graded(rollout)
        print0(f"{self.path}: {len(rollouts)} samples graded again, because the grading has changed; {changed} differ")

    def _as_rollout(self, sample: dict) -> Rollout:
        problem = self.problems[sample["id"]]
        tokens = [0] * sample["tokens"]  # their number is all that a grader may ask for
        return Rollout(problem, sample["sample"], [], tokens, [], sample["finish_reason"], sample["response"])

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Keeps all `k` graded rollouts of some missing problems."""
        on_rank_0(lambda: self._append([as_sample(rollout) for rollout in rollouts]))

    def _append(self, samples: list[dict]) -> None:
        self._samples |= {(sample["id"], sample["sample"]): sample for sample in samples}
        if not self._appends:
            write_whole(self.partial, self._text())
            self._appends = True
            return
        try:
            with self.partial.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample) + "\n" for sample in samples)
        except OSError as error:
            raise not_written(self.partial, error) from None

    def finish(self) -> list[dict] | None:
        """Gives the file its name, once no sample is missing. Returns the samples, on rank 0 only."""
        on_rank_0(self._finish)
        return self._in_order() if rank() == 0 else None

    def _finish(self) -> None:
        text = self._text()
        if not self.path.is_file() or self.path.read_bytes() != text.encode():
            write_whole(self.path, text)
        self.partial.unlink(missing_ok=True)

    def _in_order(self) -> list[dict]:
        keys = ((name, number) for name in self.problems for number in range(self.k))
        return [self._samples[key] for key in keys if key in self._samples]

    def _text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in (self.header, *self._in_order()))
