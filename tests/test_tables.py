"""The paper's tables and predictions, filled from made-up runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from common import InputError
from experiments import tables
from lib.scores import mean_and_error

CLAIMS = {claim.text: claim for prediction in tables.PREDICTIONS for claim in prediction.claims}
CHECKPOINTS = {row.checkpoint for rows in tables.TABLES.values() for row in rows}
NAN = float("nan")


def write_runs(directory: Path, averages: dict[str, float], seeds: int, shift: float) -> tuple[str, ...]:
    """Reports of made-up checkpoints; every seed moves all averages, and problems differ far more than checkpoints."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        hardness = rng.uniform(-0.3, 0.3, 40)
        results = {}
        for checkpoint, average in averages.items():
            scores = average + shift * seed + hardness + rng.normal(0, 0.01, 40)
            mean, error = mean_and_error(scores)
            row = {"avg": mean, "se": error, "scores": dict(zip(map(str, range(40)), scores.tolist()))}
            results[checkpoint] = {"test": row}
        path = directory / f"seed{seed}" / "report-test" / "all" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"results": results}))
    return tuple(str(directory / f"seed{seed}") for seed in range(seeds))


def written(out: Path) -> tuple[dict, str]:
    return json.loads((out / "results.json").read_text()), (out / "tables.md").read_text()


def test_tables_pair_problems_and_average_over_seeds(tmp_path, capsys):
    averages = {"full/direct": 0.5, "full/raw/bridge": 0.45, "full/rl/bridge": 0.44, "full/rl/opd_only": 0.40,
                "1H/rl/bridge": 0.5, "1H/rl/bridge-replay": 0.5, "1H/rl/bridge-2H": 0.56}  # fmt: skip
    runs = write_runs(tmp_path, averages, seeds=4, shift=0.05)
    tables.main(tables.Config(runs=runs, out=str(tmp_path / "tables")))
    results, text = written(tmp_path / "tables")
    found = {o["claim"]: o for o in results["orderings"]}
    # Seeds differ by 5 points and problems by 17; both cancel in paired differences.
    direct = found["direct GRPO > bridge from the raw teacher"]
    assert direct["mean"] == pytest.approx(0.05, abs=0.005)
    assert 0.0005 < direct["se"] < 0.005 and all(error < 0.005 for _, error in direct["runs"])
    assert direct["mean"] == pytest.approx(np.mean([difference for difference, _ in direct["runs"]]))
    assert {claim: o["verdict"] for claim, o in found.items()} == {
        "direct GRPO > bridge from the raw teacher": "holds",
        "bridge from the RL'd teacher > direct GRPO": "REVERSED",
        "bridge > OPD only (without 2a)": "holds",
        "bridge + 2H > bridge": "holds",
        "bridge + 2H > bridge + replay": "holds",
        "bridge + replay = bridge": "holds",
        "2H in Stages 1 and 2 against 2H in Stage 3": "resolved (-)",
    }
    assert [o["prediction"] for o in results["orderings"]] == ["P1", "P1", "P2", "P3", "P3", "P3", "App. C"]
    assert direct.keys() == {"claim", "prediction", "first", "second", "paper", "data", "mean", "se", "runs", "verdict"}
    assert results["entries"].keys() == averages.keys()
    single = [json.loads(Path(run, "report-test/all/results.json").read_text())["results"] for run in runs]
    each = [result["full/direct"]["test"]["avg"] for result in single]
    assert results["entries"]["full/direct"]["test"] == pytest.approx(mean_and_error(np.array(each)))
    assert "| - | direct GRPO of the student | `full/direct` |" in text and "75.9±0.9 / 19.8±1.4 / 17.1±0.9" in text
    assert "teacher-sample SFT" not in text and (tmp_path / "tables" / "routes.png").stat().st_size > 10_000
    capsys.readouterr()
    tables.main(tables.Config(runs=runs[:1], out=str(tmp_path / "one")))
    assert "± SE over problems" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds no report-validation"):
        tables.main(tables.Config(runs=runs, out=str(tmp_path / "x"), pool="validation"))


