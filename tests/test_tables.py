"""The paper's tables, and verdicts by Student's t, from made-up runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from common import InputError
from experiments import tables
from lib.scores import mean_and_error

CHECKPOINTS = set().union(*tables.TABLES.values())


def write_runs(directory: Path, averages: dict[str, float], seeds: int, shift: float = 0.05) -> tuple[str, ...]:
    """Reports of made-up checkpoints; every seed moves all averages, and problems differ far more than checkpoints."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        hardness = rng.uniform(-0.3, 0.3, 40)
        results = {}
        for checkpoint, average in averages.items():
            scores = average + shift * seed + hardness + rng.normal(0, 0.01, 40)
            mean, error = mean_and_error(scores)
            scores = dict(zip(map(str, range(40)), scores.tolist()))
            results[checkpoint] = {"test": {"avg": mean, "se": error, "scores": scores, "problems": 40}}
        path = directory / f"seed{seed}" / "report-test" / "all" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"results": results, "settings": {"k": 16}}))
    return tuple(str(directory / f"seed{seed}") for seed in range(seeds))


def written(out: Path, runs: tuple[str, ...] = (), **settings) -> tuple[dict, str]:
    """results.json and tables.md as they are written to `out`."""
    tables.main(tables.Config(out=str(out), runs=runs, **settings))
    return json.loads((out / "results.json").read_text()), (out / "tables.md").read_text()


def verdicts(results: dict) -> dict[str, str]:
    return {f"{o['first']} {o['relation']} {o['second']}": o["verdict"] for o in results["orderings"]}


def test_tables_pair_problems_and_average_over_seeds(tmp_path):
    averages = {"full/direct": 0.5, "full/raw/bridge": 0.45, "full/rl/bridge": 0.44, "full/rl/opd_only": 0.40,
                "1H/rl/bridge": 0.5, "1H/rl/bridge-replay": 0.5, "1H/rl/bridge-2H": 0.56}  # fmt: skip
    runs = write_runs(tmp_path, averages, seeds=4)
    results, text = written(tmp_path / "tables", runs)
    # Seeds differ by 5 points and problems by 17; both cancel in paired differences.
    direct = results["orderings"][0]
    assert direct["mean"] == pytest.approx(0.05, abs=0.005) and 0.0005 < direct["se"] < 0.005
    assert direct["interval"] == pytest.approx(3.182 * mean_and_error(np.array(direct["runs"])[:, 0])[1], rel=1e-3)
    assert verdicts(results) == {
        "full/direct > full/raw/bridge": "holds",
        "full/rl/bridge > full/direct": "REVERSED",
        "full/rl/bridge > full/rl/opd_only": "holds",
        "1H/rl/bridge-2H > 1H/rl/bridge": "holds",
        "1H/rl/bridge-2H > 1H/rl/bridge-replay": "holds",
        "1H/rl/bridge-replay = 1H/rl/bridge": "no difference resolved",
        "full/rl/bridge ? 1H/rl/bridge-2H": "resolved (-)",
    }
    single = [json.loads(Path(run, "report-test/all/results.json").read_text())["results"] for run in runs]
    each = np.array([result["full/direct"]["test"]["avg"] for result in single])
    assert results["entries"]["full/direct"]["test"] == pytest.approx(mean_and_error(each))
    assert "| direct GRPO | `full/direct` |" in text and "75.9±0.9 / 19.8±1.4 / 17.1±0.9" in text
    assert "| bridge (RL'd teacher) against bridge on 1H + Stage 3 on 2H (RL'd teacher) |" in text
    assert "| teacher-sample SFT" not in text and (tmp_path / "tables" / "routes.png").stat().st_size > 10_000
    assert "holds 4, REVERSED 1, no difference resolved 1." in text and "7 claims are tested below" in text
    # What results.json holds is enough to write both files again, to the letter.
    again = written(tmp_path / "again", results=str(tmp_path / "tables" / "results.json"))
    assert again == (results, text) and not (tmp_path / "again" / "routes.png").exists()
    with pytest.raises(InputError, match="holds no report-validation"):
        written(tmp_path / "x", runs, pool="validation")


