"""Problem sets: read from files or the hub, split into halves, and rendered as prompts for a model's tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common import INSTRUCTION, InputError, Problem, SamplerConfig, first_line, print0
from lib.verifier import MAX_CHARS, extract_answer

HUB_SETS = {  # short name -> owner/name[@configuration]:split
    "dapo": "BytedTsinghua-SIA/DAPO-Math-17k:train",
    "dapo-processed": "open-r1/DAPO-Math-17k-Processed@en:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
    "gsm8k": "openai/gsm8k@main:test",
    "gsm8k-train": "openai/gsm8k@main:train",
}
FILES = (".jsonl", ".json", ".parquet")
PROMPTS = ("prompt", "problem", "question", "messages")  # columns that may hold a row's prompt
ANSWERS = ("answer", "ground_truth", "solution")  # columns that may hold its answer, besides reward_model.ground_truth

# DAPO-Math-17k and verl's data sets wrap each problem in this text. --prompt replaces the wrapper, and ids exclude it.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
_DAPO_PREFIX, _DAPO_SUFFIX, _OURS = (re.escape(text.strip()) for text in (DAPO_PREFIX, DAPO_SUFFIX, INSTRUCTION))
_WRAPPER = re.compile(rf"^\s*(?:{_DAPO_PREFIX}|{_OURS})|(?:{_DAPO_SUFFIX}|{_OURS})\s*$")


# Ids

# Symbols and commands that have several spellings (lower-cased), each with the spelling that `problem_id` maps it to. The
# last two lines drop formula delimiters, spacing, and commands that only change how the text after them looks.
_SPELLINGS = [(re.compile(pattern.replace(">>", "(?![a-z])")), spelling) for pattern, spelling in (
    (r"\\leq?(slant)?>>", "≤"), (r"\\geq?(slant)?>>", "≥"), (r"\\neq?>>", "≠"), (r"\\lt>>", "<"), (r"\\gt>>", ">"),
    (r"\\times>>", "×"), (r"\\cdot>>|⋅", "·"), (r"\\div>>", "÷"), (r"\\[lc]?dots[bcim]?>>|\.{3,}|⋯", "…"),
    (r"[‐-―−]", "-"), ("。", "."), ("、", ","), (r"[‘’′`´]", "'"), (r"''|[“”„«»]", '"'), (r"\\%", "%"),
    (r"\\[dt]?frac>>", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac\1 \2"),
    (r"\\(left|right|bigg?[lrm]?|displaystyle|limits|q?quad)>>|\\[,;:!>()\[\]\s]|\\\\|[~$]", " "),
    (r"\\(text|math|operatorname|mbox)(rm|bf|it|normal)?>>", " "),
)]  # fmt: skip


@functools.lru_cache(maxsize=1 << 16)  # the DAPO-Math-17k file on the hub repeats each problem a hundred times
def problem_id(text: str) -> str:
    r"""First 16 hex digits of the sha256 of a problem's text after its typesetting has been normalised away.

    DAPO-Math-17k has more than a thousand problems in two typesettings, and some problems of MATH-500. If two copies had
    different ids, one could be trained on while the other counts as held out. The id ignores case, the spelling of symbols
    (`_SPELLINGS`), quotation marks, white space and .,;: except between digits, and, in a text with LaTeX, grouping
    braces. Everything else counts.
    """
    text = re.sub("[²³¹⁰-ⁿ]", lambda superscript: "^" + superscript[0], text)  # otherwise NFKC would turn x² into x2
    text = unicodedata.normalize("NFKC", text).lower()
    latex = "\\" in text or "$" in text
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = re.sub(r'(?<!\\)[{}"]' if latex else '"', " ", text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\s+", " ", text))
    text = re.sub(r"[.,;:](?!\d)|(?<!\d)[,;:]|(?<=[^\W\d])\.", "", text)  # the dot of .5 counts
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Rows


def read_rows(source: str, argument: str = "--data") -> Iterator[dict]:
    """The rows of a problem set: a .jsonl, .json or .parquet file, a short name (`HUB_SETS`), or
    owner/name[@configuration][:split] on the hub. `argument` is the command-line flag that error messages name.

    A .json file holds a list of objects, or one object per line.
    """
    path = Path(source)
    if path.suffix in FILES:
        if not path.is_file():
            raise InputError(f"{argument} {source!r} is not a file; check the path")
        yield from _rows_of_file(path)
        return
    name, _, split = HUB_SETS.get(source, source).partition(":")
    repository, _, configuration = name.partition("@")
    known = f"give one of {', '.join(HUB_SETS)}, a {', '.join(FILES)} file, or owner/name:split on the hub"
    _check_hub_name(repository, f"{argument} {source!r} is not a known data set; {known}")
    try:
        import datasets  # imported here so that a machine without it can train on files

        yield from datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:  # the hub client raises many types, all of which mean that the rows are unavailable
        without = ", or write --exclude with nothing after it" if argument == "--exclude" else ""
        raise InputError(
            f"{argument} {source!r} could not be loaded from the hub ({type(error).__name__}: {first_line(error)}); "
            f"go online, or give a file{without}"
        ) from error


def _rows_of_file(path: Path) -> Iterator[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    with path.open(encoding="utf-8-sig") as file:
        begins_a_list = file.read(1) == "["
        file.seek(0)
        if begins_a_list:
            yield from json.load(file)
            return
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise InputError(f"line {number} of '{path}' cannot be read ({error}); correct or delete it") from None


def _check_hub_name(name: str, fault: str) -> None:
    """InputError for a name that is a path or not owner/name: offline, the hub client would retry for a minute."""
    owner, _, rest = name.partition("/")
    if not rest or "/" in rest or Path(owner).exists():
        raise InputError(f"{fault} (the hub is asked for owner/name, unless owner is a file or directory here)")


def prompt_and_id(row: dict) -> tuple[str, str]:
    """A row's problem text (the last user turn) and its id, which covers all turns.

    Raises ValueError for a row without a prompt, or whose last message is not from the user.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r:.40}, not an object")
    prompt = _prompt_of(row)
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    texts = all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in turns)
    if not texts or turns[-1]["role"] != "user":
        columns = ", ".join(map(str, row))
        raise ValueError(
            f"no prompt that is a text, or a list of messages with the user's last; its columns are {columns}"
        )
    prompt = _WRAPPER.sub("", turns[-1]["content"]).strip()
    if not prompt:
        raise ValueError("its prompt is empty")
    name = problem_id(prompt)
    if len(turns) > 1:
        earlier = [(turn["role"], problem_id(turn["content"])) for turn in turns[:-1]]
        name = hashlib.sha256(json.dumps([*earlier, name]).encode()).hexdigest()[:16]
    return prompt, name


