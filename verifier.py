r"""Grade a model's response against a gold answer: is the content of its last \boxed{...} the same mathematics?

    verifier = Verifier(num_workers=4, deadline=5.0)
    verdicts = verifier.check(responses, golds)          # list[Verdict], in order
    python verifier.py '\frac12' 'so we get \boxed{0.5}' # try one by hand

What a model writes is untrusted, and a reward is only worth what its checker is, so three rules shape this file.

Strict. Only the last box of the response counts, and a wrong answer that passes costs more than a right one that fails:
    decimals are exact rationals (0.333333 is not 1/3), two different units, number bases or letter cases differ, and
    whatever cannot be decided is wrong. The comparison is math-verify's, on sympy, except for its float comparison,
    which takes 1/2004! for 1/2006!; `_exact_eq` replaces it.
Bounded. sympy can be made to run for ever by ten characters (9^{9^{9^9}}), and math-verify's own time-outs use SIGALRM,
    which works in a main thread only and does not interrupt C code. So sympy runs in worker processes with a memory
    limit, and the parent kills a worker at the deadline; a time-out counts as wrong.
Inert. No text of the model is ever evaluated as Python: answers go through a LaTeX grammar, and workers refuse to compile
    source text at all once they are ready (sympy's parse_expr and sympify are eval underneath).

Most answers are plain numbers or equal strings, decided in this process without any worker ("fast"); workers start
when the first harder answer arrives. They are `python verifier.py --worker`, one JSON line in, one out: neither a fork of
a process that holds CUDA and threads, nor a multiprocessing spawn that would import the training script again. This file
imports neither torch nor transformers, so that a worker starts in about a second.
"""

import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

MAX_CHARS = 1000  # of an answer; the longest of MATH-500 has 53, so what is longer is a dump or an attack
CACHE_SIZE = 1 << 14  # (gold, answer) pairs remembered, at most ~2 kB each
START_SECONDS = 120.0  # for a worker to import sympy, on a busy machine or a cold disk


class Verdict(NamedTuple):
    """One grading. `how`: fast | math_verify | timeout | no_answer | too_long | error; the last four are never correct."""

    correct: bool
    extracted: str | None  # the last box's content, cut to MAX_CHARS
    how: str


