"""The verifier's worker program: decides with math-verify, which uses sympy, whether two answers are equal.

`lib/verifier.py` starts it, explains why it is a separate process, and kills it at the deadline. A worker prints "ready",
then answers each JSON line [gold, answer] with true, false, or null for an error.

math-verify decides most pairs correctly, but it accepts some wrong answers, which a model in training would find. So we
replace its comparison of numbers (`exact_numeric_eq`) and parts of its grammar (`LatexReader`), and reject some answers
before asking it (`algebra_check`).
"""

import functools
import json
import logging
import os
import re
import resource
import signal
import sys

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy, normalize_latex
from math_verify import grader, verify
from sympy import FiniteSet, Interval, MatrixBase, MatrixExpr, Rational, Tuple, UnevaluatedExpr, log, preorder_traversal
from sympy.core.function import AppliedUndef
from sympy.core.relational import Eq

from lib.verifier import plain_number, split_unit

tolerant_numeric_eq = grader.sympy_numeric_eq  # math-verify's own comparison of numbers


class Unequal(Exception):
    """Two expressions certainly differ in value, so sympy need not search for a proof that they are equal."""


def exact_numeric_eq(left, right, *precision) -> bool:
    """Whether two expressions are equal as numbers. `lock_down` substitutes it for `tolerant_numeric_eq`.

    math-verify allows an absolute error, so that 1/2004! equals 1/2006!. Here two constants are equal if they agree in
    more digits than the ratio of their largest part to their smallest part has, which tells 2006! from 2006! + 1.
    Expressions with variables that agree at one point give False; the caller then compares them by algebra.
    """
    if any(isinstance(side, (MatrixBase, MatrixExpr)) or side.has(UnevaluatedExpr) for side in (left, right)):
        # For matrices math-verify calls this function again on each pair of entries. UnevaluatedExpr marks a percentage:
        # the grammar reads 15\% as 15 * UnevaluatedExpr(1/100), which math-verify also accepts for 15.
        return tolerant_numeric_eq(left, right, *precision)
    if isinstance(left, Rational) and isinstance(right, Rational):
        return left == right
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    point = {symbol: Rational(5 * index + 3, 7 * index + 8) for index, symbol in enumerate(symbols)}
    x, y = left.subs(point).evalf(30), right.subs(point).evalf(30)
    if x.is_finite and y.is_finite and abs(x - y) > max(abs(x), abs(y), 1) * 1e-20:
        raise Unequal
    if not (left.is_number and right.is_number):
        return False
    sizes = [abs(part.evalf(5)) for side in (left, right) for part in preorder_traversal(side) if part.is_number]
    digits = 60 + 3 * max(abs(int(log(size, 10).evalf(5))) for size in sizes if size.is_finite and size != 0)
    if digits > 20_000:
        return False
    x, y = left.evalf(digits, maxn=4 * digits), right.evalf(digits, maxn=4 * digits)
    return bool(x.is_finite and y.is_finite and abs(x - y) * 10 ** (digits - 15) < abs(x))


class LatexReader(_Latex2Sympy):
    """math-verify's translation from LaTeX to sympy, with two methods replaced."""

    def parse_number(self, text):
        """An exact number. The original evaluates the text as Python, so a decimal becomes a float."""
        return Rational(text.replace(",", ""))

    def convert_postfix_list(self, factors, start=0):
        r"""The product of adjacent factors. The original reads 3(5) as the mixed number 3 + 5.

        Here a mixed number is digits followed by a \frac of digits; other adjacent numbers raise ValueError.
        """
        product = self.convert_postfix(factors[start])
        texts = [factor.getText() for factor in factors[start : start + 2]]
        if len(texts) == 2 and all(re.fullmatch(r"(\\[hv]?phantom)?\{*\d+\}*", text) for text in texts):
            raise ValueError("two numbers side by side")
        if len(texts) == 2 and texts[0].isdigit() and re.fullmatch(r"\\frac\{\d+\}\{\d+\}", texts[1]):
            product, start = product + self.convert_postfix(factors[start + 1]), start + 1
        if start + 1 == len(factors):
            return product
        rest = self.convert_postfix_list(factors, start + 1)
        is_matrix = getattr(product, "is_Matrix", False) or getattr(rest, "is_Matrix", False)
        return self.mat_mul_flat(product, rest) if is_matrix else self.mul_flat(product, rest)