def _prompt_of(row: dict) -> str | list[dict] | None:
    return next((row[key] for key in PROMPTS if row.get(key)), None)


def _answer_of(row: dict) -> str:
    """A row's right answer; ValueError if it has none.

    If the text's last line is `#### 13`, as in GSM8K, the answer is 13. A `solution` is usually a derivation, whose last
    box holds the answer; a solution without a box must be the answer itself, on one short line.
    """
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    for key, value in [("", truth), *((key, row.get(key)) for key in ANSWERS)]:
        text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
        last = text.rpartition("\n")[2]
        if last.split()[:1] == ["####"]:
            text = last[4:].strip()
        elif key == "solution":
            box = extract_answer(text)
            text = box or ("" if "\n" in text or len(text) > 100 else text)
        if text:
            return text
    raise ValueError(f"no answer; its columns are {', '.join(map(str, row))}")


def load_problems(source: str, argument: str = "--data", reward: str | None = None) -> list[Problem]:
    """Reads a problem set (`read_rows`) and drops repeated problems and those whose copies disagree about the answer.

    Rows without a prompt or an answer are skipped, as are rows whose answer is too long for the verifier, unless
    `reward` (--reward) grades instead. The counts are printed. Raises InputError if no problem is left.
    """
    problems: dict[str, Problem] = {}  # the first copy of each, by its id
    conflicting: set[str] = set()
    left_out: list[str] = []
    reworded: list[tuple[str, str]] = []
    rows = 0
    for rows, row in enumerate(read_rows(source, argument), start=1):
        try:
            prompt, name = prompt_and_id(row)
            answer = _answer_of(row)
            if len(answer) > MAX_CHARS and not reward:
                raise ValueError(f"its answer has {len(answer)} characters, and the verifier takes {MAX_CHARS}")
        except ValueError as error:
            left_out.append(f"row {rows}: {error}")
            continue
        first = problems.setdefault(name, Problem(name, prompt, answer, row))
        if first.answer != answer:
            conflicting.add(name)
        if first.prompt.split() != prompt.split():
            reworded.append((prompt, first.prompt))
    kept = [problem for problem in problems.values() if problem.id not in conflicting]
    if not kept:
        why = f", {left_out[0]}" if left_out else ""
        raise InputError(
            f"{argument} {source!r} has no usable problem ({rows} rows{why}); a row needs a prompt ({', '.join(PROMPTS)}) and "
            f"an answer ({', '.join(ANSWERS)} or reward_model.ground_truth)"
        )
    if left_out:
        print0(f"{source}: {len(left_out)} of {rows} rows left out; the first is {left_out[0]}")
    if rows - len(left_out) > len(kept):
        print0(
            f"{source}: {rows} rows, {rows - len(left_out) - len(problems)} repeats dropped, "
            f"{len(conflicting)} problems with conflicting answers dropped, {len(kept)} left"
        )
    if reworded:  # the example shows the user whether `problem_id` has merged two different problems
        example = "{!r} for {!r}".format(*reworded[0])
        print0(f"{source}: {len(reworded)} of the repeats are written differently, such as {example}")
    _report_shared_text(source, [problem.prompt for problem in kept])
    return kept