def write_checkpoint(run: str, name: str, seed: int, stage: str, model: dict, **record) -> dict:
    """A checkpoint's run.json as a stage writes it, in numbers that the seed scales; returns it as a parent's record."""
    scaled = {key: value * (1 + seed) for key, value in record.items() if isinstance(value, (int, float))}
    parents = {"model": model} | ({"teacher": record["teacher"]} if "teacher" in record else {})
    written = {"stage": stage, "parents": parents, "consumed": record["consumed"].split(), **scaled}
    path = Path(run, name, "run.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(written))
    return {**written, "path": str(path.parent), "sha256": f"weights of {name}"}


def write_chain(run: str, seed: int) -> None:
    """Two teachers, a bridge from each and Stage 3 after one, with costs of which no two sums are the same by chance."""
    raw = {"path": "raw_student", "sha256": "raw"}, {"path": "raw_teacher", "sha256": "large"}

    def write(name, stage, model, **record):
        return write_checkpoint(run, name, seed, stage, model, **record)

    write("full/direct", "teacher_grpo", raw[0], consumed="a b c", trained_tokens=64_000, cpu_seconds=30)
    teacher = write("1H/rl/teacher", "teacher_grpo", raw[1], consumed="a b", trained_tokens=1_000, cpu_seconds=60)
    warmup = write("1H/rl/warmup", "fkl_warmup", raw[0], teacher=teacher, consumed="a b", sampled_tokens=2_000,
                   trained_tokens=4_000, cpu_seconds=120)  # fmt: skip
    bridge = write("1H/rl/bridge", "opd", warmup, teacher=teacher, consumed="a", trained_tokens=8_000, cpu_seconds=240)
    write("1H/rl/bridge-2H", "student_grpo", bridge, consumed="c", trained_tokens=16_000, cpu_seconds=480)
    sft = write("1H/sft/teacher", "fkl_warmup", raw[1], teacher=raw[1], consumed="a", sampled_tokens=100_000,
                trained_tokens=200_000, cpu_seconds=6)  # fmt: skip
    write("1H/sft/bridge", "opd", raw[0], teacher=sft, consumed="a b", trained_tokens=400_000, cpu_seconds=12)


COSTS = {  # labels, tokens that the student sampled and trained on, the same of the teacher, CPU minutes; of seed 0
    "full/direct": (3, 64_000, 64_000, 0, 0, 0.5),
    "1H/rl/teacher": (2, 0, 0, 1_000, 1_000, 1),
    "1H/rl/bridge": (2, 8_000, 12_000, 3_000, 1_000, 7),
    "1H/rl/bridge-2H": (3, 24_000, 28_000, 3_000, 1_000, 15),
    "1H/sft/teacher": (1, 0, 0, 100_000, 200_000, 0.1),
    "1H/sft/bridge": (2, 400_000, 400_000, 100_000, 200_000, 0.3),
}


def test_a_row_costs_what_all_stages_behind_it_have_cost(tmp_path, capsys):
    """The RL'd teacher stands behind the warmup and behind OPD, and is paid for once; seed 1 pays twice as much."""
    evaluated = [*COSTS, "student", "teacher", "full/rl/bridge"]  # no stage makes a raw model
    runs = write_runs(tmp_path, dict.fromkeys(evaluated, 0.5), seeds=2, shift=0.1)
    for seed, run in enumerate(runs):
        write_chain(run, seed)
    # Only one run has a record of this one, so it has no mean.
    write_checkpoint(runs[0], "full/rl/bridge", 0, "opd", {}, consumed="a", trained_tokens=1, cpu_seconds=1)
    tables.main(tables.Config(runs=runs, out=str(tmp_path / "tables")))
    results, text = written(tmp_path / "tables")
    assert {checkpoint: list(costs) for checkpoint, costs in results["costs"].items()} == dict.fromkeys(
        COSTS, ["labels", "student_sampled", "student_trained", "teacher_sampled", "teacher_trained", "cpu_minutes"]
    )
    for checkpoint, (labels, *spent) in COSTS.items():
        expected = [labels, *(1.5 * value for value in spent)]
        assert list(results["costs"][checkpoint].values()) == pytest.approx(expected), checkpoint
    table = text.split("**What each row cost** (mean of 2 runs)")[1].split("**Orderings**")[0]
    assert [line.split(" | ")[2] for line in table.splitlines() if "`" in line and line.startswith("|")] == [
        "`full/direct`", "`1H/rl/bridge-2H`", "`1H/rl/bridge`", "`1H/sft/bridge`", "`1H/sft/teacher`", "`1H/rl/teacher`",
    ]  # fmt: skip
    accuracy = tables.percent(*results["entries"]["1H/rl/bridge-2H"]["test"])
    row = f"| RL'd | bridge on 1H + Stage 3 on 2H | `1H/rl/bridge-2H` | {accuracy} | 3 | 36 | 42 | 4 | 2 | 22.50 |"
    assert row in table


def test_a_stage_that_is_both_the_students_and_the_teachers_counts_as_the_students():
    """A student that is distilled from what it was itself has not had another model trained for it."""
    before = {"stage": "teacher_grpo", "sha256": "before", "parents": {"model": {"path": "raw", "sha256": "raw"}}}
    after = {"stage": "opd", "parents": {"model": before, "teacher": before}}
    assert list(tables.stages_behind(after, "student").values()) == [("student", before), ("student", after)]


def test_a_row_has_no_cost_where_a_stage_behind_it_has_not_recorded_one(tmp_path, capsys):
    [run] = write_runs(tmp_path, dict.fromkeys(COSTS, 0.5), seeds=1, shift=0)
    tables.main(tables.Config(runs=(run,), out=str(tmp_path / "reports")))
    assert written(tmp_path / "reports")[0]["costs"] == {} and "What each row cost" not in capsys.readouterr().out
    write_chain(run, 0)
    path = Path(run, "1H/rl/bridge-2H/run.json")
    record = json.loads(path.read_text())
    del record["parents"]["model"]["parents"]["model"]["trained_tokens"]  # the warmup's
    path.write_text(json.dumps(record))
    tables.main(tables.Config(runs=(run,), out=str(tmp_path / "tables")))
    assert written(tmp_path / "tables")[0]["costs"].keys() == COSTS.keys() - {"1H/rl/bridge-2H"}
    path.write_text("{")
    with pytest.raises(InputError, match="1H/rl/bridge-2H/run.json is not JSON"):
        tables.main(tables.Config(runs=(run,), out=str(tmp_path / "x")))


def test_an_error_over_runs_is_no_smaller_than_that_over_problems():
    """Two runs that agree by chance: their problems differ by 0.2 ± 0.1 in each, so their mean has 0.1 / sqrt(2)."""
    run = {"full/direct": {"test": {"scores": {"a": 0.5, "b": 0.7}}},
           "full/raw/bridge": {"test": {"scores": {"a": 0.4, "b": 0.4}}}}  # fmt: skip
    claim = CLAIMS["direct GRPO > bridge from the raw teacher"]
    found = tables.ordering(tables.PREDICTIONS[0], claim, [run, run], "test", "qwen3-8b")
    assert (found["mean"], found["se"]) == pytest.approx((0.2, 0.1 / 2**0.5))
    assert found["runs"] == [pytest.approx((0.2, 0.1))] * 2 and found["paper"] == "+4.4"


@pytest.mark.parametrize(
    "difference, error, verdicts",
    [
        (0.05, 0.01, {">": "holds", "=": "does not hold", "?": "resolved (+)"}),
        (-0.05, 0.01, {">": "REVERSED", "=": "does not hold", "?": "resolved (-)"}),
        (0.01, 0.006, {">": "not resolved", "=": "holds", "?": "not resolved (+)"}),
        (-0.01, 0.006, {">": "not resolved", "=": "holds", "?": "not resolved (-)"}),
        (0.0, 0.0, {">": "not resolved", "=": "holds", "?": "not resolved (+)"}),  # the same weights twice
        (0.05, NAN, dict.fromkeys(">=?", "not resolved")),  # a single problem
    ],
)
def test_a_verdict_is_at_two_standard_errors(difference, error, verdicts):
    assert {relation: tables.verdict(difference, error, relation) for relation in ">=?"} == verdicts


def test_every_figure_of_the_paper_parses_and_stands_beside_a_row():
    number = r"\d+\.\d(±\d\.\d)?"
    for checkpoint, figures in tables.PAPER.items():
        assert checkpoint in CHECKPOINTS and 2 <= len(figures) <= len(tables.PAIRS)
        assert all(re.fullmatch(" / ".join([number] * 3), figure) for figure in figures)
    assert {c for c in CHECKPOINTS if tables.paper_figures(c, "llama") != "-"} == {
        row.checkpoint for row in tables.TABLES[tables.LLAMA]
    }
    without = {"full/rl/fkl_only", "full/rl/bridge_sampled"} | {
        row.checkpoint for row in tables.TABLES[tables.OURS]
    } - {"full/rl/teacher"}
    for pair in ("qwen3-8b", "qwen3-14b"):
        assert {c for c in CHECKPOINTS if tables.paper_figures(c, pair) == "-"} == without


DIFFERENCES = {  # with the 8B teacher, with the 14B teacher, of the Llama pair
    "Stage 1 improves the teacher": "- - -",
    "direct GRPO > bridge from the raw teacher": "+4.4 +3.1 +4.4",
    "bridge from the RL'd teacher > direct GRPO": "+3.4 +2.7 +2.3",
    "SFT'd teacher > raw teacher (bridges)": "+5.4 +4.8 -",
    "RL'd teacher > SFT'd teacher (bridges)": "+2.4 +1.0 -",
    "RL'd teacher > RL'd teacher of the student's size (bridges)": "+2.8 +2.1 -",
    "RL'd teacher > SFT'd teacher (bridges + 2H)": "+1.3 +1.8 -",
    "bridge > OPD only (without 2a)": "+1.7 +1.5 -",
    "bridge > teacher-sample SFT (without 2b)": "+3.3 +2.1 -",
    "OPD only > teacher-sample SFT": "+1.6 +0.6 -",
    "bridge + 2H > OPD only + 2H": "+0.7 +1.2 -",
    "OPD only + 2H > teacher-sample SFT + 2H": "+0.5 +0.3 -",
    "bridge > forward KL only (ours, not in the paper)": "- - -",
    "exact > sampled estimator in 2b (ours, not in the paper)": "- - -",
    "bridge + 2H > bridge": "+3.1 +2.4 -",
    "bridge + 2H > bridge + replay": "+2.8 +3.1 -",
    "bridge + replay = bridge": "+0.3 -0.7 -",
    "SFT'd teacher: bridge + 2H > bridge": "+2.9 +1.1 -",
    "SFT'd teacher: bridge + 2H > bridge + replay": "+3.2 +1.3 -",
    "SFT'd teacher: bridge + replay = bridge": "-0.3 -0.2 -",
    "2H in Stages 1 and 2 against 2H in Stage 3": "+0.8 -0.1 -",
}


def test_the_papers_differences_follow_from_its_figures():
    assert {text: " ".join(tables.paper_difference(claim.first, claim.second, pair) for pair in tables.PAIRS)
            for text, claim in CLAIMS.items()} == DIFFERENCES  # fmt: skip
    assert tables.paper_difference("full/rl/bridge", "full/raw/bridge", "qwen3-8b") == "+7.8"
    assert "+0.8 with the 8B teacher and -0.1 with the 14B teacher" in tables.PREDICTIONS[-1].says


def test_claims_are_grouped_by_prediction_and_compare_rows_of_the_tables():
    assert [prediction.name for prediction in tables.PREDICTIONS] == ["P1", "P2", "P3", "App. C"]
    assert len(CLAIMS) == sum(len(prediction.claims) for prediction in tables.PREDICTIONS)
    for text, claim in CLAIMS.items():
        assert {claim.first, claim.second} <= CHECKPOINTS
        assert claim.relation == (re.search("[>=]", text) or "?")[0] or text == "Stage 1 improves the teacher"


@pytest.mark.parametrize("pair", tables.PAIRS)
def test_each_pair_has_the_papers_tables_with_its_own_figures(pair, tmp_path, capsys):
    runs = write_runs(tmp_path, dict.fromkeys(CHECKPOINTS, 0.5), seeds=2, shift=0.1)
    for run in runs:
        metrics = Path(run, "full/direct/metrics.jsonl")
        metrics.parent.mkdir(parents=True)
        metrics.write_text('{"step": 0, "reward": 0.1}\n{"step": 1, "reward": 0.2}\n')
    tables.main(tables.Config(runs=runs, out=str(tmp_path / "out"), pair=pair))
    results, text = written(tmp_path / "out")
    titles = re.findall(r"^\*\*(Table \d(?:, \w+)?|Teachers|P\d|App\. C)", text, flags=re.M)
    qwen = ["Table 1", "Table 2, top", "Table 2, bottom", "Table 4", "Table 5", "Table 6"]
    shown = ["Table 3"] if pair == "llama" else qwen
    assert titles == [*shown, "Teachers", "P1", "P2", "P3", "App. C"]
    assert f"| {tables.paper_figures('full/rl/bridge', pair)} |" in text
    assert [o["paper"] for o in results["orderings"]] == [
        differences.split()[tables.PAIRS.index(pair)] for differences in DIFFERENCES.values()
    ]
    forward = [line.split(" | ") for line in text.splitlines() if "`full/rl/fkl_only`" in line]
    assert [cells[-2] for cells in forward] == ([] if pair == "llama" else ["-"])
    assert "1.8 at 19.8 % where 1.4 is printed" in text and "by the printed errors neither is resolved" in text


def test_runs_on_half_of_the_labels_fill_the_rows_on_all_of_them(tmp_path, capsys):
    """And the paper's figures on all labels do not stand beside them."""
    averages = {"student": 0.1, "1H/direct": 0.5, "1H/raw/bridge": 0.2, "1H/rl/teacher": 0.8, "1H/rl/bridge": 0.6,
                "1H/rl/bridge_sampled": 0.5, "1H/rl/bridge-2H": 0.6, "1H/rl/bridge-replay": 0.6}  # fmt: skip
    tables.main(tables.Config(runs=write_runs(tmp_path, averages, 3, 0.05), out=str(tmp_path / "out")))
    results, text = written(tmp_path / "out")
    found = {o["claim"]: o["verdict"] for o in results["orderings"]}
    assert found["direct GRPO > bridge from the raw teacher"] == "holds"
    assert found["exact > sampled estimator in 2b (ours, not in the paper)"] == "holds"
    assert "2H in Stages 1 and 2 against 2H in Stage 3" not in found
    assert results["entries"].keys() == averages.keys()
    assert "component ablation on 1H, no Stage 3" in text and "all labels" not in text
    assert not re.search(r"`1H/direct` \|.*75\.9", text) and text.count("| the teacher itself | `1H/rl/teacher` |") == 1
