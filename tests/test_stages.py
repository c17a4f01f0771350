"""The real scripts on tiny checkpoints: what they write, refuse, survive, and promise about each other."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import tiny_model, write_checkpoint, write_problems
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import evaluate
import fkl_warmup
import lib.data
import lib.engines
import lib.lineage
import lib.policy
import lib.runs
import opd
import student_grpo
import teacher_grpo
from common import AlreadyFinished, InputError
from experiments import toy

ROOT = Path(__file__).parent.parent
SMALL = dict(exclude=(), max_prompt_tokens=64, max_response_tokens=8, lr=1e-2, save_every=1)


def grpo(model, data, out, config=teacher_grpo.Config, **settings):
    settings = {
        **SMALL,
        "prompts_per_step": 4,
        "mini_batch_prompts": 2,
        "rollouts_per_prompt": 4,
        "passes": 1,
        **settings,
    }
    return config(model=model, data=data, out=str(out), **settings)


def warmup(model, teacher, data, out, **settings):
    settings = {**SMALL, "mini_batch_prompts": 3, "rollouts_per_prompt": 2, **settings}
    return fkl_warmup.Config(model=model, teacher=teacher, data=data, out=str(out), **settings)


def distill(model, teacher, data, out, **settings):
    settings = {**SMALL, "prompts_per_step": 3, "rollouts_per_prompt": 2, **settings}
    return opd.Config(model=model, teacher=teacher, data=data, out=str(out), **settings)


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(directory):
    """The lines of metrics.jsonl, less what is a time."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, student, teacher, problems):
    """All four stages, teacher and bridge on 1H, Stage 3 on 2H."""
    out = tmp_path_factory.mktemp("chain")
    teacher_grpo.main(grpo(teacher, problems, out / "teacher", half="1H"))
    fkl_warmup.main(warmup(student, str(out / "teacher"), problems, out / "warmup", half="1H"))
    opd.main(distill(str(out / "warmup"), str(out / "teacher"), problems, out / "bridge", half="1H"))
    student_grpo.main(grpo(str(out / "bridge"), problems, out / "student", student_grpo.Config))
    return out


STAGES = ["teacher", "warmup", "bridge", "student"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_a_whole_checkpoint(chain, stage):
    directory = chain / stage
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(directory))
    assert not Path(f"{directory}.partial").exists()
    assert {"config.json", "run.json", "metrics.jsonl", "curves.png", "tokenizer.json"} <= set(os.listdir(directory))
    assert not [name for name in os.listdir(directory) if name.startswith(("state", "lock"))]
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) >= 2
    record = json.loads((directory / "run.json").read_text())
    assert record["steps"] == len(lines) and record["config"]["seed"] == 0 and record["sessions"][0]["packages"]["torch"]


def test_opd_logs_entropy_mismatch_and_the_dense_reward_of_every_token(student, teacher, problems, tmp_path):
    """With either estimator, against a look at all tokens of the first batch of rollouts by formulas."""
    seen = {}
    for estimator in ("full", "sampled"):
        out = tmp_path / estimator
        settings = dict(estimator=estimator, prompts_per_step=5, max_steps=1, micro_batch_tokens=60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opd, "grade", lambda rollouts, verifier: seen.update(rollouts=rollouts) or
                          [setattr(rollout, "correct", True) for rollout in rollouts])  # fmt: skip
            opd.main(distill(student, teacher, problems, out, **settings))
        [line] = metrics(out)
        reward, entropy, kl, mismatch = [], [], [], []
        models = [AutoModelForCausalLM.from_pretrained(model).double().eval() for model in (student, teacher)]
        for rollout in seen["rollouts"]:
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                p, q = (m(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1) for m in models)
            sampled = torch.tensor(rollout.response_ids)[:, None]
            reward.append((q - p).gather(1, sampled).squeeze(1))
            entropy.append(-(p.exp() * p).sum(1))
            kl.append((p.exp() * (p - q)).sum(1))
            mismatch.append((p.gather(1, sampled).squeeze(1) - torch.tensor(rollout.logprobs)).abs())
        reward, entropy, kl, mismatch = map(torch.cat, (reward, entropy, kl, mismatch))
        expected = {
            "reverse_kl": kl.mean() if estimator == "full" else -reward.mean(), "entropy": entropy.mean(),
            "dense_reward": reward.mean(), "dense_reward_std": reward.std(correction=0),
            "dense_reward_min": reward.min(), "frac_dense_reward_outliers": (reward < -5).double().mean(),
            "accuracy": 1.0, "response_tokens": len(reward) / 10,
        }  # fmt: skip
        expected = {name: float(value) for name, value in expected.items()}
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert (reward < -5).any()  # otherwise the share of outliers is not tested
        assert line["sampler_mismatch"] == pytest.approx(mismatch.mean().item(), abs=1e-6)
    opd.main(distill(student, teacher, problems, tmp_path / "cool", temperature=0.7, max_steps=1))
    assert not [name for name in metrics(tmp_path / "cool")[0] if name.startswith("sampler_mismatch")]