def load_sets(sources: Sequence[str], argument: str, reward: str | None) -> dict[str, list[Problem]]:
    """The problems of each set that `argument` lists, keyed by the set's name. InputError if two share a name."""
    sets = {Path(source).stem: load_problems(source, argument, reward) for source in sources}
    if len(sets) < len(sources):
        raise InputError(f"{argument} {list(sources)}: two sets have the same name; rename a file")
    return sets


def _report_shared_text(source: str, prompts: Sequence[str]) -> None:
    """Warns if most prompts share some text: an instruction in a problem's text hides its copies in other sets."""
    for where, part in (("begin", slice(30)), ("end", slice(-30, None))):
        [(shared, count)] = Counter(prompt[part] for prompt in prompts).most_common(1)
        if len(prompts) >= 10 and count > len(prompts) / 2:
            print0(
                f"{source}: {count} of {len(prompts)} prompts {where} with {shared!r}. If this is part of an instruction, "
                "move the instruction to --prompt; otherwise copies of these problems in other sets go unnoticed"
            )


# Halves, exclusion, and the order of training


def half_of(problems: Sequence[Problem], half: str) -> list[Problem]:
    """The paper's fixed random split into two equal halves (App. F); `half` is "full", "1H" or "2H".

    The split depends only on the problems' ids, not on the order of the rows. If their number is odd, one problem is in
    neither half.
    """
    if half == "full":
        return list(problems)
    shuffled = sorted(problems, key=lambda problem: problem.id)
    random.Random(0).shuffle(shuffled)
    middle = len(shuffled) // 2
    return shuffled[:middle] if half == "1H" else shuffled[middle : 2 * middle]


