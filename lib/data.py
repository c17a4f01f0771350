"""Problem sets: read from files or the hub, split into halves, and worded as prompts for a model's tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common import InputError, Problem, SamplerConfig, first_line, print0
from lib.ids import problem_id, untypeset

ID_RULE = 1  # the rule of problem ids, recorded in run.json; another rule needs another number


def new_problem(prompt: str, answer: str) -> Problem:
    return Problem(problem_id(prompt), prompt, answer)


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

WITHOUT = {  # how to do without a problem set
    "--exclude": ", or write --exclude with nothing after it to exclude nothing",
    "--validate": ", or leave --validate out",
}


def load_problems(source: str, quiet: bool = False, argument: str = "--data") -> list[Problem]:
    """Reads a problem set and drops repeated problems and those whose copies disagree on the answer.

    `source` is a short name (see `HUB_SETS`), a local .jsonl or .parquet file, or `owner/name[@configuration]:split` on
    the hub. A row's prompt is its `prompt` (text or chat messages, the last of them the user's), `problem` or
    `question`. Its answer is `reward_model.ground_truth`, `answer`, `solution` or `ground_truth`; of an answer that
    ends in a line `#### 13`, as GSM8K's do, only that 13 counts.

    Raises InputError for an unknown source, an unreadable row (with its number), or when no problem is left. `argument`
    is the setting that names the source.
    """
    answers: dict[str, Problem] = {}
    conflicting: set[str] = set()
    reworded: list[tuple[str, str]] = []
    rows = 0
    for rows, row in enumerate(_read_rows(source, argument), start=1):
        try:
            problem = _problem_from_row(row)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InputError(
                f"row {rows} of {source!r} is not a labelled problem ({error}); each row needs a prompt "
                "(prompt, problem or question) and an answer (answer, solution or reward_model.ground_truth)"
            ) from None
        first = answers.setdefault(problem.id, problem)
        if first.answer != problem.answer:
            conflicting.add(problem.id)
        texts = first.prompt, problem.prompt
        if texts[0] != texts[1] and len({"".join(untypeset(text).split()) for text in texts}) > 1:
            reworded.append(texts)
    problems = [problem for problem in answers.values() if problem.id not in conflicting]
    if not problems:
        raise InputError(
            f"data set {source!r} holds no usable problem ({rows} rows read); name another with {argument}"
        )
    if rows > len(problems) and not quiet:
        print0(
            f"{source}: {rows} rows, {rows - len(answers)} repeats dropped, "
            f"{len(conflicting)} problems with conflicting answers dropped, {len(problems)} left"
        )
    if reworded and not quiet:  # so that problems which the ids do not tell apart are not dropped in silence
        first, second = reworded[0]
        start = max(0, len(os.path.commonprefix(reworded[0])) - 20)
        print0(
            f"{source}: {len(reworded)} of the repeats differ from the first copy in punctuation or capitals, such as "
            f"{second[start:][:60]!r} from {first[start:][:60]!r}"
        )
    return problems


def _problem_from_row(row: dict) -> Problem:
    prompt, name = prompt_and_id(row)
    answer = (row.get("reward_model") or {}).get("ground_truth")
    for key in ("answer", "solution", "ground_truth"):
        answer = row.get(key) if answer is None else answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    final = _final_answer(answer) if isinstance(answer, str) else ""
    if not final:
        raise ValueError("no answer in it" if answer is None else f"the answer is {answer!r:.40}")
    answer.encode()  # raises for half of a surrogate pair, which JSON can express but no file can hold
    return Problem(name, prompt, final, row)


def prompt_and_id(row: dict) -> tuple[str, str]:
    """The text of a row's problem, which is the user's last turn, and its id, which covers all turns.

    Raises ValueError, KeyError or TypeError for a row that holds no prompt.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r:.40}, not an object")
    prompt = _prompt_of(row)
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError("one of its messages has no role")
    if turns and turns[-1]["role"] != "user":
        raise ValueError(f"its last message is the {turns[-1]['role']}'s, and has to be the user's")
    if not turns or not turns[-1].get("content"):
        raise ValueError("no prompt in it")
    if not all(isinstance(turn.get("content"), str) for turn in turns):
        raise ValueError("the content of one of its messages is no text")
    prompt = turns[-1]["content"]
    if not prompt.strip():
        raise ValueError("no prompt in it")
    prompt = prompt.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()
    name = problem_id(prompt)
    if len(turns) > 1:
        earlier = [(turn["role"], problem_id(turn["content"])) for turn in turns[:-1]]
        name = hashlib.sha256(json.dumps([*earlier, name]).encode()).hexdigest()[:16]
    return prompt, name


def _final_answer(answer: str) -> str:
    """The answer in the last line of a worked solution, if that is `#### answer` as in GSM8K, else the whole text."""
    answer = answer.strip()
    last = answer.rpartition("\n")[2]
    return last[4:].strip() if last.split()[:1] == ["####"] else answer


def _prompt_of(row: dict) -> str | list[dict] | None:
    return next((row[key] for key in ("prompt", "problem", "question") if row.get(key)), None)


