"""The density picture: the dense reward of each token, where a wrong step is, and what the page makes of untrusted text."""

import base64
import hashlib
import json
import random
import re
import shlex
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import InputError, Problem, Rollout
from experiments import density, density_pictures, toy
from experiments.density_pictures import Scores, Shown
from lib import data


@pytest.mark.parametrize(
    "response, expected",
    [
        ("Carefully:7*8=6+3=9-4=5*2=0 \\boxed{0}<|im_end|>", []),
        ("Roughly:7*8=6+3=1-4=7*2=4 \\boxed{4}<|im_end|>", [9]),  # the two steps after 6+3=1 are right
        ("Roughly:7*8=5+3=8-4=5*2=0 \\boxed{0}<|im_end|>", [5, 13]),
        ("Hmm,7*8=6+3=9-4=5*2=1 \\boxed{1}<|im_end|>", [17]),
        ("Guess: \\boxed{4}<|im_end|>", None),
        ("Roughly:7*8=6+2=8-4=4*2=8 \\boxed{8}<|im_end|>", None),  # copies a wrong digit
        ("Roughly:7*8=6+3=1 \\boxed{1}<|im_end|>", None),  # leaves two steps out
        ("Roughly:7*8=6+3=9-4=5*2=0 \\boxed{1}<|im_end|>", None),  # has another digit in the box
        ("Roughly:7*8=6+3==-4=5*2=0 \\boxed{0}<|im_end|>", None),
        ("Roughly:7*8=6+3=1-4=7*2=4 \\boxed{4}", None),  # does not end
        ("7*8=6+3=9-4=5*2=0 \\boxed{0}<|im_end|>", None),
        ("<|im_end|>", None),
    ],
)
def test_where_a_step_is_wrong(response, expected):
    tokenizer = toy.make_tokenizer()
    tokens = tokenizer.batch_decode([[token] for token in tokenizer(response)["input_ids"]])
    assert "".join(tokens) == response
    assert density.wrong_steps(tokens, "7*8+3-4*2") == expected
    for index in expected or ():
        assert tokens[index - 1] == "=" and tokens[index].isdigit()


def test_wrong_steps_are_those_that_the_demonstrations_plant():
    """`toy.work_out` draws the errors of the rough habit; what it replaced is found again, in hundreds of problems."""
    tokenizer, rng, mistakes = toy.make_tokenizer(), random.Random(0), 0
    for _ in range(300):
        problem = toy.make_problem(rng)
        expression = problem.prompt.removeprefix(toy.TASK)
        text = toy.demonstrate(problem, "Roughly:", rng) + toy.EOS
        tokens = tokenizer.batch_decode([[token] for token in tokenizer(text)["input_ids"]])
        found = density.wrong_steps(tokens, expression)
        values = [int(expression[0]), *(int(tokens[index]) for index in range(5, 18, 4))]
        operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        right = [operations[op](v, int(d)) % 10 for v, op, d in zip(values, expression[1::2], expression[2::2])]
        assert found == [5 + 4 * n for n in range(4) if right[n] != values[n + 1]]
        mistakes += len(found)
    assert 0.3 < mistakes / 1200 < 0.5


def scores_of(probabilities, targets) -> Scores:
    """`token_scores` of a model whose distribution in each place is a row of `probabilities` (T, V)."""
    logits = torch.tensor(probabilities).log()
    return density.token_scores(logits, torch.eye(logits.shape[1]), torch.tensor(targets), logits.shape[1])


