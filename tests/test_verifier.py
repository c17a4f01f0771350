r"""The verifier against right answers, wrong answers that look right, and answers written to break it.

tests/data/verifier_cases.jsonl holds one case a line: gold, response, expected, kind, and source where the gold answer is
taken from MATH-500 (MIT licence). The expectations were written from the mathematics, not from what the verifier says;
results/verifier/disagreements.md lists where the two differ.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verifier
from verifier import MAX_CHARS, Verifier, extract_answer, normalise, quick_check

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Every other case, unless TEST_LONG is set: half a minute of two cores instead of a whole one.
CASES = [json.loads(line) for line in (ROOT / "tests/data/verifier_cases.jsonl").read_text().splitlines()]
CASES = CASES if os.environ.get("TEST_LONG") else CASES[::2]


def box(answer: str) -> str:
    return rf"Hence the answer is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def shared():
    with Verifier(
        num_workers=2, deadline=20.0
    ) as v:  # generous: a busy test machine must not time an honest answer out
        yield v


# ---- the corpus


def test_corpus(shared):
    """At least 99 % agreement, no wrong answer accepted, and every disagreement explained in results/."""
    assert len(CASES) >= 300
    verdicts = shared.check([c["response"] for c in CASES], [c["gold"] for c in CASES])
    differing = [(c, v) for c, v in zip(CASES, verdicts, strict=True) if c["expected"] != v.correct]
    assert [(c["gold"], v.extracted) for c, v in differing if v.correct] == [], "false positives"
    assert len(differing) <= 0.01 * len(CASES)
    listed = (ROOT / "results/verifier/disagreements.md").read_text()
    unexplained = [(c["gold"], v.extracted) for c, v in differing if f"`{v.extracted}`" not in listed]
    assert unexplained == []


def test_corpus_is_not_one_sided():
    """A verifier that always says no, or yes, must fail the corpus."""
    share = sum(c["expected"] for c in CASES) / len(CASES)
    assert 0.3 < share < 0.7
    kinds = {c["kind"] for c in CASES}
    assert kinds >= {
        "fraction", "interval", "set", "matrix", "units", "percent", "mixed", "extract", "text", "thousands", "aime", "hedge",
        "trap", "injection", "unicode",
    }  # fmt: skip


# ---- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box at all, 7", None),
        ("", None),
        (r"\boxed{7}", "7"),
        (r"\boxed 7, as shown", "7"),
        (r"\boxed{3} and then \fbox{ 4 }", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{}", ""),
        (r"\boxed{7} \boxed{", None),  # truncated while boxing something else
        (r"\boxed{7", None),
        (r"\boxed{7}}}} {{", "7"),
        (
            r"\boxed{\frac{1}{2} so, properly: \boxed{0.5}",
            "0.5",
        ),  # an early box that never closes does not hide a later one
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),  # of nested boxes, the outer
        (r"put it in \boxed, so \boxed{7}", "7"),
        (r"\boxedx{7}", None),
        ("\\boxed\n{7}", "7"),
        (r"\boxed{a\\{b}}", r"a\\{b}"),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" + "{" * 10**6 + "7" + "}" * 10**6 + "}",
        r"\boxed{" + "{" * 10**6,
        r"\boxed{" * 150_000,
        r"\boxed{" * 70_000 + "}" * 70_000,
        r"\boxed " * 150_000,
        r"\boxed{7}" * 110_000,
        r"\boxed" + " " * 10**6,
        "\\" * 10**6,
        r"\boxed{" + "7" * 10**6 + "}",
    ],
    ids=[
        "braces",
        "open braces",
        "open boxes",
        "nested boxes",
        "bare boxes",
        "many boxes",
        "spaces",
        "backslashes",
        "digits",
    ],
)
def test_extraction_is_linear(text):
    start = time.monotonic()
    extract_answer(text)
    assert time.monotonic() - start < 10.0  # about 1 s; a quadratic scan would take hours


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\{}bofxed 7$", max_size=60))
def test_extract_any_text(text):
    answer = extract_answer(text)
    assert answer is None or answer in text
    assert (
        extract_answer(text + r" \boxed{42}") in ("42", *([answer] if answer else []))
        or "\\boxed" in text
        or "\\fbox" in text
    )


# ---- the fast path


@settings(max_examples=300, deadline=None)
@given(
    st.integers(-(10**12), 10**12),
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{}.0", "{:,}", r"\text{{{}}}", "${}$", "{}."]),
)
def test_integers_are_decided_exactly(gold, other, style):
    assert quick_check(str(gold), normalise(style.format(gold))) is True
    assert quick_check(str(gold), normalise(style.format(other))) is (gold == other)


@settings(max_examples=300, deadline=None)
@given(st.decimals(-1000, 1000, places=3), st.decimals(-1000, 1000, places=3))
def test_decimals_are_decided_exactly(gold, other):
    assert quick_check(str(gold), str(other)) is (Fraction(gold) == Fraction(other))


def test_no_number_is_too_long():
    """Python's int() raises above 4,300 digits; the fast path compares digits as text."""
    assert quick_check("7" * 900, "0" * 50 + "7" * 900) is True
    assert quick_check("7" * 5000, "0" + "7" * 5000) is True
    assert quick_check("7" * 5000, "7" * 4999) is False