# Finding the answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([-+]?\d+(?:,\d{3})*(?:\.\d+)?))", re.ASCII)
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} of `text` (or `\boxed 7`), stripped; None if there is none.

    Of nested boxes the outer one counts. A last box that never closes (a truncated response) is no answer, even if an
    earlier one was complete. Time is linear in len(text): each character is scanned at most twice.
    """
    answer, pos = None, 0  # answer: (start, end) of the last complete box
    while box := _BOX.search(text, pos):
        pos = box.end()
        if box[1] is not None:
            answer = box.span(1)
            continue
        answer, open_at = None, [pos]  # a stack: where a box's content starts, -1 for a plain brace
        for token in _BOX_OR_BRACE.finditer(text, pos):
            pos = token.end()
            if token[0] == "{":
                open_at.append(-1)
            elif token[0] == "}":
                start = open_at.pop()
                if start >= 0:
                    answer = (start, token.start())
                if not open_at:
                    break
            elif token[0][-1] == "{" and len(token[0]) > 2:  # a box inside; \{ is an escaped brace
                answer = None
                open_at.append(pos)
        else:
            break  # some box is open to the end of the text
    return None if answer is None else text[answer[0] : answer[1]].strip()


# The fast path: decide what needs no algebra

_CLEAN = [
    (re.compile(r"\\(?:left|right)(?![A-Za-z])\.?|\\!|\\displaystyle(?![A-Za-z])|(?<=\\\\)\[\d+ ?pt\]"), ""),
    (re.compile(r"(?<!\\)\\[,;: \n]|~|\\q?quad(?![A-Za-z])|\\thinspace(?![A-Za-z])|\s+"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mbox|math(?:rm|bf)|text(?:bf|it|rm|normal))\s*(?=\{)"), r"\\text"),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|°|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])"), ""),  # keeps "1 2" apart from "12"
    (re.compile(r"^(-?\d+) (\d+)/(\d+)$", re.ASCII), r"\1\\frac{\2}{\3}"),
]
_WRAPPERS = [(r"\boxed{", "}"), (r"\fbox{", "}"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d*)(?:\.(\d*))?", re.ASCII)
_TEXT = re.compile(r"\\text\{([^{}\\]*)\}")
_UNIT = re.compile(
    r"(?:\\text\{ ?([A-Za-z][A-Za-z ./]*?)\.? ?\}|(?<=[\d }])([A-Za-z]{2,}))(?:\^\{?([23])\}?)?$", re.ASCII
)
_BASED = re.compile(r"(\d+)_(?:(\d)|\{(\d+)\})", re.ASCII)
_UNITS = {  # canonical name: other spellings, less a final s
    "deg": "degree", "rad": "radian", "cent": "", "dollar": "", "mm": "millimeter millimetre", "cm": "centimeter centimetre",
    "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "l": "liter litre", "ml": "milliliter millilitre",
    "sec": "second", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr", "mph": "", "unit": "",
}  # fmt: skip
_UNIT_NAME = {spelling: name for name, others in _UNITS.items() for spelling in [name, *others.split()]}
_POWER = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNIT = set(  # words after a number that change or hedge it
    "a an about almost and approx approximately around at base but by choose cubed divided dozen dozens e each either else "
    "exactly factorial false fifth for fourth from half halves i if in infinity into is it least less maybe minus mod modulo "
    "more most nearly no not of off only or out over pi plus power quarter quarters ratio root roughly score squared tau than "
    "then third thirds times to true under unless versus vs wrong".split()
)


def normalise(text: str) -> str:
    r"""`text` without the typography that never changes its meaning: spacing, \left, \dfrac, $...$, a final full stop."""
    text, before = text.strip(), None
    while text != before:
        before = text
        if text.endswith(".") and not text.endswith((r"\.", "..")):
            text = text[:-1].rstrip()
        for a, b in _WRAPPERS:
            inner = text[len(a) : -len(b)]
            if text == a + inner + b and (_balanced(inner) if b == "}" else a not in inner and b not in inner):
                text = inner.strip()
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip()


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _number(text: str) -> str | None:
    """A canonical decimal if `text` is plainly one number ("073", "1,000", "70.0"), else None.

    Works on the digits as text, so that no length is too long for it; ASCII digits only, though int() reads others.
    """
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    whole, fraction = re.sub("[, ]", "", match[2]).lstrip("0") or "0", (match[3] or "").rstrip("0")
    return ("-" if match[1] == "-" and whole + fraction != "0" else "") + whole + ("." + fraction if fraction else "")


def _split_unit(text: str) -> tuple[str, str]:
    r"""(value, canonical unit or "") of a normalised answer: "15\text{cm}^2" -> ("15", "cm2"), "\$5" -> ("5", "dollar")."""
    if text.startswith((r"\$", "$")):
        return text.lstrip("\\$"), "dollar"
    if text.endswith(r"^\circ"):
        return text[: -len(r"^\circ")], "deg"
    match = _UNIT.search(text)
    if not match or not match.start():
        return text, ""
    value, words, power = text[: match.start()].rstrip(), (match[1] or match[2]).lower().split(), match[3] or ""
    if words in (["percent"], ["pct"]):
        return value + r"\%", ""
    if len(words) == 1 and words[0] in _SCALE:
        return value + rf"\cdot 10^{{{_SCALE[words[0]]}}}", ""
    if words[0] in _POWER and len(words) > 1 and not power:
        power = _POWER[words.pop(0)]
    names = [_UNIT_NAME.get(w) or _UNIT_NAME.get(w.removesuffix("s")) for w in words]
    if match[2] and not names[0]:  # a bare word counts only if it is known: "5ab" is a product
        return text, ""
    if len(words) > 3 or not _NO_UNIT.union(_SCALE).isdisjoint(words) and names != ["in"]:
        return text, ""
    return value, " ".join(n or w.removesuffix("s") for n, w in zip(names, words)) + power


def _words(text: str) -> str | None:
    r"""The words of an answer that is text: "\text{(C)}" -> "C", "\textbf{No solution.}" -> "no solution"; else None."""
    bare = _TEXT.sub(r"\1", text).strip().rstrip(".")
    bare = bare[1:-1] if re.fullmatch(r"\([A-Za-z]\)", bare) else bare
    if not re.fullmatch(r"[A-Za-z][A-Za-z '-]*" if r"\text" in text else r"[A-Za-z][A-Za-z ']*", bare):
        return None
    return bare if len(bare) == 1 else " ".join(bare.lower().split())


def quick_check(gold: str, answer: str) -> bool | None:
    """True or False where the two (normalised) strings alone decide, None where algebra is needed."""
    if gold == answer:
        return True
    if any(c.isdigit() and not c.isascii() for c in answer):
        return False  # "٣" and "３" are digits to int(), but no gold answer is written in them
    gold, answer = (t[6:-1] if _TEXT.fullmatch(t) and _number(t[6:-1]) else t for t in (gold, answer))  # \text{12}
    (gold_value, gold_unit), (value, unit) = _split_unit(gold), _split_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        return False
    numbers = _number(gold_value), _number(value)
    if None not in numbers:
        return numbers[0] == numbers[1]
    based = _BASED.fullmatch(gold)
    if based or re.search(r"\d\s*_", answer):  # the grammar would drop the base
        theirs = _BASED.fullmatch(answer)
        if based and theirs:
            return (based[1], based[2] or based[3]) == (theirs[1], theirs[2] or theirs[3])
        return bool(based) and _number(based[1]) == numbers[1]  # the question states the base; the answer may omit it
    gold_words, words = _words(gold), _words(answer)
    if gold_words and (_TEXT.fullmatch(gold) or len(gold_words) > 3 or gold_words in ("yes", "no", "odd")):
        return gold_words == words  # the grammar would read a product of letters, in which "seat" is "east"
    if gold_words and len(gold_words) == 1 and gold_words == words:
        return True
    return None


# The worker process: math-verify on one pair at a time


class _Unequal(Exception):
    """Two expressions differ, numerically and beyond doubt: no need to try symbolic equality, which is slow."""


def _exact_eq(original):
    """math-verify's comparison of two numbers, `original`, without its absolute tolerance.

    Two constants are equal when they agree in more digits than the largest and smallest of their parts span: enough
    to tell 2006! from 2006! + 1. Expressions with symbols that agree at one point are left to symbolic equality, which
    the caller tries next.
    """
    from sympy import MatrixBase, MatrixExpr, Rational, UnevaluatedExpr, log, preorder_traversal

    def exact(a, b, float_rounding, numeric_precision):
        if isinstance(a, (MatrixBase, MatrixExpr)) or isinstance(b, (MatrixBase, MatrixExpr)):
            return original(a, b, float_rounding, numeric_precision)  # calls this function on the entries
        if isinstance(a, Rational) and isinstance(b, Rational):
            return a == b
        if a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):
            # A percentage: 15\% is 15 times UnevaluatedExpr(1/100), and passes for 15.
            return original(a, b, float_rounding, numeric_precision)
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        point = {symbol: Rational(5 * i + 3, 7 * i + 8) for i, symbol in enumerate(symbols)}
        x, y = a.subs(point).evalf(30), b.subs(point).evalf(30)
        if x.is_finite and y.is_finite and abs(x - y) > max(abs(x), abs(y), 1) * 1e-20:
            raise _Unequal
        if not (a.is_number and b.is_number):
            return False
        sizes = [abs(part.evalf(5)) for side in (a, b) for part in preorder_traversal(side) if part.is_number]
        digits = 60 + 3 * max(abs(int(log(size, 10).evalf(5))) for size in sizes if size.is_finite and size != 0)
        if digits > 20_000:
            return False
        x, y = a.evalf(digits, maxn=4 * digits), b.evalf(digits, maxn=4 * digits)
        return bool(x.is_finite and y.is_finite and abs(x - y) * 10 ** (digits - 15) < abs(x))

    return exact


@functools.lru_cache(maxsize=256)  # the samples of one prompt share their gold answer
def _parse(text: str, is_real: bool):
    """The sympy object that LaTeX `text` denotes, with every decimal as an exact rational."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy, normalize_latex
    from math_verify.parser import get_last_eq
    from sympy import Rational

    class Converter(_Latex2Sympy):
        def parse_number(self, text):  # the original's sympy.Number(text) is eval underneath, and a float
            return Rational(text.replace(",", ""))

        def convert_postfix_list(self, arr, i=0):
            """A product written by juxtaposition. The original reads 3(5) as 3 + 5, by its rule for mixed numbers."""
            first = self.convert_postfix(arr[i])
            texts = [factor.getText() for factor in arr[i : i + 2]]
            if len(texts) == 2 and all(re.fullmatch(r"(\\[hv]?phantom)?\{*\d+\}*", text) for text in texts):
                raise ValueError("two numbers side by side")
            if len(texts) == 2 and texts[0].isdigit() and re.fullmatch(r"\\frac\{\d+\}\{\d+\}", texts[1]):
                first, i = first + self.convert_postfix(arr[i + 1]), i + 1
            if i + 1 == len(arr):
                return first
            rest = self.convert_postfix_list(arr, i + 1)
            is_matrix = getattr(first, "is_Matrix", False) or getattr(rest, "is_Matrix", False)
            return self.mat_mul_flat(first, rest) if is_matrix else self.mul_flat(first, rest)

    if (number := _number(text)) is not None:
        return Rational(number)
    if repeating := re.fullmatch(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}", text, re.ASCII):
        sign, whole, head, tail = repeating.groups()
        return Rational(f"{sign}1") * (
            Rational(f"{whole}.{head}0") + Rational(int(tail), (10 ** len(tail) - 1) * 10 ** len(head))
        )
    latex = normalize_latex(text, NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"))
    converter = Converter(None, is_real, False, ConversionConfig(lowercase_symbols=False))
    try:
        return converter.parse(latex)
    except Exception:
        if get_last_eq(latex) == latex:
            raise
        return converter.parse(get_last_eq(latex))


def _algebra_check(gold: str, answer: str) -> bool:
    """Whether math-verify holds `answer` and `gold` for equal. May run for ever, take any memory, raise anything."""
    from math_verify import verify
    from math_verify.grader import is_expr_of_only_symbols, should_treat_as_complex
    from sympy import FiniteSet, Interval, Tuple
    from sympy.core.function import AppliedUndef
    from sympy.core.relational import Eq

    gold, answer = _split_unit(gold)[0], _split_unit(answer)[0]
    is_real = not (should_treat_as_complex(gold) or should_treat_as_complex(answer))

    def equal(a, b) -> bool:
        try:
            return verify(a, b, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
        except _Unequal:
            return False

    def is_constant(side) -> bool:
        return getattr(side, "is_number", False) and not side.has(AppliedUndef)

    def is_name(side) -> bool:
        return is_expr_of_only_symbols(side) or side.has(AppliedUndef) or side.is_Pow

    if r"\approx" in answer:  # "10\sqrt{2}\approx 14.14": the exact part counts, if the rest is its approximation
        answer, _, approximation = answer.partition(r"\approx")
        if r"\approx" in gold or abs(float(approximation) / float(_parse(answer, is_real)) - 1) > 0.01:
            return False
    ours, theirs = _parse(gold, is_real), _parse(answer, is_real)
    # "3 = 5" must not pass for 5, as math-verify would have it: it looks at the last side of an equation only.
    equations = [part for part in getattr(theirs, "_unsorted_args", (theirs,)) if isinstance(part, Eq)]
    constants = [side for part in equations for side in part.args if is_constant(side)]
    if not all(equal(constants[0], side) for side in constants[1:]):
        return False
    # Nor may "2x - 6 = 0" pass for 0, while "x = 0", "f(1) = 0" and "x^2 = 0" may.
    if "=" not in gold and not all(is_constant(part.lhs) or is_name(part.lhs) for part in equations):
        return False
    # A set of values is no tuple or interval, and [1, 0] no (1, 0), though math-verify compares their elements.
    kinds = [(isinstance(tree, FiniteSet), isinstance(tree, (Tuple, Interval))) for tree in (ours, theirs)]
    if kinds in ([(True, False), (False, True)], [(False, True), (True, False)]):
        return False
    if isinstance(ours, Tuple) and isinstance(theirs, Tuple) and {gold[0], answer[0]} == {"(", "["}:
        return False
    return equal(ours, theirs)


def _lock_down() -> None:
    """Prepare math-verify in this process, then let nothing compile text, start a program or open a connection."""
    from math_verify import grader

    grader.sympy_numeric_eq = _exact_eq(grader.sympy_numeric_eq)
    # What sympy imports late compiles text of its own, so it is imported now.
    for pair in [
        (r"\sin^2 x", r"1-\cos^2 x"),
        ("2x=6", "4x=12"),
        (r"\{1,2\}", "3"),
        ("n!", "n(n-1)!"),
        ("x>2", r"(2,\infty)"),
    ]:
        _algebra_check(*pair)

    def refuse(event: str, args: tuple) -> None:
        if event == "compile" and not str(args[1]).endswith(".py"):
            source = args[0] if isinstance(args[0], bytes) else str(args[0]).encode()
            if not source.startswith(b"def monomial_"):  # sympy writes one such function per number of variables
                raise RuntimeError("a verifier worker compiles no text")
        if event in ("os.system", "os.fork", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            raise RuntimeError(f"refused in a verifier worker: {event}")

    sys.addaudithook(refuse)


def _worker_main(deadline: float, memory_bytes: int) -> None:
    """Answer JSON lines [gold, answer] with true, false or null (error) until stdin closes."""
    import logging
    import resource

    replies = os.fdopen(os.dup(1), "w")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)  # a stray print of a library must not look like a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the parent decides
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    _lock_down()
    os.dup2(sink, 2)  # nobody reads it from now on, and a full pipe would block
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(int(deadline) + 2)  # no handler: the kernel ends a busy worker whose parent died
        try:
            verdict = bool(_algebra_check(*json.loads(line)))
        except MemoryError:
            return  # the heap is in pieces; the parent starts a fresh worker
        except Exception:
            verdict = None
        signal.alarm(0)
        print(json.dumps(verdict), file=replies, flush=True)


# The parent's side


class _Worker:
    """One worker process, started at its first question and again after each death."""

    def __init__(self, deadline: float, memory_bytes: int):
        self.deadline, self.memory_bytes = deadline, memory_bytes
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(self.deadline), str(self.memory_bytes)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders some sets by hash; a verdict must not vary
        )
        if self._readline(START_SECONDS) != b"ready\n":
            self.process.kill()
            reason = self.process.stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
            self.stop()
            raise RuntimeError(f"a verifier worker did not start: {reason or 'no message'}")

    def _readline(self, seconds: float) -> bytes | None:
        """The next line, b"" if the worker died, None at the deadline."""
        until, line, fd = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        poll = select.poll()  # not select(): a training process can hold descriptors above 1024
        poll.register(fd, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                return None
            chunk = os.read(fd, 4096)
            if not chunk:
                return b""
            line += chunk
        return line

    def ask(self, gold: str, answer: str) -> tuple[bool, str]:
        """(correct, how). A worker found dead gets one successor, since the death may be no fault of this answer."""
        for _ in range(2):
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self.process.stdin.flush()
                line = self._readline(self.deadline)
            except OSError:
                line = b""
            if line:
                verdict = json.loads(line)
                return verdict is True, "error" if verdict is None else "math_verify"
            self.stop()
            if line is None:
                return False, "timeout"
        return False, "error"

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            try:
                pipe.close()
            except OSError:
                pass  # unsent bytes for a process that is gone


class Verifier:
    """Grades batches. `num_workers` processes (default: one a core, 8 at most), `deadline` seconds a grading,
    `memory_bytes` of address space a worker. Safe to call from several threads; one batch runs at a time."""

    def __init__(self, num_workers: int | None = None, deadline: float = 5.0, memory_bytes: int = 2 << 30):
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        if num_workers < 1 or deadline <= 0:
            raise ValueError(f"num_workers ({num_workers}) and deadline ({deadline}) must be positive")
        self._workers = [_Worker(deadline, memory_bytes) for _ in range(num_workers)]
        self._cache: OrderedDict[tuple[str, str], tuple[bool, str]] = OrderedDict()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, lambda workers: [w.stop() for w in workers], self._workers)

    def check(self, responses: list[str], golds: list[str]) -> list[Verdict]:
        """Grade responses[i] against golds[i]; never pass the prompt along, only what the model wrote.

        Whatever the responses hold, every one gets a verdict. Raises ValueError for lists of unequal length and for a
        gold answer that is empty or longer than MAX_CHARS, RuntimeError if workers cannot start (math-verify missing).
        """
        if len(responses) != len(golds):
            raise ValueError(f"{len(responses)} responses for {len(golds)} gold answers")
        with self._lock:
            verdicts, pending = [None] * len(golds), OrderedDict()  # pending: pair -> indices that wait for it
            for i, (response, gold) in enumerate(zip(responses, golds)):
                if not gold.strip() or len(gold) > MAX_CHARS:
                    raise ValueError(f"gold answer {i} is empty or longer than {MAX_CHARS} characters: {gold[:50]!r}")
                extracted = extract_answer(response)
                if extracted and len(extracted) > MAX_CHARS:
                    verdicts[i] = Verdict(False, extracted[:MAX_CHARS], "too_long")
                    continue
                pair = normalise(gold), normalise(extracted or "")
                if not pair[1]:
                    verdicts[i] = Verdict(False, extracted, "no_answer")
                else:
                    quick = quick_check(*pair)
                    if quick is not None:
                        verdicts[i] = Verdict(quick, extracted, "fast")
                    elif pair in self._cache:
                        self._cache.move_to_end(pair)
                        verdicts[i] = Verdict(self._cache[pair][0], extracted, self._cache[pair][1])
                    else:
                        pending.setdefault(pair, []).append((i, extracted))
            for pair, result in self._ask_all(list(pending)):
                self._cache[pair] = result
                for i, extracted in pending[pair]:
                    verdicts[i] = Verdict(result[0], extracted, result[1])
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            return verdicts

    def _ask_all(self, pairs: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[bool, str]]]:
        todo, done = deque(pairs), []

        def serve(worker: _Worker) -> None:
            while True:
                try:
                    pair = todo.popleft()
                except IndexError:
                    return
                done.append((pair, worker.ask(*pair)))

        workers = self._workers[: len(pairs)]
        if workers:
            with ThreadPoolExecutor(len(workers)) as pool:
                try:
                    list(pool.map(serve, workers))  # list(): raises what a thread raised
                except BaseException:  # Ctrl-C, or workers that do not start: the other threads stop after their pair
                    todo.clear()
                    raise
        return done

    def close(self) -> None:
        """End the workers; a later check() would start them again."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker_main(float(sys.argv[2]), int(sys.argv[3]))
    elif len(sys.argv) == 3:
        sys.stdout.reconfigure(errors="backslashreplace")
        with Verifier(num_workers=1) as verifier:
            print(verifier.check([sys.argv[2]], [sys.argv[1]])[0])
    else:
        sys.exit("usage: python verifier.py GOLD RESPONSE")