def test_a_row_that_is_missing_in_one_run_is_named(tmp_path, capsys):
    averages = {"full/direct": 0.5, "full/raw/bridge": 0.45}
    runs = write_runs(tmp_path / "a", {**averages, "full/rl/bridge": 0.6}, 1)
    runs += write_runs(tmp_path / "b", {**averages, "student": 0.1}, 1)
    results, text = written(tmp_path / "out", runs)
    for sentence in (f"`student` (missing in {runs[0]})", f"`full/rl/bridge` (missing in {runs[1]})"):
        assert sentence in text
    assert text in capsys.readouterr().out
    assert verdicts(results).keys() == {"full/direct > full/raw/bridge"}


def test_quantiles_of_student_t():
    """Against a table, and p values against their intervals."""
    for df, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 30: 2.042, 249: 1.970}.items():
        assert tables.quantile(df) == pytest.approx(quantile, abs=5e-4)
        assert tables.p_value(-quantile, 1.0, df) == pytest.approx(0.05, abs=2e-4)
    assert tables.p_value(2.0, 1.0, 2) == pytest.approx(0.1835, abs=1e-4)
    assert tables.p_value(0.0, 0.0, 4) == 1 and tables.p_value(0.1, 0.0, 4) == 0 and tables.p_value(1, np.nan, 0) == 1


def test_the_wider_interval_decides():
    """Two runs that agree by chance have the error of their problems; runs that disagree have their own, by few degrees."""
    agreeing = tables.difference([(0.2, 0.1)] * 2, problems=40)
    assert (agreeing["mean"], agreeing["se"]) == pytest.approx((0.2, 0.1 / 2**0.5))
    assert agreeing["interval"] == pytest.approx(2.023 * 0.1 / 2**0.5, rel=1e-3) and agreeing["p"] > 0.005
    assert tables.difference([(0.2, 0.1)], problems=40)["interval"] == pytest.approx(0.2023, rel=1e-3)
    apart = tables.difference([(0.082, 0.028), (0.028, 0.032), (0.172, 0.038)], problems=100)
    assert apart["mean"] > 2 * apart["se"] and 0.15 < apart["p"] < 0.16  # not resolved all the same
    assert apart["interval"] == pytest.approx(4.303 * apart["se"], rel=1e-3)


def test_holms_correction():
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert tables.holm([0.6, 0.001, 0.5]) == pytest.approx([1.0, 0.003, 1.0])


def test_a_verdict_is_at_5_percent():
    found = lambda mean, p: [tables.verdict(mean, p, relation) for relation in ">=?"]
    assert found(0.05, 0.049) == ["holds", "does not hold", "resolved (+)"]
    assert found(-0.05, 0.049) == ["REVERSED", "does not hold", "resolved (-)"]
    assert found(0.05, 0.051) == ["not resolved", "no difference resolved", "not resolved"]


CHAIN = {  # checkpoint: stage, its model and teacher, labels, tokens sampled (if recorded) and trained on, CPU seconds
    "full/direct": ("teacher_grpo", "raw_student", None, "a b c", None, 64_000, 30),
    "1H/rl/teacher": ("teacher_grpo", "raw_teacher", None, "a b", None, 1_000, 60),
    "1H/rl/warmup": ("fkl_warmup", "raw_student", "1H/rl/teacher", "a b", 2_000, 4_000, 120),
    "1H/rl/bridge": ("opd", "1H/rl/warmup", "1H/rl/teacher", "a", None, 8_000, 240),
    "1H/rl/bridge-2H": ("student_grpo", "1H/rl/bridge", None, "c", None, 16_000, 480),
    "1H/sft/teacher": ("fkl_warmup", "raw_teacher", "raw_teacher", "a", 100_000, 200_000, 6),
}


def write_chain(run: str, seed: int) -> None:
    """The run.json of each stage, with costs that the seed scales, of which no two sums are the same by chance."""
    records = {name: {"sha256": name} for name in ("raw_student", "raw_teacher")}
    for name, (stage, model, teacher, labels, sampled, trained, seconds) in CHAIN.items():
        parents = {"model": records[model], **({"teacher": records[teacher]} if teacher else {})}
        costs = {"trained_tokens": trained, "cpu_seconds": seconds, **({"sampled_tokens": sampled} if sampled else {})}
        record = {"stage": stage, "parents": parents, "trained_on": labels.split()}
        record |= {key: value * (1 + seed) for key, value in costs.items()}
        write_record(run, name, record)
        records[name] = {**record, "sha256": f"weights of {name}"}


