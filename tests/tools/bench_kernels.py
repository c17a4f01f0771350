"""Times and memory of the fused losses beside the formulas and Liger's kernel, on one device.

    python -m tests.tools.bench_kernels            # the table on a GPU, written to results/kernels/bench_<device>.md
    python -m tests.tools.bench_kernels --cpu      # memory and time against the formulas on one CPU thread
    python -m tests.tools.bench_kernels --tiny     # every line of the GPU table at toy sizes, on any device; writes nothing

Liger-Kernel is compared if it is installed (`pip install liger-kernel`). A row that runs out of memory stays in the
table. Times are medians. Memory is the peak above what was allocated before the call, gradients included.
"""

import argparse
import datetime
import gc
import importlib.metadata
import math
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import kernels as K  # noqa: E402

SIZES = {  # N tokens, Ds, Dt, V
    "Qwen3 1.7B <- 8B": (16384, 2048, 4096, 151936),
    "Llama-3 8B <- 70B": (16384, 4096, 8192, 128256),
}
TINY = {"tiny": (200, 32, 48, 1100)}


# Against the formulas on a CPU.

def cpu_step(op, who):
    torch.manual_seed(0)
    n, d, v = 512, 256, 32000
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d).mul_(0.1).requires_grad_()
    if op == "kl":
        function = K.fused_linear_kl if who == "ours" else K.fused_linear_kl_reference
        others = torch.randn(n, d), torch.randn(v, d).mul_(0.1)
    else:
        function = K.fused_linear_logprob if who == "ours" else K.fused_linear_logprob_reference
        others = ()
    target = torch.randint(0, v, (n,))

    def step():
        hidden.grad = weight.grad = None
        function(hidden, weight, *others, target)[0].sum().backward()
    return step


def peak_of_one_step(op, who):
    """In a process of its own: megabytes by which one step raises the peak of resident memory."""
    torch.set_num_threads(1)
    step = cpu_step(op, who)
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)


def cpu_bars(check):
    torch.set_num_threads(1)
    print("T=512, D=256, V=32000, fp32, forward + backward, one thread, against the formulas; bars: memory <= 0.30x, CPU "
          "time <= 1.00x")

    def peak(op, who):
        """The least of three: the heap of one process in fifteen is laid out so that 42 MB come on top."""
        command = [sys.executable, "-m", "tests.tools.bench_kernels", "--peak", op, who]
        return min(float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
                   for _ in range(3))
    # Before this process grows: Linux lets a child inherit its parent's peak.
    peaks = {op: {who: peak(op, who) for who in ("ours", "formulas")} for op in ("kl", "logprob")}
    kept = True
    for op, memory in peaks.items():
        steps = {who: cpu_step(op, who) for who in ("ours", "formulas")}
        seconds = {who: [] for who in steps}
        for _ in range(4):  # in turn, so that a busy machine is busy for both
            for who, step in steps.items():
                start = time.process_time()
                step()
                seconds[who].append(time.process_time() - start)
        cost = {who: min(seconds[who]) for who in steps}
        time_ratio, memory_ratio = cost["ours"] / cost["formulas"], memory["ours"] / memory["formulas"]
        kept &= memory_ratio <= 0.3  # the time is printed: a busy machine must not fail a test
        print(f"{op:8} CPU time {cost['ours'] * 1e3:4.0f} / {cost['formulas'] * 1e3:4.0f} ms = {time_ratio:.2f}x, peak "
              f"extra memory {memory['ours']:4.0f} / {memory['formulas']:4.0f} MB = {memory_ratio:.2f}x", flush=True)
    if check and not kept:
        sys.exit("the memory bar is not met")


# The table on a GPU.

def liger():
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda h, w, th, tw: loss(h, w, th, tw, None) * len(h)  # its loss is a mean over tokens, ours a sum


def tokens(h, w):
    """One token for each row, in the place of those that a model sampled."""
    return torch.arange(len(h), device=h.device) % len(w)


def exact(function, *direction):
    return lambda h, w, th, tw: function(h, w, th, tw, tokens(h, w), *direction)[0]


def sampled_token(h, w, th, tw):
    """The estimate from one token: policy gradient on log pi_T - log pi_student."""
    logprob, _ = K.fused_linear_logprob(h, w, tokens(h, w))
    with torch.no_grad():
        advantage = K.fused_linear_logprob(th, tw, tokens(h, w))[0] - logprob
    return -(advantage * logprob).sum()


KL_METHODS = {
    "ours, reverse": lambda: exact(K.fused_linear_kl),
    "ours, forward": lambda: exact(K.fused_linear_kl, "forward"),
    "formulas": lambda: exact(K.fused_linear_kl_reference),
    "formulas, torch.compile": lambda: exact(torch.compile(K.fused_linear_kl_reference)),
    "Liger LigerFusedLinearJSD": liger,
    "sampled token, ours": lambda: sampled_token,
}


