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
    allowed = {"student_grpo": {"teacher_grpo"}, "tables": {"evaluate"}, "run_plan": STAGES}.get(name, set())
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


def test_the_readme_names_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"


FREE = {"numpy", "triton"}  # other packages pin these two: vLLM's numba, PyTorch's CUDA build


def test_requirements_are_pinned():
    """One version of each, or a range with both ends where another package has a say."""
    found = set()
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            requirement = line.split("#")[0].strip()
            if requirement and not requirement.startswith("-r "):
                name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
                found.add(name)
                pattern = r">=[0-9.]+,<[0-9.]+" if name in FREE else r"==[0-9][0-9a-z.]*"
                assert re.fullmatch(re.escape(name) + pattern, requirement), f"{file.name}: {requirement}"
    assert {"torch", "transformers", "vllm", "safetensors"} | FREE <= found


def calls(path: Path):
    """(dotted name as written, node) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "os.system", "os.popen"}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_unpickled_or_evaluated(name):
    """Of ours; processes of one run exchange objects, and a training state has an index, that PyTorch pickles."""
    assert not imports(SCRIPTS[name]) & UNSAFE_IMPORTS
    for called, node in calls(SCRIPTS[name]):
        assert called not in UNSAFE_CALLS, (name, called)
        assert not any(keyword.arg == "shell" for keyword in node.keywords), (name, called)


def test_code_that_a_checkpoint_brings_is_never_trusted():
    """transformers asks on the terminal where it is not told; so wherever it could, it is told no."""
    told = []
    for path in SCRIPTS.values():
        for called, node in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("trust_remote_code", "False") == "False", (path.name, called)
            if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", called) and not called.startswith(
                "AutoModelForCausalLM.from_config"
            ):
                assert options.get("trust_remote_code") == "False", (path.name, called)
                told.append(called)
            if called == "AutoModelForCausalLM.from_pretrained":
                assert options.get("use_safetensors") == "True"
    assert {
        "AutoConfig.from_pretrained",
        "AutoTokenizer.from_pretrained",
        "AutoModelForCausalLM.from_pretrained",
    } <= set(told)


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