def write_record(run: str, checkpoint: str, record: dict) -> None:
    path = Path(run, checkpoint, "run.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))


COSTS = {  # labels, tokens that the student sampled and trained on, the same of the teacher, CPU minutes; of seed 0
    "full/direct": (3, 64_000, 64_000, 0, 0, 0.5),
    "1H/rl/teacher": (2, 0, 0, 1_000, 1_000, 1),
    "1H/rl/bridge": (2, 8_000, 12_000, 3_000, 1_000, 7),
    "1H/rl/bridge-2H": (3, 24_000, 28_000, 3_000, 1_000, 15),
    "1H/sft/teacher": (1, 0, 0, 100_000, 200_000, 0.1),
}


def test_a_row_costs_what_all_stages_behind_it_have_cost(tmp_path):
    """The RL'd teacher is behind the warmup and behind OPD, and is paid for once; seed 1 pays twice as much."""
    evaluated = [*COSTS, "student", "teacher", "full/rl/bridge"]  # no stage makes a raw model
    runs = write_runs(tmp_path, dict.fromkeys(evaluated, 0.5), seeds=2)
    for seed, run in enumerate(runs):
        write_chain(run, seed)
    # Only one run has a record of this one, so it has no mean.
    record = {"stage": "opd", "parents": {}, "trained_on": ["a"], "trained_tokens": 1, "cpu_seconds": 1}
    write_record(runs[0], "full/rl/bridge", record)
    results, text = written(tmp_path / "tables", runs)
    assert results["costs"].keys() == COSTS.keys()
    for checkpoint, (labels, *spent) in COSTS.items():
        expected = [labels, *(1.5 * value for value in spent)]
        assert list(results["costs"][checkpoint].values()) == pytest.approx(expected), checkpoint
    accuracy = tables.percent(*results["entries"]["1H/rl/bridge-2H"]["test"])
    assert f"| `1H/rl/bridge-2H` | {accuracy} | 3 | 36 | 42 | 4 | 2 | 22.50 |" in text
    path = Path(runs[0], "1H/rl/bridge-2H/run.json")
    record = json.loads(path.read_text())
    del record["parents"]["model"]["parents"]["model"]["trained_tokens"]  # the warmup's: what the row cost is not known
    path.write_text(json.dumps(record))
    assert written(tmp_path / "unknown", runs)[0]["costs"].keys() == COSTS.keys() - {"1H/rl/bridge-2H"}


def test_the_papers_differences_follow_from_its_figures():
    assert tables.PAPER.keys() <= CHECKPOINTS
    claims = [claim.split() for claims in tables.CLAIMS.values() for claim in claims]
    found = [tables.paper_difference(first, second, "qwen3-8b") for first, _, second, *ours in claims if not ours]
    expected = "+4.4 +3.4 +5.4 +2.4 +2.8 +1.3 +1.7 +3.3 +0.7 +1.2 +3.1 +2.8 +0.3 +2.9 +3.2 -0.3 +0.8"
    assert found == expected.split()


@pytest.mark.parametrize("pair", [*tables.PAIRS, "1H"])
def test_each_pair_has_the_papers_tables_with_its_own_figures(pair, tmp_path):
    """The pretrained model of SCALE=real has its own table, on 1H."""
    rows, claims = (tables.TABLES_1H, tables.CLAIMS_1H) if pair == "1H" else (tables.TABLES, tables.CLAIMS)
    runs = write_runs(tmp_path, dict.fromkeys(set().union(*rows.values()), 0.5), seeds=2)
    results, text = written(tmp_path / "out", runs, **({} if pair == "1H" else {"pair": pair}))
    assert len(results["orderings"]) == sum(map(len, claims.values()))
    titles = re.findall(r"^\*\*(Table \d(?:, \w+)?|Teachers|Rows|P\d|App\. C)", text, flags=re.M)
    qwen = ["Table 1", "Table 2, top", "Table 2, bottom", "Table 4", "Table 5", "Table 6"]
    after = ["Teachers", "P1", "P2", "P3", "App. C"]
    assert titles == {"1H": ["Rows", "P1", "P2"], "llama": ["Table 3", *after]}.get(pair, qwen + after)
    assert pair == "1H" or f"| {tables.paper_figures('full/rl/bridge', pair)} |" in text


def test_accuracy_stands_against_the_cpu_time_of_all_stages_behind_it(tmp_path):
    """A stage's 60 CPU seconds over 3 seconds of steps, 1 of which is the first step's, and 1 of validation."""
    lines = [
        {"step": 0, "validation_validation": 0.1, "seconds_validation": 0.5},
        {"step": 0, "reward": 0.5, "seconds_rollout": 0.5, "seconds_update": 0.5},
        {"step": 1, "reward": 0.5, "seconds_rollout": 2.0},
        {"step": 2, "validation_validation": 0.4, "seconds_validation": 0.5},
    ]
    record = {"stage": "", "parents": {}, "trained_on": [], "cpu_seconds": 60.0}
    for stage in ("1H/direct", "1H/rl/teacher", "1H/rl/warmup", "1H/rl/bridge"):
        write_record(str(tmp_path), stage, record)
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    direct, bridge, teacher = (runs[0] for runs in tables.over_time([str(tmp_path)]).values())
    assert direct == teacher == [(0, 0.1), (0, 0.1), (pytest.approx(0.75), 0.4)]
    assert bridge == [(0, 0.1), *((pytest.approx(0.75 * stages), a) for stages, a in zip((1, 2, 2, 3), (0.1, 0.4) * 2))]
    assert tables.over_time([str(tmp_path / "1H")]) == {}


def test_the_number_of_runs_that_would_resolve_a_difference():
    """With 12 runs the interval reaches 2.201 standard errors to each side: 2.201 x 0.1498 / 12^0.5 = 0.095."""
    four = [(0.1 + x * 0.116, 0.0) for x in (-1.5, -0.5, 0.5, 1.5)]  # spread 0.1498; 11 runs would leave 0.1006
    assert tables.runs_needed(four) == 12 and tables.runs_needed([(-x, e) for x, e in four]) == 12
    assert tables.runs_needed([(0.001, 0), (-0.001, 0)]) is None


def test_the_demo_is_explained(tmp_path, capsys, monkeypatch):
    """With one curve for each checkpoint: of its rewards, though it logs an accuracy as well, or of its accuracy."""
    [run] = write_runs(tmp_path, {"student": 0.1, "full/direct": 0.4, "1H/rl/bridge": 0.5, "1H/rl/bridge-2H": 0.6}, 1)
    write_chain(run, 0)
    for checkpoint, line in {
        "full/direct": {"reward": -0.4, "accuracy": 0.9}, "1H/rl/bridge": {"reverse_kl": 0.2, "accuracy": 0.9},
        "1H/rl/bridge-2H": {"reward": 0.6},
    }.items():  # fmt: skip
        Path(run, checkpoint, "metrics.jsonl").write_text(json.dumps({"step": 0, **line}) + "\n")
    out, drawn = Path(run, "report-test/all"), []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    tables.main(tables.Config(out=str(out), runs=(run,), demo=True))
    said = capsys.readouterr().out
    assert "answered 40 test problems 16 times" in said
    for words, labels in (
        ("raw student", 0),
        ("direct GRPO", 3),
        (r"bridge on 1H \+ Stage 3 on 2H \(RL'd teacher\)", 3),
    ):
        assert re.search(rf"  {words} +\d+\.\d ± \d\.\d +{labels}\n", said)
    steps = said[said.index("Paired differences") :]
    assert re.search(r"Stage 3: .* \+10\.\d ± 0\.\d\n", steps) and "Stage 1: " not in steps  # no teacher was evaluated
    bars, rewards, kls = drawn[0].axes
    _, _, [whiskers] = next(box.errorbar for box in bars.containers if hasattr(box, "patches")).lines
    shown = float(re.search(r"raw student +\S+ ± (\S+)", said)[1])
    assert np.diff(whiskers.get_segments()[0], axis=0)[0, 0] / 2 == pytest.approx(shown, abs=0.051)
    assert {line.get_label(): line.get_ydata()[0] for line in rewards.lines} == {
        "direct GRPO": -0.4, "bridge on 1H (RL'd teacher)": 0.9, "bridge on 1H + Stage 3 on 2H (RL'd teacher)": 0.6,
    }  # fmt: skip
    assert [line.get_ydata()[0] for line in kls.lines] == [0.2]