def test_a_planted_wrong_token_has_the_lowest_reward(monkeypatch):
    """The student writes 2, 0, 1, 3 and hesitates throughout; the teacher knows that the third token should be 0."""
    student = [[0.1, 0.2, 0.4, 0.3], [0.4, 0.2, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
    teacher = [[0.01, 0.01, 0.97, 0.01], [0.9, 0.05, 0.02, 0.03], [0.94, 0.03, 0.02, 0.01], [0.02, 0.03, 0.05, 0.9]]
    written = [2, 0, 1, 3]
    problem = Problem("p", "?", "0")
    rollout = Rollout(problem, 0, [0], written, [0.0] * 4, "stop", "", correct=False)
    shown = Shown("title", rollout, scores_of(student, written), scores_of(teacher, written))
    expected = np.log([0.97, 0.9, 0.03, 0.9]) - np.log([0.4, 0.4, 0.3, 0.25])
    np.testing.assert_allclose(shown.rewards, expected, rtol=1e-5)
    assert int(shown.rewards.argmin()) == 2
    assert shown.teacher.top_ids[2].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(shown.teacher.top_probs[2], torch.tensor([0.94, 0.03, 0.02, 0.01]))
    monkeypatch.setattr(density, "LOGITS", 9)  # two tokens at a time
    for one, other in zip(scores_of(teacher, written), shown.teacher):
        torch.testing.assert_close(one, other)


def test_scores_are_those_of_the_whole_model(student, problems):
    """Against transformers' own logits, for responses of different lengths in one pack."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(student), data.load_problems(problems, quiet=True)
    prompts = data.tokenize_prompts(tokenizer, loaded, toy.WORDING)
    rng = random.Random(0)
    rollouts = [
        Rollout(p, 0, prompts[p.id], [rng.randrange(26) for _ in range(n)], [0.0] * n, "stop", "")
        for n, p in zip((1, 7, 12), loaded)
    ]
    cfg = density.Config(student, student, student, problems, out="")
    model = AutoModelForCausalLM.from_pretrained(student)
    for rollout, found in zip(rollouts, density.score(student, rollouts, cfg, len(tokenizer)), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        torch.testing.assert_close(
            found.logprobs, logprobs.gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        top = logprobs.exp().topk(5)
        assert found.top_ids.tolist() == top.indices.tolist()
        torch.testing.assert_close(found.top_probs, top.values, rtol=1e-4, atol=1e-5)


def test_shares_are_over_problems():
    """Of problem a one response in two has its lowest reward at the first mistake, and both have it at some mistake."""
    rewards = {at: torch.tensor([-5.0 if i == at else -1.0 for i in range(4)]) for at in range(4)}
    cases = [
        density.Case("a", [1, 3], (rewards[1], rewards[0])),
        density.Case("a", [1, 3], (rewards[3], rewards[3])),
        density.Case("b", [2], (rewards[2], rewards[0])),
    ]
    found = density.compare(cases)
    assert (found["responses"], found["problems"], found["chance"]) == (3, 2, 0.25)
    assert found["lowest at first mistake"] == {
        "trained teacher": (0.75, pytest.approx(0.25)),
        "raw teacher": (0.0, 0.0),
        "difference": (0.75, pytest.approx(0.25)),
    }
    assert found["lowest at any mistake"]["trained teacher"] == (1.0, 0.0)
    assert found["lowest at any mistake"]["raw teacher"][0] == 0.25
    assert found["nats at first mistake"]["trained teacher"][0] == -4.0  # a: -5 and -1; b: -5
    sentence, short = density.in_words(found)
    assert "first wrong result in 75 ± 25 % with the trained teacher and 0 ± 0 %" in sentence
    assert "−4.0 ± 1.0 nats" in sentence and "100 ± 0 %" in short


def test_long_responses_are_wrapped_and_cut_around_the_lowest_reward():
    assert density_pictures.wrap([4, 4, 4, 20, 1, 9], room=10) == [[0, 1], [2], [3], [4, 5]]
    lines = [[2 * n, 2 * n + 1] for n in range(10)]
    assert density_pictures.around(lines, 9, most=3) == [[6, 7], [8, 9], [10, 11]]
    assert density_pictures.around(lines, 0, most=3) == lines[:3]
    assert density_pictures.around(lines, 19, most=3) == lines[7:]
    assert density_pictures.around(lines[:2], 3, most=3) == lines[:2]


def test_colours_go_from_red_over_white_to_blue():
    channels = lambda reward: [int(density_pictures.shade(reward)[0][i : i + 2], 16) for i in (1, 3, 5)]
    red, white, blue = channels(-6), channels(0), channels(6)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50 and min(white) > 240
    assert channels(-8) == channels(-800) and density_pictures.shade(-8)[1] == "#ffffff"
    assert [density_pictures.nats(value) for value in (-7.88, -0.04, 0.04, 1.25)] == ["−7.9", "0", "0", "1.2"]


class Page(HTMLParser):
    """The scripts of a page, the names of its elements, and the texts of its tokens."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.scripts, self.tokens, self.attributes, self.inside = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.inside = "token" if dict(attrs).get("class") == "token" else tag
        if self.inside == "token":
            self.tokens.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts.append(text)
        elif self.inside == "token":
            self.tokens[-1] += text


HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "\u202e", "&amp;", "\"'>", "$data"]


def hostile_row(count: int = 1) -> tuple[Shown, object]:
    """A response that consists of `HOSTILE`, `count` times, and its tokenizer."""
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(HOSTILE)
    ids = [*tokenizer.convert_tokens_to_ids(HOSTILE)] * count
    tops = torch.tensor([ids[:5]] * len(ids)), torch.full((len(ids), 5), 0.2)
    student, teacher = (Scores(torch.linspace(-1, last, len(ids)), *tops) for last in (-1, -9))
    problem = Problem("p", "What is <b>1</b>?" + HOSTILE[0], "<i>2</i>")
    rollout = Rollout(problem, 0, [2], ids, [0.0] * len(ids), "length", "", correct=False, how="no_answer")
    return Shown("<u>title</u>", rollout, student, teacher), tokenizer


def test_the_page_escapes_what_models_and_data_say():
    shown, tokenizer = hostile_row()
    text = density_pictures.page([[shown]], tokenizer, "<s>said</s>")
    page = Page(text)
    assert not {"img", "b", "i", "u", "s"} & set(page.names) and page.names.count("script") == 2
    assert not [pair for pair in page.attributes if pair[1].startswith("on") or pair[1] in ("src", "href")]
    escaped = ["\\u202e" if token == "\u202e" else token for token in HOSTILE]
    assert page.tokens == escaped  # the parser undoes the escaping
    content, script = json.loads(page.scripts[0]), page.scripts[1]
    ids = shown.rollout.response_ids
    assert [content["texts"][str(token)] for token in ids] == escaped
    [response] = content["responses"]
    assert response["ids"] == ids and response["rewards"][-1] == -8.0
    assert response["teacher"][0] == [[token, 0.2] for token in ids[:5]]
    # The page may run this script and no other.
    allowed = re.search(r"default-src 'none'; .*script-src 'sha256-(.+?)'", text)[1]
    assert base64.b64decode(allowed) == hashlib.sha256(script.encode()).digest()
    assert "cut: 0" in text


def test_long_and_strange_responses_can_be_drawn(tmp_path):
    """Thousands of tokens make a longer page with numbers only where the mouse points, and a picture of the usual size."""
    short, tokenizer = hostile_row()
    long, _ = hostile_row(500)
    for name, shown in (("short", short), ("long", long)):
        density_pictures.draw([[shown]], tokenizer, "", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<small>" in density_pictures.page([[short]], tokenizer, "")
    page = density_pictures.page([[long]], tokenizer, "")
    assert "<small>" not in page and page.count('class="token"') == 3000
    height = lambda name: int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24], "big")
    assert height("long") < height("short") + 400


