r"""Grades a model's response: is the content of its last \boxed{...} mathematically equal to the right answer ("gold")?

    with Verifier() as verifier:
        verdicts = verifier.check(responses, golds)           # a Verdict for each response, in order
    python -m lib.verifier '\frac12' 'so we get \boxed{0.5}'  # grade one response by hand

A model in training exploits every mistake of its grader. So this grader is

strict: accepting a wrong answer costs more than rejecting a right one. Only the last box of a response counts, decimals
    are exact (0.333333 is not 1/3), and answers in different units, number bases or letter cases differ. An answer that
    cannot be decided is wrong.
bounded: 9^{9^{9^9}} keeps sympy busy forever, and math-verify's own timeouts do not interrupt C code. So sympy runs in
    worker processes with a memory limit, which are killed at a deadline. A timeout counts as wrong.
inert: model output is never evaluated as Python, although much of sympy evaluates text. Answers are parsed with a LaTeX
    grammar, and a worker refuses to compile source text.

Most answers are plain numbers or equal strings, which `quick_check` decides. Workers (lib/verifier_worker.py) decide
the rest. They are separate programs because a fork would copy a process that holds CUDA and threads, and
multiprocessing's "spawn" would import the training script again. Neither file imports torch, which is slow to import.
"""

import json
import os
import re
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Longer answers, gold or the model's, are not graded: the longest in MATH-500 has 53 characters, so a longer one is
# dumped text or an attack.
MAX_CHARS = 1000
START_SECONDS = 120.0  # enough for a worker to import sympy on a busy machine or from a cold disk


class Verdict(NamedTuple):
    """One grading. `how` is fast, math_verify, timeout, no_answer, too_long or error; the last four mean wrong."""

    correct: bool
    extracted: str | None  # the last box's content, cut to MAX_CHARS
    how: str


# Finding the answer

# An opening box or a box with a bare number, a brace, or an escaped brace or backslash. \\boxed, from a model that
# escapes its output twice, counts as a box.
_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s*(?:(\{)|([-+]?\d+(?:,\d{3})*(?:\.\d+)?))|\\[\\{}](?!boxed|fbox)|[{}]", re.ASCII
)


def extract_answer(text: str) -> str | None:
    r"""The stripped content of the last \boxed{...} or \fbox{...} (or `\boxed 7`) in `text`; None if there is none.

    If boxes are nested, the outer one counts. If the last box never closes, as in a truncated response, the result is
    None even if an earlier box was complete. Takes time linear in the length of the text.
    """
    answer, open_at = None, []  # For each open brace: where its content starts if it is a box's, else None.
    for token in _TOKEN.finditer(text):
        if token[1]:
            answer = None
            open_at.append(token.end())
        elif not open_at:  # Outside a box only a bare number, as in \boxed 7, matters.
            answer = token.span(2) if token[2] else answer
        elif token[0] == "{":
            open_at.append(None)
        elif token[0] == "}":
            start = open_at.pop()
            answer = answer if start is None else (start, token.start())
    return None if answer is None else text[slice(*answer)].strip()


# The fast path: answers that can be decided without algebra

_CLEAN = [  # typography that never changes the meaning, with its replacement; applied in this order
    (re.compile(r"\\(?:left|right)(?![A-Za-z])\.?|\\!|\\displaystyle(?![A-Za-z])|(?<=\\\\)\[\d+ ?pt\]"), ""),
    (re.compile(r"(?<!\\)\\[,;: \n]|~|\\q?quad(?![A-Za-z])|\\thinspace(?![A-Za-z])|\s+"), " "),
    (re.compile(r"\\(?:mbox|math(?:rm|bf)|text(?:bf|it|rm|normal))\s*(?=\{)"), r"\\text"),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|°|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])"), ""),  # Keeps the space in "1 2", which must not become 12.
    (re.compile(r"^(-?\d+) (\d+)/(\d+)$", re.ASCII), r"\1\\frac{\2}{\3}"),
    (re.compile(r"^(\d+)_\{(\d)\}$", re.ASCII), r"\1_\2"),
    (re.compile(r"^\\text\{([-+]?[\d.,]+)\}$", re.ASCII), r"\1"),
]
_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d*)(?:\.(\d*))?", re.ASCII)
_BASED = re.compile(r"(\d+)_(?:\d|\{\d+\})", re.ASCII)  # a number with its base: 52_8
_TEXT = re.compile(r"\\text\{([^{}\\]*)\}")
_UNIT = re.compile(
    r"(?:\\text\{ ?([A-Za-z][A-Za-z ./]*?)\.? ?\}|(?<=[\d }])([A-Za-z]{2,}))(?:\^\{?([23])\}?)?$", re.ASCII
)
_UNITS = {  # our name for a unit -> its other spellings, without a final s
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mph": "", "deg": "degree", "rad": "radian",
    "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "l": "liter litre", "ml": "milliliter millilitre",
    "sec": "second", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr",
    "cent": "", "dollar": "", "unit": "",
}  # fmt: skip
_UNIT_NAME = {spelling: name for name, others in _UNITS.items() for spelling in [name, *others.split()]}
_POWER = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_FACTOR = {
    "percent": r"\%", "pct": r"\%", "hundred": r"\cdot 10^{2}", "thousand": r"\cdot 10^{3}",
    "million": r"\cdot 10^{6}", "billion": r"\cdot 10^{9}", "trillion": r"\cdot 10^{12}",
}  # fmt: skip
_NO_UNIT = set(_FACTOR) | set(  # words that change or hedge the number before them
    "a an about almost and approx approximately around at base but by choose cubed divided dozen dozens e each either "
    "else exactly factorial false fifth for fourth from half halves i if in infinity into is it least less maybe minus "
    "mod modulo more most nearly no not of off only or out over pi plus power quarter quarters ratio root roughly "
    "score squared tau than then third thirds times to true under unless versus vs wrong".split()
)