def load_training_problems(cfg, validation: Iterable[Problem]) -> list[Problem]:
    """The problems in the chosen --half of --data that are neither in `validation` nor in a set of --exclude.

    `cfg` is a stage's Config. A question is dropped even if other messages precede it in one of the sets, or if its
    excluded copy has no answer. The halves are cut before the exclusion, so they do not depend on the evaluation sets.
    """
    problems = half_of(load_problems(cfg.data, reward=cfg.reward), cfg.half)
    held_out = [(problem.prompt, problem.id) for problem in validation]
    for source in cfg.exclude:
        found = []
        for row in read_rows(source, "--exclude"):
            with suppress(ValueError):  # raised for a row without a prompt
                found.append(prompt_and_id(row))
        if not found:
            raise InputError(f"--exclude {source!r} has no row with a prompt ({', '.join(PROMPTS)})")
        _report_shared_text(source, [prompt for prompt, _ in found])
        held_out += found
    ids = {name for prompt, whole in held_out for name in (whole, problem_id(prompt))}
    kept = [problem for problem in problems if ids.isdisjoint({problem.id, problem_id(problem.prompt)})]
    names, dropped = ", ".join(dict.fromkeys((*cfg.exclude, *cfg.validate))), len(problems) - len(kept)
    if names:
        print0(f"{cfg.data}: {dropped} of {len(problems)} problems dropped because they are in {names}")
    if not kept:
        raise InputError(f"every problem of --data {cfg.data!r} (half {cfg.half}) is in {names}; name other sets")
    return kept


def problem_batches(
    problems: Sequence[Problem], size: int, epochs: int, stage: str, seed: int, limit: int | None = None
) -> list[list[Problem]]:
    """Batches of `size` problems from successive shuffled epochs: `limit` batches, or else `epochs` epochs.

    The order depends on `stage` as well as on the seed. Otherwise OPD with a step limit would repeat the warmup's problems,
    and the bridge as a whole would see fewer problems than the runs it is compared with. A batch may span two epochs, and
    so hold a problem twice. Without `limit` the very last batch may be smaller.
    """
    if limit is not None:
        epochs = math.ceil(limit * size / len(problems))
    order: list[Problem] = []
    for number in range(epochs):
        one_epoch = list(problems)
        random.Random(f"{stage}/{seed}/{number}").shuffle(one_epoch)
        order += one_epoch
    return [order[start : start + size] for start in range(0, len(order), size)][:limit]


# Prompts and tokenizers