@pytest.mark.parametrize("stage", ["teacher", "bridge", "student"])
def test_the_sampler_is_the_trainers_policy_in_every_step(chain, stage):
    for line in metrics(chain / stage):
        assert 0 <= line["sampler_mismatch"] <= line["sampler_mismatch_max"] < 1e-4
        assert 0 < line["entropy"] < math.log(len(toy.VOCABULARY))


def test_weights_change_in_every_stage(chain, student, teacher):
    for before, after in [(teacher, chain / "teacher"), (student, chain / "warmup"), (chain / "warmup", chain / "bridge"),
                          (chain / "bridge", chain / "student")]:  # fmt: skip
        first, second = weights(before), weights(after)
        assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


def test_lineage_names_ancestors_and_every_consumed_problem(chain, problems):
    every = lib.data.load_problems(problems)
    half = {name: {problem.id for problem in lib.data.half_of(every, name)} for name in ("1H", "2H")}
    lineage = lib.lineage.read_lineage(str(chain / "bridge"))
    assert lib.lineage.consumed_problems(lineage) == half["1H"]
    assert lib.lineage.consumed_problems(lib.lineage.read_lineage(str(chain / "student"))) == half["1H"] | half["2H"]
    assert lineage["stage"] == "opd" and lineage["parents"]["teacher"]["stage"] == "teacher_grpo"
    assert lineage["parents"]["model"]["sha256"] == lib.lineage.read_lineage(str(chain / "warmup"))["sha256"]
    teacher = lib.lineage.last_rl_stage(lineage["parents"]["teacher"])
    assert teacher["stage"] == "teacher_grpo" and 0 <= teacher["first"]["reward"] <= 1
    assert lib.lineage.last_rl_stage(lineage)["sha256"] == teacher["sha256"]
    assert lib.lineage.last_rl_stage(lineage["parents"]["model"]["parents"]["model"]) is None


def test_stage_3_refuses_consumed_labels_unless_it_is_the_replay(chain, problems, tmp_path):
    bridge = str(chain / "bridge")
    with pytest.raises(InputError, match="on 6 of its 6 problems --model .* already trained"):
        student_grpo.main(grpo(bridge, problems, tmp_path / "x", student_grpo.Config, half="1H"))
    with pytest.raises(InputError, match="--replay: .* was trained on none"):
        student_grpo.main(grpo(bridge, problems, tmp_path / "x", student_grpo.Config, half="2H", replay=True))
    assert os.listdir(tmp_path) == []
    student_grpo.main(grpo(bridge, problems, tmp_path / "replay", student_grpo.Config, half="1H", replay=True))
    replay, fresh = (json.loads((d / "run.json").read_text()) for d in (tmp_path / "replay", chain / "student"))
    differing = {name for name in fresh["config"] if fresh["config"][name] != replay["config"][name]}
    assert differing == {"half", "replay", "out"} and fresh["steps"] == replay["steps"]


