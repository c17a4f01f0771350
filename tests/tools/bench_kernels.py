"""Times and memory of the fused losses beside the formulas and Liger's kernel, on one device.

    python -m tests.tools.bench_kernels            # on a GPU, also written to results/kernels/bench_<device>.md
    python -m tests.tools.bench_kernels --cpu      # on one CPU thread; fails if ours take over 0.30x the formulas' memory
    python -m tests.tools.bench_kernels --tiny     # every line of the GPU table at toy sizes, on any device; writes nothing

Liger-Kernel is compared if it is installed (`pip install liger-kernel`). A row that runs out of memory stays in the
table. Times are medians. Memory is the peak above what was allocated before the call, gradients included.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import multiprocessing
import pathlib
import platform
import resource
import statistics
import sys
import time
import timeit

import torch

import kernels as K

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {  # N tokens, Ds, Dt, V
    "Qwen3 1.7B <- 8B": (16384, 2048, 4096, 151936),
    "Llama-3 8B <- 70B": (16384, 4096, 8192, 128256),
}
TINY = {"tiny": (200, 32, 48, 1100)}
CPU = {"fp32 on one CPU thread": (512, 256, 256, 32000)}


def tokens(h, w):
    """One token for each row, in the place of those that a model sampled."""
    return torch.arange(len(h), device=h.device) % len(w)


def exact(function, *direction):
    return lambda h, w, th, tw: function(h, w, th, tw, tokens(h, w), *direction)[0]


def logprob(function):
    return lambda h, w, th, tw: function(h, w, tokens(h, w))[0].sum()


@functools.cache
def compiled():
    return torch.compile(K.fused_linear_kl_reference)


def liger(h, w, th, tw):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    return LigerFusedLinearJSD(jsd_beta=1.0)(h, w, th, tw, None) * len(h)  # its loss is a mean over tokens, ours a sum


def sampled_token(h, w, th, tw):
    """The estimate from one token: policy gradient on log pi_T - log pi_student."""
    found, _ = K.fused_linear_logprob(h, w, tokens(h, w))
    with torch.no_grad():
        advantage = K.fused_linear_logprob(th, tw, tokens(h, w))[0] - found
    return -(advantage * found).sum()


METHODS = {  # name -> loss, a function of the student's hidden states and weight and the teacher's
    "KL, ours, reverse": exact(K.fused_linear_kl),
    "KL, ours, forward": exact(K.fused_linear_kl, "forward"),
    "KL, formulas": exact(K.fused_linear_kl_reference),
    "KL, formulas, torch.compile": lambda *args: exact(compiled())(*args),
    "KL, Liger LigerFusedLinearJSD": liger,
    "KL, sampled token, ours": sampled_token,
    "log-probability, ours": logprob(K.fused_linear_logprob),
    "log-probability, formulas": logprob(K.fused_linear_logprob_reference),
}
ON_CPU = {"KL, ours, reverse": "KL, formulas", "log-probability, ours": "log-probability, formulas"}


def inputs(n, ds, dt, v, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    make = lambda rows, columns, scale: (torch.randn(rows, columns, device=device) * scale).to(dtype)
    student = make(n, ds, 1).requires_grad_(), make(v, ds, 2 / ds ** 0.5).requires_grad_()
    return *student, make(n, dt, 1), make(v, dt, 2 / dt ** 0.5)


def products(h, w, th, tw):
    """A function that does the matrix products of our KL and nothing else, in as many pieces."""
    h, w, th, tw = (K._operand(x.detach()) for x in (h, w, th, tw))
    pieces = K._pieces(len(h), len(w) * 4, h.device)
    logits = h.new_zeros((pieces[0].stop, len(w)), dtype=torch.float32)
    total, grad = torch.zeros_like(w, dtype=torch.float32), logits.to(h.dtype)

    def call():
        for piece in pieces:
            rows = piece.stop - piece.start
            K._mm(h[piece], w.T, out=logits[:rows])
            K._mm(th[piece], tw.T, out=logits[:rows])
            K._mm(grad[:rows], w)
            K._add_mm(total, grad[:rows].T, h[piece])
    return call


def measure(make):
    """Milliseconds and gigabytes of `make()`, which prepares the call."""
    function = make()
    if torch.cuda.is_available():
        from triton.testing import do_bench
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()  # memory first, because it also compiles
        torch.cuda.synchronize()
        del result
        peak = torch.cuda.max_memory_allocated() - before
        return do_bench(function, warmup=200, rep=1000, return_mode="median"), peak / 2 ** 30
    # M_MMAP_THRESHOLD: each tensor is a mapping of its own. In the heap, chance layouts take up to 42 MB more.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: None)
    mallopt(-3, 1 << 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    mallopt(-3, 1 << 25)  # glibc's own limit, for the times
    times = timeit.repeat(function, timer=time.process_time, number=1, repeat=3)
    return statistics.median(times) * 1e3, peak / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def apart(function, *args):
    """What a function returns in a fork of this process, which never computes: nothing before has raised the peak."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=lambda: writing.send(function(*args)))
    child.start()
    writing.close()
    found = reading.recv()
    child.join()
    return found


