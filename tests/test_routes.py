"""The paper's routes: what the Makefile would run, and what two checkpoints differ in."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import test_plan
from helpers import CHAIN_GRPO, ROOT, assert_same_weights, grpo

import evaluate
import lib.lineage
import student_grpo
from experiments import audit, real, tables

SCRIPTS = "teacher_grpo|fkl_warmup|opd|student_grpo|evaluate|experiments.toy|experiments.real|experiments.tables|experiments.audit"


def plan(target: str, **variables) -> list[tuple[str, dict[str, str]]]:
    """The commands that make would run from nothing, as (script, {option: words})."""
    commands = []
    for line in test_plan.plan(target, **{"RUNS": "runs/none", "REAL": "runs/none", **variables}).splitlines():
        if found := re.search(rf"\b({SCRIPTS})(?:\.py)? (--.*)", line):
            options = dict(re.findall(r"--([\w-]+)((?: (?!--)\S+)*)", found[2]))
            commands.append((found[1], {name: value.strip() for name, value in options.items()}))
    return commands


def stages(commands: list) -> list:
    return [(script, options) for script, options in commands if not script.startswith("experiments")]


def written(commands: list) -> list[str]:
    return [options["out"] for script, options in stages(commands) if script != "evaluate"]


PLANS = {
    "R1": ["teacher_grpo"],
    "R2": ["teacher_grpo", "fkl_warmup", "fkl_warmup", "student_grpo"],  # the warmup is there for its rollouts
    "R3-full": ["teacher_grpo", "fkl_warmup", "opd"],
    "R5-half": ["teacher_grpo", "fkl_warmup", "opd", "student_grpo"],
    "R6": ["fkl_warmup", "fkl_warmup", "opd", "student_grpo"],
    "R7": ["teacher_grpo", "fkl_warmup", "opd", "student_grpo"],
    "R8": ["teacher_grpo", "opd", "student_grpo"],
}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("scale", ["toy", "real", "paper"])
@pytest.mark.parametrize("route", PLANS)
def test_a_route_is_the_papers_chain_of_stages(route, scale):
    commands = stages(plan(route, SCALE=scale))
    assert [script for script, _ in commands] == PLANS[route]
    halves = [options["half"] for _, options in commands]
    assert set(halves[:-1]) <= {"full"} if route in ("R1", "R3-full") else set(halves[:-1]) == {"1H"}
    assert halves[-1] == {"R1": "full", "R3-full": "full", "R7": "1H"}.get(route, "2H")
    assert ("replay" in commands[-1][1]) == (route == "R7")
    # Each stage trains what the one before it wrote, or learns from it.
    for path in written(commands)[:-1] if route != "R2" else ():
        assert any(path in options.values() for _, options in commands[1:])


def test_all_tables_need_each_checkpoint_once():
    paper = written(plan("tables", SCALE="paper"))
    assert len(paper) == len(set(paper)) == 30
    llama = written(plan("tables", SCALE="paper", PAIR="llama", FIRST_NODE="n1"))
    assert len(llama) == 6 and all(path.startswith("runs/llama/seed0/full/") for path in llama)
    rows = set().union(*tables.TABLES.values()) - {"student", "teacher"}
    made = {path.removeprefix("runs/qwen3-8b/seed0/") for path in paper}
    assert rows - made == {"full/rl/bridge_sampled", "full/rl/opd_only_sampled", "full/direct_long"}  # of the toy only
    toy = {options["out"].removeprefix("runs/none/seed0/") for _, options in plan("tables", SCALE="toy")}
    assert rows <= toy


def test_the_pretrained_model_is_asked_in_the_same_words_everywhere():
    """In all stages and evaluations, and where its student is made."""
    (first, made), *commands = plan("tables", SCALE="real")
    assert first == "experiments.real" and made["student"] == real.Config.student
    rows = written(commands)
    assert len(rows) == len(set(rows)) == 8 and all("/1H/" in path for path in rows)  # on the same labels
    words = shlex.split(shlex.join(real.WORDING).replace(str(real.PROMPT), "experiments/real_prompt.txt"))
    wording = {name.removeprefix("--"): value for name, value in zip(words, words[1:]) if name.startswith("--")}
    wording["no-chat-template"] = ""
    for _, options in stages(commands):
        assert {name: " ".join(shlex.split(options[name])) for name in wording} == wording


@pytest.mark.parametrize("scale, budget", [("toy", "max-steps"), ("real", "max-steps"), ("paper", "epochs")])
def test_matched_routes_differ_in_what_they_contrast_alone(scale, budget):
    def options(route: str, script: str) -> dict[str, str]:
        [found] = [options for name, options in plan(route, SCALE=scale) if name == script]
        return found

    def differing(first: dict, second: dict) -> set[str]:
        watching = {"validate", "validate-k", "validate-every", "export-every"}  # they leave the weights alone
        return {name for name in (first.keys() | second.keys()) - watching if first.get(name) != second.get(name)}

    fresh, replay = options("R5-half", "student_grpo"), options("R7", "student_grpo")
    assert differing(fresh, replay) == {"half", "replay", "out"}
    # Direct GRPO has the settings of Stages 1 and 3; only model, labels and budget are its own.
    assert differing(fresh, options("R1", "teacher_grpo")) <= {"model", "half", "out", budget}
    stage_1 = options("R5-half", "teacher_grpo")
    assert differing(options("R1", "teacher_grpo"), stage_1) <= {"model", "half", "out", budget}
    # What stands in for the bridge makes as many updates of the student, with the same settings.
    bridge, only = options("R5-half", "opd"), options("R8", "opd")
    assert differing(bridge, only) == {"model", "out", budget}
    assert int(only[budget]) == int(bridge[budget]) + int(options("R5-half", "fkl_warmup")[budget])
    # Half of the labels or all of them, the bridge is the same.
    assert differing(options("R3-full", "opd"), bridge) == {"model", "teacher", "half", "out"}


def test_fresh_labels_and_replay_are_compared(chain, problems, tmp_path, capsys):
    replayed = tmp_path / "replay"
    settings = dict(half="1H", replay=True, **CHAIN_GRPO)
    student_grpo.main(grpo(str(chain / "bridge"), problems, replayed, student_grpo.Config, **settings))
    capsys.readouterr()
    first, second = (lib.lineage.read_lineage(str(path)) for path in (chain / "student", replayed))
    assert audit.differences(first, second).keys() == {"half", "replay", "labels"}
    assert audit.differences(first, first) == {}
    audit.main(audit.Config(compare=(str(chain / "student"), str(replayed))))
    assert "| half | 2H | 1H |" in capsys.readouterr().out
    other = audit.differences(first, lib.lineage.read_lineage(str(chain / "bridge")))
    assert {"stage", "model weights", "teacher weights", "teacher", "rollouts_per_prompt"} <= other.keys()


def test_the_lineage_is_printed_as_a_tree(chain, test_problems, tmp_path, capsys):
    report, models = str(tmp_path / "report"), (str(chain / "bridge"), str(chain / "student"))
    evaluate.main(evaluate.Config(out=report, models=models, data=(test_problems,), k=2, max_response_tokens=8))
    capsys.readouterr()
    audit.main(audit.Config(lineage=models[1], reports=(report,)))
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[^ ]*/|  .*", "", line.lstrip("├└─│ ")) for line in lines] == [
        "student", "model: bridge", "model: warmup", "model: student", "teacher: teacher", "model: teacher",
        "teacher: teacher", "model: teacher",
    ]  # fmt: skip
    assert "[student_grpo, 2H, 6 labels, 2 steps, reward" in lines[0] and " %" in lines[0] and " %" in lines[1]
    assert "[opd, 1H, 6 labels" in lines[1] and lines[1].startswith("└─ model: ")
    assert lines[2].startswith("   ├─ model: ") and lines[3].startswith("   │  ├─ model: ")


@pytest.mark.rest
def test_a_plan_is_carried_out_as_if_by_the_shell(student, problems, tmp_path):
    """The same weights as from a fresh interpreter; the first command that fails ends the plan."""
    settings = f"--data {problems} --exclude --max-prompt-tokens 64 --max-response-tokens 8 --prompts-per-step 4 " \
        "--mini-batch-prompts 2 --rollouts-per-prompt 4 --max-steps 1 --lr 1e-2"  # fmt: skip
    command = f"python teacher_grpo.py --model {{}} --out {tmp_path}/{{}} \\\n\t{settings}"
    first, second, bad = (command.format(*each) for each in ((student, "a"), (student, "b"), ("nowhere", "c")))
    text = "\n".join([first, f"touch {tmp_path / 'touched'}", bad, second])
    words = [sys.executable, "-m", "experiments.run_plan"]
    done = subprocess.run(words, cwd=ROOT, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "error: exit status 2 of: python teacher_grpo.py --model nowhere" in done.stderr
    assert "error: --model 'nowhere' is not a checkpoint directory" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "touched"]
    words = second.replace("\\\n", " ").split()
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
