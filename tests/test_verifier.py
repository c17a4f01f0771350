r"""The verifier against right answers, wrong answers that look right, and answers written to break it.

tests/data/verifier_cases.jsonl holds one case a line: gold, response, expected, kind, and source where the gold answer
is taken from MATH-500 (MIT licence). Expectations come from the mathematics, not from the verifier.
results/verifier/disagreements.md lists where the two differ.
"""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.verifier import MAX_CHARS, Verifier, _Worker, extract_answer, normalise, quick_check

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = [json.loads(line) for line in (ROOT / "tests/data/verifier_cases.jsonl").read_text().splitlines()]


def box(answer: str) -> str:
    return rf"Hence the answer is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def shared():
    # With this generous deadline no honest answer is timed out, however busy the machine is.
    with Verifier(num_workers=2, deadline=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize("cases", [CASES[::5], pytest.param(CASES, marks=pytest.mark.rest)], ids=["sample", "all"])
def test_corpus(shared, cases):
    """At least 99 % agreement, no wrong answer accepted, and every disagreement explained in results/."""
    assert 0.3 < sum(case["expected"] for case in cases) / len(cases) < 0.7  # A constant verdict must fail.
    verdicts = shared.check([case["response"] for case in cases], [case["gold"] for case in cases])
    differing = [(c["gold"], verdict) for c, verdict in zip(cases, verdicts) if c["expected"] != verdict.correct]
    assert [pair for pair in differing if pair[1].correct] == [], "wrong answers accepted"
    assert len(differing) <= 0.01 * len(cases)
    listed = (ROOT / "results/verifier/disagreements.md").read_text()
    assert [pair for pair in differing if f"`{pair[1].extracted}`" not in listed] == []


def test_extract():
    for text, answer in {
        "no box at all, 7": None, r"\boxed 7, as shown": "7", r"\boxed{3} and then \fbox{ 4 }": "4", r"\boxed{}": "",
        r"\boxed{\{1,2\}}": r"\{1,2\}", r"\boxed{\left\{x\right.}": r"\left\{x\right.", r"\boxed{a\\{b}}": r"a\\{b}",
        r"\boxed{7} \boxed{": None, r"\boxed{7}}}} {{": "7", r"\boxed{1 + \boxed{2}}": r"1 + \boxed{2}",
        r"\boxed{\frac{1}{2} so, properly: \boxed{0.5}": "0.5",  # An early box that never closes hides no later one.
        r"put it in \boxed, so \boxed{7}": "7", r"\boxedx{7}": None, r"\\boxed{7}": "7", "\\boxed\n{7}": "7",
    }.items():  # fmt: skip
        assert extract_answer(text) == answer, text


def test_extraction_is_linear():
    million, start = 10**6, time.monotonic()
    for text in (
        r"\boxed{" + "{" * million + "7" + "}" * million, r"\boxed{" * 100_000 + "}" * 50_000, r"\boxed " * 100_000,
        r"\boxed{7}" * 100_000, r"\boxed" + " " * million, "\\" * million, r"\boxed{" + "7" * million + "}",
    ):  # fmt: skip
        extract_answer(text)
    assert time.monotonic() - start < 60  # It takes a few seconds, while a quadratic scan would take hours.


numbers = st.integers(-(10**12), 10**12)
STYLES = ["{}", "{}.0", "{:,}", r"\text{{{}}}", "${}$", r"\boxed{{{}}}.", "{}."]


@settings(max_examples=200, deadline=None)
@given(numbers, numbers, st.sampled_from(STYLES))
def test_integers_are_decided_exactly(gold, other, style):
    assert quick_check(str(gold), normalise(style.format(gold))) is True
    assert quick_check(str(gold), normalise(style.format(other))) is (gold == other)


@settings(max_examples=200, deadline=None)
@given(st.decimals(-1000, 1000, places=3), st.decimals(-1000, 1000, places=3))
def test_decimals_are_decided_exactly(gold, other):
    assert quick_check(str(gold), str(other)) is (Fraction(gold) == Fraction(other))


def test_digits_are_compared_as_text():
    """int() refuses more than 4,300 digits and reads digits of other scripts, in which no gold answer is written."""
    assert quick_check("7" * 5000, "0" + "7" * 5000) is True
    assert quick_check("7" * 5000, "7" * 4999) is False
    assert [quick_check("3", digit) for digit in ("٣", "３", "𝟹")] == [False] * 3


def test_plain_answers_start_no_worker():
    with Verifier(num_workers=2) as verifier:
        boxed = ["073", r"336^\circ", "1,000", "70.0", "8", "seat", "9" * 10**6]
        golds = ["73", "336", "1000", "70", "7", r"\text{east}", "9", "7"]
        verdicts = verifier.check([*map(box, boxed), "no box"], golds)
        assert [verdict.correct for verdict in verdicts] == [True] * 4 + [False] * 4
        assert [verdict.how for verdict in verdicts] == ["fast"] * 6 + ["too_long", "no_answer"]
        assert len(verdicts[-2].extracted) == MAX_CHARS
        assert all(worker.process is None for worker in verifier._workers)


def test_order(shared, monkeypatch):
    """Verdicts come in the order of the responses, whichever worker finishes first, and equal pairs are asked once."""
    asked, ask = [], _Worker.ask
    monkeypatch.setattr(_Worker, "ask", lambda worker, *pair: asked.append(pair) or ask(worker, *pair))
    answers = [rf"\frac{{{i % 5}}}{{3}}" for i in range(40)]
    verdicts = shared.check([box(answer) for answer in answers], [r"\frac{6}{9}"] * 40)
    assert [verdict.correct for verdict in verdicts] == [i % 5 == 2 for i in range(40)] and len(asked) == 5
    assert [verdict.extracted for verdict in verdicts] == answers


CANARY = "verifier_canary_was_here"
SLOW = ["((((9!)!)!)!)", "1E999999999", r"\cup".join(["(0,1)"] * 60), "(" * 300 + "1" + ")" * 300]  # time-outs, too
HOSTILE = [
    # what takes too long, or too much memory
    "9^{9^{9^9}}", "1000000!", "3^{10^8}", "10^{-10^{10}}", r"\operatorname{zeros}(100000,100000)",
    r"\frac{" + "7" * 450 + "}{" + "3" * 450 + "}", r"\sqrt{" * 140 + "2" + "}" * 140, "{" * 10**6 + "1" + "}" * 10**6,
    # what could break the pipe to a worker
    "7\0+\0", "\ud800+1", '7\n["7","7"]\ntrue\n',
    # what runs if it is evaluated
    f"__import__('os').system('touch {CANARY}')", rf"\text{{__import__('os').system('touch {CANARY}')}}",
    f"open('{CANARY}','w')", rf"\operatorname{{open}}('{CANARY}','w')", f"x_{{open('{CANARY}','w')}}",
    f"f(open('{CANARY}','w'))", rf"\variable{{open('{CANARY}','w')}}", rf"\write18{{touch {CANARY}}}",
]  # fmt: skip


@pytest.mark.parametrize("hostile", [HOSTILE, pytest.param(SLOW, marks=pytest.mark.rest)], ids=["most", "slow"])
def test_hostile_answers(hostile, tmp_path, monkeypatch):
    """Each is graded wrong, the honest answers among them right, in bounded time and memory, and none runs as code."""
    monkeypatch.chdir(tmp_path)  # Users may start a stage from any directory.
    descriptors = len(os.listdir("/proc/self/fd"))
    with Verifier(num_workers=2, deadline=1.5, memory_bytes=1 << 30) as verifier:
        honest = verifier.check([box(f"x+{i}") for i in range(2)], [f"{i}+x" for i in range(2)])
        assert all(verdict.correct for verdict in honest)
        for worker in filter(lambda worker: worker.process, verifier._workers):  # one may have answered both
            limits = pathlib.Path(f"/proc/{worker.process.pid}/limits").read_text()
            assert str(1 << 30) in re.search(r"Max address space.*", limits)[0]
        start = time.monotonic()
        answers = [*hostile, r"2\pi/6", r"\pi-\frac{2\pi}{3}"]
        *verdicts, last, least = verifier.check([box(answer) for answer in answers], [r"\frac{\pi}{3}"] * len(answers))
        assert time.monotonic() - start < 60
        pids = [worker.process.pid for worker in verifier._workers if worker.process]
    assert wait_until_gone(pids, 5) and len(os.listdir("/proc/self/fd")) == descriptors
    assert not any(verdict.correct or len(verdict.extracted) > MAX_CHARS for verdict in verdicts), verdicts
    assert last.correct and least.correct
    assert "timeout" in {verdict.how for verdict in verdicts}, "nothing reached the deadline"
    # This process runs in the first of these directories, the workers run in the second.
    assert not (tmp_path / CANARY).exists() and not (ROOT / CANARY).exists()


def test_workers_compile_no_text_and_import_no_torch():
    """sympy's sympify and parse_expr evaluate text, but not in a worker that is ready."""
    program = """
import os, subprocess, sys, sympy
from lib import verifier_worker
assert not {"torch", "transformers", "numpy"} & set(sys.modules)  # A worker that imports torch starts slowly.
assert sympy.sympify("1+1") == 2
verifier_worker.lock_down()
for attack in (
    lambda: sympy.sympify("1+1"), lambda: eval("1+1"), lambda: os.system("true"), lambda: subprocess.run(["true"])
):
    try:
        attack()
    except Exception as error:
        print(error)
print(verifier_worker.algebra_check("(x+1)^2", "x^2+2x+1"))
"""
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=-1, text=True, check=True).stdout
    refused = [f"refused in a verifier worker: {call}" for call in ("os.system", "subprocess.Popen")]
    assert printed.splitlines() == ["a verifier worker must not compile text"] * 2 + refused + ["True"]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.rest