@pytest.mark.parametrize("digits", ["٣", "３", "७", "𝟹", "3٣"])
def test_other_digits_are_wrong(digits):
    """int() reads them as 3, and no gold answer is written so: a guess in them is not a formatting habit worth a reward."""
    assert quick_check("3", digits) is False
    assert quick_check("33", digits) is False


def test_plain_answers_start_no_worker():
    with Verifier(num_workers=2) as v:
        responses = [
            box("073"),
            box(r"336^\circ"),
            box("1,000"),
            box("70.0"),
            box("8"),
            box(r"\text{east}"),
            "no box",
            box("9" * 10**6),
        ]
        verdicts = v.check(responses, ["73", "336", "1000", "70", "7", r"\text{west}", "7", "9"])
        assert [x.correct for x in verdicts] == [True] * 4 + [False] * 4
        assert [x.how for x in verdicts] == ["fast"] * 6 + ["no_answer", "too_long"]
        assert len(verdicts[-1].extracted) == MAX_CHARS
        assert all(worker.process is None for worker in v._workers)


# ---- the parts that replace math-verify's own


def test_unequal_factorials(shared):
    """math-verify alone accepts the first: both sides are 0.0 to 15 decimal places."""
    pairs = [
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
        ("2006!+1", "2006!"),
        (r"\frac{\pi}{2004!+1}", r"\frac{\pi}{2004!}"),
    ]
    assert [v.correct for v in shared.check([box(a) for a, _ in pairs], [g for _, g in pairs])] == [False] * 3
    assert shared.check([box(r"2006\cdot 2005!")], ["2006!"])[0] == (True, r"2006\cdot 2005!", "math_verify")


@settings(max_examples=25, deadline=None)
@given(st.fractions(-50, 50, max_denominator=40), st.fractions(-50, 50, max_denominator=40))
def test_fractions(shared, gold, other):
    def latex(x: Fraction) -> str:
        return rf"\frac{{{3 * x.numerator}}}{{{3 * x.denominator}}}"

    answers = [latex(gold), f"{gold.numerator}/{gold.denominator}", latex(other)]
    verdicts = shared.check([box(a) for a in answers], [rf"\frac{{{gold.numerator}}}{{{gold.denominator}}}"] * 3)
    assert [v.correct for v in verdicts] == [True, True, gold == other]


def test_juxtaposition(shared):
    """math-verify alone reads 3(5) as 8."""
    verdicts = shared.check([box("3(5)"), box("3(5)"), box(r"3\frac12"), box(r"3(\frac12)")], ["15", "8", "7/2", "7/2"])
    assert [v.correct for v in verdicts] == [True, False, True, False]


# ---- hostile answers