def test_stage_3_is_stage_1(student, problems, tmp_path):
    """The matched protocol: the same checkpoint, half and settings give the same weights from either script."""
    teacher_grpo.main(grpo(student, problems, tmp_path / "direct", half="2H"))
    student_grpo.main(grpo(student, problems, tmp_path / "stage3", student_grpo.Config, half="2H"))
    assert_same_weights(tmp_path / "direct", tmp_path / "stage3")
    assert metrics(tmp_path / "direct") == metrics(tmp_path / "stage3")
    own = {field.name for field in dataclasses.fields(student_grpo.Config)}
    assert own - {field.name for field in dataclasses.fields(teacher_grpo.Config)} == {"replay"}


def test_distillation_lowers_its_kl(student, teacher, problems, tmp_path):
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "warmup", passes=8, max_steps=20))
    opd.main(distill(student, teacher, problems, tmp_path / "opd", passes=6))
    opd.main(distill(student, teacher, problems, tmp_path / "sampled", passes=6, estimator="sampled"))
    for name, key, factor in [
        ("warmup", "forward_kl", 0.7),
        ("opd", "reverse_kl", 0.7),
        ("sampled", "reverse_kl", 0.95),
    ]:
        values = [line[key] for line in metrics(tmp_path / name)]
        assert sum(values[-3:]) / 3 < factor * values[0], (name, values)


def cached_rows(directory):
    """All rows of a directory of teacher rollouts, in order."""
    shards = sorted(Path(directory).glob("shard-??????"))
    return [row for shard in shards for row in datasets.load_from_disk(str(shard)).to_list()]


def rewrite_shard(directory, change):
    """Replaces the only shard of a directory of teacher rollouts by its changed rows."""
    [shard] = Path(directory).glob("shard-??????")
    rows = [change(number, row) for number, row in enumerate(datasets.load_from_disk(str(shard)).to_list())]
    shutil.rmtree(shard)
    datasets.Dataset.from_list(rows).save_to_disk(str(shard))


def test_sft_and_the_shared_rollouts(student, teacher, problems, tmp_path):
    cache = tmp_path / "rollouts"
    settings = dict(rollouts=str(cache), max_sequences=6, stop=("*",))  # three problems in a shard
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "fkl", **settings))
    rows, shards = cached_rows(cache), sorted(cache.glob("shard-??????"))
    assert len(rows) == 12 * 2 and len(shards) == 4
    times = [shard.stat().st_mtime_ns for shard in shards]
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "sft", **settings, loss="sft", passes=2))
    assert [shard.stat().st_mtime_ns for shard in shards] == times  # sampled once
    assert metrics(tmp_path / "sft")[-1]["cross_entropy"] < metrics(tmp_path / "sft")[0]["cross_entropy"]
    # What a kill leaves out is sampled again, with the same result and in the same place.
    shutil.rmtree(shards[2])
    shards[3].rename(shards[3].with_suffix(".tmp"))
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "again", **settings))
    assert cached_rows(cache) == rows
    assert_same_weights(tmp_path / "fkl", tmp_path / "again")
    with pytest.raises(InputError, match="holds other rollouts"):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "other", **settings, seed=1))


def test_verifier_filtered_sft_keeps_correct_rollouts_only(student, teacher, problems, tmp_path):
    cache = tmp_path / "rollouts"
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "fkl", rollouts=str(cache)))
    rewrite_shard(cache, lambda number, row: {**row, "correct": number in (2, 9)})
    settings = dict(rollouts=str(cache), loss="sft", keep="correct", mini_batch_prompts=1)
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "sft", **settings))
    consumed = json.loads((tmp_path / "sft" / "run.json").read_text())["consumed"]
    assert set(consumed) == {cached_rows(cache)[number]["id"] for number in (2, 9)}
    rewrite_shard(cache, lambda number, row: {**row, "correct": False})
    with pytest.raises(InputError, match="the teacher answered no problem correctly"):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "none", **settings))