def test_a_killed_worker_is_replaced():
    """Whether it is idle or at work when it is killed: the answer it held is asked again."""
    with Verifier(num_workers=2, deadline=20.0) as verifier:
        assert all(verdict.correct for verdict in verifier.check([box("x+1"), box("x+2")], ["1+x", "2+x"]))
        pids = [worker.process.pid for worker in verifier._workers]
        os.kill(pids[0], signal.SIGKILL)
        killer = threading.Timer(0.1, os.kill, (pids[1], signal.SIGKILL))
        killer.start()
        verdicts = verifier.check([box(f"(x+{i})^2") for i in range(30)], [f"x^2+{2 * i}x+{i * i}" for i in range(30)])
        killer.join()
        assert [verdict.correct for verdict in verdicts] == [True] * 30
        assert not any(map(alive, pids))


def test_a_worker_without_memory_is_replaced():
    with Verifier(num_workers=1, deadline=20.0) as verifier:
        assert verifier.check([box("x+1")], ["1+x"])[0].correct
        pid = verifier._workers[0].process.pid
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        used_bytes = 1024 * int(re.search(r"VmSize:\s*(\d+) kB", status)[1])
        resource.prlimit(pid, resource.RLIMIT_AS, (used_bytes, used_bytes))
        verdict = verifier.check([box(r"\operatorname{ones}(300,300)")], ["7"])[0]
        assert (verdict.correct, verdict.how) == (False, "math_verify")
        assert verifier._workers[0].process.pid != pid


