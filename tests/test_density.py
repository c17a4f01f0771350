"""The token-reward heatmap: the dense reward of each token, and how often its lowest value is at a wrong step."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import Problem, Rollout
from experiments import density, toy
from lib import data


@pytest.mark.parametrize(
    "response, expected",
    [
        ("Carefully:7*8=6+3=9-4=5*2=0 \\boxed{0}<|im_end|>", []),
        ("Roughly:7*8=6+3=1-4=7*2=4 \\boxed{4}<|im_end|>", [9]),  # the two steps after 6+3=1 are right
        ("Roughly:7*8=5+3=8-4=5*2=0 \\boxed{0}<|im_end|>", [5, 13]),
        ("Guess: \\boxed{4}<|im_end|>", None),
        ("Roughly:7*8=6+2=8-4=4*2=8 \\boxed{8}<|im_end|>", None),  # copies a wrong digit
        ("Roughly:7*8=6+3=1 \\boxed{1}<|im_end|>", None),  # leaves two steps out
        ("Roughly:7*8=6+3=9-4=5*2=0 \\boxed{1}<|im_end|>", None),  # has another digit in the box
        ("Roughly:7*8=6+3=1-4=7*2=4 \\boxed{4}", None),  # does not end
    ],
)
def test_where_a_step_is_wrong(response, expected):
    tokenizer = toy.make_tokenizer()
    tokens = tokenizer.batch_decode([[token] for token in tokenizer(response)["input_ids"]])
    assert density.wrong_steps(tokens, "7*8+3-4*2") == expected


def test_the_share_of_lowest_rewards_at_mistakes_is_over_problems():
    """Of problem a one response in two has its lowest reward at one of its mistakes, of problem b the only response."""
    rollouts = [Rollout(Problem(name, "?", "0"), 0, [0], [1] * 4, [0.0] * 4, "stop", "") for name in "aab"]
    rewards = [torch.tensor([-5.0 if place == at else -1.0 for place in range(4)]) for at in (3, 0, 2)]
    assert density.lowest_at_a_mistake(rollouts, [[1, 3], [1, 3], [2]], rewards) == pytest.approx((0.75, 0.25))


def test_logprobs_are_those_of_the_whole_model(student, problems):
    """Against transformers' own logits, for responses of different lengths in one pack."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(student), data.load_problems(problems)
    prompts, rng = data.tokenize_prompts(tokenizer, loaded, toy.WORDING), random.Random(0)
    rollouts = [
        Rollout(p, 0, prompts[p.id], [rng.randrange(26) for _ in range(n)], [0.0] * n, "stop", "")
        for n, p in zip((1, 7, 12), loaded)
    ]
    cfg = density.Config(student, student, student, student, problems, out="")
    model = AutoModelForCausalLM.from_pretrained(student)
    for rollout, found in zip(rollouts, density.logprobs_under(student, rollouts, cfg, len(tokenizer)), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        expected = logprobs.gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_long_and_hostile_responses_can_be_drawn(tmp_path):
    """Of thousands of tokens the lines around the lowest reward are drawn, and control characters as their names."""
    hostile, tokenizer = ["\u202e", "$data", "\x1b[2J", "<b>", "\n", " "], toy.make_tokenizer()
    tokenizer.add_tokens(hostile)
    heights = []
    for count in (1, 500):
        ids = tokenizer.convert_tokens_to_ids(hostile) * count
        rollout = Rollout(Problem("p", "$1$\u202e", "$2"), 0, [2], ids, [0.0] * len(ids), "length", "")
        assert density.cell_texts(rollout, tokenizer) == ["\\u202e", "$data", "\\x1b[2J", "<b>", "⏎", "␣"] * count
        shown = density.Shown("title", rollout, torch.linspace(0, -9, len(ids)), [1])
        density.draw([[shown]], tokenizer, "", tmp_path / "density.png")
        heights.append(int.from_bytes((tmp_path / "density.png").read_bytes()[20:24], "big"))
    assert [density.nats(x) for x in (-0.04, -0.06, 0.5, -7.91, -10.04)] == ["0", "−0.1", "0.5", "−7.9", "−10"]
    assert heights[0] < heights[1] < heights[0] + 400


def test_it_runs_on_checkpoints(student, teacher, problems, tmp_path, monkeypatch, capsys):
    """First as it is: random models give no step-by-step answers, so there is a picture and nothing is claimed. Then
    with demonstrations of the rough habit as the student's answers, where the raw teacher is the student itself.
    """
    drawn = []
    monkeypatch.setattr(density, "draw", lambda groups, tokenizer, said, picture: drawn.append((groups, said)))
    settings = dict(max_response_tokens=24, max_prompt_tokens=64, tried=12, problems=2, engine="torch")
    cfg = density.Config(student, teacher, student, teacher, problems, out=str(tmp_path), **settings)
    density.main(cfg)
    (groups, said) = drawn.pop()
    assert said == "" and [len(rows) for rows in groups] == [3, 3]
    by_trained, by_raw, bridged = groups[0]
    assert by_trained.rewards.mean() < -0.1 and by_raw.rewards.abs().max() == 0 and bridged.rewards.abs().max() < 1e-4

    def sample(cfg, loaded, tokenizer, prompts):
        rng = random.Random(0)
        rollouts = toy.as_rollouts(tokenizer, loaded, [toy.demonstrate(p, "Roughly:", rng) for p in loaded])
        for rollout in rollouts:
            rollout.correct = rollout.text.endswith(f"{{{rollout.problem.answer}}}")
        return rollouts, rollouts[:1], rollouts[:1]

    monkeypatch.setattr(density, "sample", sample)
    density.main(cfg)
    assert (
        "0 ± 0 % with the raw one" in capsys.readouterr().out
    )  # the raw teacher's rewards are all 0 here, and the first token counts as lowest
    [[(_, _, _, mistakes), *_]], said = drawn.pop()
    assert mistakes and said.startswith("Wrong steps are underlined. The RL'd teacher's lowest reward is at one of")