@pytest.mark.parametrize("stage", STAGES)
def test_the_split_into_micro_batches_shows_in_no_number(stage, student, teacher, problems, tmp_path, monkeypatch):
    """Of those that a stage's main logs, the gradient's norm among them: tokens are counted once for all micro-batches."""
    for module in (teacher_grpo, fkl_warmup, opd):
        monkeypatch.setattr(module, "grade", lambda rollouts, _: [setattr(r, "correct", sum(r.response_ids) % 2 == 0) for r in rollouts])  # fmt: skip
    for name, tokens in (("split", 45), ("whole", 10**6)):
        script, config = RUNS[stage](
            student, teacher, problems, tmp_path / name, max_steps=2, micro_batch_tokens=tokens
        )
        changes = {"require_finished": False} if stage in ("teacher", "student") else {}
        script.main(dataclasses.replace(config, **changes))
    for split, whole in zip(metrics(tmp_path / "split"), metrics(tmp_path / "whole"), strict=True):
        assert split == pytest.approx(whole, rel=1e-3, abs=1e-4) and whole["grad_norm"] > 1e-3


@pytest.mark.parametrize("stage", ["teacher", "bridge", "student"])
def test_every_step_samples_anew(stage, student, teacher, problems, tmp_path, monkeypatch):
    """A problem that comes again gets other responses, and another seed of the run gives others from the start."""
    keys = []
    for module in (teacher_grpo, opd):
        sample = module.sample_rollouts
        monkeypatch.setattr(module, "sample_rollouts", lambda *a, seed_key, sample=sample: keys.append(seed_key) or sample(*a, seed_key=seed_key))  # fmt: skip
    for seed in (0, 1):
        script, config = RUNS[stage](student, teacher, problems, tmp_path / str(seed), seed=seed)
        script.main(dataclasses.replace(config, passes=2))
    assert len(set(keys)) == len(keys) > 4


@pytest.mark.parametrize("stage", STAGES)
def test_an_end_text_ends_responses_and_is_trained(stage, student, teacher, problems, tmp_path, monkeypatch):
    """Like the end-of-sequence token, in every stage: it is the last token of a response, and one of the loss's targets."""
    made = []
    for module in (teacher_grpo, fkl_warmup, opd):

        def recording(rollouts, *rest, make=module.make_batches):
            made.append((rollouts, make(rollouts, *rest)))
            return made[-1][1]

        monkeypatch.setattr(module, "make_batches", recording)
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=1, stop=(":",))
    script.main(config)
    stops = lib.data.stop_tokens(toy.make_tokenizer(), (":",))
    ended = 0
    for rollouts, batches in made:
        for number, rollout in enumerate(rollouts):
            ends = [token in stops | {0, 1} for token in rollout.response_ids]
            assert not any(ends[:-1]) and ends[-1] == (rollout.finish_reason == "stop")
            assert [t for b in batches for t in b.targets[b.rollout_index == number].tolist()] == rollout.response_ids
            ended += rollout.response_ids[-1] in stops
    assert ended


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_follows_its_schedule(stage, student, teacher, problems, tmp_path):
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=4)
    script.main(dataclasses.replace(config, lr_schedule="cosine", warmup_steps=2, passes=4))
    rates = [common.learning_rate(step, 4, config.lr, "cosine", 2) for step in range(4)]
    assert [line["lr"] for line in metrics(tmp_path / "out")] == pytest.approx(rates) and len(set(rates)) > 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_has_the_settings_of_the_config(stage, student, teacher, problems, tmp_path, monkeypatch):
    made, adamw, clip = [], torch.optim.AdamW, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k) or adamw(*a, **k))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: made.append(limit) or clip(p, limit))
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=1)
    script.main(dataclasses.replace(config, lr=3e-3, weight_decay=0.03, max_grad_norm=0.3))
    assert made[0]["lr"] == 3e-3 and made[0]["weight_decay"] == 0.03 and set(made[1:]) == {0.3}


def test_the_reference_stays_where_the_stage_began(chain):
    for stage in ("teacher", "student"):
        first, *_, last = [line["kl_to_reference"] for line in metrics(chain / stage)]
        assert 0 <= first < last


