"""Wrong invocations and corrupt files: the one sentence that each must end in, and that nothing is left behind.

Every case runs a script's command line in this process on small inputs. `{tmp}` in words and sentences is the case's own
directory, `{student}`, `{teacher}` and `{problems}` are good inputs.
"""

import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, MambaConfig, PhiConfig, PreTrainedConfig

import common
import lib.policy
import lib.runs
from experiments import toy

ROOT = Path(__file__).parent.parent

GOOD = "--exclude --max-prompt-tokens 64 --max-response-tokens 8"
SCRIPTS = {
    "experiments.audit": "--out {tmp}/out",
    "experiments.toy": "--out {tmp}/out",
    "experiments.samples": "{tmp}/run",
    "experiments.track": "{tmp}/run",
    "teacher_grpo": f"--model {{student}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "student_grpo": f"--model {{student}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "fkl_warmup": f"--model {{student}} --teacher {{teacher}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "opd": f"--model {{student}} --teacher {{teacher}} --data {{problems}} --out {{tmp}}/out {GOOD}",
    "evaluate": "--models {student} --data {problems} --out {tmp}/out --max-response-tokens 8",
}

# What stands in {tmp} before the script is run.


def lines(*rows, name: str = "data.jsonl"):
    """A file of these lines: text or bytes as they are, all else as JSON."""
    encoded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]

    def prepare(place):
        (place.tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (place.tmp / name).write_bytes(b"".join(row + b"\n" for row in encoded))

    return prepare


def copied(*changes, of: str = "student"):
    """{tmp}/bad, a copy of a good checkpoint with something done to it."""

    def prepare(place):
        shutil.copytree(getattr(place, of), place.tmp / "bad")
        for change in changes:
            change(place.tmp / "bad")

    return prepare


def config_json(**changes):
    def change(bad):
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def cut(name: str, size: int):
    return lambda bad: os.truncate(bad / name, size)


def without(*names: str):
    return lambda bad: [(bad / name).unlink() for name in names]


def text(name: str, content: str):
    return lambda bad: (bad / name).write_text(content)


def not_a_number(bad):
    weights = load_file(bad / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})


def pickled(bad):
    torch.save(load_file(bad / "model.safetensors"), bad / "pytorch_model.bin")
    (bad / "model.safetensors").unlink()


def tokenizer(**changes):
    def change(bad):
        changed = AutoTokenizer.from_pretrained(bad)
        for name, value in changes.items():
            changed.add_tokens(value) if name == "tokens" else setattr(changed, name, value)
        changed.save_pretrained(bad)

    return change


def another_architecture(config: PreTrainedConfig):
    return lambda bad: AutoModelForCausalLM.from_config(config).save_pretrained(bad)


