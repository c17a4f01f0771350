"""The pages lead where they say: links to lines, the paper's names in docstrings, gradients, and README's first table.

`python tests/test_paper.py` puts the right line numbers into the links, after an edit that has moved lines.
"""

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?)(\w[\w/.]*)#L(\d+)\)")


def definition(file: str, name: str) -> tuple[int, str]:
    """Where a file defines a name (`Class.method` too), and what is said of it there, with single spaces.

    That is the docstring of a function or class, or its source if it has none; of `main` that of the module; and of an
    assignment, in a Makefile too, its lines.
    """
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    if file == "Makefile":
        number = next(number for number, line in enumerate(lines, 1) if re.match(rf"{name} [:?]?= ", line))
        return number, lines[number - 1]
    body = module = ast.parse(source)
    for part in name.split("."):
        body = next(node for node in body.body if part in names(node))
    described = module if name == "main" else body
    can_have = isinstance(described, (ast.Module, ast.FunctionDef, ast.ClassDef))
    text = can_have and ast.get_docstring(described) or "\n".join(lines[body.lineno - 1 : body.end_lineno])
    return body.lineno, " ".join(text.split())


def names(node: ast.AST) -> list[str]:
    """What a statement of a module or class defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def corrected(page: Path) -> str:
    """The page with the right line numbers in all links."""
    right = lambda m: f"[`{m[1]}`]({m[2]}{m[3]}#L{definition(m[3], m[1])[0]})"
    return LINK.sub(right, page.read_text(encoding="utf-8"))


def test_links_lead_where_they_say():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == corrected(page), "`python tests/test_paper.py` corrects the line numbers"
        assert LINK.search(text) or page.name not in ("README.md", "paper.md")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_settings_that_pages_name_exist():
    configs = [importlib.import_module(name).Config for name in ("teacher_grpo", "fkl_warmup", "opd", "student_grpo",
               "evaluate", "experiments.audit", "experiments.tables", "experiments.toy")]  # fmt: skip
    known = {field.name.replace("_", "-") for config in configs for field in dataclasses.fields(config)}
    others = {"help", "dtype", "json-lines", "cpus-per-task", "shutdown-timeout", "signals-to-handle"}
    for page in PAGES:
        text = re.sub(r"torchrun.*|#SBATCH.*|pip install.*", "", page.read_text(encoding="utf-8"))
        named = re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]+)", text)
        assert set(named) <= known | others, page.name


PAPER = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
ROWS = [line for line in PAPER.splitlines() if "#L" in line and line[0] == "|"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_docstrings_say_which_object_of_the_paper_they_are(row):
    """Each link of a row leads to one of the names in its first cell, and each of these names is found behind a link."""
    called = re.findall(r"`([^`]+)`", row.split(" | ")[0])
    texts = {f"{file}: {name}": definition(file, name)[1] for name, _, file, _ in LINK.findall(row)}
    assert called and texts
    for place, text in texts.items():
        assert any(name in text for name in called), f"{place} says nothing of {called}"
    for name in called:
        assert any(name in text for text in texts.values()), f"none of {list(texts)} says {name}"


FIRST_SCREEN = {  # row -> checkpoint on the toy, and on the pretrained model
    "raw student": ("student", "student"),
    "direct GRPO of the student": ("full/direct", "1H/direct/step-000026"),
    "the same, with about the CPU time": ("full/direct_long", "1H/direct"),
    "bridge from the raw": ("full/raw/bridge", "1H/raw/bridge"),
    "bridge from the RL'd": ("full/rl/bridge", "1H/rl/bridge"),
    "raw teacher": ("teacher", "teacher"),
    "RL'd teacher": ("full/rl/teacher", "1H/rl/teacher"),
}


def test_the_table_of_the_first_screen_has_the_recorded_figures():
    """Of the toy and the real model those in results.json, of the paper those that the tables put beside ours."""
    from experiments import tables

    toy, real = (
        json.loads((ROOT / f"results/{task}/results.json").read_text(encoding="utf-8"))["entries"]
        for task in ("toy", "real")
    )
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    for name, checkpoints in FIRST_SCREEN.items():
        [cells] = [cells[1:] for cells in rows if len(cells) == 4 and cells[0].strip("* ").startswith(name)]
        scores = (entries[checkpoint]["test"] for entries, checkpoint in zip((toy, real), checkpoints))
        expected = [f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in scores]
        expected.append(tables.paper_figures(checkpoints[0], "qwen3-8b").split(" / ")[0].replace("±", " ± "))
        assert [cell.strip("* ") for cell in cells] == expected, name


def gradient(loss_of, logits: torch.Tensor) -> torch.Tensor:
    """Of a stage's loss with respect to the student's logits (N, V): hidden states that an identity matrix makes logits."""
    logits = logits.clone().requires_grad_()
    loss_of(lambda batch, head: head(logits, torch.eye(logits.shape[1], dtype=logits.dtype))).backward()
    return logits.grad


def test_gradients_are_what_the_docstrings_of_the_losses_say():
    import fkl_warmup
    import opd
    import teacher_grpo

    generator = torch.Generator().manual_seed(0)
    logits, theirs = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = lambda batch, loss_fn: loss_fn(theirs, torch.eye(7, dtype=torch.float64))
    teacher.hidden_states = lambda batch: (theirs, torch.eye(7, dtype=torch.float64))
    targets = torch.tensor([0, 6, 3, 3, 1])
    p, log_p, log_q = logits.softmax(1), logits.log_softmax(1), theirs.log_softmax(1)
    sampled = torch.nn.functional.one_hot(targets, 7)
    log_p_y, log_q_y = ((log * sampled).sum(1, keepdim=True) for log in (log_p, log_q))
    batch = SimpleNamespace(targets=targets, sampler_logprobs=log_p_y.squeeze(1) - 0.3)

    kl = (p * (log_p - log_q)).sum(1, keepdim=True)
    found = gradient(lambda student: opd.exact_kl_loss(student, teacher, batch, 7).loss, logits)
    torch.testing.assert_close(found, p * (log_p - log_q - kl))
    found = gradient(lambda student: fkl_warmup.forward_kl_loss(student, teacher, batch, 7).loss, logits)
    torch.testing.assert_close(found, p - log_q.exp())
    found = gradient(lambda student: fkl_warmup.sft_loss(student, batch), logits)
    torch.testing.assert_close(found, p - sampled)
    found = gradient(lambda student: opd.sampled_kl_loss(student, teacher, batch, 7, 2.0).loss, logits)
    weight = torch.tensor(0.3, dtype=torch.float64).exp()
    torch.testing.assert_close(found, -weight * (log_q_y - log_p_y) * (sampled - p))

    logprobs = log_p_y.squeeze(1).clone().requires_grad_()
    old, reference = logprobs.detach() - 0.1, log_q_y.squeeze(1)
    advantages, weights = torch.tensor([[1.0, -1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 0.7, 2.0, 0.9]], dtype=torch.float64)
    teacher_grpo.grpo_loss(logprobs, old, reference, advantages, weights, 0.2, 0.05)[0].backward()
    ratio = (logprobs - old).exp().detach()  # 1.1, which is not clipped
    expected = -weights * ratio * advantages + 0.05 * (1 - (reference - logprobs.detach()).exp())
    torch.testing.assert_close(logprobs.grad, expected)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(corrected(page), encoding="utf-8")