def test_a_token_that_the_tokenizer_does_not_have_ends_a_response(problems, teacher, tmp_path):
    """Output matrices have more rows than there are tokens, and a random model samples those as often as others."""
    model = tiny_model(seed=3, vocab_size=len(toy.VOCABULARY) + 6, head_dim=32)
    model.save_pretrained(tmp_path / "padded")
    toy.make_tokenizer().save_pretrained(tmp_path / "padded")
    seen, sample = [], opd.sample_rollouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "sample_rollouts", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])
        for estimator in ("full", "sampled"):
            settings = dict(estimator=estimator, max_steps=2, rollouts_per_prompt=8)
            opd.main(distill(str(tmp_path / "padded"), teacher, problems, tmp_path / estimator, **settings))
    rollouts = [rollout for batch in seen for rollout in batch]
    assert max(token for rollout in rollouts for token in rollout.response_ids) < len(toy.VOCABULARY)
    cut = [r for r in rollouts if r.finish_reason == "length" and len(r.response_ids) < 8]
    assert cut and all(len(r.response_ids) == len(r.logprobs) for r in cut)
    assert all(not line["skipped_steps"] for line in metrics(tmp_path / "full") + metrics(tmp_path / "sampled"))


TABLE_8 = dict(lr=1e-6, passes=10, mini_batch_prompts=8, max_prompt_tokens=3072, max_response_tokens=16384,
               clip_ratio=0.2, max_grad_norm=1.0, kl_coef=5e-4)  # fmt: skip
TABLE_9 = dict(lr=1e-6, passes=1, rollouts_per_prompt=8, max_prompt_tokens=2048, max_response_tokens=16384,
               temperature=1.0)  # fmt: skip
EARLIER_CODE = dict(weight_decay=0.1, warmup_steps=0, thinking=False, rollouts_per_prompt=8, temperature=1.0)
DEFAULTS = {
    teacher_grpo: {**TABLE_8, **EARLIER_CODE, "half": "full", "prompts_per_step": 32, "inner_epochs": 1},
    student_grpo: {**TABLE_8, **EARLIER_CODE, "half": "2H", "replay": False},
    fkl_warmup: {**TABLE_9, **EARLIER_CODE, "mini_batch_prompts": 64, "loss": "fkl", "keep": "all"},
    opd: {**TABLE_9, **EARLIER_CODE, "prompts_per_step": 64, "estimator": "full"},
    evaluate: dict(k=16, temperature=0.7, top_p=0.8, top_k=20, thinking=False, data=("math500", "aime24", "aime25"),
                   max_prompt_tokens=3072, max_response_tokens=16384),
}  # fmt: skip


@pytest.mark.parametrize("script", DEFAULTS, ids=lambda script: script.__name__)
def test_defaults_are_those_of_the_paper(script):
    """Tables 8 and 9, App. F, and for what they leave open the authors' code for their earlier papers."""
    found = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert {name: found[name] for name in DEFAULTS[script]} == DEFAULTS[script]
    if script is not evaluate:
        assert found["exclude"] == ("math500", "aime24", "aime25")
    if script in (teacher_grpo, student_grpo):
        assert found["require_finished"] and found["normalize_by_std"] and found["importance_cap"] == 2


# Interruption; tests/test_faults.py kills every stage many times


RUNS = {
    "teacher": lambda s, t, data, out, **k: (teacher_grpo, grpo(t, data, out, passes=2, **k)),
    "warmup": lambda s, t, data, out, **k: (fkl_warmup, warmup(s, t, data, out, passes=2, **k)),
    "bridge": lambda s, t, data, out, **k: (opd, distill(s, t, data, out, **k)),
    "student": lambda s, t, data, out, **k: (student_grpo, grpo(s, data, out, student_grpo.Config, passes=3, **k)),
}


def command_line(script, config):
    words = [sys.executable, str(ROOT / f"{script.__name__}.py")]
    for name, value in dataclasses.asdict(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, (tuple, list)):
            words += [flag, *value]
        elif value is not None:
            words += [flag, str(value)]
    return words


