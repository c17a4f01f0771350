"""Problem sets: read from files or the hub, split into halves, and worded as prompts for a model's tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common import INSTRUCTION, InputError, Problem, first_line, print0


def new_problem(prompt: str, answer: str) -> Problem:
    return Problem(problem_id(prompt), prompt, answer)


def problem_id(prompt: str) -> str:
    """First 16 hex digits of the sha256 of the prompt's letters, digits and signs; case, spaces and layout do not
    count.

    DAPO-Math-17k holds about a thousand problems twice, typeset differently. If the two copies had different ids, one
    could be trained on while the other counts as held out.
    """
    text = unicodedata.normalize("NFKC", prompt).lower()
    text = re.sub(r"\\(left|right|displaystyle|quad|qquad|[,;:! ])", "", text)  # LaTeX for spacing and sizes
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)  # a decimal point stays, a full stop goes
    kept = "".join(character for character in text if character.isalnum() or character in "+-*/=<>^!|.")
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


HUB_SETS = {  # short name -> (repository, configuration, split)
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
    "dapo-processed": ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k-train": ("openai/gsm8k", "main", "train"),
}

# The wrapper that the original DAPO-Math-17k puts around each problem; our own instruction replaces it.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


def load_problems(source: str, quiet: bool = False) -> list[Problem]:
    """Reads a problem set and drops repeated problems and those whose copies disagree on the answer.

    `source` is a short name (see `HUB_SETS`), a local .jsonl or .parquet file, or `owner/name[@configuration]:split` on
    the hub. A row's prompt is its `prompt` (text or chat messages), `problem` or `question`. Its answer is
    `reward_model.ground_truth`, `answer`, `solution` or `ground_truth`; if that contains "####", only what follows
    counts.

    Raises InputError for an unknown source, an unreadable row (with its number), or when no problem is left.
    """
    answers: dict[str, Problem] = {}
    conflicting: set[str] = set()
    rows = 0
    for rows, row in enumerate(_read_rows(source), start=1):
        try:
            problem = _problem_from_row(row)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InputError(
                f"row {rows} of {source!r} is not a labelled problem ({error}); each row needs a prompt "
                "(prompt, problem or question) and an answer (answer, solution or reward_model.ground_truth)"
            ) from None
        if answers.setdefault(problem.id, problem).answer != problem.answer:
            conflicting.add(problem.id)
    problems = [problem for problem in answers.values() if problem.id not in conflicting]
    if not problems:
        raise InputError(f"data set {source!r} holds no usable problem ({rows} rows read); name another with --data")
    if rows > len(problems) and not quiet:
        print0(
            f"{source}: {rows} rows, {rows - len(answers)} repeats dropped, "
            f"{len(conflicting)} problems with conflicting answers dropped, {len(problems)} left"
        )
    return problems


def _problem_from_row(row: dict) -> Problem:
    prompt = prompt_of_row(row)
    answer = (row.get("reward_model") or {}).get("ground_truth")
    for key in ("answer", "solution", "ground_truth"):
        answer = row.get(key) if answer is None else answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.rsplit("####", 1)[-1].strip():
        raise ValueError("no answer in it" if answer is None else f"the answer is {answer!r:.40}")
    answer.encode()  # raises for half of a surrogate pair, which JSON can express but no file can hold
    return Problem(problem_id(prompt), prompt, answer.rsplit("####", 1)[-1].strip(), row)


def prompt_of_row(row: dict) -> str:
    """The problem's text in a data set's row; ValueError, KeyError or TypeError if it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r:.40}, not an object")
    prompt = next((row[key] for key in ("prompt", "problem", "question") if row.get(key)), None)
    if isinstance(prompt, list):
        prompt = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no prompt in it")
    return prompt.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()


def _read_rows(source: str) -> Iterable[dict]:
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InputError(
                            f"line {number} of {source!r} is not JSON ({error}); mend or delete it"
                        ) from None
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError):
            raise InputError(f"data set {source!r} is not a parquet file that can be read; fetch it anew") from None
        yield from rows
    elif path.suffix in (".jsonl", ".parquet", ".json", ".csv") or path.exists():
        raise InputError(
            f"data set {source!r} is not a readable .jsonl or .parquet file; check the path given with --data"
        )
    else:
        name, _, split = source.partition(":")
        repository, _, configuration = name.partition("@")
        if source in HUB_SETS:
            repository, configuration, split = HUB_SETS[source]
        elif repository.count("/") != 1:
            raise InputError(
                f"data set {source!r} is unknown; give one of {', '.join(HUB_SETS)}, a .jsonl or .parquet file, or "
                "owner/name:split on the hub"
            )
        import datasets

        try:
            yield from datasets.load_dataset(repository, configuration or None, split=split or "train")
        except Exception as error:  # the hub client raises many kinds; all of them mean that the rows cannot be had
            raise InputError(f"data set {source!r} could not be loaded from the hub ({type(error).__name__}); "
                             "go online, or give a local .jsonl or .parquet file") from error  # fmt: skip


def half_of(problems: Sequence[Problem], half: str, split_seed: int = 0) -> list[Problem]:
    """The paper's fixed random split into two equal halves (App. F); `half` is "full", "1H" or "2H".

    The split depends on the problems' ids and `split_seed` alone, not on the order of rows; of an odd number of
    problems one is left out of both halves, so that the halves are equal.

    Raises InputError when there are fewer than two problems to split.
    """
    if half == "full":
        return list(problems)
    if len(problems) < 2:
        raise InputError(f"--half {half} needs at least two problems, and there is {len(problems)}; use --half full")
    shuffled = sorted(problems, key=lambda problem: problem.id)
    random.Random(split_seed).shuffle(shuffled)
    middle = len(shuffled) // 2
    return shuffled[:middle] if half == "1H" else shuffled[middle : 2 * middle]