def _read_rows(source: str, argument: str = "--data") -> Iterable[dict]:
    path = Path(os.path.expanduser(source))
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
            f"data set {source!r} is not a readable .jsonl or .parquet file; check the path given with {argument}"
        )
    else:
        name, _, split = source.partition(":")
        repository, _, configuration = name.partition("@")
        if source in HUB_SETS:
            repository, configuration, split = HUB_SETS[source]
        elif repository.count("/") != 1:
            raise InputError(
                f"{argument} {source!r} is no known data set; give one of {', '.join(HUB_SETS)}, a .jsonl or .parquet file, or "
                "owner/name:split on the hub"
            )
        import datasets

        try:
            yield from datasets.load_dataset(repository, configuration or None, split=split or "train")
        except Exception as error:  # the hub client raises many kinds; all of them mean that the rows cannot be had
            raise InputError(
                f"data set {source!r} could not be loaded from the hub ({type(error).__name__}); go online, give {argument} "
                f"a local .jsonl or .parquet file{WITHOUT.get(argument, '')}"
            ) from error


def half_of(problems: Sequence[Problem], half: str) -> list[Problem]:
    """The paper's fixed random split into two equal halves (App. F); `half` is "full", "1H" or "2H".

    The split depends on the problems' ids alone, not on the order of rows; of an odd number of
    problems one is left out of both halves, so that the halves are equal.

    Raises InputError when there are fewer than two problems to split.
    """
    if half == "full":
        return list(problems)
    if len(problems) < 2:
        raise InputError(f"--half {half} needs at least two problems, and there is {len(problems)}; use --half full")
    shuffled = sorted(problems, key=lambda problem: problem.id)
    random.Random(0).shuffle(shuffled)
    middle = len(shuffled) // 2
    return shuffled[:middle] if half == "1H" else shuffled[middle : 2 * middle]


def load_training_problems(data: str, half: str, exclude: Sequence[str], validate: Sequence[str] = ()) -> list[Problem]:
    """The problems of one half of `data`, without those that stand in a set of `exclude` or `validate`, too.

    A question of such a set is dropped also where other messages stand before it. The halves are cut before the
    exclusion, so that a checkpoint's half does not depend on what is evaluated.
    """
    problems = half_of(load_problems(data), half)
    sources = [*((source, "--exclude") for source in exclude), *((source, "--validate") for source in validate)]
    held_out = set()
    for source, argument in sources:
        held_out = held_out.union(*map(_ids, load_problems(source, quiet=True, argument=argument)))
    kept = [problem for problem in problems if held_out.isdisjoint(_ids(problem))]
    if len(kept) < len(problems):
        names = ", ".join(source for source, _ in sources)
        print0(f"{data}: {len(problems) - len(kept)} problems dropped because they stand in {names}")
    if not kept:
        also = f" and --validate {list(validate)}" if validate else ""
        raise InputError(
            f"no problem of --data {data!r} (half {half}) is left outside --exclude {list(exclude)}{also}; name others"
        )
    return kept


def _ids(problem: Problem) -> set[str]:
    """A problem's id, and if it has several turns also the id that its last one has alone."""
    return {problem.id} if len(chat_messages(problem, "", "")) == 1 else {problem.id, problem_id(problem.prompt)}


def problem_batches(
    problems: Sequence[Problem], size: int, passes: int, seed: int, limit: int | None = None
) -> list[list[Problem]]:
    """`passes` shuffled passes over the problems, cut into batches of `size`, of which the first `limit` are made.

    The tail of a pass is filled from the next one, so every batch is full; the last batch of all may be cut short. A
    batch can therefore hold a problem more than once, and a message says so if `size` makes that the rule.
    """
    if size > len(problems) and passes > 1:
        print0(
            f"--prompts-per-step {size} is more than the {len(problems)} problems there are, so a batch holds problems "
            "several times, each time with other responses"
        )
    order: list[Problem] = []
    if limit is not None:  # passes that are never reached would only take memory
        passes = min(passes, math.ceil(limit * size / len(problems)))
    for number in range(passes):
        one_pass = list(problems)
        random.Random(f"{seed}/{number}").shuffle(one_pass)
        order += one_pass
    return [order[start : start + size] for start in range(0, len(order), size)][:limit]


# Prompts and tokenizers