CANARY = "verifier_canary_was_here"
HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "factorials": "((((9!)!)!)!)",
    "memory": r"\operatorname{zeros}(100000,100000)",
    "million factorial": "1000000!",
    "large power": "3^{10^8}",
    "tiny": "10^{-10^{10}}",
    "exponent": "1E999999999",
    "parentheses": "(" * 300 + "1" + ")" * 300,
    "square roots": r"\sqrt{" * 140 + "2" + "}" * 140,
    "million braces": "{" * 10**6 + "1" + "}" * 10**6,
    "megabyte of digits": "7" * 10**6,
    "900 digits": r"\frac{" + "7" * 450 + "}{" + "3" * 450 + "}",
    "null bytes": "7\0+\0",
    "surrogate": "\ud800+1",
    "newlines": '7\n["7","7"]\ntrue\n',
    "unions": r"\cup".join(["(0,1)"] * 60),
    "import": f"__import__('os').system('touch {CANARY}')",
    "import in text": rf"\text{{__import__('os').system('touch {CANARY}')}}",
    "open": f"open('{CANARY}','w')",
    "operator": rf"\operatorname{{open}}('{CANARY}','w')",
    "subscript": f"x_{{open('{CANARY}','w')}}",
    "function": f"f(open('{CANARY}','w'))",
    "variable": rf"\variable{{open('{CANARY}','w')}}",
    "shell": rf"\write18{{touch {CANARY}}}",
}


def test_hostile_answers(tmp_path, monkeypatch):
    """Each is graded wrong, the honest answers among them are graded right, and no time or memory is lost for good."""
    monkeypatch.chdir(tmp_path)
    with Verifier(num_workers=2, deadline=1.5, memory_bytes=1 << 30) as v:
        honest = v.check([box(f"x+{i}") for i in range(2)], [f"{i}+x" for i in range(2)])
        assert all(x.correct for x in honest)
        limits = (ROOT / f"/proc/{v._workers[0].process.pid}/limits").read_text()
        assert str(1 << 30) in re.search(r"Max address space.*", limits)[0]
        start = time.monotonic()
        answers = [*HOSTILE.values(), r"2\pi/6", r"\pi-\frac{2\pi}{3}"]
        *verdicts, last, least = v.check([box(a) for a in answers], [r"\frac{\pi}{3}"] * len(answers))
        seconds = time.monotonic() - start
        for name, verdict in zip(HOSTILE, verdicts, strict=True):
            assert not verdict.correct, name
            assert verdict.extracted is None or len(verdict.extracted) <= MAX_CHARS
        assert last.correct and least.correct
        assert {x.how for x in verdicts} <= {"fast", "math_verify", "timeout", "too_long", "error"}
        assert "timeout" in {x.how for x in verdicts}, "nothing reached the deadline"
        assert seconds < 60
        assert v.check([box(r"2\pi/6")], [r"\frac{\pi}{3}"])[0].correct
    assert not (tmp_path / CANARY).exists()


def test_a_time_out_is_remembered():
    with Verifier(num_workers=1, deadline=0.5) as v:
        first = v.check([box("9^{9^{9^9}}")] * 8, ["7"] * 8)
        start = time.monotonic()
        assert v.check([box("9^{9^{9^9}}")], ["7"]) == first[:1]
        assert {x.how for x in first} == {"timeout"}
        assert time.monotonic() - start < 0.2


def test_workers_compile_no_text():
    """sympy's sympify and parse_expr evaluate text; a worker that is ready cannot."""
    program = (
        "import verifier, sympy\n"
        "assert sympy.sympify('1+1') == 2\n"
        "verifier._lock_down()\n"
        "for attack in (lambda: sympy.sympify('1+1'), lambda: eval('1+1'), lambda: __import__('os').system('true'),\n"
        "               lambda: __import__('subprocess').run(['true'])):\n"
        "    try: attack()\n"
        "    except Exception as e: print(e)\n"
        "print(verifier._algebra_check('(x+1)^2', 'x^2+2x+1'))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert out == ["a verifier worker compiles no text"] * 2 + [
        f"refused in a verifier worker: {e}" for e in ("os.system", "subprocess.Popen")
    ] + ["True"]


# ---- processes


