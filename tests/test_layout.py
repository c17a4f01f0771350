"""What the project's shape promises: who imports whom, what may be imported at all, and that names do not collide."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
STAGES = {"teacher_grpo", "fkl_warmup", "opd", "student_grpo", "evaluate"}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_arrows_run_one_way(name):
    allowed = {"student_grpo": {"teacher_grpo"}, "tables": {"evaluate"}}.get(name, set())
    assert imports(SCRIPTS[name]) & STAGES <= allowed


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_import_is_in_the_requirements(name):
    listed = {
        re.split(r"[<>=\[ ]", line)[0].replace("-", "_").lower()
        for file in ROOT.glob("requirements*.txt")
        for line in file.read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    }
    brought_by = {"tokenizers": "transformers", "pyarrow": "datasets"}
    third_party = imports(SCRIPTS[name]) - set(sys.stdlib_module_names) - set(SCRIPTS)
    assert {brought_by.get(package, package) for package in third_party} <= listed
    assert not third_party & {"trl", "accelerate", "deepspeed", "lightning", "ray"}


def test_leaves_know_nothing_of_stages():
    for name in ("common", "engines", "kernels", "memory", "verifier"):
        assert not re.search(r"if stage\b|stage ==", SCRIPTS[name].read_text())


def test_a_hub_package_named_kernels_does_no_harm(tmp_path):
    """transformers looks for a distribution of that name and would then import from our kernels.py what is not in it."""
    record = tmp_path / "kernels-0.17.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.0\n")
    code = "import toy; from transformers import Qwen3ForCausalLM; import kernels; kernels.fused_linear_kl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", sorted(STAGES | {"toy"}))
def test_help_explains_every_setting(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(importlib.import_module(name).Config, args=["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--out" in words and "--seed" in words
    assert name == "toy" or "Table 9" in words or "Table 10" in words
