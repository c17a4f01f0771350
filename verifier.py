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


# ---- finding the answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|([-+]?\d[\d,]*(?:\.\d+)?))", re.ASCII)
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


# ---- the fast path: decide what needs no algebra

_CLEAN = [
    (re.compile(r"\\(?:left|right)(?![A-Za-z])\.?|\\!|\\displaystyle(?![A-Za-z])"), ""),
    (re.compile(r"(?<!\\)\\[,;: \n]|~|\\q?quad(?![A-Za-z])|\\thinspace(?![A-Za-z])|\s+"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mbox|mathrm|textbf|textit|textrm|textnormal|mathbf|rm)\s*(?=\{)"), r"\\text"),
    (re.compile(r"\s*\{,\}\s*"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|°|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])"), ""),  # keeps "1 2" apart from "12"
]
_WRAPPERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_NUMBER = re.compile(r"([-+]?)(?:\\?\$)?(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?(?:\^\\circ)?", re.ASCII)
_TEXT = re.compile(r"\\text\{([^{}\\]*)\}")


def normalise(text: str) -> str:
    """`text` without the typography that never changes its meaning: spacing, \\left, \\dfrac, $...$, a final full stop."""
    text = text.strip()
    while text.endswith(".") or any(text.startswith(a) and text.endswith(b) and len(text) > len(a + b) for a, b in _WRAPPERS):
        if text.endswith(".") and not text.endswith(r"\."):
            text = text[:-1].rstrip()
            continue
        a, b = next(((a, b) for a, b in _WRAPPERS if text.startswith(a) and text.endswith(b)), ("", ""))
        if not a or a in text[len(a) : -len(b)]:
            break
        text = text[len(a) : -len(b)].strip()
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip()


def _number(text: str) -> str | None:
    """A canonical decimal if `text` is plainly one number ("073", "1,000", "70.0", "\\$5", "336^\\circ"), else None.

    Works on the digits as text, so that no length is too long for it; ASCII digits only, though int() reads others.
    """
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    whole, fraction = match[2].replace(",", "").lstrip("0") or "0", (match[3] or "").rstrip("0")
    sign = "-" if match[1] == "-" and (whole, fraction) != ("0", "") else ""
    return f"{sign}{whole}.{fraction}"


def quick_check(gold: str, answer: str) -> bool | None:
    """True or False where the two (normalised) strings alone decide, None where algebra is needed."""
    if gold == answer:
        return True
    if any(c.isdigit() and not c.isascii() for c in answer):
        return False  # "٣" and "３" are digits to int(), but no gold answer is written in them
    a, b = (_number(_TEXT.sub(r"\1", t) if _TEXT.fullmatch(t) else t) for t in (gold, answer))
    if a is not None and b is not None:
        return a == b
    return None


# ---- the worker process: math-verify on one pair at a time


def _exact_eq(original):
    """math-verify's numeric comparison without its tolerance; floats are already rationals when it is called."""

    def exact(a, b, float_rounding, numeric_precision):
        import sympy
        from math_verify.grader import is_atomic_or_pct_atomic

        matrices = isinstance(a, (sympy.MatrixBase, sympy.MatrixExpr)) or isinstance(b, (sympy.MatrixBase, sympy.MatrixExpr))
        if matrices or is_atomic_or_pct_atomic(a, sympy.Number) or is_atomic_or_pct_atomic(b, sympy.Number):
            return original(a, b, float_rounding, numeric_precision)
        if a.free_symbols or b.free_symbols:
            return False  # left to symbolic equality, which the caller tries next
        x, y = a.evalf(50), b.evalf(50)
        return bool(x.is_finite and y.is_finite and x != 0 and abs(x - y) < abs(x) * sympy.Float("1e-40", 50))

    return exact


def _parse(text: str, is_real: bool):
    """The sympy object that LaTeX `text` denotes, with every decimal as an exact rational."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy, normalize_latex
    from math_verify.parser import get_last_eq
    from sympy import Rational

    class Converter(_Latex2Sympy):
        def parse_number(self, text):  # the original's sympy.Number(text) is eval underneath, and a float
            return Rational(text.replace(",", ""))

    number = _number(text)
    if number is not None:
        return Rational(number)
    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(text, config)
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
    from math_verify.grader import should_treat_as_complex

    is_real = not (should_treat_as_complex(gold) or should_treat_as_complex(answer))
    return verify(_parse(gold, is_real), _parse(answer, is_real), timeout_seconds=None, raise_on_error=True)


def _worker_main(deadline: float, memory_bytes: int) -> None:
    """Answer JSON lines [gold, answer] with true, false or null (error) until stdin closes."""
    import logging
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a stray print of a library must not look like a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the parent decides
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    import math_verify.grader as grader

    grader.sympy_numeric_eq = _exact_eq(grader.sympy_numeric_eq)
    _algebra_check(r"\frac{1}{2}", "0.5")  # imports what is imported late

    def refuse(event: str, args: tuple) -> None:
        if event == "compile" and not str(args[1]).endswith(".py") or event in ("os.system", "subprocess.Popen", "os.fork"):
            raise RuntimeError(f"refused in a verifier worker: {event}")

    sys.addaudithook(refuse)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # No handler: the kernel ends a worker whose parent died before it could.
        signal.alarm(int(deadline) + 2)
        try:
            verdict = bool(_algebra_check(*json.loads(line)))
        except MemoryError:
            return  # the heap is in pieces; the parent starts a fresh worker
        except Exception:
            verdict = None
        signal.alarm(0)
        print(json.dumps(verdict), file=replies, flush=True)


# ---- the parent's side


class _Worker:
    """One worker process, started at its first question and again after each death."""

    def __init__(self, deadline: float, memory_bytes: int):
        self.deadline, self.memory_bytes = deadline, memory_bytes
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(self.deadline), str(self.memory_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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
                gold_answer = extract_answer(gold)
                gold_answer = normalise(gold if gold_answer is None else gold_answer)
                if not gold_answer or len(gold) > MAX_CHARS:
                    raise ValueError(f"gold answer {i} is empty or longer than {MAX_CHARS} characters: {gold[:50]!r}")
                extracted = extract_answer(response)
                if not extracted:
                    verdicts[i] = Verdict(False, extracted, "no_answer")
                elif len(extracted) > MAX_CHARS:
                    verdicts[i] = Verdict(False, extracted[:MAX_CHARS], "too_long")
                else:
                    pair = gold_answer, normalise(extracted)
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
                list(pool.map(serve, workers))  # list(): raises what a thread raised
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
