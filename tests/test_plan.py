"""The Makefile as a newcomer meets it: its plans with every check that the stages make, a launcher that fails, and .venv."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from common import InputError
from tests.tools.rehearsal import rehearse, write_models

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def run(*command: str, cwd=ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "MAKEFLAGS": "", **environment}  # those of `make -s test` would silence the commands
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=env)


def plan(target: str, cwd=ROOT, **variables) -> str:
    """What `make -n` prints where nothing has been made, without the installation."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    done = run("make", "-n", "-o", ".venv/installed", target, *settings, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models()


@pytest.mark.parametrize(
    "target, variables, count",  # count: of the stages and evaluations in the plan
    [
        ("tables", {}, 31),
        ("tables", {"PAIR": "qwen3-14b", "SEED": 1}, 31),
        ("tables", {"PAIR": "llama", "FIRST_NODE": "node1"}, 7),
        ("R7", {"NODES": 2, "FIRST_NODE": "node1"}, 4),
        ("R8", {"GPUS": 1}, 3),
    ],
)
def test_every_command_of_a_plan_would_be_accepted(target, variables, count, place):
    assert rehearse(plan(target, SCALE="paper", **variables)) == count
    assert [path.name for path in Path("runs").glob("*/*")] == [f"seed{variables.get('SEED', 0)}"]


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (".* teacher_grpo.py .*\n", "", "--teacher '.*/1H/rl/teacher' is not a checkpoint directory"),
        ("--half 2H", "--half 1H", "--half 1H: .* already trained on 10 of the 10 problems"),
        ("--seed 0", "--seed 0 --tensor-parallel 3", "--tensor-parallel 3 must divide .* processes .8."),
        ("--seed 0", "--seed 0 --max-response-tokens 41000", "'Qwen/Qwen3-8B' has 40960 positions"),
    ],
)
def test_the_rehearsal_finds_what_would_be_refused(old, new, sentence, place):
    """Otherwise the tests above would pass whatever the Makefile says."""
    with pytest.raises(InputError, match=sentence):
        rehearse(re.sub(old, new, plan("R5-half", SCALE="paper")))


LAUNCHER = """
echo "$@" >> commands
case "$*" in *"$FAIL"*) status=1;; *) status=0;; esac
out=$(echo "$*" | sed 's/.*--out \\([^ ]*\\).*/\\1/')
mkdir -p $out && touch $out/run.json
exit $status
"""


def test_a_finished_checkpoint_outlives_a_stage_that_fails_in_its_last_moment(tmp_path):
    """Make would otherwise delete its run.json, and with it what the checkpoint was trained on."""
    (tmp_path / "launcher").write_text(LAUNCHER)
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/installed", "R7", "SCALE=paper", "RUN=sh launcher"]
    everything = ["teacher", "warmup", "bridge", "bridge-replay"]
    for number, failing in enumerate(everything, 1):
        done = run(*command, cwd=tmp_path, FAIL=f"--out runs/qwen3-8b/seed0/1H/rl/{failing} ")
        assert done.returncode != 0 and len(list(tmp_path.rglob("run.json"))) == number
    assert run(*command, "-q", cwd=tmp_path).returncode == 0
    outs = re.findall(r"--out \S+/(\S+)", (tmp_path / "commands").read_text())
    assert outs == everything  # each of them once


def test_two_nodes_need_a_place_to_meet():
    done = run("make", "-n", "tables", "SCALE=paper", "PAIR=llama")
    assert done.returncode != 0 and "give FIRST_NODE, the host name of the first node" in done.stderr


PYTHON = """
[ "$2" = venv ] || exec {python} "$@"
for directory; do :; done
[ "$3" = --clear ] && rm -r $directory
mkdir -p $directory/bin
ln -sf {python} $directory/bin/python
ln -sf {true} $directory/bin/pip
"""  # makes an environment in no time, with a pip that does nothing


def test_a_broken_environment_is_replaced(tmp_path):
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable, true=shutil.which("true")))
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-cpu.txt"):
        (tmp_path / name).touch()
    venv = tmp_path / ".venv"

    def make(python: str = "sh python") -> subprocess.CompletedProcess:
        return run("make", "setup", f"PYTHON={python}", cwd=tmp_path)

    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 1)\n")
    old = make(f"env PYTHONPATH={tmp_path} {sys.executable}")
    assert old.returncode != 0 and "is Python 3.9, and 3.11 or newer is needed; name one" in old.stderr
    assert not venv.exists()

    assert make().returncode == 0 and "Nothing to be done" in make().stdout
    damages = (
        lambda: (venv / "installed").unlink(),  # as after an interruption
        lambda: (venv / "bin/python").unlink(),
        lambda: (venv / "installed").write_text("other.txt\n"),
    )
    for damage in damages:
        (venv / "marker").touch()
        damage()
        done = make()
        assert done.returncode == 0 and not (venv / "marker").exists(), done.stderr
        assert re.fullmatch("requirements(-cpu)?.txt\n", (venv / "installed").read_text())