SMALL = dict(vocab_size=26, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def trained_on_everything(bad):
    from lib.data import load_problems

    ids = [problem.id for problem in load_problems(str(bad.parent / "seen.jsonl"), quiet=True)]
    (bad / "run.json").write_text(json.dumps({"stage": "opd", "parents": {}, "consumed": ids}))


def linked(place):
    (place.tmp / "link").symlink_to(place.tmp / "nowhere")


def at_home(place):
    place.monkeypatch.setenv("HOME", str(place.tmp))


def locked(place):
    (place.tmp / "out.partial").mkdir()
    place.lock = (place.tmp / "out.partial" / "lock").open("w")
    fcntl.flock(place.lock, fcntl.LOCK_EX)


def interrupted(*changes):
    """{tmp}/out.partial, in which a run of `teacher_grpo` with its defaults has saved two steps."""

    def prepare(place):
        teacher_grpo = importlib.import_module("teacher_grpo")
        cfg = teacher_grpo.Config(
            str(place.student), data=str(place.problems), out=str(place.tmp / "out"), exclude=(), max_prompt_tokens=64,
            max_response_tokens=8, save_every=1, max_steps=2, passes=1, prompts_per_step=2,
        )  # fmt: skip
        with lib.runs.Run(cfg, {"model": cfg.model}) as run:
            policy = lib.policy.load_policy(cfg.model, cfg, True)
            run.save(1, policy, torch.optim.AdamW(policy.parameters()), None, trained_on=())
        for change in changes:
            change(place.tmp / "out.partial" / "state-000001")

    return prepare


def finished(place):
    """{tmp}/out, the checkpoint of a run of `teacher_grpo` with the settings in RESUMED that has finished."""
    interrupted()(place)
    partial = place.tmp / "out.partial"
    (partial / "state-000001" / "run.json").rename(partial / "run.json")
    shutil.rmtree(partial / "state-000001")
    (partial / "lock").unlink()
    partial.rename(place.tmp / "out")


RESUMED = "--save-every 1 --max-steps 2 --passes 1 --prompts-per-step 2 --resume"


def cached_rollouts(*changes):
    """{tmp}/cache, complete and with no right answer, made by a run that is gone; `changes` are made to the directory."""

    def prepare(place):
        fkl_warmup = importlib.import_module("fkl_warmup")
        cache = place.tmp / "cache"
        cfg = fkl_warmup.Config(
            str(place.student), str(place.teacher), data=str(place.problems), out=str(place.tmp / "made"), exclude=(),
            max_prompt_tokens=64, max_response_tokens=8, rollouts=str(cache), rollouts_per_prompt=2, max_steps=1,
        )  # fmt: skip
        place.monkeypatch.setattr(
            fkl_warmup, "grade", lambda rollouts, _: [setattr(r, "correct", False) for r in rollouts]
        )
        fkl_warmup.main(cfg)
        shutil.rmtree(place.tmp / "made")
        for change in changes:
            change(cache)

    return prepare


CACHE = "--rollouts {tmp}/cache --rollouts-per-prompt 2 --max-steps 1"


def report(name: str, content: str | dict):
    return lines(content, name=f"{name}/results.json")


def both(*prepares):
    return lambda place: [prepare(place) for prepare in prepares]


def offline(place):
    def load(*arguments, **options):
        raise ConnectionError("there is no network")

    place.monkeypatch.setattr(datasets, "load_dataset", load)


def chat(*roles: str) -> dict:
    return {"prompt": [{"role": role, "content": f"7+{i}"} for i, role in enumerate(roles[::-1])][::-1], "answer": "7"}


OMITS = toy.CHAT_TEMPLATE.replace("{% else %}", "{% elif message.role == 'assistant' %}")
REFUSES = toy.CHAT_TEMPLATE.replace("{% else %}", "{% elif message.role == 'system' %}{{ raise_exception('no system here') }}{% else %}")  # fmt: skip
SYSTEM = toy.CHAT_TEMPLATE.replace("message.role == 'user'", "message.role in ('user', 'system')")
EXAMPLES = toy.CHAT_TEMPLATE.replace("<|im_end|>", "")
ROW = {"prompt": "1+1", "answer": "2"}
FINE = {"answer": "2", "response": "\\boxed{2}"}
NEEDS = "each row needs a prompt (prompt, problem or question) and an answer (answer, solution or reward_model.ground_truth)"
DATA = "--data {tmp}/data.jsonl"
BAD = "--model {tmp}/bad"

TEXTS = "--teacher None --loss sft --rollouts {tmp}/texts.jsonl"

CASES = {
    # data sets
    "no such data file": ("teacher_grpo", "--data {tmp}/nowhere.jsonl", None,
        "data set '{tmp}/nowhere.jsonl' is not a readable .jsonl or .parquet file; check the path given with --data"),
    "unknown data set": ("teacher_grpo", "--data dapoo", None,
        "--data 'dapoo' is no known data set; give one of dapo, dapo-processed, math500, aime24, aime25, gsm8k, gsm8k-train, a .jsonl or .parquet file, or owner/name:split on the hub"),
    "a directory as data": ("opd", "--data {tmp}", None,
        "data set '{tmp}' is not a readable .jsonl or .parquet file; check the path given with --data"),
    "data in another format": ("fkl_warmup", "--data {tmp}/data.csv", lines("a,b", name="data.csv"),
        "data set '{tmp}/data.csv' is not a readable .jsonl or .parquet file; check the path given with --data"),
    "JSONL with a bad line 731": ("teacher_grpo", DATA, lines(*[ROW] * 730, '{"prompt": "b", "ans'),
        "line 731 of '{tmp}/data.jsonl' is not JSON (…); mend or delete it"),
    "undecodable bytes": ("teacher_grpo", DATA, lines(ROW, b'{"prompt": "\xff\xfe", "answer": "1"}'),
        "line 2 of '{tmp}/data.jsonl' is not JSON (…); mend or delete it"),
    "a million brackets": ("teacher_grpo", DATA, lines(ROW, "[" * 10**6),
        "line 2 of '{tmp}/data.jsonl' is not JSON (…); mend or delete it"),
    "wrong columns": ("student_grpo", DATA, lines({"text": "a", "label": "1"}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (no prompt in it); " + NEEDS),
    "a row that is a list": ("teacher_grpo", DATA, lines([1, 2]),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (it is [1, 2], not an object); " + NEEDS),
    "no answer": ("teacher_grpo", DATA, lines(ROW, {"prompt": "a"}),
        "row 2 of '{tmp}/data.jsonl' is not a labelled problem (no answer in it); " + NEEDS),
    "empty answer": ("teacher_grpo", DATA, lines({"prompt": "a", "answer": " "}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (the answer is ' '); " + NEEDS),
    "nothing after ####": ("teacher_grpo", DATA, lines({"prompt": "a", "answer": "so it is\n#### "}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (the answer is 'so it is\\n#### '); " + NEEDS),
    "answer not a string": ("teacher_grpo", DATA, lines({"prompt": "a", "answer": ["1"]}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (the answer is ['1']); " + NEEDS),
    "answer that nothing can write": ("teacher_grpo", DATA, lines('{"prompt": "a", "answer": "\\ud800"}'),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (…); " + NEEDS),
    "empty prompt": ("teacher_grpo", DATA, lines({"prompt": " ", "answer": "1"}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (no prompt in it); " + NEEDS),
    "messages that end with another's": ("teacher_grpo", DATA, lines(chat("user", "assistant")),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (its last message is the assistant's, and has to be the user's); " + NEEDS),
    "messages without roles": ("teacher_grpo", DATA, lines({"prompt": ["1+1"], "answer": "2"}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (one of its messages has no role); " + NEEDS),
    "a message that is a picture": ("teacher_grpo", DATA, lines({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}),
        "row 1 of '{tmp}/data.jsonl' is not a labelled problem (the content of one of its messages is no text); " + NEEDS),
    "empty file": ("teacher_grpo", DATA, lines(),
        "data set '{tmp}/data.jsonl' holds no usable problem (0 rows read); name another with --data"),
    "only conflicting answers": ("teacher_grpo", DATA, lines(ROW, {**ROW, "answer": "3"}),
        "data set '{tmp}/data.jsonl' holds no usable problem (2 rows read); name another with --data"),
    "corrupt parquet": ("teacher_grpo", "--data {tmp}/data.parquet", lines("PAR1", name="data.parquet"),
        "data set '{tmp}/data.parquet' is not a parquet file that can be read; fetch it anew"),
    "everything excluded": ("teacher_grpo", "--exclude {problems}", None,
        "no problem of --data '{problems}' (half full) is left outside --exclude ['{problems}']; name others"),
    "every problem is one to validate on": ("teacher_grpo", "--validate {problems}", None,
        "no problem of --data '{problems}' (half full) is left outside --exclude [] and --validate ['{problems}']; name others"),
    "training set that cannot be had": ("teacher_grpo", "--data math500", offline,
        "data set 'math500' could not be loaded from the hub (…); go online, give --data a local .jsonl or .parquet file"),
    "set to exclude that cannot be had": ("teacher_grpo", "--exclude math500", offline,
        "data set 'math500' could not be loaded from the hub (…); go online, give --exclude a local .jsonl or .parquet file, or write --exclude with nothing after it to exclude nothing"),
    "set to validate on that cannot be had": ("student_grpo", "--validate math500", offline,
        "data set 'math500' could not be loaded from the hub (…); go online, give --validate a local .jsonl or .parquet file, or leave --validate out"),
    "no such file to exclude": ("opd", "--exclude {tmp}/nowhere.jsonl", None,
        "data set '{tmp}/nowhere.jsonl' is not a readable .jsonl or .parquet file; check the path given with --exclude"),
    # prompts
    "system prompt without a chat template": ("teacher_grpo", BAD + " --system-prompt Think.", copied(without("chat_template.jinja")),
        "--system-prompt 'Think.': the tokenizer of '{tmp}/bad' has no chat template, so that there is no system's turn; give the text in --prefix"),
    "system prompt without a chat template, evaluated": ("evaluate", "--models {tmp}/bad --system-prompt Think.", copied(without("chat_template.jinja")),
        "--system-prompt 'Think.': the tokenizer of '{tmp}/bad' has no chat template, so that there is no system's turn; give the text in --prefix"),
    "several turns without a chat template": ("teacher_grpo", DATA + " " + BAD, both(lines(chat("user", "assistant", "user")), copied(without("chat_template.jinja"))),
        "problem … ('7+0'...) has 3 turns, and the tokenizer of '{tmp}/bad' has no chat template, so that nothing would tell them apart; make them one text"),
    "end text that no token contains": ("teacher_grpo", "--stop : xyz", None,
        "--stop 'xyz' stands in no single token of '{student}', so that it could end no response; give a shorter text, such as '\\n'"),
    "end text that no token contains, evaluated": ("evaluate", r"--stop '\nxyz'", None,
        "--stop '\\nxyz' stands in no single token of '{student}', so that it could end no response; give a shorter text, such as '\\n'"),
    "empty end text": ("opd", "--stop ''", None,
        "--stop '' is empty and could end no response; give a text, such as '\\n', or leave --stop out"),
    "empty end text, evaluated": ("evaluate", "--stop ''", None,
        "--stop '' is empty and could end no response; give a text, such as '\\n', or leave --stop out"),
    "no such file before the problems": ("fkl_warmup", "--prefix @{tmp}/nowhere.txt", None,
        "--prefix @{tmp}/nowhere.txt: the file cannot be read as text (No such file or directory); check its path"),
    "no such file of an instruction, evaluated": ("evaluate", "--instruction @{tmp}/nowhere.txt", None,
        "--instruction @{tmp}/nowhere.txt: the file cannot be read as text (No such file or directory); check its path"),
    "a directory as system prompt": ("student_grpo", "--system-prompt @{tmp}", None,
        "--system-prompt @{tmp}: the file cannot be read as text (Is a directory); check its path"),
    "a file before the problems that is no text": ("opd", "--prefix @{tmp}/prefix.txt", lines(b"\xff\xfe", name="prefix.txt"),
        "--prefix @{tmp}/prefix.txt: the file cannot be read as text (…); check its path"),
    "system prompt in plain text": ("student_grpo", "--system-prompt Think. --no-chat-template", None,
        "--system-prompt 'Think.': --no-chat-template is given, so that there is no system's turn; give the text in --prefix"),
    "system prompt in plain text, evaluated": ("evaluate", "--system-prompt Think. --no-chat-template", None,
        "--system-prompt 'Think.': --no-chat-template is given, so that there is no system's turn; give the text in --prefix"),
    "several turns in plain text": ("opd", DATA + " --no-chat-template", lines(chat("user", "assistant", "user")),
        "problem … ('7+0'...) has 3 turns, and --no-chat-template is given, so that nothing would tell them apart; make them one text"),
    "two system prompts": ("teacher_grpo", DATA + " --system-prompt Think.", lines(chat("system", "user")),
        "--system-prompt 'Think.': problem … ('7+0'...) begins with a system's turn of its own; leave the setting out, or take that turn out of the data"),
    "chat template that refuses a system's turn": ("opd", BAD + " --system-prompt Think.", copied(tokenizer(chat_template=REFUSES)),
        "the chat template of '{tmp}/bad' refuses problem …, whose turns are ['system', 'user'] (no system here); leave out --system-prompt or that turn of the data, or put its text into the user's turn"),
    "chat template that omits a system's turn": ("fkl_warmup", BAD + " --system-prompt Think.", copied(tokenizer(chat_template=OMITS)),
        "the chat template of '{tmp}/bad' omits the system's turn of problem …; leave out --system-prompt or that turn of the data, or put its text into the user's turn"),
    "half of one problem": ("teacher_grpo", DATA + " --half 2H", lines(ROW),
        "--half 2H needs at least two problems, and there is 1; use --half full"),
    "prompt too long": ("teacher_grpo", DATA + " --max-prompt-tokens 5", lines(ROW),
        "the prompt of problem 4a1b21d876ae00c8 ('1+1'...) has 6 tokens, more than --max-prompt-tokens 5; raise the limit or drop the problem"),
    # numbers
    "no steps": ("teacher_grpo", "--max-steps 0", None,
        "--max-steps 0 is too small; give a number above zero"),
    "negative learning rate": ("opd", "--lr -1e-6", None,
        "--lr -1e-06 is too small; give a number above zero"),
    "learning rate that is no number": ("fkl_warmup", "--lr nan", None,
        "--lr nan is not a number below 4294967296; give one"),
    "learning rate without end": ("opd", "--lr inf", None,
        "--lr inf is not a number below 4294967296; give one"),
    "group of one": ("teacher_grpo", "--rollouts-per-prompt 1", None,
        "--rollouts-per-prompt 1 leaves nothing to compare a response with; give 2 or more"),
    "temperature zero": ("opd", "--temperature 0", None,
        "--temperature 0.0 is too small; give a number above zero"),
    "negative seed": ("fkl_warmup", "--seed -1", None,
        "--seed -1 is too small; give zero or more"),
    "seed too large for a generator": ("teacher_grpo", f"--seed {10**30}", None,
        f"--seed {10**30} is not a number below 4294967296; give one"),
    "seed too large for NumPy, which vLLM gives it to": ("evaluate", f"--seed {2**32}", None,
        f"--seed {2**32} is not a number below 4294967296; give one"),
    "split seed with more digits than a float has": ("student_grpo", f"--split-seed {10**400}", None,
        f"--split-seed {10**400} is not a number below 4294967296; give one"),
    "toy of a seed too large": ("experiments.toy", f"--seed {10**30}", None,
        f"--seed {10**30} is not a number below 4294967296; give one"),
    "passes without end": ("opd", "--passes 1000000000", None,
        "--passes 1000000000 is more than 1000; give fewer, or say with --max-steps when to stop"),
    "no passes": ("student_grpo", "--passes 0", None,
        "--passes 0 is too small; give a number above zero"),
    # validation
    "unknown validation set": ("teacher_grpo", "--validate dapoo", None,
        "--validate 'dapoo' is no known data set; give one of dapo, dapo-processed, math500, aime24, aime25, gsm8k, gsm8k-train, a .jsonl or .parquet file, or owner/name:split on the hub"),
    "no such validation file": ("opd", "--validate {tmp}/nowhere.jsonl", None,
        "data set '{tmp}/nowhere.jsonl' is not a readable .jsonl or .parquet file; check the path given with --validate"),
    "two validation sets of one name": ("fkl_warmup", "--validate {problems} {tmp}/train.jsonl", lines(ROW, name="train.jsonl"),
        "--validate ['{problems}', '{tmp}/train.jsonl']: two sets have one name, and their scores need two; rename a file"),
    "validation prompt too long": ("opd", "--validate {tmp}/data.jsonl --max-prompt-tokens 30", lines({"prompt": "1+" * 40, "answer": "1"}),
        "the prompt of problem ca6be191a1732abb ('1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+'...) has 83 tokens, more than --max-prompt-tokens 30; raise the limit or drop the problem"),
    "validation top-p above one": ("fkl_warmup", "--validate {tmp}/data.jsonl --validate-top-p 1.5", lines(ROW),
        "--validate-top-p 1.5 is more than all of the distribution; give 1 or less"),
    "validation top-k zero": ("teacher_grpo", "--validate {tmp}/data.jsonl --validate-top-k 0", lines(ROW),
        "--validate-top-k 0 keeps no token; give 1 or more, or -1 for all"),
    "no validation samples": ("teacher_grpo", "--validate {tmp}/data.jsonl --validate-k 0", lines(ROW),
        "--validate-k 0 is too small; give a number above zero"),
    "no checkpoint along the way": ("opd", "--export-every 0", None,
        "--export-every 0 is too small; give a number above zero"),
    "the best of nothing": ("teacher_grpo", "--keep-best", None,
        "--keep-best has no scores to choose by; name a set with --validate, or leave --keep-best out"),
    "chosen by what is reported": ("opd", "--validate math500 --keep-best", None,
        "--keep-best would choose the weights by --validate 'math500', and later scores on the same problems would be too good (it is an evaluation set); validate on other problems, or leave --keep-best out"),
    "a vLLM engine for teacher and student": ("fkl_warmup", "--validate {tmp}/data.jsonl --engine vllm", lines(ROW),
        "--validate ['{tmp}/data.jsonl'] needs vLLM for the student, and this process needs it for the teacher's missing rollouts; make those first, with --rollouts DIR --max-steps 1 and with --exclude in the place of --validate"),
    # the output directory
    "out exists": ("teacher_grpo", "--out {tmp}", None,
        "--out '{tmp}' already exists; name another, or delete it"),
    "out that is a link to nothing": ("teacher_grpo", "--out {tmp}/link", linked,
        "--out '{tmp}/link' already exists; name another, or delete it"),
    "report in the place of a link to nothing": ("evaluate", "--out {tmp}/link", linked,
        "--out '{tmp}/link' cannot be written ('{tmp}/link' is not a writable directory); name another"),
    "out that cannot be made": ("teacher_grpo", "--out {tmp}/file/out", lines(name="file"),
        "--out '{tmp}/file/out' cannot be written (Not a directory); name another directory"),
    "out in use by another run": ("teacher_grpo", "", locked,
        "--out '{tmp}/out' is being written by another run; name another, or stop that one"),
    "interrupted run, not resumed": ("teacher_grpo", "", interrupted(),
        "{tmp}/out.partial holds an interrupted run; add --resume to continue it, or delete it"),
    "resumed with other settings": ("teacher_grpo", RESUMED + " --lr 0.5", interrupted(),
        "--resume: the run in {tmp}/out.partial had lr = 1e-06, now it is 0.5; give the same settings, name another --out, or delete {tmp}/out.partial"),
    "resumed with another text before the problems": ("teacher_grpo", RESUMED + " --prefix @{tmp}/prefix.txt", both(interrupted(), lines("1+1=2", name="prefix.txt")),
        "--resume: the run in {tmp}/out.partial had prefix = '', now it is '1+1=2\\n'; give the same settings, name another --out, or delete {tmp}/out.partial"),
    "finished, then resumed with other settings": ("teacher_grpo", RESUMED + " --lr 0.5", finished,
        "--resume: the run in {tmp}/out had lr = 1e-06, now it is 0.5; give the same settings, name another --out, or delete {tmp}/out"),
    "finished, then resumed by another stage": ("opd", RESUMED, finished,
        "--resume: {tmp}/out holds a run of teacher_grpo.py, not of opd.py; name another --out, or delete it"),
    "finished, and not resumed": ("teacher_grpo", RESUMED.removesuffix(" --resume"), finished,
        "--out '{tmp}/out' already exists; name another, or delete it"),
    "resumed by another stage": ("opd", RESUMED, interrupted(),
        "--resume: {tmp}/out.partial holds a run of teacher_grpo.py, not of opd.py; name another --out, or delete it"),
    "resumed from a damaged state": ("teacher_grpo", RESUMED, interrupted(cut("__0_0.distcp", 5000)),
        "no training state in {tmp}/out.partial is whole, __0_0.distcp of state-000001 is not what was written; delete the directory to begin again"),
    # checkpoints
    "missing model": ("teacher_grpo", "--model {tmp}/nowhere", None,
        "--model '{tmp}/nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
    "a home directory that the shell left to us": ("opd", "--teacher=~/nowhere --model ~/nowhere", at_home,
        "--model '{tmp}/nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
    "missing model, stage 3": ("student_grpo", "--model {tmp}/nowhere", None,
        "--model '{tmp}/nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
    "missing tokenizer": ("teacher_grpo", BAD, copied(without("tokenizer.json", "tokenizer_config.json")),
        "--model '{tmp}/bad' has no tokenizer that transformers can load (it has no vocabulary); put its files beside the weights"),
    "tokenizer half-written": ("teacher_grpo", BAD, copied(cut("tokenizer.json", 200)),
        "--model '{tmp}/bad' has no tokenizer that transformers can load (…); put its files beside the weights"),
    "missing config": ("teacher_grpo", BAD, copied(without("config.json")),
        "model '{tmp}/bad' has no config.json that transformers can use (…); fetch it anew, or name another"),
    "config half-written": ("teacher_grpo", BAD, copied(cut("config.json", 100)),
        "--model '{tmp}/bad' has no tokenizer that transformers can load (…); put its files beside the weights"),
    "unknown architecture": ("teacher_grpo", BAD, copied(config_json(model_type="nonsense")),
        "model '{tmp}/bad' has no config.json that transformers can use (…); fetch it anew, or name another"),
    "model that brings its own code": (
        "teacher_grpo", BAD, copied(config_json(model_type="own", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"})),
        "model '{tmp}/bad' brings code of its own, which is never run; name one of an architecture that transformers has"),
    "truncated safetensors": ("teacher_grpo", BAD, copied(cut("model.safetensors", 9000)),
        "{tmp}/bad/model.safetensors is not a whole safetensors file (…); fetch it anew"),
    "truncated safetensors of the student": ("fkl_warmup", BAD, copied(cut("model.safetensors", 9000)),
        "{tmp}/bad/model.safetensors is not a whole safetensors file (…); fetch it anew"),
    "truncated safetensors of the teacher": ("opd", "--teacher {tmp}/bad", copied(cut("model.safetensors", 9000), of="teacher"),
        "{tmp}/bad/model.safetensors is not a whole safetensors file (…); fetch it anew"),
    "empty safetensors": ("evaluate", "--models {tmp}/bad --max-prompt-tokens 64", copied(cut("model.safetensors", 0)),
        "{tmp}/bad/model.safetensors is not a whole safetensors file (…); fetch it anew"),
    "pickled weights": ("teacher_grpo", BAD, copied(pickled),
        "model '{tmp}/bad' holds no .safetensors weights, and no others are loaded; convert it"),
    "weights missing": ("teacher_grpo", BAD, copied(config_json(num_hidden_layers=3, layer_types=None)),
        "model '{tmp}/bad' lacks 11 of the weights that its config asks for (model.layers.2.input_layernorm.weight, ...); fetch it anew"),
    "weights of another shape": ("teacher_grpo", BAD, copied(config_json(hidden_size=32)),
        "model '{tmp}/bad' has no weights that fit its config (they have other shapes); fetch it anew"),
    "NaN weights": ("opd", BAD, copied(not_a_number),
        "model '{tmp}/bad' has weights that are not finite (model.layers.1.mlp.up_proj.weight); take the checkpoint before it broke"),
    "half-written run.json": ("teacher_grpo", BAD, copied(text("run.json", '{"stage": "opd", "par')),
        "{tmp}/bad/run.json is not JSON (…), so the checkpoint's history is lost; fetch it anew"),
    "run.json of something else": ("student_grpo", BAD, copied(text("run.json", "[]")),
        "{tmp}/bad/run.json is not what a stage writes, so the checkpoint's history is lost; fetch it anew"),
    "logits rescaled": ("teacher_grpo", BAD, copied(config_json(logit_scale=0.5)),
        "model '{tmp}/bad' rescales its logits (logit_scale), which the fused losses do not do; use another"),
    "bias in the output layer": ("opd", BAD, copied(another_architecture(PhiConfig(**SMALL))),
        "model '{tmp}/bad' has a bias in its output layer, which the fused losses ignore; use another"),
    "recurrent layers": ("teacher_grpo", BAD, copied(another_architecture(MambaConfig(vocab_size=26, hidden_size=16, num_hidden_layers=1))),
        "model '{tmp}/bad' has layers (linear_attention) that would mix the sequences of a micro-batch; use one whose layers are all plain attention"),
    "attention of its own": ("fkl_warmup", BAD, copied(another_architecture(FalconConfig(**SMALL))),
        "model '{tmp}/bad' has layers (those of FalconForCausalLM) that would mix the sequences of a micro-batch; use one whose layers are all plain attention"),
    "more tokens than rows": ("teacher_grpo", BAD, copied(tokenizer(tokens=["a", "b"])),
        "model '{tmp}/bad' knows 26 tokens and its tokenizer has 28; put the tokenizer beside it that it was trained with"),
    # pairs
    "missing teacher": ("opd", "--teacher {tmp}/nowhere", None,
        "--teacher '{tmp}/nowhere' is not a checkpoint directory, nor a hub name (owner/name)"),
    "teacher of another family": ("fkl_warmup", "--teacher {tmp}/bad", copied(tokenizer(tokens=["a", "b"]), of="teacher"),
        "--model '{student}' and --teacher '{tmp}/bad' have different vocabularies (26 and 28 tokens, 2 differ: 'a' is absent and 26, 'b' is absent and 27); distillation needs a teacher of the student's family"),
    "different end of sequence": ("opd", "--teacher {tmp}/bad", copied(tokenizer(eos_token="<|user|>"), of="teacher"),
        "--model '{student}' and --teacher '{tmp}/bad' differ in their eos_token ('<|im_end|>' and '<|user|>'); copy one tokenizer over the other"),
    "different template": (
        "opd", "--teacher {tmp}/bad",
        copied(tokenizer(chat_template=toy.CHAT_TEMPLATE.replace("<|user|>", "<|assistant|>")), of="teacher"),
        "--model '{student}' and --teacher '{tmp}/bad' render prompts differently (after '<|' one has …, the other …); give both the same chat template"),
    "template that differs in a system's turn": ("opd", "--system-prompt 7+7 --teacher {tmp}/bad", copied(tokenizer(chat_template=SYSTEM), of="teacher"),
        "--model '{student}' and --teacher '{tmp}/bad' render prompts differently (after '<|' one has …, the other …); give both the same chat template"),
    "template that differs in an example's turn": ("fkl_warmup", DATA + " --teacher {tmp}/bad", both(lines(ROW, chat("user", "assistant", "user")), copied(tokenizer(chat_template=EXAMPLES), of="teacher")),
        "--model '{student}' and --teacher '{tmp}/bad' render prompts differently (after …); give both the same chat template"),
    # teacher rollouts
    "rollouts that end elsewhere": ("fkl_warmup", CACHE + " --stop :", cached_rollouts(),
        "--rollouts '{tmp}/cache' holds other rollouts (with end_tokens = […], and this run needs […]); name another directory"),
    "rollouts of another run": ("fkl_warmup", CACHE + " --seed 1", cached_rollouts(),
        "--rollouts '{tmp}/cache' holds other rollouts (with seed = 0, and this run needs 1); name another directory"),
    "rollouts that are none": ("fkl_warmup", CACHE, lines("hello", name="cache/letter"),
        "--rollouts '{tmp}/cache' holds something else than rollouts; name another directory"),
    "nothing right to learn from": ("fkl_warmup", CACHE + " --loss sft --keep correct", cached_rollouts(),
        "--keep correct leaves nothing, because no response is right and finished; give --keep all"),
    # texts of another model
    "no teacher": ("fkl_warmup", "--teacher None", None,
        "--teacher is missing; name a checkpoint, or with --loss sft a .jsonl file in --rollouts"),
    "texts and a teacher": ("fkl_warmup", "--loss sft --rollouts {tmp}/texts.jsonl", None,
        "--rollouts '{tmp}/texts.jsonl' holds texts, from which --loss sft learns without a --teacher; give these two settings, or a directory in --rollouts"),
    "no such texts": ("fkl_warmup", TEXTS, None,
        "--rollouts '{tmp}/texts.jsonl' is not a file; check the path"),
    # rewards
    "reward that names no function": ("teacher_grpo", "--reward {tmp}/rewards.py", None,
        "--reward '{tmp}/rewards.py' is not FILE.py:function with a file that exists; check the path"),
    "no such reward file": ("fkl_warmup", "--reward {tmp}/rewards.py:score", None,
        "--reward '{tmp}/rewards.py:score' is not FILE.py:function with a file that exists; check the path"),
    # held-out labels
    "labels that were seen": ("student_grpo", BAD + " --data {tmp}/seen.jsonl --half full", both(lines(ROW, {"prompt": "2+2", "answer": "4"}, name="seen.jsonl"), copied(trained_on_everything)),
        "--half full: on 2 of its 2 problems --model '{tmp}/bad' or a checkpoint before it was already trained; give the other half, or add --replay for the replay control"),
    "replay of what was never seen": ("student_grpo", "--replay", None,
        "--replay: --model '{student}' was trained on none of the problems of half 2H; leave --replay out"),
    # engines
    "tensor parallel without vLLM": ("teacher_grpo", "--engine torch --tensor-parallel 2", None,
        "--tensor-parallel 2 needs vLLM; give --engine vllm, or drop it"),
    "vLLM is not installed": ("opd", "--engine vllm", lambda place: place.hide("vllm"),
        "--engine vllm: vLLM is not installed; install requirements.txt, or give --engine torch"),
    "heads that vLLM cannot attend with": ("teacher_grpo", BAD + " --engine vllm", copied(config_json(head_dim=48)),
        "--engine vllm: on a CPU vLLM has no attention for heads of 48, the size in '{tmp}/bad', only for 32, 64, 80, 96, 112, 128, 160, 192, 224, 256; give --engine torch"),
    "more positions than there are": ("teacher_grpo", "--engine vllm --max-response-tokens 65", None,
        "--max-prompt-tokens 64 and --max-response-tokens 65 make 129, and '{student}' has 128 positions; lower one of them"),
    "more positions than the embedded sampler's model has": ("teacher_grpo", "--engine torch --max-response-tokens 116", None,
        "the longest prompt, of 13 tokens, and --max-response-tokens 116 make 129, and '{student}' has 128 positions; lower --max-response-tokens"),
    "more positions than there are, planned": ("fkl_warmup", "--max-response-tokens 16384 --dry-run", None,
        "the longest prompt, of 13 tokens, and --max-response-tokens 16384 make 16397, and '{student}' has 128 positions; lower --max-response-tokens"),
    "more positions than the teacher has": ("opd", "--teacher {tmp}/bad", copied(config_json(max_position_embeddings=20), of="teacher"),
        "the longest prompt, of 13 tokens, and --max-response-tokens 8 make 21, and '{tmp}/bad' has 20 positions; lower --max-response-tokens"),
    "more positions than there are to evaluate": ("evaluate", "--engine torch --max-response-tokens 116", None,
        "the longest prompt, of 13 tokens, and --max-response-tokens 116 make 129, and '{student}' has 128 positions; lower --max-response-tokens"),
    "tensor parallel over more processes than there are": ("teacher_grpo", "--engine vllm --tensor-parallel 2", None,
        "--tensor-parallel 2 must divide the number of processes (1); give one that does"),
    # evaluation
    "nothing to evaluate": ("evaluate", "--models", None,
        "there is nothing to evaluate; name checkpoints with --models"),
    "nothing to audit": ("experiments.audit", "", None,
        "there is nothing to do; give --lineage, --compare, --responses, --regrade or --curves"),
    "curves of no stage": ("experiments.audit", "--curves {student}", None,
        "--curves ['{student}']: none of them has a metrics.jsonl with rewards, accuracies or KLs; name checkpoints of GRPO, OPD or the warmup"),
    "two curves of one name": ("experiments.audit", "--curves {student} {student}", None,
        "--labels ['student', 'student'] must be one different name for each of the 2 --curves"),
    "labels that do not match": ("evaluate", "--labels a b", None,
        "--labels ['a', 'b'] must be one different name for each of the 1 --models"),
    "two checkpoints of one name": ("evaluate", "--models {student} {student}", None,
        "--labels ['student', 'student'] must be one different name for each of the 2 --models"),
    "two data sets of one name": ("evaluate", "--data {problems} {tmp}/train.jsonl --max-prompt-tokens 64", lines(ROW, name="train.jsonl"),
        "--data ['{problems}', '{tmp}/train.jsonl']: two sets have one name, and the report needs two; rename a file"),
    "prompt too long to evaluate": ("evaluate", "--max-prompt-tokens 3", None,
        "the prompt of problem 997b7809ed0d5413 ('Left to right, modulo 10: 6-6-0-4-8'...) has 13 tokens, more than --max-prompt-tokens 3; raise the limit or drop the problem"),
    "no samples": ("evaluate", "--k 0", None,
        "--k 0 is too small; give a number above zero"),
    "top-p above one": ("evaluate", "--top-p 1.5", None,
        "--top-p 1.5 is more than all of the distribution; give 1 or less"),
    "top-k zero": ("evaluate", "--top-k 0", None,
        "--top-k 0 keeps no token; give 1 or more, or -1 for all"),
    "report in a file's place": ("evaluate", "--out {tmp}/file", lines(name="file"),
        "--out '{tmp}/file' cannot be written ('{tmp}/file' is not a writable directory); name another"),
    "missing responses": ("experiments.audit", "--responses {tmp}/nowhere.jsonl", None,
        "--responses '{tmp}/nowhere.jsonl' is not a file; give a .jsonl file of answers and responses"),
    "responses with a bad line": ("experiments.audit", "--responses {tmp}/data.jsonl", lines(FINE, b"\xff"),
        "line 2 of '{tmp}/data.jsonl' is not an object with answer and response; mend it"),
    "responses without answers": ("experiments.audit", "--responses {tmp}/data.jsonl", lines(FINE, {"response": "a"}),
        "line 2 of '{tmp}/data.jsonl' is not an object with answer and response; mend it"),
    "responses that are no text": ("experiments.audit", "--responses {tmp}/data.jsonl", lines({"answer": "1", "response": 1}),
        "line 1 of '{tmp}/data.jsonl': answer and response must be text, the answer not empty; mend it"),
    "no responses": ("experiments.audit", "--responses {tmp}/data.jsonl", lines(),
        "--responses '{tmp}/data.jsonl' is empty; give a line for each response"),
    "responses graded onto themselves": ("experiments.audit", "--responses {tmp}/data.jsonl --out {tmp}", lines(FINE),
        "--out '{tmp}' is the directory of --responses itself; name another"),
    "a label that names no directory": ("evaluate", "--labels ../..", None,
        "--labels: '../..' cannot be the name of a directory in the report; give one of letters and digits"),
    "a label in the place of the table": ("evaluate", "--labels table.md", None,
        "--labels: 'table.md' cannot be the name of a directory in the report; give one of letters and digits"),
    "two labels of one directory": ("evaluate", "--models {student} {teacher} --labels a/b a-b", None,
        "--labels ['a/b', 'a-b']: two of them would share a directory of the report, because only letters, digits and the signs ._+- name one; give others"),
    "regrading no report": ("experiments.audit", "--regrade {tmp}", None,
        "--regrade '{tmp}' holds no results.json; evaluate into it first"),
    "regrading a report whose samples are gone": ("experiments.audit", "--regrade {tmp}/a", report("a", {"results": {"x": {"y": {"avg": 1, "se": 0, "problems": 2}}}}),
        "--regrade '{tmp}/a': {tmp}/a/x/y.jsonl does not hold all samples that the report was made from; evaluate it anew"),
    "scores from no report": ("experiments.audit", "--lineage {student} --reports {tmp}", None,
        "--reports '{tmp}' holds no results.json; evaluate into it first"),
    "scores from half a report": ("experiments.audit", "--lineage {student} --reports {tmp}/a", report("a", '{"results": {'),
        "--reports '{tmp}/a': its results.json is not a report of an evaluation; evaluate it anew"),
    "scores from something else": ("experiments.audit", "--lineage {student} --reports {tmp}/a", report("a", {"averages": {}}),
        "--reports '{tmp}/a': its results.json is not a report of an evaluation; evaluate it anew"),
    # watching a run
    "samples of no run": ("experiments.samples", "", None,
        "'{tmp}/run' holds no samples.jsonl; name the --out of a stage that has made a step"),
    "samples that there are not": ("experiments.samples", "--step 7", both(lines({"step": 0}, name="run/metrics.jsonl"), lines({"step": 0}, name="run/samples.jsonl")),
        "{tmp}/run has no such samples; leave out --step or --only"),
    "no samples to print": ("experiments.samples", "--last 0", both(lines(name="run/metrics.jsonl"), lines(name="run/samples.jsonl")),
        "--last 0 prints nothing; give 1 or more"),
    "tracker that is not installed": ("experiments.track", "--to wandb", lambda place: place.hide("wandb"),
        "--to wandb: it is not installed; run pip install wandb, or name the other one"),
}  # fmt: skip


class Place:
    def __init__(self, tmp, student, teacher, problems, monkeypatch):
        self.tmp, self.monkeypatch = tmp, monkeypatch
        self.student, self.teacher, self.problems = student, teacher, problems

    def hide(self, package):
        find = importlib.util.find_spec
        self.monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
        )

    def fill(self, words: str) -> str:
        return words.format(tmp=self.tmp, student=self.student, teacher=self.teacher, problems=self.problems)


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(directory.rglob("*"))
    }


def test_the_readme_says_how_many_there_are():
    assert f"leave nothing behind: {len(CASES)} of them" in (ROOT / "PROMISES.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_left_behind(name, student, teacher, problems, tmp_path, monkeypatch, capfd):
    script, words, prepare, sentence = CASES[name]
    place = Place(tmp_path, student, teacher, problems, monkeypatch)
    if prepare is not None:
        prepare(place)
    if "--engine vllm" in words and name != "vLLM is not installed":
        pytest.importorskip("vllm")
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(place.fill(f"{SCRIPTS[script]} {words}"))])
    capfd.readouterr()
    module = importlib.import_module(script)
    monkeypatch.setattr(common, "exit_process", sys.exit)  # which would end pytest if it has made a process group
    with pytest.raises(SystemExit) as exit:
        common.cli(module.main, module.Config)
    said = capfd.readouterr().err
    assert exit.value.code == 2
    assert contents(tmp_path) == before
    pattern = re.escape(f"error: {place.fill(sentence)}").replace("…", ".+")  # what a library says is the library's
    assert "Traceback" not in said and re.fullmatch(pattern, said.splitlines()[-1])
    assert said.endswith("\n")


def test_a_port_that_is_taken(student, problems, tmp_path):
    """As torchrun starts rank 0 of two, where something else listens at the place to meet."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        words = f"--model {student} --data {problems} --out {tmp_path}/out --exclude".split()
        done = subprocess.run(
            [sys.executable, str(ROOT / "teacher_grpo.py"), *words],
            env={**os.environ, **meeting, **ranks}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 2 and os.listdir(tmp_path) == []
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    port = meeting["MASTER_PORT"]
    assert re.fullmatch(
        rf"error: the processes of this run cannot meet at 127.0.0.1:{port} \(.+\); give torchrun another port", line
    )
    assert "Traceback" not in done.stderr