def load_tokenizer(model: str, argument: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory or hub name; InputError (naming `argument`) if there is none."""
    if not Path(model).is_dir():
        _check_hub_name(model, f"{argument} {model!r} is not a checkpoint directory; check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if not tokenizer("1+1")["input_ids"]:  # without files, transformers returns a tokenizer with no vocabulary
            raise ValueError("it has no vocabulary")
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"{argument} {model!r} has no tokenizer that transformers can load ({first_line(error)}); put its files beside "
            "the weights, or for a name on the hub check it and go online"
        ) from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, cfg: SamplerConfig) -> str:
    """The problem rendered with the model's chat template, or as plain text if there is none. The last turn is the
    user's: the problem's text inserted into --prompt.

    Raises InputError if there are earlier turns but no template, because plain text cannot mark where turns begin.
    """
    turns = _prompt_of(problem.row)
    earlier = turns[:-1] if isinstance(turns, list) else []
    asked = cfg.prompt.replace("{problem}", problem.prompt)
    if uses_template(tokenizer, cfg):
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in earlier]
        return tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True,
            enable_thinking=cfg.thinking,
        )  # fmt: skip
    if earlier:
        raise InputError(
            f"problem {problem.id} ({problem.prompt[:40]!r}...) has {len(turns)} turns, but no chat template is used; merge "
            "them into one text, or give a model with a template"
        )
    return asked


def uses_template(tokenizer: PreTrainedTokenizerBase, cfg: SamplerConfig) -> bool:
    return cfg.chat_template and tokenizer.chat_template is not None


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], cfg, leave_out_long: bool = False
) -> dict[str, list[int]]:
    """Prompt token ids by problem id. `cfg` is a stage's Config, which says how prompts are rendered.

    Raises InputError if a prompt is longer than --max-prompt-tokens. With `leave_out_long`, long prompts are dropped and
    their number is printed; the InputError is raised only if all prompts are too long.
    """
    texts = [render_prompt(tokenizer, problem, cfg) for problem in problems]
    # A chat template writes the special tokens itself. Without one the tokenizer adds them, such as a leading BOS.
    encoded = tokenizer(texts, add_special_tokens=not uses_template(tokenizer, cfg))["input_ids"]
    if any(ids[-1:] == [tokenizer.eos_token_id] for ids in encoded):
        raise InputError(
            f"a prompt ends with the end-of-sequence token {tokenizer.eos_token!r}, so the model would begin a new text; set "
            "add_eos_token to false in tokenizer_config.json, or change the chat template"
        )
    prompts = {problem.id: ids for problem, ids in zip(problems, encoded)}
    kept = {key: ids for key, ids in prompts.items() if len(ids) <= cfg.max_prompt_tokens}
    if len(kept) < len(prompts):
        said = (
            f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than --max-prompt-tokens "
            f"{cfg.max_prompt_tokens}, the longest has {max(map(len, prompts.values()))} tokens"
        )
        if not leave_out_long or not kept:
            raise InputError(f"{said}; raise the limit")
        print0(f"{said}; they are left out")
    return kept


def end_tokens(
    generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> list[int]:
    """Tokens that end a response: the tokenizer's end-of-sequence token, those in the checkpoint's generation config, and
    those that contain a `stop` string.
    """
    configured = generation_config.eos_token_id if generation_config else None
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured, *stop_tokens(tokenizer, stop)} - {None})


@functools.lru_cache(maxsize=8)  # reading 150,000 entries at every step would take a tenth of a second
def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than a tokenizer's largest id. len(tokenizer) is smaller if some ids below it are unused."""
    return max(tokenizer.get_vocab().values()) + 1


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> set[int]:
    """The tokens whose own text contains a --stop string. InputError for a string that no token contains.

    Stopping at whole tokens makes both engines stop at the same place, and the last token is trained like any other.
    """
    found: set[int] = set()
    texts = tokenizer.batch_decode([[token] for token in range(vocab_size(tokenizer))]) if stop else []
    for text in stop:
        tokens = {token for token, own in enumerate(texts) if text and text in own}
        if not tokens:
            raise InputError(
                f"--stop {text!r} is in no token of {tokenizer.name_or_path!r}, but only a single token that contains it can "
                "end a response; give a short text, such as '\\n'"
            )
        found |= tokens
    return found


def check_same_tokenizer(
    student: str, teacher: str, problems: Sequence[Problem], cfg: SamplerConfig, arguments=("--model", "--teacher")
) -> None:
    """InputError unless both have the same vocabulary, special tokens and rendered prompts: otherwise a KL between their
    distributions is meaningless. `arguments` are the flags that named the two.
    """
    both = [load_tokenizer(model, argument) for model, argument in zip((student, teacher), arguments)]
    pair = f"{arguments[0]} {student!r} and {arguments[1]} {teacher!r}"
    first, second = (tokenizer.get_vocab() for tokenizer in both)
    if first != second:
        token = min(first.items() ^ second.items(), key=lambda item: item[1])[0]
        raise InputError(
            f"{pair} have different vocabularies ({len(first)} and {len(second)} tokens, {token!r} is "
            f"{first.get(token, 'absent')} and {second.get(token, 'absent')}); give a teacher of the student's family"
        )
    for name in ("eos_token", "bos_token", "pad_token"):
        first, second = (getattr(tokenizer, name) for tokenizer in both)
        if first != second:
            raise InputError(f"{pair} differ in {name} ({first!r} and {second!r}); copy one tokenizer over the other")
    for problem in problems:
        first, second = (render_prompt(tokenizer, problem, cfg) for tokenizer in both)
        if first != second:
            raise InputError(
                f"{pair} render prompts differently ({first!r} and {second!r}); give both the same chat template"
            )
