"""Common mistakes: each ends in one sentence, before a model is loaded, and leaves nothing behind.

In words and sentences `{tmp}` is the case's own
directory, and `{student}`, `{teacher}` and `{problems}` are good inputs. Sentences are regular expressions.
"""

import fcntl
import importlib
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

import common
import lib.engines
import lib.policy
from experiments import toy

GOOD = "--exclude --max-prompt-tokens 64 --max-response-tokens 8"
SCRIPTS = {
    "teacher_grpo": f"--model {{student}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "student_grpo": f"--model {{student}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "fkl_warmup": f"--model {{student}} --teacher {{teacher}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "opd": f"--model {{student}} --teacher {{teacher}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "evaluate": "--models {student} --data {problems} --out {tmp}/out --max-response-tokens 8",
}


def lines(*rows, name: str = "data.jsonl"):
    """A file of these lines: text as it is, all else as JSON."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return lambda place: (place.tmp / name).write_text(text)


def copied(change, of: str = "student"):
    """{tmp}/bad, a copy of a good checkpoint with something done to it."""

    def prepare(place):
        shutil.copytree(place.paths[of], place.tmp / "bad")
        change(place.tmp / "bad")

    return prepare


def config_json(**changes):
    def change(bad):
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def without(*names: str):
    return lambda bad: [(bad / name).unlink() for name in names]


def pickled(bad):
    torch.save(load_file(bad / "model.safetensors"), bad / "pytorch_model.bin")
    (bad / "model.safetensors").unlink()


def another_family(bad):
    sizes = dict(vocab_size=26, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(FalconConfig(**sizes)).save_pretrained(bad)


def tokenizer(**changes):
    def change(bad):
        changed = AutoTokenizer.from_pretrained(bad)
        for name, value in changes.items():
            changed.add_tokens(value) if name == "tokens" else setattr(changed, name, value)
        changed.save_pretrained(bad)

    return change


def in_use(name):
    def prepare(place):
        (place.tmp / name).mkdir()
        place.lock = (place.tmp / name / "lock").open("w")
        fcntl.flock(
            place.lock, fcntl.LOCK_SH
        )  # a shared lock: it refuses a stage only if the stage asks for an exclusive one

    return prepare


def offline(place):
    place.monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=ConnectionError("there is no network")))


def no_vllm(place):
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    place.monkeypatch.setattr(lib.engines, "importlib", found)


DATA, BAD, BAD_TEACHER = "--data {tmp}/data.jsonl", "--model {tmp}/bad", "--teacher {tmp}/bad"
ROW = {"prompt": "1+1", "answer": "2"}
OTHER_TEMPLATE = toy.CHAT_TEMPLATE.replace("<|user|>", "<|assistant|>")

CASES = {
    # data
    "no such file": ("teacher_grpo", DATA, None, "'{tmp}/data.jsonl' is not a .*check the path"),
    "unknown set": ("opd", "--data dapoo", None, "--data 'dapoo' is no.* known data set"),
    "a line that is not JSON": ("teacher_grpo", DATA, lines(ROW, '{"prompt": "b", "ans'),
        "line 2 of '{tmp}/data.jsonl' cannot be read .* delete it"),
    "other columns": ("student_grpo", DATA, lines({"text": "a", "label": "1"}), "row needs a prompt .* and an answer"),
    "everything excluded": ("teacher_grpo", "--exclude {problems}", None, "problem of --data '{problems}' .*name other"),
    "no network": ("teacher_grpo", "--data math500", offline, "'math500' could not be loaded from the hub .*go online"),
    "long prompts": ("teacher_grpo", "--max-prompt-tokens 5", None, "than --max-prompt-tokens 5.*raise the limit"),
    "texts where a teacher is needed": ("fkl_warmup", "--rollouts {tmp}/data.jsonl", lines(ROW),
        "--rollouts '{tmp}/data.jsonl' holds texts.*--loss sft"),
    "neither teacher nor texts": ("fkl_warmup", "--teacher None", None, "--teacher is missing; name a checkpoint"),
    "no such reward": ("fkl_warmup", "--reward {tmp}/r.py:score", None, "--reward '{tmp}/r.py:score'.*check the path"),
    # numbers
    "a rate that is not a number": ("opd", "--lr nan", None, "--lr nan"),
    "a negative rate": ("opd", "--lr -1", None, "--lr -1.0 is too small"),
    "temperature zero": ("opd", "--temperature 0", None, "--temperature 0.0 is too small"),
    "group of one": ("teacher_grpo", "--rollouts-per-prompt 1", None, "--rollouts-per-prompt 1 leaves nothing to compare"),
    "end text in no token": ("opd", "--stop xyz", None, "--stop 'xyz' .* no .*token.*such as '\\\\n'"),
    "more positions than the teacher has": ("opd", BAD_TEACHER, copied(config_json(max_position_embeddings=20), "teacher"),
        "--max-response-tokens 8 is 21, but '{tmp}/bad' has 20 positions"),
    # engines
    "tensor parallel without vLLM": ("teacher_grpo", "--engine torch --tensor-parallel 2", None, "2 needs vLLM"),
    "vLLM is not installed": ("opd", "--engine vllm", no_vllm, "vLLM is not installed; .*give --engine torch"),
    # the output directory
    "out exists": ("teacher_grpo", "--out {tmp}", None, "--out '{tmp}' already exists; name another, or delete it"),
    "out in use": ("teacher_grpo", "", in_use("out.partial"), "--out '{tmp}/out' is being written by another run"),
    # checkpoints
    "no such model": ("teacher_grpo", "--model {tmp}/nowhere", None, "--model '{tmp}/nowhere' is not a checkpoint dir"),
    "no tokenizer": ("teacher_grpo", BAD, copied(without("tokenizer.json", "tokenizer_config.json")),
        "--model '{tmp}/bad' has no tokenizer"),
    "no config": ("teacher_grpo", BAD, copied(without("config.json")), "'{tmp}/bad' has no config.json"),
    "pickled weights": ("teacher_grpo", BAD, copied(pickled), "'{tmp}/bad' holds no .safetensors weights"),
    "weights missing": ("teacher_grpo", BAD, copied(config_json(num_hidden_layers=3, layer_types=None)),
        "'{tmp}/bad' lacks 11 of the weights"),
    "another family": ("opd", BAD, copied(another_family), "model '{tmp}/bad' (has layers|is of the family)"),
    "more tokens than rows": ("teacher_grpo", BAD, copied(tokenizer(tokens=["a", "b"])),
        "'{tmp}/bad' has embeddings for 26 tokens, but its tokenizer has 28"),
    "broken history": ("student_grpo", BAD, copied(lambda bad: (bad / "run.json").write_text('{"stage": "opd", "par')),
        "{tmp}/bad/run.json was not .*history is lost"),
    # pairs
    "another vocabulary": ("fkl_warmup", BAD_TEACHER, copied(tokenizer(tokens=["new"]), "teacher"),
        "have different vocabularies .*26 and 27 tokens.*'new' is absent and 26"),
    "another end of sequence": ("opd", BAD_TEACHER, copied(tokenizer(eos_token="<|user|>"), "teacher"),
        "differ in .*eos_token .*copy one tokenizer over the other"),
    "another template": ("opd", BAD_TEACHER, copied(tokenizer(chat_template=OTHER_TEMPLATE), "teacher"),
        "render prompts differently .*give both the same chat template"),
    # evaluation
    "report in use": ("evaluate", "", in_use("out"), "--out '{tmp}/out' is in use by another process"),
    "two sets of one name": ("evaluate", "--data {problems} {tmp}/train.jsonl", lines(ROW, name="train.jsonl"),
        "--data .*two sets have the same name.*rename a file"),
    "top-p above one": ("evaluate", "--top-p 1.5", None, "--top-p 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_left_behind(name, student, teacher, problems, tmp_path, monkeypatch, capfd):
    script, words, prepare, sentence = CASES[name]
    paths = {"tmp": str(tmp_path), "student": student, "teacher": teacher, "problems": problems}
    place = SimpleNamespace(tmp=tmp_path, monkeypatch=monkeypatch, paths=paths)
    if prepare is not None:
        prepare(place)
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    before = contents()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(f"{SCRIPTS[script]} {words}".format(**paths))])
    for module in (lib.policy, lib.engines) if name != "weights missing" else ():  # which loading finds out
        monkeypatch.setattr(module, "load_causal_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(common, "exit_process", sys.exit)  # which would otherwise end pytest
    capfd.readouterr()
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit:
        common.cli(module.main, module.Config)
    said = capfd.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in said
    assert re.match("error: .*" + sentence.format(**paths), said.splitlines()[-1])
    assert contents() == before
