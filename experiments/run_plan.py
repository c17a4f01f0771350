"""Runs the commands that `make -n` prints, each in a fork of one process that has already imported everything.

    make -n tables SEED=3 | python -m experiments.run_plan

A stage of the toy computes for ten seconds; starting Python and importing PyTorch would take eight more. Otherwise this
is like make: each command is a separate process with its own arguments, and the first failure ends the plan.
"""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import traceback

from transformers import Qwen3ForCausalLM  # noqa: F401

import evaluate  # noqa: F401  (imported for the children, like the others)
import fkl_warmup  # noqa: F401
import opd  # noqa: F401
import teacher_grpo  # noqa: F401
from experiments import audit, tables  # noqa: F401


def run(words: list[str]) -> int:
    """Runs `python SCRIPT.py` or `python -m MODULE` in a forked child, anything else as a command; returns its status."""
    module = words[1:2] == ["-m"]
    if not module and not (len(words) > 1 and words[1].endswith(".py")):
        return subprocess.run(words).returncode
    child = os.fork()
    if child:
        # Ctrl-C also reaches the child, which handles it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.signal(signal.SIGINT, handler)
        return status
    status = 0
    try:
        if module:
            sys.argv = words[2:]
            sys.modules.pop(words[2], None)  # runpy warns about a module that is already imported
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for command in sys.stdin.read().replace("\\\n", " ").splitlines():
        words = shlex.split(command)
        if words and not words[0].startswith("make") and (status := run(words)):
            sys.exit(f"error: exit status {status} of: {command}")