def run(monkeypatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["density.py", *shlex.split(words)])
    monkeypatch.setattr(common, "exit_process", lambda status: sys.exit(status) if status else None)
    common.cli(density.main, density.Config)


WORDS = "--student {student} --teacher {teacher} --raw-teacher {student} --data {problems} --out {out}"


def test_runs_on_checkpoints(student, teacher, problems, tmp_path, monkeypatch, capsys):
    """Random models give no step-by-step answers, so there is a picture and nothing is claimed."""
    words = WORDS.format(student=student, teacher=teacher, problems=problems, out=tmp_path / "out")
    run(monkeypatch, f"{words} --bridge {teacher} --max-response-tokens 9 --tried 4 --problems 2 --engine torch")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "density.html",
        "density.json",
        "density.png",
    ]
    page = Page((tmp_path / "out" / "density.html").read_text())
    assert page.names.count("section") == 2 and page.names.count("h3") == 6
    record = json.loads((tmp_path / "out" / "density.json").read_text())
    assert record["mistakes"] is None and record["settings"]["tried"] == 4
    responses = json.loads(page.scripts[0])["responses"]
    assert all(reward == 0 for reward in responses[1]["rewards"])  # the raw teacher is the student itself here
    assert any(abs(reward) > 0.1 for reward in responses[0]["rewards"])
    assert all(reward == 0 for reward in responses[2]["rewards"])  # and the bridged student the teacher
    assert "In " not in capsys.readouterr().out