def test_sigkill_leaves_a_state_that_the_command_line_resumes(teacher, problems, tmp_path):
    straight = grpo(teacher, problems, tmp_path / "straight", passes=8)
    teacher_grpo.main(straight)
    cut = dataclasses.replace(straight, out=str(tmp_path / "cut"), resume=True)
    process = subprocess.Popen(command_line(teacher_grpo, cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut.partial").glob("state-00000[3-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut").exists()
    assert_same_weights(teacher, teacher)  # the parent still loads
    result = subprocess.run(command_line(teacher_grpo, cut), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "continuing after step" in result.stdout, result.stderr
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "cut")


@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_a_finished_run_is_a_success_that_loads_nothing(chain, teacher, problems, ranks):
    """So a script may give --resume to every stage of its chain, whichever of them are finished."""
    cfg = grpo(teacher, problems, chain / "teacher", half="1H", resume=True)
    words = command_line(teacher_grpo, cfg)
    if ranks > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    before = {path: path.stat().st_mtime_ns for path in (chain / "teacher").rglob("*")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher is already finished, with these settings; there is nothing to resume\n") == 1
    assert "error" not in done.stderr and "Loading" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (chain / "teacher").rglob("*")} == before


def test_every_stage_knows_that_it_is_finished(chain, student, teacher, problems, monkeypatch):
    first, bridge = str(chain / "teacher"), str(chain / "bridge")
    finished = [
        (teacher_grpo, grpo(teacher, problems, first, half="1H", resume=True)),
        (fkl_warmup, warmup(student, first, problems, chain / "warmup", half="1H", resume=True)),
        (opd, distill(str(chain / "warmup"), first, problems, bridge, half="1H", resume=True)),
        (student_grpo, grpo(bridge, problems, chain / "student", student_grpo.Config, resume=True)),
    ]
    for script in (teacher_grpo, fkl_warmup, opd):
        monkeypatch.setattr(script, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    for script, cfg in finished:
        with pytest.raises(AlreadyFinished):
            script.main(cfg)
        with pytest.raises(InputError, match="had lr = 0.01, now it is 0.5; give the same settings") as error:
            script.main(dataclasses.replace(cfg, lr=0.5))
        assert not isinstance(error.value, AlreadyFinished)


def test_the_text_of_a_prefix_is_recorded_and_resumed_with(student, problems, tmp_path, monkeypatch, capsys):
    """Not the name of its file, which may change or go without changing a prompt."""
    monkeypatch.setattr(common, "exit_process", sys.exit)
    first, other = tmp_path / "first.txt", tmp_path / "other.txt"
    first.write_text("1+1=2\n")
    other.write_text("1+1=2\n")

    def run(prefix: Path) -> int:
        cfg = grpo(student, problems, tmp_path / "out", max_steps=1, prefix=f"@{prefix}", stop=(r"\n",), resume=True)
        monkeypatch.setattr(sys, "argv", command_line(teacher_grpo, cfg)[1:])
        with pytest.raises(SystemExit) as exit:
            common.cli(teacher_grpo.main, teacher_grpo.Config)
        return exit.value.code

    assert run(first) == 0
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert recorded["prefix"] == "1+1=2\n" and recorded["stop"] == ["\n"]
    assert run(other) == 0 and "is already finished, with these settings" in capsys.readouterr().out
    other.write_text("1+1=3\n")
    assert run(other) == 2
    assert r"had prefix = '1+1=2\n', now it is '1+1=3\n'; give the same settings" in capsys.readouterr().err


# Bad input


def other_template(directory, source):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|assistant|>")
    tokenizer.save_pretrained(directory)
    return str(directory)


def other_vocabulary(directory, source):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_bad_input_gives_one_sentence_before_any_model_is_loaded(student, teacher, problems, tmp_path, monkeypatch):
    def no_model(*arguments, **options):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(lib.policy, "load_causal_lm", no_model)
    monkeypatch.setattr(lib.engines, "load_causal_lm", no_model)
    out = tmp_path / "out"
    template, vocabulary = (make(tmp_path / make.__name__, teacher) for make in (other_template, other_vocabulary))
    taken, one = tmp_path / "taken", write_problems(tmp_path / "one.jsonl", 1)
    taken.mkdir()
    missing, empty = str(tmp_path / "missing"), tmp_path / "empty"
    empty.mkdir()
    plain = dict(system_prompt="x", chat_template=False)
    report = dict(out=str(out), models=(student,), data=(problems,))
    cases = [
        (teacher_grpo, grpo(missing, problems, out), "--model .*missing' is not a checkpoint directory"),
        (teacher_grpo, grpo(str(empty), problems, out), "--model .*empty' has no tokenizer"),
        (opd, distill(student, missing, problems, out), "--teacher .*missing' is not a checkpoint directory"),
        (opd, distill(student, vocabulary, problems, out), "have different vocabularies .26 and 27 tokens, .*'new'"),
        (fkl_warmup, warmup(student, vocabulary, problems, out), "have different vocabularies"),
        (opd, distill(student, template, problems, out), "render prompts differently"),
        (teacher_grpo, grpo(student, "dapoo", out), "--data 'dapoo' is no known data set"),
        (teacher_grpo, grpo(student, one, out, half="2H"), "--half 2H needs at least two problems"),
        (teacher_grpo, grpo(student, problems, out, max_prompt_tokens=5), "more than --max-prompt-tokens 5"),
        (teacher_grpo, grpo(student, problems, taken), "--out .*taken' already exists"),
        (student_grpo, grpo(missing, problems, out, student_grpo.Config), "--model .*missing'"),
        (teacher_grpo, grpo(student, problems, out, rollouts_per_prompt=1), "--rollouts-per-prompt"),
        (teacher_grpo, grpo(student, problems, out, temperature=0.0), "--temperature"),
        (opd, distill(student, teacher, problems, out, stop=("xyz",)), "--stop 'xyz' stands in no single token"),
        (fkl_warmup, warmup(student, teacher, problems, out, stop=("",)), "--stop '' is empty"),
        (student_grpo, grpo(student, problems, out, student_grpo.Config, **plain), "--system-prompt 'x': --no-chat-t"),
        (evaluate, evaluate.Config(**report, stop=("xyz",)), "--stop 'xyz' stands in no single token"),
        (evaluate, evaluate.Config(**report, **plain), "--system-prompt 'x': --no-chat-template is given"),
    ]
    for script, config, message in cases:
        with pytest.raises(InputError, match=message) as error:
            script.main(config)
        assert "\n" not in str(error.value)
        assert not out.exists() and not (tmp_path / "out.partial").exists(), message


def test_the_command_line_ends_in_one_line(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "opd.py"),
        "--model",
        "nowhere",
        "--teacher",
        "x",
        "--data",
        "y",
        "--out",
        "z",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode != 0 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: --model 'nowhere' is not a checkpoint directory")


def test_two_runs_cannot_share_an_output_directory(student, problems, tmp_path):
    config = grpo(student, problems, tmp_path / "out")
    first = lib.runs.Run(config, {"model": student})
    with pytest.raises(InputError, match="is being written by another run"):
        lib.runs.Run(config, {"model": student})
    del first


def test_unsafe_heads_are_refused(tmp_path):
    model = tiny_model()
    model.lm_head = torch.nn.Linear(16, model.config.vocab_size, bias=True)
    directory = write_checkpoint(tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    with pytest.raises(InputError, match="rescales its logits"):
        lib.policy.load_policy(directory, opd.Config(directory, "", data="", out=""), True)


def test_bfloat16_on_a_cpu_trains_float32_weights(student, teacher, problems, tmp_path):
    """The same samples' log-probabilities differ by rounding, the sampler computes as the trainer does, and the chain of
    weights stays in float32: updates that bfloat16 would round away are kept.
    """
    command = command_line(
        teacher_grpo, grpo(teacher, problems, tmp_path / "out", max_steps=2, lr=1e-5, cpu_bfloat16=True)
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = metrics(tmp_path / "out")[0]
    assert 0 < line["sampler_mismatch"] < 0.1
    before, after = (load_file(f"{path}/model.safetensors") for path in (teacher, tmp_path / "out"))
    assert all(value.dtype == torch.float32 for value in after.values())
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < change < 5e-5
