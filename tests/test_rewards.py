"""What a policy might try to be paid for: answers in the prompt, several boxes, responses that never end.

And rewards of the user's own, through the real scripts.
"""

import hashlib
import json
import traceback
from pathlib import Path

import pytest
import torch
from helpers import distill, grpo, metrics, warmup

import evaluate
import fkl_warmup
import lib.lineage
import lib.rollouts
import opd
import teacher_grpo
from common import InputError, Problem, Rollout
from lib.rewards import Reward, grade
from lib.verifier import Verifier

RESPONSES = {  # text, whether it ended, whether it is to be paid for: the answer is 4
    "right": ("so \\boxed{4}", True, True),
    "wrong": ("so \\boxed{5}", True, False),
    "right, but cut at the limit": ("so \\boxed{4}", False, False),
    "right first, wrong last": ("\\boxed{4} or rather \\boxed{5}", True, False),
    "wrong first, right last": ("\\boxed{5} or rather \\boxed{4}", True, True),
    "every digit, in boxes": ("".join(f"\\boxed{{{digit}}}" for digit in range(10)), True, False),
    "every digit, in one box": ("\\boxed{0,1,2,3,4,5,6,7,8,9}", True, False),
    "quoted, not answered": ("the problem says \\boxed{4}, and I say: \\boxed{}", True, False),
    "nothing": ("", True, False),
}


@pytest.fixture
def learnt_from(monkeypatch) -> list[list[Rollout]]:
    """The rollouts of each of GRPO's steps."""
    seen, update = [], teacher_grpo.update
    recording = lambda p, ref, opt, rollouts, *rest: seen.append(rollouts) or update(p, ref, opt, rollouts, *rest)
    monkeypatch.setattr(teacher_grpo, "update", recording)
    return seen


@pytest.mark.parametrize("require_finished, normalize", [(True, True), (False, False)])
def test_what_is_rewarded(student, problems, tmp_path, monkeypatch, learnt_from, require_finished, normalize):
    """Through Stage 1 itself, on groups of these responses. Every prompt holds its own answer in a box.

    The answer to the last problem of the batch is another one, so that none of its responses is paid for.
    """

    def sample(engine, chosen, prompts, *rest, **options):
        return [
            Rollout(Problem(p.id, "Is it \\boxed{4}?", "4" if p is not chosen[-1] else "17"), i, prompts[p.id], [5, 1],
                    [-1.0, -1.0], "stop" if finished else "length", text)
            for p in chosen for i, (text, finished, _) in enumerate(RESPONSES.values())
        ]  # fmt: skip

    monkeypatch.setattr(teacher_grpo, "sample_rollouts", sample)
    settings = dict(require_finished=require_finished, normalize_by_std=normalize, max_steps=1)
    teacher_grpo.main(grpo(student, problems, tmp_path / "out", rollouts_per_prompt=len(RESPONSES), **settings))
    paid = [right or (not require_finished and "cut" in name) for name, (_, _, right) in RESPONSES.items()]
    [line] = metrics(tmp_path / "out")
    share = sum(paid) / len(paid)
    *groups, unpaid = torch.tensor([rollout.advantage for rollout in learnt_from[0]]).view(-1, len(RESPONSES))
    assert len(groups) == 3 and not unpaid.any()
    assert line["reward"] == pytest.approx(share * 3 / 4) and line["frac_reward_zero_std"] == 1 / 4
    assert line["truncated"] == pytest.approx(1 / len(RESPONSES))
    scale = (share * (1 - share)) ** 0.5 if normalize else 1.0
    for group in groups:
        assert group.tolist() == pytest.approx([(value - share) / scale for value in paid], abs=1e-4)


def test_the_prompt_is_never_graded():
    texts = ("", "as was said above", "\\boxed{5}", "\\boxed{4}")
    rollouts = [rollout(text, prompt="The answer is \\boxed{4}.") for text in texts]
    with Verifier() as verifier:
        grade(rollouts, verifier)
    assert [rollout.correct for rollout in rollouts] == [False, False, False, True]


def rollout(text, finish_reason="stop", tokens=3, prompt="prompt") -> Rollout:
    problem = Problem("x", prompt, "4", {"answer": "4"})
    return Rollout(problem, 0, [4], [5] * tokens, [-1.0] * tokens, finish_reason, text)


# A reward of one's own

FEW_ONES = """
def few_ones(row, response):
    assert isinstance(row["answer"], str) and row["source"] == "mine"
    row["source"] = "what one call changes in the row, the next one does not see"
    return 1.5 - 0.5 * response.count("1")
"""


def few_ones(text: str) -> float:
    return 1.5 - 0.5 * text.count("1")


@pytest.fixture
def mine(problems, tmp_path):
    """The training problems with another column, which only the reward reads, and the reward."""
    rows = [{**json.loads(line), "source": "mine"} for line in Path(problems).read_text().splitlines()]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(FEW_ONES)
    return str(tmp_path / "mine.jsonl"), f"{tmp_path}/rewards.py:few_ones"