@functools.lru_cache(maxsize=256)  # Parsing is slow, and all samples of a prompt have the same gold answer.
def parse_latex(text: str, is_real: bool):
    """Parses LaTeX into a sympy object in which every decimal is an exact rational."""
    if (number := plain_number(text)) is not None:
        return Rational(number)
    if repeating := re.fullmatch(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}", text, re.ASCII):
        sign, whole, head, tail = repeating.groups()
        difference = int(whole + head + tail) - int(
            "0" + whole + head
        )  # between the number shifted by one period and the number itself
        return Rational(int(sign + "1") * difference, (10 ** len(tail) - 1) * 10 ** len(head))
    latex = normalize_latex(text, NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"))
    return LatexReader(None, is_real, False, ConversionConfig(lowercase_symbols=False)).parse(latex)


def equal(left, right) -> bool:
    """Whether math-verify considers two sympy objects equal."""
    try:
        return verify(left, right, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    except Unequal:
        return False


def algebra_check(gold: str, answer: str) -> bool:
    """Whether two normalised answers are equal. It may run forever, exhaust memory or raise any exception."""
    gold, answer = split_unit(gold)[0], split_unit(answer)[0]
    is_real = not (grader.should_treat_as_complex(gold) or grader.should_treat_as_complex(answer))
    # In "10\sqrt{2}\approx 14.14" the exact part counts, provided that the approximation is close to it.
    if r"\approx" in answer:
        answer, _, approximation = answer.partition(r"\approx")
        if r"\approx" in gold or abs(float(approximation) / float(parse_latex(answer, is_real)) - 1) > 0.01:
            return False
    ours, theirs = parse_latex(gold, is_real), parse_latex(answer, is_real)
    # math-verify looks only at the last side of an equation. All constant sides must be equal, so that "3 = 5" does not
    # pass for 5. The first side must be a constant or a name for the second, as in "x = 0", "f(1) = 0" and "x^2 = 0", so
    # that "2x - 6 = 0" does not pass for 0.
    is_constant = lambda side: getattr(side, "is_number", False) and not side.has(AppliedUndef)
    is_name = lambda side: grader.is_expr_of_only_symbols(side) or side.has(AppliedUndef) or side.is_Pow
    equations = [part for part in getattr(theirs, "_unsorted_args", (theirs,)) if isinstance(part, Eq)]
    constants = [side for part in equations for side in part.args if is_constant(side)]
    if not all(equal(constants[0], side) for side in constants[1:]):
        return False
    if "=" not in gold and not all(is_constant(part.lhs) or is_name(part.lhs) for part in equations):
        return False
    # math-verify compares only the elements, so a set can equal a tuple or an interval, and [1, 0] can equal (1, 0). We
    # treat these as different.
    for one, other in ((ours, theirs), (theirs, ours)):
        if isinstance(one, FiniteSet) and isinstance(other, (Tuple, Interval)):
            return False
    if isinstance(ours, Tuple) and isinstance(theirs, Tuple) and {gold[0], answer[0]} == {"(", "["}:
        return False
    return equal(ours, theirs)


def lock_down() -> None:
    """Patches math-verify, then forbids this process to compile text, start a program or open a connection."""
    grader.sympy_numeric_eq = exact_numeric_eq
    # Some parts of sympy compile source text when they are first imported. These pairs import them before it is forbidden.
    for gold, answer in {
        r"\sin^2 x": r"1-\cos^2 x", "2x=6": "4x=12", r"\{1,2\}": "3", "n!": "n(n-1)!", "x>2": r"(2,\infty)"
    }.items():  # fmt: skip
        algebra_check(gold, answer)

    def refuse(event: str, args: tuple) -> None:
        if event == "compile" and not str(args[1]).endswith(".py"):
            source = args[0] if isinstance(args[0], bytes) else str(args[0]).encode()
            if not source.startswith(b"def monomial_"):  # sympy generates one such function per number of variables
                raise RuntimeError("a verifier worker must not compile text")
        if event in ("os.system", "os.fork", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            raise RuntimeError(f"refused in a verifier worker: {event}")

    sys.addaudithook(refuse)


def main(deadline: float, memory_bytes: int) -> None:
    """Answers questions until the parent closes stdin or dies."""
    # torchrun and the terminal signal the whole process group, but a worker must finish its pair.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    # Replies use a separate descriptor, so that nothing a library prints can be taken for a verdict.
    replies, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    lock_down()
    os.dup2(nowhere, 2)  # From here on errors are reported as verdicts, not on the user's terminal.
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # If the parent dies it cannot kill this worker at the deadline. The alarm, which has no handler, does so.
        signal.alarm(int(deadline) + 2)
        try:
            verdict = bool(algebra_check(*json.loads(line)))
        except MemoryError:
            return  # Too little memory may be left for the next pair, so the parent starts a new worker.
        except Exception:
            verdict = None
        signal.alarm(0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