def alive(pid: int) -> bool:
    try:
        return not re.search(r"^State:\s+Z", pathlib.Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_killed_worker_is_replaced():
    """Also while it works: the answer it held is asked again."""
    with Verifier(num_workers=2, deadline=20.0) as v:
        assert all(x.correct for x in v.check([box("x+1"), box("x+2")], ["1+x", "2+x"]))
        pids = [w.process.pid for w in v._workers]
        os.kill(pids[0], signal.SIGKILL)
        killer = threading.Timer(0.1, os.kill, (pids[1], signal.SIGKILL))
        killer.start()
        verdicts = v.check([box(f"(x+{i})^2") for i in range(30)], [f"x^2+{2 * i}x+{i * i}" for i in range(30)])
        killer.join()
        assert [x.correct for x in verdicts] == [True] * 30
        assert not any(map(alive, pids))
        pids = [w.process.pid for w in v._workers if w.process]
    assert wait_until_gone(pids, 5)


@pytest.mark.parametrize("answer", ["x+1", "9^{9^{9^9}}"], ids=["idle", "busy"])
def test_workers_die_with_a_killed_parent(answer):
    """An idle worker sees its stdin close; a busy one has an alarm pending, 2 s after the deadline."""
    program = (
        "import threading, time, verifier\n"
        "v = verifier.Verifier(num_workers=1, deadline=2.0)\n"
        "v.check([r'\\boxed{x+1}'], ['1+x'])\n"
        "print(v._workers[0].process.pid, flush=True)\n"
        f"v.check([r'\\boxed{{{answer}}}'], ['1+x'])\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    assert alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone([worker], 10)


def test_no_worker_outlives_a_verifier():
    """Nor one that is neither closed nor in a with statement, at interpreter exit."""
    program = "import verifier; v = verifier.Verifier(1); v.check([r'\\boxed{x+1}'], ['1+x']); print(v._workers[0].process.pid)"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert wait_until_gone([int(out.stdout)], 5)


def test_workers_that_cannot_start_are_an_error(monkeypatch, tmp_path):
    """A missing math-verify must stop the run: graded as wrong answers, it would look like a weak model."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named math_verify' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(verifier.sys, "executable", str(broken))
    with Verifier(num_workers=2) as v, pytest.raises(RuntimeError, match="did not start: No module named math_verify"):
        v.check([box("x+1")] * 2, ["1+x", "x+2"])


def test_imports_stay_small():
    program = "import sys, verifier; print(sorted({'torch', 'transformers', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- the interface


def test_order_and_duplicates(shared):
    """Verdicts come in the order of the responses, whichever worker finishes first."""
    answers = [rf"\frac{{{i % 5}}}{{3}}" for i in range(40)]
    verdicts = shared.check([box(a) for a in answers], [r"\frac{6}{9}"] * 40)
    assert [v.correct for v in verdicts] == [i % 5 == 2 for i in range(40)]
    assert [v.extracted for v in verdicts] == answers


def test_many_threads(shared):
    results = {}

    def grade(i: int) -> None:
        results[i] = [v.correct for v in shared.check([box(f"x+{j}") for j in range(5)], [f"{i}+x"] * 5)]

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [i == j for j in range(5)] for i in range(5)}


@pytest.mark.parametrize(("responses", "golds"), [(["a"], []), (["a"], [" "]), (["a"], ["7" * 2000])])
def test_bad_calls(responses, golds):
    with Verifier() as v, pytest.raises(ValueError):
        v.check(responses, golds)


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"deadline": 0.0}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        Verifier(**arguments)


def test_command_line():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "verifier.py", *arguments], cwd=ROOT, capture_output=True, text=True)

    assert run(r"\frac12", r"so \boxed{0.5}").stdout == "Verdict(correct=True, extracted='0.5', how='math_verify')\n"
    assert run("7").returncode != 0


def test_short_soak():
    """2,000 gradings: the same processes and descriptors at the end as after the first. The long one is in results/."""
    with Verifier(num_workers=2, deadline=20.0) as v:
        v.check([box("x+1"), box("x+2")], ["1+x", "2+x"])
        pids, descriptors = [w.process.pid for w in v._workers], len(os.listdir("/proc/self/fd"))
        for start in range(0, 2000, 250):
            values = range(start, start + 250)
            answers = [rf"\frac{{{i}}}{{7}}" if i % 50 == 0 else str(i) for i in values]
            golds = [rf"\frac{{{2 * i}}}{{14}}" if i % 50 == 0 else f"0{i}" for i in values]
            assert all(x.correct for x in v.check([box(a) for a in answers], golds))
        assert [w.process.pid for w in v._workers] == pids
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert wait_until_gone(pids, 5)