def row(name, make):
    """A line of the table, which is printed too, with what went wrong if something did; and the gigabytes."""
    gigabytes = None
    try:
        milliseconds, gigabytes = measure(make)
        line = f"| {name} | {milliseconds:.2f} | {gigabytes:.3f} | |"
    except Exception as error:  # a package that is missing, or too little memory: the other rows are still measured
        line = f"| {name} | - | - | {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]} |"
        gc.collect()
    print(line, flush=True)
    return line, gigabytes


def table(args, names):
    """The rows of the methods' forward and backward passes, and of parts of them, by name."""
    both_passes = lambda name: lambda: lambda: torch.autograd.grad(METHODS[name](*args), args[:2])
    square = torch.zeros(*(8192 if args[0].is_cuda else 256,) * 2, device=args[0].device, dtype=args[0].dtype).normal_()
    makers = {name: both_passes(name) for name in names} | {
        "KL, its matrix products alone": lambda: products(*args),
        "log-probability, ours, forward": lambda: torch.no_grad()(lambda: METHODS["log-probability, ours"](*args)),
        f"one product of {len(square)} x {len(square)} matrices": lambda: lambda: square @ square}
    run = row if args[0].is_cuda else functools.partial(apart, row)
    return {name: run(name, make) for name, make in makers.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="against the formulas on a CPU only")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, any device, writes nothing")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    on_cpu = options.cpu or not (cuda or options.tiny)
    if on_cpu and cuda:
        raise SystemExit("--cpu measures on a CPU; set CUDA_VISIBLE_DEVICES= before the command")
    if not cuda:
        torch.set_num_threads(1)
    device, name = "cuda" if cuda else "cpu", torch.cuda.get_device_name() if cuda else platform.machine()
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed.get(name, 'absent')}" for name in ("torch", "triton", "liger-kernel"))
    command = "`python -m tests.tools.bench_kernels`"
    lines = [f"# Fused losses on {name}", "", f"{versions}; {datetime.date.today()}; {command}"]
    print(lines[-1])
    for size, shape in (CPU if on_cpu else TINY if options.tiny else SIZES).items():
        args = inputs(*shape, device, torch.float32 if on_cpu else torch.bfloat16)
        rows = table(args, [*ON_CPU, *ON_CPU.values()] if on_cpu else METHODS)
        lines += ["", f"## {size}: N, Ds, Dt, V = {shape}", "", "| | ms | extra GB | |", "|---|---|---|---|"]
        lines += [line for line, _ in rows.values()]
    if on_cpu:
        return any(rows[ours][1] > 0.3 * rows[formulas][1] for ours, formulas in ON_CPU.items())
    if not options.tiny:
        (ROOT / f"results/kernels/bench_{name.lower().replace(' ', '_')}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
