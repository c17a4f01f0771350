"""The word problems and the pruned student of experiments/real.py, without the pretrained model."""

import collections
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model, write_checkpoint
from safetensors.torch import load_file

import common
import fkl_warmup
import lib.data
import lib.lineage
from common import Problem, Rollout
from experiments import real
from lib.files import json_lines

SIZES = dict(vocab_size=64, family="Llama", hidden_size=32, layers=6, intermediate_size=48)


def asked_for(row: dict) -> tuple[int, str, int]:
    """The calculation that the words of a problem ask for, with a sum's larger number first."""
    first, second = map(int, re.findall(r"\d+", row["problem"]))
    operation = "+" if "gets" in row["problem"] else "-"
    assert operation == "+" or first > second
    return max(first, second), operation, min(first, second)


def test_the_files_share_no_calculation_in_any_order_and_no_problem_and_their_answers_are_right(tmp_path):
    for seed in (0, 1):
        files = real.draw_problems(seed)
        assert {name: len(problems) for name, problems in files.items()} == {**real.SIZES, "healing": real.HEALING}
        every = [row for problems in files.values() for row in problems]
        for row in every:
            first, operation, second = row["calculation"].split()
            assert (int(first), operation, int(second)) == asked_for(row)
            assert int(row["answer"]) == int(first) + int(second) * {"+": 1, "-": -1}[operation]
        calculations = collections.Counter(map(asked_for, every))
        assert set(calculations) <= set(real.calculations()) and set(calculations.values()) == {1}
        real.write_rows(tmp_path / "every.jsonl", every)
        assert len({problem.id for problem in lib.data.load_problems(str(tmp_path / "every.jsonl"))}) == len(every)


def test_the_seed_decides_all_problems_but_those_of_the_healing(tmp_path):
    real.main(real.Config(out=str(tmp_path), teacher="none", student="none", seed=0))
    first = {path.stem: json_lines(path) for path in tmp_path.iterdir()}
    again, other = map(real.draw_problems, (0, 1))
    healing = again.pop("healing")
    assert first == again and healing == other.pop("healing")
    assert all(first[name] != other[name] for name in real.SIZES)


def random_rollouts(count: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(64, (count, 12), generator=generator).tolist()
    return [Rollout(Problem(str(n), "", ""), 0, ids[:4], ids[4:], [0.0] * 8, "stop", "") for n, ids in enumerate(texts)]


def without_effect(model, *numbers: int):
    """The model, with layers of which attention and MLP add nothing to the stream past them."""
    for layer in (model.model.layers[number] for number in numbers):
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def test_layers_that_do_nothing_are_the_first_to_be_removed(capsys):
    assert real.choose_layers(without_effect(tiny_model(**SIZES), 3), random_rollouts(6), 64, 1) == [3]
    assert "without layers [3] the KL is 0.000 nats a token" in capsys.readouterr().out
    removed = real.choose_layers(without_effect(tiny_model(**SIZES), 4, 1), random_rollouts(6), 64, 3)
    assert set(removed[:2]) == {1, 4} and len(set(removed)) == 3


def test_the_reported_kl_is_that_of_the_models(capsys):
    """Of the whole model to the one that is left, in a plain forward pass of each, over the response tokens."""
    model, rollouts = tiny_model(**SIZES), random_rollouts(4)
    removed = real.choose_layers(model, rollouts, 64, 2)
    whole, pruned = tiny_model(**SIZES), tiny_model(**SIZES)
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[n] for n in range(6) if n not in removed)
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids for rollout in rollouts])
    with torch.no_grad():
        p, q = (m(ids, use_cache=False).logits[:, 3:-1].log_softmax(-1) for m in (whole, pruned))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 0.01 and f"the KL is {kl:.3f} nats a token" in capsys.readouterr().out


def test_the_student_is_the_teacher_without_layers_and_has_no_history(tmp_path, monkeypatch):
    """The healing is a run of Stage 2a, here in this process."""
    sizes = {**SIZES, "vocab_size": 26}
    teacher = write_checkpoint(tmp_path / "teacher", **sizes)
    without_effect(tiny_model(**sizes), 1, 4).save_pretrained(teacher)
    weights = load_file(f"{teacher}/model.safetensors")

    def in_this_process(words, check):
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.setattr(common, "exit_process", lambda status: status and pytest.fail(f"exit status {status}"))
        common.cli(fkl_warmup.main, fkl_warmup.Config)

    monkeypatch.setattr(real, "subprocess", SimpleNamespace(run=in_this_process))
    student, made = tmp_path / "raw_student", tmp_path / "raw_student.made"
    real.make_student(real.Config(out="", teacher=teacher, drop_layers=2), student, real.draw_problems(0)["healing"])
    pruned, healed = (load_file(path / "model.safetensors") for path in (made / "pruned", student))
    kept = (0, 2, 3, 5)
    for name, value in pruned.items():
        number = re.search(r"layers\.(\d+)", name)
        before = name.replace(number[0], f"layers.{kept[int(number[1])]}") if number else name
        assert torch.equal(value, weights[before])
    assert healed.keys() == pruned.keys() and any(not torch.equal(healed[name], pruned[name]) for name in pruned)
    assert lib.lineage.read_lineage(str(student)).get("stage") is None
    healing = json.loads((made / "healing" / "run.json").read_text())["config"]
    examples = "".join(f"{text}\n" for text in re.findall(r"    (.* = \\boxed.*)\n", real.__doc__))
    assert healing["prompt"] == examples + "{problem}" and healing["stop"] == ["\n"]
    assert healing["data"] == str(made / "healing.jsonl") and not healing["chat_template"]