def test_mistakes_are_counted_on_the_toy(student, teacher, problems, tmp_path, monkeypatch, capsys):
    """With demonstrations of the rough habit in the place of what the random student would write."""

    def sample(cfg, loaded, tokenizer, prompts):
        rng = random.Random(0)
        rollouts = toy.as_rollouts(tokenizer, loaded, [toy.demonstrate(p, "Roughly:", rng) for p in loaded])
        for rollout in rollouts:
            rollout.correct = rollout.text.endswith(f"{{{rollout.problem.answer}}}")
        return rollouts, rollouts[:1], []

    monkeypatch.setattr(density, "sample", sample)
    words = WORDS.format(student=student, teacher=teacher, problems=problems, out=tmp_path / "out")
    run(monkeypatch, f"{words} --max-response-tokens 24 --max-prompt-tokens 64")
    found = json.loads((tmp_path / "out" / "density.json").read_text())["mistakes"]
    assert 6 <= found["responses"] == found["problems"] <= 12
    assert found["chance"] == pytest.approx(1 / 22)
    assert found["nats at first mistake"]["raw teacher"] == [0, 0]
    said = capsys.readouterr().out
    assert f"In {found['responses']} wrong step-by-step answers" in said
    assert f"In {found['responses']} wrong step-by-step answers" in (tmp_path / "out" / "density.html").read_text()


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--problems 0", "--problems 0 is too small; give a number above zero"),
        ("--tried -1", "--tried -1 is too small; give a number above zero"),
        ("--raw-teacher nowhere", "--raw-teacher 'nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
        ("--student nowhere", "--student 'nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
        (
            "--bridge {other}",
            "--student '{student}' and --bridge '{other}' have different vocabularies (26 and 27 tokens",
        ),
        ("--max-response-tokens 200", "and '{student}' has 128 positions; lower --max-response-tokens"),
        ("--out {problems}", "--out '{problems}' cannot be written"),
    ],
)
def test_bad_input(words, sentence, student, teacher, problems, tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["one more"])
    AutoModelForCausalLM.from_pretrained(student).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    places = dict(student=student, teacher=teacher, problems=problems, out=tmp_path / "out", other=tmp_path / "other")
    monkeypatch.setattr(density, "load_causal_lm", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(density, "make_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    given = f"{WORDS} --max-response-tokens 24 {words}".format(**places)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, given)
    assert exit.value.code == 2 and sentence.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_process_draws(student, teacher, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    with pytest.raises(InputError, match="2 processes would draw one picture; start a single one, without torchrun"):
        density.main(density.Config(student, teacher, student, problems, out=str(tmp_path / "out")))