def load_training_problems(data: str, half: str, split_seed: int, exclude: Sequence[str]) -> list[Problem]:
    """The problems of one half of `data`, without those that also stand in one of the `exclude`d evaluation sets.

    The halves are cut before the exclusion, so that a checkpoint's half does not depend on what is evaluated.
    """
    problems = half_of(load_problems(data), half, split_seed)
    held_out = {problem.id for source in exclude for problem in load_problems(source, quiet=True)}
    kept = [problem for problem in problems if problem.id not in held_out]
    if len(kept) < len(problems):
        print0(f"{data}: {len(problems) - len(kept)} problems dropped because they stand in {', '.join(exclude)}")
    if not kept:
        raise InputError(
            f"no problem of --data {data!r} (half {half}) is left outside --exclude {list(exclude)}; name others"
        )
    return kept


def problem_batches(problems: Sequence[Problem], size: int, passes: int, seed: int) -> list[list[Problem]]:
    """`passes` shuffled passes over the problems, cut into batches of `size`.

    The tail of a pass is filled from the next one, so every batch is full; the last batch of all may be cut short. A
    batch can therefore hold a problem more than once, and a message says so if `size` makes that the rule.
    """
    if size > len(problems) and passes > 1:
        print0(
            f"--prompts-per-step {size} is more than the {len(problems)} problems there are, so a batch holds problems "
            "several times, each time with other responses"
        )
    order = []
    for number in range(passes):
        one_pass = list(problems)
        random.Random(f"{seed}/{number}").shuffle(one_pass)
        order += one_pass
    return [order[start : start + size] for start in range(0, len(order), size)]


# Prompts and tokenizers


def load_tokenizer(model: str, argument: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory or hub name; InputError (naming `argument`) if there is none."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"{argument} {model!r} is not a checkpoint directory, nor a hub name (owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if not tokenizer("1+1")["input_ids"]:  # without files, transformers makes a tokenizer that knows no token
            raise ValueError("it has no vocabulary")
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"{argument} {model!r} has no tokenizer that transformers can load ({first_line(error)}); put its files beside the "
            "weights"
        ) from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: str, instruction: str, thinking: bool) -> str:
    """The problem and the instruction in the model's chat template, or as plain text if the model has none."""
    if tokenizer.chat_template is None:
        return problem + instruction
    messages = [{"role": "user", "content": problem + instruction}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    instruction: str,
    thinking: bool,
    max_prompt_tokens: int,
) -> dict[str, list[int]]:
    """Prompt token ids by problem id. InputError when a prompt is longer than `max_prompt_tokens`."""
    texts = [render_prompt(tokenizer, problem.prompt, instruction, thinking) for problem in problems]
    prompts = {}
    # A chat template writes special tokens itself. Without one the tokenizer adds its own, such as a leading BOS.
    encoded = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    for problem, ids in zip(problems, encoded):
        if len(ids) > max_prompt_tokens:
            raise InputError(
                f"the prompt of problem {problem.id} ({problem.prompt[:40]!r}...) has {len(ids)} tokens, more than "
                f"--max-prompt-tokens {max_prompt_tokens}; raise the limit or drop the problem"
            )
        prompts[problem.id] = ids
    return prompts


def end_tokens(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's end of sequence, and those in the checkpoint's generation
    settings.
    """
    configured = generation_config.eos_token_id if generation_config else None
    return sorted({tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None})


def check_same_tokenizer(student: str, teacher: str) -> None:
    """Raises InputError, saying what differs, unless teacher and student read and write the same tokens.

    A KL between two distributions over tokens has a meaning only if both are over the same tokens. Compared are the
    vocabularies, the special tokens and the rendered prompts.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher, "--teacher")
    pair = f"--model {student!r} and --teacher {teacher!r}"
    first, second = ours.get_vocab(), theirs.get_vocab()
    if first != second:
        differing = sorted(
            {token for token, _ in first.items() ^ second.items()}, key=lambda t: first.get(t, second.get(t))
        )
        examples = ", ".join(
            f"{token!r} is {first.get(token, 'absent')} and {second.get(token, 'absent')}" for token in differing[:3]
        )
        raise InputError(
            f"{pair} have different vocabularies ({len(first)} and {len(second)} tokens, {len(differing)} differ: "
            f"{examples}); distillation needs a teacher of the student's family"
        )
    for name in ("eos_token", "bos_token", "pad_token", "all_special_tokens"):
        first, second = getattr(ours, name), getattr(theirs, name)
        if first != second and not (isinstance(first, list) and sorted(first) == sorted(second)):
            raise InputError(
                f"{pair} differ in their {name} ({first!r} and {second!r}); copy one tokenizer over the other"
            )
    for thinking in (False, True):
        first, second = (render_prompt(tokenizer, "1+1", INSTRUCTION, thinking) for tokenizer in (ours, theirs))
        if first != second:
            same = len(os.path.commonprefix([first, second]))
            raise InputError(
                f"{pair} render prompts differently (after {first[:same][-20:]!r} one has {first[same:][:40]!r}, the other "
                f"{second[same:][:40]!r}); give both the same chat template"
            )