def milliseconds(function):
    if torch.cuda.is_available():
        from triton.testing import do_bench
        return do_bench(function, warmup=200, rep=1000, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def extra_gigabytes(function):
    if not torch.cuda.is_available():
        return math.nan
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def row(name, make):
    """A line of the table: the name, ms and GB of `make()`, or what went wrong. make() prepares the call."""
    try:
        function = make()
        gigabytes = extra_gigabytes(function)  # first, because it also compiles
        line = f"| {name} | {milliseconds(function):.2f} | {gigabytes:.2f} | |"
    except Exception as error:  # a package that is missing, or too little memory: the other rows are still measured
        line = f"| {name} | - | - | {type(error).__name__}: {str(error).splitlines()[0][:90]} |"
        gc.collect()
    print(line, flush=True)
    return line


def inputs(n, ds, dt, v, device):
    torch.manual_seed(0)
    make = lambda rows, columns, scale: (torch.randn(rows, columns, device=device) * scale).bfloat16()
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


def table(device, shape):
    args = inputs(*shape, device)
    hidden, weight = args[:2]
    gradients = lambda loss: torch.autograd.grad(loss, (hidden, weight))
    lines = []
    for name, make in KL_METHODS.items():
        def prepared(make=make):
            method = make()
            return lambda: gradients(method(*args))
        lines.append(row(f"KL, {name}", prepared))
    lines.append(row("KL, its matrix products alone", lambda: products(*args)))
    for who, function in (("ours", K.fused_linear_logprob), ("formulas", K.fused_linear_logprob_reference)):
        call = lambda function=function: function(hidden, weight, tokens(hidden, weight))[0]
        forward = lambda call=call: torch.no_grad()(call)
        lines.append(row(f"log-probability, {who}, forward", forward))
        lines.append(row(f"log-probability, {who}, forward + backward", lambda call=call: lambda: gradients(call().sum())))
    square = torch.randn(*(8192 if device == "cuda" else 256,) * 2, device=device).bfloat16()
    tflops = 2 * len(square) ** 3 / milliseconds(lambda: square @ square) / 1e9
    lines.append(f"| a square product in bfloat16: {tflops:.1f} TFLOP/s | | | |")
    return lines


def gradient_errors(device, n, ds, v):
    """Lines with the relative error of dH and dW against float64, for teachers at three distances from the student."""
    lines = []
    for noise in (0.22, 0.045, 0.014):  # of the logits: KL is about noise ** 2 * 2
        hidden, weight, _, _ = inputs(n, ds, 1, v, device)
        moved = (weight + noise * 2 / ds ** 0.5 * torch.randn_like(weight, dtype=torch.float32)).detach().bfloat16()
        args = hidden, weight, hidden.detach(), moved
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in args]
        kl = K.fused_linear_kl(*wide, tokens(hidden, weight), backend="torch")
        truth = torch.autograd.grad(kl.loss, wide[:2])
        for name in ("ours, reverse", "formulas"):
            got = torch.autograd.grad(KL_METHODS[name]()(*args), args[:2])
            worst = max(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth))
            lines.append(f"- mean KL {kl.kl.mean().item():.1e}, {name}: {worst:.2%}")
            print(lines[-1], flush=True)
    return lines


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="against the formulas on a CPU only")
    parser.add_argument("--assert-memory", action="store_true", help="with --cpu: fail where memory is above 0.30x")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, any device, writes nothing")
    parser.add_argument("--peak", nargs=2, metavar=("OP", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak_of_one_step(*args.peak)
    if args.cpu or not (torch.cuda.is_available() or args.tiny):
        return cpu_bars(args.assert_memory)
    cuda = torch.cuda.is_available()
    device, name = "cuda" if cuda else "cpu", torch.cuda.get_device_name() if cuda else platform.machine()
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "triton", "liger-kernel"))
    lines = [f"# Fused losses on {name}", "", f"{versions}; {datetime.date.today()}; `python -m tests.tools.bench_kernels`"]
    print(lines[-1])
    for size, shape in (TINY if args.tiny else SIZES).items():
        lines += ["", f"## {size}: N, Ds, Dt, V = {shape}", "", "| | ms | extra GB | |", "|---|---|---|---|"]
        lines += table(device, shape)
    n, ds, _, v = next(iter((TINY if args.tiny else SIZES).values()))
    lines += ["", "## Relative error of the gradients against float64", "", *gradient_errors(device, min(n, 256), ds, v)]
    if not args.tiny:
        slug = name.lower().replace(" ", "_")
        (ROOT / f"results/kernels/bench_{slug}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