def normalise(text: str) -> str:
    r"""Removes typography that never changes the meaning of `text`: spacing, \left, $...$, a box, a final full stop."""
    text, before = text.strip(), None
    while text != before:
        before = text
        text = text if text.endswith((r"\.", "..")) else text.removesuffix(".").rstrip()
        inner = extract_answer(text)
        if text in (rf"\boxed{{{inner}}}", rf"\fbox{{{inner}}}"):
            text = inner
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(opening) : -len(closing)]
            # The delimiters must not occur inside: "$1$ or $2$" is two formulas, and keeps its dollar signs.
            if text == opening + inner + closing and opening not in inner and closing not in inner:
                text = inner.strip()
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip()


def plain_number(text: str) -> str | None:
    """A canonical decimal if `text` is a single plain number ("073", "1,000", "70.0"), else None.

    It works on the digits as text, because int() rejects very long numbers and accepts non-ASCII digits.
    """
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    whole, fraction = re.sub("[, ]", "", match[2]).lstrip("0") or "0", (match[3] or "").rstrip("0")
    return ("-" if match[1] == "-" and whole + fraction != "0" else "") + whole + ("." + fraction if fraction else "")


def split_unit(text: str) -> tuple[str, str]:
    r"""The value and the unit (or "") of a normalised answer: "15\text{cm}^2" -> ("15", "cm2"), "\$5" -> ("5", "dollar")."""
    if text.startswith((r"\$", "$")):
        return text.lstrip("\\$"), "dollar"
    if text.endswith(r"^\circ"):
        return text.removesuffix(r"^\circ"), "deg"
    match = _UNIT.search(text)
    if not match or not match.start():
        return text, ""
    value, words, power = text[: match.start()].rstrip(), (match[1] or match[2]).lower().split(), match[3] or ""
    if len(words) == 1 and words[0] in _FACTOR:
        return value + _FACTOR[words[0]], ""
    if words[0] in _POWER and len(words) > 1 and not power:
        power = _POWER[words.pop(0)]
    names = [_UNIT_NAME.get(word) or _UNIT_NAME.get(word.removesuffix("s")) for word in words]
    hedged = len(words) > 3 or not _NO_UNIT.isdisjoint(words) and names != ["in"]
    if hedged or match[2] and not names[0]:  # A word outside \text must be a known unit, because "5ab" is a product.
        return text, ""
    return value, " ".join(name or word.removesuffix("s") for name, word in zip(names, words)) + power


def _words(text: str) -> str | None:
    r"""The words of a verbal answer ("\text{(C)}" -> "C", "\text{No solution.}" -> "no solution"), else None."""
    bare = _TEXT.sub(r"\1", text).strip().rstrip(".")
    bare = bare[1:-1] if re.fullmatch(r"\([A-Za-z]\)", bare) else bare
    # A hyphen outside of \text is a minus sign.
    if not re.fullmatch(r"[A-Za-z][A-Za-z '-]*", bare) or "-" in bare and r"\text" not in text:
        return None
    return bare if len(bare) == 1 else " ".join(bare.lower().split())


def quick_check(gold: str, answer: str) -> bool | None:
    """Whether two normalised answers are equal, if their strings settle it; None if algebra is needed."""
    if gold == answer:
        return True
    if any(char.isdigit() and not char.isascii() for char in answer):
        return False  # int() accepts digits such as "٣" and "３", but no gold answer uses them.
    (gold_value, gold_unit), (value, unit) = split_unit(gold), split_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        return False
    gold_number, number = plain_number(gold_value), plain_number(value)
    if gold_number and number:
        return gold_number == number
    if based := _BASED.fullmatch(gold):  # An answer may omit the base, which the question states.
        return plain_number(based[1]) == number
    if re.search(r"\d\s*_", answer):  # The LaTeX grammar would ignore the base of a number.
        return False
    gold_words, words = _words(gold), _words(answer)
    if gold_words and (_TEXT.fullmatch(gold) or len(gold_words) > 3 or gold_words in ("yes", "no", "odd")):
        return gold_words == words  # The LaTeX grammar reads words as products of letters: "seat" would equal "east".
    if re.fullmatch("[A-Za-z]{3}", gold):  # Three letters may be a word or a product: "abc", "cat".
        if _TEXT.sub(r"\1", answer) == gold:
            return True
        # An answer that is a product must have the letters in the same order, so that "act" does not pass for "cat".
        letters = re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", value.rpartition("=")[2])
        return None if letters == gold else False
    return True if gold_words and len(gold_words) == 1 and gold_words == words else None