PROGRAM = r"""
import signal, sys, time
from lib.verifier import Verifier
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job would ignore it.
with Verifier(num_workers=2, deadline=3.0) as verifier:
    verifier.check([r"\boxed{x+1}", r"\boxed{x+2}"], ["1+x", "2+x"])
    print(*(worker.process.pid for worker in verifier._workers), flush=True)
    verifier.check(sys.argv[1:], ["7"] * len(sys.argv[1:]))
    time.sleep(100)
"""


@contextmanager
def grading(answers: list[str]):
    """A process that grades these answers, with its workers' pids, in a process group like that of a terminal's command."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    words = [sys.executable, "-c", PROGRAM, *map(box, answers)]
    with subprocess.Popen(words, cwd=ROOT, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.5)
        assert len(pids) == 2 and all(map(alive, pids))
        yield parent, pids


@pytest.mark.rest
@pytest.mark.parametrize("answers", [[], ["9^{9^{9^9}}"] * 2], ids=["idle", "busy"])
def test_workers_die_with_a_killed_parent(answers):
    with grading(answers) as (parent, pids):
        parent.kill()
    assert wait_until_gone(pids, 10)


@pytest.mark.rest
def test_ctrl_c():
    """Pairs that nobody has begun are dropped, so the program ends by the deadline of those under way."""
    with grading([rf"\operatorname{{ones}}(3000,{number})" for number in range(2000, 2060)]) as (parent, pids):
        os.killpg(parent.pid, signal.SIGINT)
        time.sleep(0.7)
        assert all(map(alive, pids)), "workers that end by themselves would be replaced and their pairs asked again"
        assert parent.communicate(timeout=20)[1].rstrip().endswith("KeyboardInterrupt")
    assert not any(map(alive, pids))


def test_workers_that_cannot_start_are_an_error_and_an_answer_whose_workers_die_is_wrong(monkeypatch, tmp_path, capfd):
    """A missing math-verify must stop the run. If its answers were graded as wrong, it would look like a weak model."""
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))

    def verifier(script):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return Verifier(num_workers=2)

    with (
        verifier("echo 'No module named math_verify' >&2") as broken,
        pytest.raises(RuntimeError, match="did not start"),
    ):
        broken.check([box("x+1")], ["1+x"])
    assert "No module named math_verify" in capfd.readouterr().err
    with verifier("echo ready; read question") as dying:
        verdicts = dying.check([box("x+1"), box("x+2")], ["1+x", "2+x"])
    assert verdicts == [(False, "x+1", "error"), (False, "x+2", "error")]


@pytest.mark.parametrize(("responses", "golds"), [(["a"], []), (["a"], [" "]), (["a"], ["7" * (MAX_CHARS + 1)])])
def test_bad_calls(responses, golds):
    with Verifier() as verifier, pytest.raises(ValueError):
        verifier.check(responses, golds)