def load_tokenizer(model: str, argument: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory or hub name; InputError (naming `argument`) if there is none."""
    model = os.path.expanduser(model)
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


def chat_messages(problem: Problem, instruction: str, system_prompt: str, prefix: str = "") -> list[dict[str, str]]:
    """The turns of a problem's prompt, each with role and content. The prefix begins and the instruction ends the last,
    which is the user's.

    A prompt that is text has one turn. `system_prompt`, unless it is empty, becomes a system's turn in front. Raises
    InputError if there is such a turn already.
    """
    earlier = _prompt_of(problem.row)
    earlier = earlier[:-1] if isinstance(earlier, list) else []
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in earlier]
    if system_prompt and turns and turns[0]["role"] == "system":
        raise InputError(
            f"--system-prompt {system_prompt[:40]!r}: problem {problem.id} ({problem.prompt[:40]!r}...) begins with a "
            "system's turn of its own; leave the setting out, or take that turn out of the data"
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, *turns, {"role": "user", "content": prefix + problem.prompt + instruction}]


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, cfg: SamplerConfig) -> str:
    """The problem's turns in the model's chat template, or the user's one turn as it is if there is no template.

    Raises InputError where there are other turns and no template, or a template that refuses or omits one of them.
    """
    messages = chat_messages(problem, cfg.instruction, cfg.system_prompt, cfg.prefix)
    name = f"problem {problem.id} ({problem.prompt[:40]!r}...)"
    if not uses_template(tokenizer, cfg):
        why = "--no-chat-template is given"
        if tokenizer.chat_template is None:
            why = f"the tokenizer of {tokenizer.name_or_path!r} has no chat template"
        if cfg.system_prompt:
            raise InputError(
                f"--system-prompt {cfg.system_prompt[:40]!r}: {why}, so that there is no system's turn; give the text in "
                "--prefix"
            )
        if len(messages) > 1:
            raise InputError(
                f"{name} has {len(messages)} turns, and {why}, so that nothing would tell them apart; make them one text"
            )
        return messages[0]["content"]
    remedy = "leave out --system-prompt or that turn of the data, or put its text into the user's turn"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=cfg.thinking
        )
    except Exception as error:  # templates raise errors of their own, and of the template language
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} refuses {name}, whose turns are "
            f"{[message['role'] for message in messages]} ({first_line(error)}); {remedy}"
        ) from None
    for message in messages:  # of an assistant's turn some templates omit the thinking, which is how they are made
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path!r} omits the {message['role']}'s turn of {name}; {remedy}"
            )
    return text


def uses_template(tokenizer: PreTrainedTokenizerBase, cfg: SamplerConfig) -> bool:
    return cfg.chat_template and tokenizer.chat_template is not None


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], cfg) -> dict[str, list[int]]:
    """Prompt token ids by problem id. InputError when a prompt is longer than --max-prompt-tokens or not rendered.

    `cfg` is a stage's Config, which says how problems are worded.
    """
    texts = [render_prompt(tokenizer, problem, cfg) for problem in problems]
    prompts = {}
    # A chat template writes special tokens itself. Without one the tokenizer adds its own, such as a leading BOS.
    encoded = tokenizer(texts, add_special_tokens=not uses_template(tokenizer, cfg))["input_ids"]
    for problem, ids in zip(problems, encoded):
        if len(ids) > cfg.max_prompt_tokens:
            raise InputError(
                f"the prompt of problem {problem.id} ({problem.prompt[:40]!r}...) has {len(ids)} tokens, more than "
                f"--max-prompt-tokens {cfg.max_prompt_tokens}; raise the limit or drop the problem"
            )
        prompts[problem.id] = ids
    return prompts


def end_tokens(
    generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> list[int]:
    """Tokens that end a response: the tokenizer's end of sequence, those in the checkpoint's generation settings, and
    those that contain a text of `stop`.
    """
    configured = generation_config.eos_token_id if generation_config else None
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured, *stop_tokens(tokenizer, stop)} - {None})


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> set[int]:
    """The tokens whose own text contains one of the texts of --stop. InputError for an empty text, and for one that no
    token contains.

    Deciding by tokens makes both engines stop at the same place, and lets the end be trained like every other token.
    """
    if "" in stop:
        raise InputError(
            "--stop '' is empty and could end no response; give a text, such as '\\n', or leave --stop out"
        )
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))]) if stop else []
    found = {text: {token for token, own in enumerate(texts) if text in own} for text in stop}
    for text, tokens in found.items():
        if not tokens:
            raise InputError(
                f"--stop {text!r} stands in no single token of {tokenizer.name_or_path!r}, so that it could end no "
                "response; give a shorter text, such as '\\n'"
            )
    return set().union(*found.values())


def check_same_tokenizer(
    student: str,
    teacher: str,
    problems: Sequence[Problem],
    cfg: SamplerConfig,
    arguments: tuple[str, str] = ("--model", "--teacher"),
) -> None:
    """Raises InputError, saying what differs, unless teacher and student read and write the same tokens.

    `arguments` are the names that the two have on the command line.

    A KL between two distributions over tokens has a meaning only if both are over the same tokens. Compared are the
    vocabularies, the special tokens, and for each order of turns among the problems one prompt as the run renders it.
    """
    ours, theirs = load_tokenizer(student, arguments[0]), load_tokenizer(teacher, arguments[1])
    pair = f"{arguments[0]} {student!r} and {arguments[1]} {teacher!r}"
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
    orders = {tuple(turn["role"] for turn in chat_messages(problem, "", "")): problem for problem in problems}
    for problem in orders.values():
        first, second = (render_prompt(tokenizer, problem, cfg) for tokenizer in (ours, theirs))
        if first != second:
            same = len(os.path.commonprefix([first, second]))
            raise InputError(
                f"{pair} render prompts differently (after {first[:same][-20:]!r} one has {first[same:][:40]!r}, the other "
                f"{second[same:][:40]!r}); give both the same chat template"
            )