# Asking workers


class _Worker:
    """One worker process, started at its first question and restarted at the next question if it has died."""

    def __init__(self, deadline: float, memory_bytes: int):
        self.deadline, self.memory_bytes = deadline, memory_bytes
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lib.verifier_worker", str(self.deadline), str(self.memory_bytes)],
            bufsize=0,  # With a buffer, closing the pipe of a dead worker would try to flush it, and fail.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,  # where Python finds lib.verifier_worker
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders some sets by hash; verdicts must be repeatable.
        )
        if self._read_line(START_SECONDS) != b"ready\n":
            self.stop()
            raise RuntimeError("a verifier worker did not start; its error is above")

    def _read_line(self, seconds: float) -> bytes | None:
        """The worker's next line, b"" if it died, None at the deadline. A worker writes each short line in one go."""
        poll = select.poll()  # select.select() fails on descriptors above 1023, which a training process may have.
        poll.register(self.process.stdout, select.POLLIN)
        return os.read(self.process.stdout.fileno(), 4096) if poll.poll(seconds * 1000) else None

    def ask(self, gold: str, answer: str) -> tuple[bool, str]:
        """Whether the answer is correct, and how that was decided.

        If the worker dies, a new one is asked once, because the answer may not be the cause.
        """
        for _ in range(2):
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                line = self._read_line(self.deadline)
            except BrokenPipeError:
                line = b""
            if line:
                verdict = json.loads(line)
                return verdict is True, "error" if verdict is None else "math_verify"
            self.stop()
            if line is None:
                return False, "timeout"
        return False, "error"

    def stop(self) -> None:
        if self.process is not None:
            with self.process as process:  # On leaving, this closes the pipes and waits for the process.
                process.kill()
            self.process = None


class Verifier:
    """Grades batches of responses, one batch at a time, in a `with` block. Its verdict is the paper's R(x, y).

    There are `num_workers` processes (by default one per core, at most 8). Each has `deadline` seconds per pair and
    `memory_bytes` of address space.
    """

    def __init__(self, num_workers: int | None = None, deadline: float = 5.0, memory_bytes: int = 2 << 30):
        num_workers = num_workers or min(8, os.cpu_count() or 1)
        self._workers = [_Worker(deadline, memory_bytes) for _ in range(num_workers)]
        self._idle = list(self._workers)

    def check(self, responses: list[str], golds: list[str]) -> list[Verdict]:
        """Grades responses[i] against golds[i]. A response is the model's text without the prompt.

        Any response gets a verdict, however malformed. Raises ValueError for lists of unequal length and for a gold
        answer that is empty or longer than MAX_CHARS, RuntimeError if workers cannot start (math-verify missing).
        """
        verdicts, undecided = [], {}  # `undecided`: index of a response -> the pair that a worker must decide
        for index, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            if not gold.strip() or len(gold) > MAX_CHARS:
                raise ValueError(f"gold answer {index} is empty or longer than {MAX_CHARS} characters: {gold[:50]!r}")
            answer = extract_answer(response)
            if answer and len(answer) > MAX_CHARS:
                verdicts.append(Verdict(False, answer[:MAX_CHARS], "too_long"))
                continue
            pair = normalise(gold), normalise(answer or "")
            correct = quick_check(*pair) if pair[1] else False
            verdicts.append(Verdict(bool(correct), answer, "fast" if pair[1] else "no_answer"))
            if correct is None:
                undecided[index] = pair
        pairs = list(dict.fromkeys(undecided.values()))  # Samples of a prompt often agree, so each pair is asked once.
        with ThreadPoolExecutor(len(self._workers)) as pool:
            results = dict(zip(pairs, pool.map(self._ask, pairs)))  # On Ctrl-C, map cancels pairs not yet started.
        for index, pair in undecided.items():
            correct, how = results[pair]
            verdicts[index] = Verdict(correct, verdicts[index].extracted, how)
        return verdicts

    def _ask(self, pair: tuple[str, str]) -> tuple[bool, str]:
        worker = self._idle.pop()  # There are no more threads than workers, so one is always idle.
        try:
            return worker.ask(*pair)
        finally:
            self._idle.append(worker)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc) -> None:
        for worker in self._workers:
            worker.stop()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.verifier GOLD RESPONSE")
    with Verifier(num_workers=1) as verifier:
        print(verifier.check([sys.argv[2]], [sys.argv[1]])[0])