def test_grpo_trains_on_a_reward_of_ones_own(teacher, mine, tmp_path, learnt_from):
    """Unchanged, for cut responses, too, whatever --require-finished says."""
    data, reward = mine
    settings = dict(reward=reward, prompts_per_step=6, rollouts_per_prompt=8, require_finished=True)
    teacher_grpo.main(grpo(teacher, data, tmp_path / "out", **settings))
    rewards = [line["reward"] for line in metrics(tmp_path / "out")]
    for line, rollouts in zip(rewards, learnt_from, strict=True):
        values = [few_ones(rollout.text) for rollout in rollouts]
        assert [rollout.reward for rollout in rollouts] == values and line == pytest.approx(sum(values) / len(values))
        assert [rollout.correct for rollout in rollouts] == [value >= 1 for value in values]
        assert {rollout.how for rollout in rollouts} == {"reward"}
    assert any(rollout.finish_reason == "length" for rollout in learnt_from[0])
    lineage = lib.lineage.read_lineage(str(tmp_path / "out"))
    assert lineage["config"]["reward"] == reward
    assert lineage["sessions"][0]["files"][reward] == hashlib.sha256((tmp_path / "rewards.py").read_bytes()).hexdigest()


def graded(path: Path, source: str, rollouts: list[Rollout]) -> list[Rollout]:
    path.write_text(source)
    with Reward(f"{path}:score") as reward:
        grade(rollouts, reward)
    return rollouts


def test_a_reward_may_ask_for_the_verdict_the_length_and_how_the_response_ended(tmp_path, monkeypatch):
    rollouts = [rollout("\\boxed{4.0}", tokens=5), rollout("4", "length", tokens=7), rollout("\\boxed{5}")]
    source = "def score(row, response, finish_reason, correct, *, tokens):\n    return correct - tokens * (finish_reason == 'length')\n"
    graded(tmp_path / "three.py", source, rollouts)
    for require_finished in (True, False):
        assert teacher_grpo.rewards_of(rollouts, require_finished).tolist() == [1, -7, 0]
    assert [(r.correct, r.how) for r in rollouts] == [(True, "fast"), (False, "no_answer"), (False, "fast")]
    # Without the question there is no verifier. What is right is then what earns 1, and names mean nothing in the first two places.
    monkeypatch.setattr("lib.rewards.Verifier", None)
    graded(tmp_path / "two.py", "def score(correct, tokens):\n    return 2 * (tokens == '4')\n", rollouts)
    assert [(r.reward, r.correct, r.how) for r in rollouts] == [(v, v > 0, "reward") for v in (0, 2, 0)]


def test_a_reward_that_fails_shows_its_own_traceback(tmp_path):
    """With a note that names the problem; and a value that is no finite number is an error."""
    with pytest.raises(ZeroDivisionError) as caught:
        graded(tmp_path / "fails.py", "def score(row, response):\n    return 1 / len(response)\n", [rollout("")])
    printed = "".join(traceback.format_exception(caught.value))
    assert f'{tmp_path}/fails.py", line 2, in score' in printed and "return 1 / len(response)" in printed
    assert f"--reward {tmp_path}/fails.py:score failed on a response to problem x" in printed
    with pytest.raises(ValueError, match="must be a finite number"):
        graded(tmp_path / "nan.py", "def score(row, response):\n    return float('nan')\n", [rollout("")])


def test_every_script_grades_with_it(student, teacher, mine, tmp_path, monkeypatch, capsys):
    """Accuracy and pass@k count values of 1 or more, avg@k is the mean value, --keep correct keeps finished ones of 1 or more."""
    data, reward = mine
    seen, sample = [], lib.rollouts.sample_rollouts
    for module in (opd, fkl_warmup, evaluate):
        monkeypatch.setattr(module, "sample_rollouts", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])

    opd.main(distill(student, teacher, data, tmp_path / "bridge", reward=reward, max_steps=1))
    values = [few_ones(rollout.text) for rollout in seen[-1]]
    [line] = metrics(tmp_path / "bridge")
    assert line["accuracy"] == sum(value >= 1 for value in values) / len(values)

    cache = dict(rollouts=str(tmp_path / "rollouts"), loss="sft", keep="correct")
    fkl_warmup.main(warmup(student, teacher, data, tmp_path / "warmup", **cache, reward=reward))
    kept = [rollout for rollout in seen[-1] if few_ones(rollout.text) >= 1 and rollout.finish_reason == "stop"]
    assert f"{len(kept)} right and finished; learning from {len(kept)}" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds other rollouts .with reward = "):
        fkl_warmup.main(warmup(student, teacher, data, tmp_path / "other", **cache))

    report = evaluate.Config(
        out=str(tmp_path / "report"), models=(student,), data=(data,), k=3, max_response_tokens=8, reward=reward,
    )  # fmt: skip

    def result():
        evaluate.main(report)
        return json.loads((tmp_path / "report" / "results.json").read_text())["results"]["student"]["mine"]

    found = result()
    values = torch.tensor([few_ones(rollout.text) for rollout in seen[-1]]).view(-1, 3)
    assert found["avg"] == pytest.approx(values.mean().item())
    assert found["pass"] == pytest.approx((values >= 1).any(dim=1).float().mean().item())
    # With another file under the old name the responses are graded again, with their lengths, and not sampled again.
    sampled = len(seen)
    (tmp_path / "rewards.py").write_text("def few_ones(row, response, tokens):\n    return -0.01 * tokens\n")
    tokens = [len(rollout.response_ids) for rollout in seen[-1]]
    assert result()["avg"] == pytest.approx(-0.01 * sum(tokens) / len(tokens)) and len(seen) == sampled
