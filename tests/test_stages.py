"""The stages' mains on tiny checkpoints: what they write, what they log, and what they promise about each other."""

import dataclasses
import math
import os

import pytest
import torch
from conftest import tiny_model
from helpers import CHAIN_GRPO, RUNS, assert_same_weights, distill, grade_with, grpo, launch, metrics, record, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import evaluate
import fkl_warmup
import lib.data
import lib.lineage
import opd
import student_grpo
import teacher_grpo
from common import InputError
from experiments import toy


@pytest.mark.parametrize("stage, before", [*zip(RUNS, ["{teacher}", "{student}", "warmup", "bridge"])])
def test_a_stage_writes_a_whole_checkpoint(chain, stage, before, student, teacher):
    directory = chain / stage
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(directory))
    assert model.generation_config.eos_token_id == [1, 0]
    files = {"config.json", "run.json", "metrics.jsonl", "curves.png", "tokenizer.json"}
    assert files <= set(os.listdir(directory))
    assert not [*directory.glob("state*"), *directory.glob("lock*"), *chain.glob("*.partial")]
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) >= 2
    assert record(directory)["steps"] == len(lines) and record(directory)["config"]["seed"] == 0
    for line in lines if stage != "warmup" else ():  # the sampler has the trainer's weights in every step
        assert 0 <= line["sampler_mismatch"] <= line["sampler_mismatch_max"] < 1e-4
        assert 0 < line["entropy"] < math.log(len(toy.VOCABULARY))
    if stage in ("teacher", "student"):  # the reference stays where the stage began
        assert 0 <= lines[0]["kl_to_reference"] < lines[-1]["kl_to_reference"]
    first, second = weights(chain / before.format(student=student, teacher=teacher)), weights(directory)
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_do_what_one_does(chain, student, teacher, problems, tmp_path):
    """The same samples, and but for rounding the same losses and weights; each rank's sampler has the newest weights."""
    done = launch(2, "tests/run_ranks.py", str(tmp_path), student, teacher, problems, "small")
    assert done.returncode == 0, done.stderr[-5000:]
    for stage in RUNS:
        for alone, together in zip(metrics(chain / stage), metrics(tmp_path / stage), strict=True):
            assert together == pytest.approx(alone, rel=1e-3, abs=1e-5), stage
        assert max(line["grad_norm"] for line in metrics(chain / stage)) > 0.01
        for name in ("samples.jsonl", "generation_config.json"):
            assert (chain / stage / name).read_text() == (tmp_path / stage / name).read_text()
        first, second = weights(chain / stage), weights(tmp_path / stage)
        assert first.keys() == second.keys()
        # AdamW moves a weight whose gradient is nothing but rounding by up to the learning rate, so a few may differ.
        distances = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
        assert (distances > 1e-4).sum() <= len(distances) / 1000 and distances.max() < 2e-3, stage


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_opd_logs_what_the_formulas_say_of_every_token(estimator, student, teacher, problems, tmp_path, monkeypatch):
    """KL, dense reward, entropy and the sampler's error, over all tokens of the first batch."""
    rollouts = []
    grade_with(monkeypatch, lambda batch, grader: rollouts.extend(batch))
    models = [AutoModelForCausalLM.from_pretrained(model).double().eval() for model in (student, teacher)]
    settings = dict(estimator=estimator, prompts_per_step=5, max_steps=1, micro_batch_tokens=60)
    opd.main(distill(student, teacher, problems, tmp_path / "out", **settings))
    [line] = metrics(tmp_path / "out")
    columns = []
    for rollout in rollouts:
        ids, sampled = torch.tensor([rollout.prompt_ids + rollout.response_ids]), torch.tensor(rollout.response_ids)
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1) for m in models)
        of_sampled = lambda x, sampled=sampled: x.gather(1, sampled[:, None]).squeeze(1)
        mismatch = (of_sampled(p) - torch.tensor(rollout.logprobs)).abs()
        columns.append((of_sampled(q - p), -(p.exp() * p).sum(1), (p.exp() * (p - q)).sum(1), mismatch))
    reward, entropy, kl, mismatch = map(torch.cat, zip(*columns))
    expected = {
        "reverse_kl": kl.mean() if estimator == "exact" else -reward.mean(), "entropy": entropy.mean(),
        "dense_reward": reward.mean(), "dense_reward_std": reward.std(correction=0),
        "dense_reward_min": reward.min(), "frac_dense_reward_outliers": (reward < -5).double().mean(),
        "accuracy": sum(rollout.correct for rollout in rollouts) / 10, "response_tokens": len(reward) / 10,
    }  # fmt: skip
    expected = {name: float(value) for name, value in expected.items()}
    assert {name: line[name] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert (reward < -5).any()  # otherwise the share of outliers is not tested
    assert line["sampler_mismatch"] == pytest.approx(mismatch.mean().item(), abs=1e-6)


def test_lineage_names_ancestors_and_every_problem_trained_on(chain, problems):
    every = lib.data.load_problems(problems)
    half = {name: {problem.id for problem in lib.data.half_of(every, name)} for name in ("1H", "2H")}
    lineage = lib.lineage.read_lineage(str(chain / "bridge"))
    assert lib.lineage.problems_trained_on(lineage) == half["1H"]
    assert lib.lineage.problems_trained_on(lib.lineage.read_lineage(str(chain / "student"))) == half["1H"] | half["2H"]
    assert lineage["stage"] == "opd" and lineage["parents"]["teacher"]["stage"] == "teacher_grpo"
    assert lineage["trained_on"] and set(lineage["trained_on"]) <= half["1H"]  # the problems that OPD itself sampled on
    assert lineage["parents"]["model"]["sha256"] == lib.lineage.read_lineage(str(chain / "warmup"))["sha256"]
    teacher = lib.lineage.last_rl_stage(lineage["parents"]["teacher"])
    assert teacher["stage"] == "teacher_grpo" and 0 <= teacher["first"]["reward"] <= 1
    assert lib.lineage.last_rl_stage(lineage)["sha256"] == teacher["sha256"]
    assert lib.lineage.last_rl_stage(lineage["parents"]["model"]["parents"]["model"]) is None
    made = lambda *trained_on, **parents: {"trained_on": trained_on, "parents": parents}
    above = made("b", model=made("c"), teacher=made("d"))  # labels that only a teacher or its ancestors used count
    assert lib.lineage.problems_trained_on(made("a", model=made(), teacher=above)) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("checkpoint, said", [
    ("teacher", "C1: the teacher was trained with RL, in which the mean reward went from"),
    ("bridge", "C1: the teacher has no RL of its own; its ancestor {chain}/teacher was trained with RL"),
    ("{student}", "C1: the teacher has no recorded RL stage, so C1 is unchecked."),
])  # fmt: skip
def test_what_is_not_on_record_is_said(checkpoint, said, chain, student, capsys):
    lineage = lib.lineage.read_lineage(str(chain / checkpoint.format(student=student)))
    opd.report_c1(lineage)
    lib.lineage.report_missing_history("it", lineage)
    printed = capsys.readouterr().out
    assert said.format(chain=chain) in printed
    assert ("it: no recorded history: held-out labels cannot be checked" in printed) == (lineage["path"] == student)


def test_stage_3_refuses_labels_trained_on_unless_it_is_the_replay(chain, problems, tmp_path):
    bridge = str(chain / "bridge")
    with pytest.raises(InputError, match="--model .* already trained on 6 of the 6 problems"):
        student_grpo.main(grpo(bridge, problems, tmp_path / "x", student_grpo.Config, half="1H"))
    with pytest.raises(InputError, match="--replay: .* was trained on none"):
        student_grpo.main(grpo(bridge, problems, tmp_path / "x", student_grpo.Config, half="2H", replay=True))
    assert os.listdir(tmp_path) == []
    student_grpo.main(
        grpo(bridge, problems, tmp_path / "replay", student_grpo.Config, half="1H", replay=True, **CHAIN_GRPO)
    )
    replay, fresh = record(tmp_path / "replay"), record(chain / "student")
    differing = {name for name in fresh["config"] if fresh["config"][name] != replay["config"][name]}
    assert differing == {"half", "replay", "out"} and fresh["steps"] == replay["steps"]


def test_stage_3_is_stage_1(student, problems, tmp_path, capsys):
    """The matched protocol: the same checkpoint, half and settings give the same weights from either script."""
    teacher_grpo.main(grpo(student, problems, tmp_path / "direct", half="2H"))
    student_grpo.main(grpo(student, problems, tmp_path / "stage3", student_grpo.Config, half="2H"))
    assert_same_weights(tmp_path / "direct", tmp_path / "stage3")
    assert metrics(tmp_path / "direct") == metrics(tmp_path / "stage3")
    own = {field.name for field in dataclasses.fields(student_grpo.Config)}
    assert f"--model {student}: no recorded history" in capsys.readouterr().out
    assert own - {field.name for field in dataclasses.fields(teacher_grpo.Config)} == {"replay"}


@pytest.mark.parametrize("stage, settings, key, factor", [
    ("warmup", {}, "forward_kl", 0.7), ("warmup", dict(loss="sft"), "cross_entropy", 0.9),
    ("bridge", dict(epochs=6), "reverse_kl", 0.7), ("bridge", dict(epochs=6, estimator="sampled"), "reverse_kl", 0.95),
])  # fmt: skip
def test_distillation_lowers_its_loss(stage, settings, key, factor, student, teacher, problems, tmp_path):
    settings = dict(max_steps=20) | settings if stage == "warmup" else settings
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", **settings)
    script.main(config)
    values = [line[key] for line in metrics(tmp_path / "out")]
    assert sum(values[-3:]) / 3 < factor * values[0], values


@pytest.mark.parametrize("stage", ["teacher", "warmup", "bridge"])
def test_the_split_into_micro_batches_shows_in_no_number(stage, student, teacher, problems, tmp_path, monkeypatch):
    """Of those that a stage logs, with the gradient's norm: tokens are counted once for all micro-batches."""
    grade_with(monkeypatch)
    for name, tokens in (("split", 45), ("whole", 10**6)):
        settings = dict(max_steps=2, micro_batch_tokens=tokens)
        script, config = RUNS[stage](student, teacher, problems, tmp_path / name, **settings)
        script.main(config)
    for split, whole in zip(metrics(tmp_path / "split"), metrics(tmp_path / "whole"), strict=True):
        assert split == pytest.approx(whole, rel=1e-3, abs=1e-4) and whole["grad_norm"] > 1e-3


@pytest.mark.parametrize("stage", ["teacher", "bridge"])
def test_every_step_samples_anew(stage, student, teacher, problems, tmp_path, monkeypatch):
    """A problem that comes again gets other responses, and another seed of the run gives others from the start."""
    groups = []  # of each problem in each batch: its id and its responses

    def keep(rollouts, grader):
        for rollout in rollouts:
            if rollout.sample == 0:
                groups.append([rollout.problem.id])
            groups[-1].append(rollout.response_ids)

    grade_with(monkeypatch, keep)
    for seed in (0, 1):
        script, config = RUNS[stage](student, teacher, problems, tmp_path / str(seed), seed=seed, epochs=2)
        script.main(config)
    # Short responses may come twice by chance. Half of the groups would, if a pass or a seed made no difference.
    assert len(groups) >= 24 and len(set(map(str, groups))) > 0.7 * len(groups)


@pytest.mark.parametrize("stage", RUNS)
def test_every_stage_follows_its_settings(stage, student, teacher, problems, tmp_path, monkeypatch):
    """An end text ends responses like the end-of-sequence token, and is the last token that is trained; and AdamW's."""
    trained, made, adamw, clip = [], [], torch.optim.AdamW, torch.nn.utils.clip_grad_norm_
    for module in (teacher_grpo, fkl_warmup, opd):
        recording = lambda rollouts, *rest, make=module.make_batches: trained.extend(rollouts) or make(rollouts, *rest)
        monkeypatch.setattr(module, "make_batches", recording)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k) or adamw(*a, **k))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: made.append(limit) or clip(p, limit))
    settings = dict(lr=3e-3, lr_schedule="cosine", lr_warmup_steps=2, weight_decay=0.03, max_grad_norm=0.3)
    settings |= dict(max_steps=4, stop=(":",), temperature=0.5)
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", **settings)
    script.main(config)
    assert made[0]["lr"] == 3e-3 and made[0]["weight_decay"] == 0.03 and set(made[1:]) == {0.3}
    lines, rates = metrics(tmp_path / "out"), [common.learning_rate(step, 4, 3e-3, "cosine", 2) for step in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(rates) and len(set(rates)) > 2
    # Sampler, old policy (from the second mini-batch on) and policy in training are all at the sampling temperature.
    for line in lines if stage in ("teacher", "student") else ():
        assert line["sampler_mismatch_max"] < 1e-4 and line["importance_clipped"] == 0
    stops = lib.data.stop_tokens(toy.make_tokenizer(), (":",))
    for rollout in trained:
        ends = [token in stops | {0, 1} for token in rollout.response_ids]
        assert not any(ends[:-1]) and ends[-1] == (rollout.finish_reason == "stop")
    assert any(rollout.response_ids[-1] in stops for rollout in trained)


def test_a_token_that_the_tokenizer_does_not_have_ends_a_response(problems, teacher, tmp_path, monkeypatch):
    """Output matrices have more rows than there are tokens, and a random model samples those as often as others."""
    model = tiny_model(seed=3, vocab_size=len(toy.VOCABULARY) + 6, head_dim=32)
    model.save_pretrained(tmp_path / "padded")
    toy.make_tokenizer().save_pretrained(tmp_path / "padded")
    rollouts = []
    grade_with(monkeypatch, lambda batch, grader: rollouts.extend(batch))
    opd.main(distill(str(tmp_path / "padded"), teacher, problems, tmp_path / "out", max_steps=2, rollouts_per_prompt=8))
    assert max(token for rollout in rollouts for token in rollout.response_ids) < len(toy.VOCABULARY)
    cut = [r for r in rollouts if r.finish_reason == "length" and len(r.response_ids) < 8]
    assert cut and all(len(r.response_ids) == len(r.logprobs) for r in cut)
    assert all(not line["skipped_steps"] for line in metrics(tmp_path / "out"))


SETS = ("math500", "aime24", "aime25")
TABLE_8 = dict(lr=1e-6, epochs=10, mini_batch_prompts=8, max_prompt_tokens=3072, max_response_tokens=16384, kl_coef=5e-4,
               clip_ratio=0.2, max_grad_norm=1.0, require_finished=True, normalize_by_std=True, importance_cap=2)  # fmt: skip
TABLE_9 = dict(lr=1e-6, epochs=1, max_prompt_tokens=2048, max_response_tokens=16384)
EARLIER_CODE = dict(
    weight_decay=0.1, lr_warmup_steps=0, thinking=False, rollouts_per_prompt=8, temperature=1.0, exclude=SETS
)
DEFAULTS = {
    teacher_grpo: {**TABLE_8, **EARLIER_CODE, "half": "full", "prompts_per_step": 32, "inner_epochs": 1},
    student_grpo: {**TABLE_8, **EARLIER_CODE, "half": "2H", "replay": False},
    fkl_warmup: {**TABLE_9, **EARLIER_CODE, "mini_batch_prompts": 64, "loss": "fkl", "keep": "all"},
    opd: {**TABLE_9, **EARLIER_CODE, "prompts_per_step": 64, "estimator": "exact"},
    evaluate: dict(k=16, temperature=0.7, top_p=0.8, top_k=20, thinking=False, data=SETS, max_prompt_tokens=3072,
                   max_response_tokens=16384),
}  # fmt: skip


@pytest.mark.parametrize("script", DEFAULTS, ids=lambda script: script.__name__)
def test_defaults_are_those_of_the_paper(script):
    """Tables 8 and 9, App. F, and for what they leave open the authors' code for their earlier papers."""
    found = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert {name: found[name] for name in DEFAULTS[script]} == DEFAULTS[script]


@pytest.mark.rest
def test_bfloat16_on_a_cpu_trains_float32_weights(teacher, problems, tmp_path):
    """Samples' log-probabilities differ by rounding alone, and weights keep updates that bfloat16 would round away."""
    try:
        teacher_grpo.main(grpo(teacher, problems, tmp_path / "out", max_steps=2, lr=1e-5, cpu_bfloat16=True))
    finally:
        torch.distributed.destroy_process_group()
    assert 0 < metrics(tmp_path / "out")[0]["sampler_mismatch"] < 0.1
    before, after = weights(teacher), weights(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in after.values())
    assert 0 < max((after[name] - before[name]).abs().max().item() for name in before) < 5e-5
