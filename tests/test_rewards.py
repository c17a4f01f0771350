"""What a policy might try to be paid for: answers in the prompt, several boxes, responses that never end.

And rewards of the user's own, through the real scripts.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from test_stages import distill, grpo, metrics, warmup

import evaluate
import fkl_warmup
import lib.lineage
import lib.rollouts
import lib.runs
import opd
import teacher_grpo
from common import InputError, Problem, Rollout
from experiments import audit
from lib import plots
from lib.rewards import make_grader
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


@pytest.mark.parametrize("normalize", [True, False], ids=["", "not normalised"])
@pytest.mark.parametrize("require_finished", [True, False], ids=["", "cut ones too"])
def test_what_is_rewarded(student, problems, tmp_path, monkeypatch, require_finished, normalize):
    """Through Stage 1 itself, on groups of these responses. Every prompt holds its own answer in a box.

    The answer to the last problem of the batch is another one, so that none of its responses is paid for.
    """

    def sample(engine, chosen, prompts, n, *rest, **options):
        assert n == len(RESPONSES)
        return [
            Rollout(Problem(p.id, "Is it \\boxed{4}?", "4" if p is not chosen[-1] else "17"), i, prompts[p.id], [5, 1],
                    [-1.0, -1.0], "stop" if finished else "length", text)
            for p in chosen for i, (text, finished, _) in enumerate(RESPONSES.values())
        ]  # fmt: skip

    advantages = []
    update = teacher_grpo.update

    def seen(policy, reference, optimizer, rollouts, *rest):
        advantages.append(torch.tensor([rollout.advantage for rollout in rollouts]).view(-1, len(RESPONSES)))
        return update(policy, reference, optimizer, rollouts, *rest)

    monkeypatch.setattr(teacher_grpo, "sample_rollouts", sample)
    monkeypatch.setattr(teacher_grpo, "update", seen)
    teacher_grpo.main(
        grpo(
            student,
            problems,
            tmp_path / "out",
            rollouts_per_prompt=len(RESPONSES),
            max_steps=1,
            require_finished=require_finished,
            normalize_by_std=normalize,
        )
    )
    paid = [right or (not require_finished and "cut" in name) for name, (_, _, right) in RESPONSES.items()]
    [line] = metrics(tmp_path / "out")
    share = sum(paid) / len(paid)
    *groups, unpaid = advantages[0]
    assert len(groups) == 3 and not unpaid.any()
    assert line["reward"] == pytest.approx(share * 3 / 4) and line["frac_reward_zero_std"] == 1 / 4
    assert line["truncated"] == pytest.approx(1 / len(RESPONSES))
    scale = (share * (1 - share)) ** 0.5 if normalize else 1.0
    for group in groups:
        assert group.tolist() == pytest.approx([(value - share) / scale for value in paid], abs=1e-4)


def test_the_prompt_is_never_graded():
    """Nor what a response says of itself in fields other than its text."""
    rollouts = [
        Rollout(Problem("x", "The answer is \\boxed{4}.", "4"), 0, [4], [], [], "stop", text)
        for text in ("", "as was said above", "\\boxed{5}", "\\boxed{4}")
    ]
    with Verifier() as verifier:
        lib.rollouts.grade(rollouts, verifier)
    assert [rollout.correct for rollout in rollouts] == [False, False, False, True]


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


def test_grpo_trains_on_a_reward_of_ones_own(teacher, mine, tmp_path, monkeypatch):
    data, reward = mine
    seen, update = [], teacher_grpo.update
    monkeypatch.setattr(
        teacher_grpo,
        "update",
        lambda p, ref, opt, rollouts, *rest: seen.append(rollouts) or update(p, ref, opt, rollouts, *rest),
    )
    settings = dict(reward=reward, passes=6, prompts_per_step=6, rollouts_per_prompt=8, require_finished=False)
    teacher_grpo.main(grpo(teacher, data, tmp_path / "out", **settings))
    rewards = [line["reward"] for line in metrics(tmp_path / "out")]
    for line, rollouts in zip(rewards, seen, strict=True):
        values = [few_ones(rollout.text) for rollout in rollouts]
        assert [rollout.reward for rollout in rollouts] == values and line == pytest.approx(sum(values) / len(values))
        assert [rollout.correct for rollout in rollouts] == [value >= 1 for value in values]
        assert {rollout.how for rollout in rollouts} == {"reward"}
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.1  # it learns to write fewer of them
    lineage = lib.lineage.read_lineage(str(tmp_path / "out"))
    path = reward.removesuffix(":few_ones")
    assert lineage["config"]["reward"] == reward
    assert lineage["reward_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert not (tmp_path / "__pycache__").exists()
    other = {**lineage, "reward_sha256": None}
    assert audit.differences(lineage, other) == {"reward file": (lineage["reward_sha256"], None)}


def test_every_script_grades_with_it(student, teacher, mine, tmp_path, monkeypatch, capsys):
    """Accuracy and pass@k count values of 1 or more, avg@k is the mean value, --keep correct keeps values of 1 or more."""
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
    kept = [rollout for rollout in seen[-1] if few_ones(rollout.text) >= 1]
    assert f"{len(kept)} correct; learning from {len(kept)}" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds other rollouts .with reward_sha256 = "):
        fkl_warmup.main(warmup(student, teacher, data, tmp_path / "other", **cache))

    report = evaluate.Config(
        out=str(tmp_path / "report"), models=(student,), data=(data,), k=3, max_response_tokens=8, reward=reward,
    )  # fmt: skip
    evaluate.main(report)
    values = torch.tensor([few_ones(rollout.text) for rollout in seen[-1]]).view(-1, 3)
    result = json.loads((tmp_path / "report" / "results.json").read_text())["results"]["student"]["mine"]
    assert result["avg"] == pytest.approx(values.mean().item())
    assert result["pass"] == pytest.approx((values >= 1).any(dim=1).float().mean().item())
    table = (tmp_path / "report" / "table.md").read_text()
    assert f"avg is the mean of --reward {reward}, times 100." in table
    sampled = len(seen)
    evaluate.main(report)
    assert len(seen) == sampled
    # With another file under the old name the responses are graded again, and not sampled again.
    Path(reward.removesuffix(":few_ones")).write_text("def few_ones(row, response):\n    return 0.5\n")
    evaluate.main(report)
    result = json.loads((tmp_path / "report" / "results.json").read_text())["results"]["student"]["mine"]
    assert len(seen) == sampled and result["avg"] == 0.5


def test_a_run_is_not_resumed_with_another_reward(teacher, mine, tmp_path, monkeypatch):
    data, reward = mine
    config = grpo(teacher, data, tmp_path / "out", reward=reward)
    log = lib.runs.Run.log

    def die(run, step, *arguments, **options):
        if step == 1:
            raise KeyboardInterrupt
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib.runs.Run, "log", die)
        teacher_grpo.main(config)
    Path(reward.removesuffix(":few_ones")).write_text(FEW_ONES.replace("1.5", "2.5"))
    with pytest.raises(InputError, match="--resume: the file of --reward .* is not what it was"):
        teacher_grpo.main(dataclasses.replace(config, resume=True))
    Path(reward.removesuffix(":few_ones")).write_text(FEW_ONES)
    teacher_grpo.main(dataclasses.replace(config, resume=True))


def test_pictures_have_room_for_rewards_below_0_and_above_1(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    plots.draw_bars(
        {"a": {"b": (2.5, 0.1)}, "c": {"b": (-0.5, 0.1)}}, "title", tmp_path / "bars.png", {"a": "large", "c": "small"}
    )
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "reward": {i - 3}}}\n' for i in range(3)))
    plots.draw_curves({"a": str(tmp_path)}, tmp_path / "curves.png")
    bars, curves = (figure.axes[0] for figure in figures)
    assert bars.get_xlim() == pytest.approx((-54, 270)) and curves.get_ylim()[0] == -3


def test_a_reward_that_fails_on_one_rank_fails_on_all(mine, tmp_path, monkeypatch):
    """A rank whose function fails sends that to the others instead of leaving them to wait for its verdicts."""
    (tmp_path / "rewards.py").write_text("def few_ones(row, response):\n    return 1 / len(response)\n")
    rollouts = [Rollout(Problem(name, "", "1"), 0, [4], [], [], "stop", name) for name in ("", "a", "b", "c")]

    def two_ranks(work, items):
        try:
            return work(items[:2]) + work(items[2:])
        except InputError:
            pytest.fail("one rank leaves while the other waits for its verdicts")

    monkeypatch.setattr(lib.rollouts, "map_over_ranks", two_ranks)
    with make_grader(grpo("", "", "", reward=mine[1])) as grader:
        with pytest.raises(InputError, match="failed on a response to problem .*ZeroDivisionError in line 2: division"):
            lib.rollouts.grade(rollouts, grader)
        lib.rollouts.grade(rollouts[1:], grader)
    assert [rollout.reward for rollout in rollouts[1:]] == [1.0, 1.0, 1.0]
