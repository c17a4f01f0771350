"""Times and memory of the fused losses beside the formulas and other libraries' kernels, in one run on one device.

    python -m tests.bench_kernels            # the whole table on a GPU: results/kernels/bench_<device>.json, .md, .png
    python -m tests.bench_kernels --cpu      # the CPU bars: memory and time against the formulas, one thread
    python -m tests.bench_kernels --tiny     # every line of the GPU table at toy sizes, on any device; writes nothing

Liger-Kernel and TRL are compared where they are installed (`pip install liger-kernel trl`); the table says where they
are not. A row that runs out of memory stays in it. Times are medians; memory is the peak above what was allocated
before the call, gradients included. Bars are those the project set itself for an H100.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels as K  # noqa: E402

SIZES = {  # N tokens, Ds, Dt, V
    "Qwen3 1.7B <- 8B": (16384, 2048, 4096, 151936),
    "Llama-3 8B <- 70B": (16384, 4096, 8192, 128256),
}
TINY = {"tiny": (200, 32, 48, 1100)}
RESULTS = ROOT / "results/kernels"


# The CPU bars.

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
        """The least of three: one process in fifteen has its heap laid out so that 42 MB come on top."""
        command = [sys.executable, "-m", "tests.bench_kernels", "--peak", op, who]
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


# The GPU table.

def optional(make):
    """A competitor, or why it is missing."""
    try:
        return make()
    except Exception as error:  # not installed, wrong version, no GPU: the run goes on without it
        return f"not run: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"


def liger_fused():
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda h, w, th, tw: loss(h, w, th, tw, None) * len(h)  # a mean over tokens; ours is a sum


def liger_chunked():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    return lambda h, w, th, tw: loss(h, w, th, tw, torch.zeros(len(h), dtype=torch.int64, device=h.device)) * len(h)


def trl_chunked():
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as loss
    return lambda h, w, th, tw: loss(h[None], th[None], w, tw, torch.ones(1, len(h), device=h.device), 1.0, 1)[0]


def sampled(h, w):
    """One token for each row, standing for those that were sampled."""
    return torch.arange(len(h), device=h.device) % len(w)


def exact(function, *direction):
    return lambda h, w, th, tw: function(h, w, th, tw, sampled(h, w), *direction)[0]


def sampled_token(h, w, th, tw):
    """The sampled-token estimator: policy gradient on log pi_T - log pi_student of one token."""
    target = sampled(h, w)
    logprob, _ = K.fused_linear_logprob(h, w, target)
    with torch.no_grad():
        advantage = K.fused_linear_logprob(th, tw, target)[0] - logprob
    return -(advantage * logprob).sum()


KL_METHODS = {
    "ours, reverse": lambda: exact(K.fused_linear_kl),
    "ours, forward": lambda: exact(K.fused_linear_kl, "forward"),
    "formulas": lambda: exact(K.fused_linear_kl_reference),
    "formulas, torch.compile": lambda: exact(torch.compile(K.fused_linear_kl_reference)),
    "Liger LigerFusedLinearJSD (default)": liger_fused,
    "Liger chunked JSD loss": liger_chunked,
    "TRL chunked divergence": trl_chunked,
    "sampled token, ours": lambda: sampled_token,
}


class Device:
    def __init__(self, name):
        self.name, self.cuda = name, name == "cuda"

    def milliseconds(self, function):
        if self.cuda:
            from triton.testing import do_bench
            return do_bench(function, warmup=200, rep=1000, return_mode="median")
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    def extra_gigabytes(self, function):
        if not self.cuda:
            return math.nan
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 30

    def measure(self, function):
        """-> milliseconds and gigabytes, or what stopped it."""
        try:
            gigabytes = self.extra_gigabytes(function)  # first: it also compiles
            return dict(ms=self.milliseconds(function), gb=gigabytes)
        except Exception as error:  # the row is kept
            full = isinstance(error, torch.cuda.OutOfMemoryError)
            note = "out of memory" if full else f"{type(error).__name__}: {error}"[:100]
            gc.collect()
            return dict(ms=math.nan, gb=math.nan, note=note)


def inputs(n, ds, dt, v, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    make = lambda rows, columns, scale: (torch.randn(rows, columns, device=device) * scale).to(dtype)
    student = make(n, ds, 1).requires_grad_(), make(v, ds, 2 / ds ** 0.5).requires_grad_()
    return *student, make(n, dt, 1), make(v, dt, 2 / dt ** 0.5)


def ceilings(device, n, ds, dt, v):
    """Milliseconds of the products alone, chunked as ours, bare; and the device's own GEMM and copy rates."""
    h, w, th, tw = (x.detach() for x in inputs(n, ds, dt, v, device.name))
    h, w, th, tw = (K._operand(x) for x in (h, w, th, tw))
    rows = K._pieces(n, v * 4, h.device)[0].stop
    logits, total = (h.new_zeros(shape, dtype=torch.float32) for shape in ((rows, v), (v, ds)))
    grad = logits.to(h.dtype)

    def products():
        K._mm(h[:rows], w.T, out=logits)
        K._mm(th[:rows], tw.T, out=logits)
        K._mm(grad, w)
        K._add_mm(total, grad.T, h[:rows])
    pieces = n / rows
    bare = device.milliseconds(products) * pieces
    square = torch.randn(*(8192 if device.cuda else 256,) * 2, device=device.name).to(h.dtype)
    source = torch.empty(2 ** 30 if device.cuda else 2 ** 20, dtype=torch.uint8, device=device.name)
    goal = torch.empty_like(source)
    return dict(products_ms=bare, product_tflops=2 * n * v * (3 * ds + dt) / bare / 1e9,
                square_gemm_tflops=2 * len(square) ** 3 / device.milliseconds(lambda: square @ square) / 1e9,
                copy_gb_per_s=2 * source.numel() / device.milliseconds(lambda: goal.copy_(source)) / 1e6)


def show(name, row):
    print(f"  {name:36} {row['ms']:9.2f} ms {row['gb']:7.2f} GB  {row.get('note', '')}", flush=True)


def kl_table(device, sizes):
    args = inputs(*sizes, device.name)
    rows = {}
    for name, make in KL_METHODS.items():
        method = optional(make)
        if isinstance(method, str):
            rows[name] = dict(ms=math.nan, gb=math.nan, note=method)
        else:
            rows[name] = device.measure(lambda: torch.autograd.grad(method(*args), args[:2]))
        show(name, rows[name])
    return rows


def logprob_table(device, n, ds, dt, v):
    hidden, weight, _, _ = inputs(n, ds, 1, v, device.name)
    target = sampled(hidden, weight)
    rows = {}
    for who, function in (("ours", K.fused_linear_logprob), ("formulas", K.fused_linear_logprob_reference)):
        with torch.no_grad():
            rows[f"{who}, forward"] = device.measure(lambda: function(hidden, weight, target))

        def both():
            return torch.autograd.grad(function(hidden, weight, target)[0].sum(), (hidden, weight))
        rows[f"{who}, forward + backward"] = device.measure(both)
    backward = rows["ours, forward + backward"]["ms"] - rows["ours, forward"]["ms"]
    rows["ours, backward"] = dict(ms=backward, gb=math.nan)
    for name, row in rows.items():
        show(name, row)
    return rows


def gradient_errors(device, n, ds, v):
    """Relative error of dH and dW against float64 for a teacher that is the student with a moved head."""
    table = {}
    for noise in (0.22, 0.045, 0.014):  # of the logits: KL is about noise ** 2 * 2
        hidden, weight, _, _ = inputs(n, ds, 1, v, device.name)
        moved = (weight + noise * 2 / ds ** 0.5 * torch.randn_like(weight, dtype=torch.float32)).detach().bfloat16()
        args = hidden, weight, hidden.detach(), moved
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in args]
        exact_kl = K.fused_linear_kl(*wide, sampled(hidden, weight), backend="torch")
        truth = torch.autograd.grad(exact_kl.loss, wide[:2])
        mean_kl = f"{exact_kl.kl.mean().item():.1e}"
        row = {}
        for name, make in KL_METHODS.items():
            skipped = name in ("ours, forward", "sampled token, ours", "formulas, torch.compile")
            method = None if skipped else optional(make)
            if callable(method):
                try:
                    got = torch.autograd.grad(method(*args), args[:2])
                    row[name] = max(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth))
                except Exception as error:  # the row is kept
                    row[name] = f"{type(error).__name__}: {error}"[:80]
        table[mean_kl] = row
        shown = {k: f"{x:.2%}" if isinstance(x, float) else x for k, x in row.items()}
        print(f"  KL {mean_kl}: ", shown, flush=True)
    return table


def end_to_end(device, n, tiny):
    """An OPD update without sampling: both backbones, loss, student's backward. Exact KL against the sampled token."""
    from transformers import Qwen3Config, Qwen3Model
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size")
    shapes = (((32, 64, 2, 2, 1, 16, 1100), (48, 96, 2, 2, 1, 16, 1100)) if tiny else
              ((2048, 6144, 28, 16, 8, 128, 151936), (4096, 12288, 36, 32, 8, 128, 151936)))  # Qwen3 1.7B, 8B
    student_shape, teacher_shape = (dict(zip(names, shape)) for shape in shapes)
    with torch.device(device.name):
        torch.set_default_dtype(torch.bfloat16)
        student, teacher = (Qwen3Model(Qwen3Config(**s)) for s in (student_shape, teacher_shape))
        teacher_head = torch.randn(teacher_shape["vocab_size"], teacher_shape["hidden_size"]) * 0.02
        torch.set_default_dtype(torch.float32)
        ids = torch.arange(n).remainder(1000).view(-1, min(n, 2048) if n % 2048 == 0 else n)
    student.gradient_checkpointing_enable()
    student.train()

    def update(loss):
        with torch.no_grad():
            teacher_hidden = teacher(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = student(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        loss(hidden, student.embed_tokens.weight, teacher_hidden, teacher_head).backward()
        student.zero_grad()
    rows = {}
    for name in ("ours, reverse", "sampled token, ours"):
        row = rows[name] = device.measure(lambda: update(KL_METHODS[name]()))
        show(name, row)
    return rows


def bars(report):
    """What the project wants on an H100 at the Qwen3 sizes, beside what was measured. NaN meets nothing."""
    size = report["sizes"]["Qwen3 1.7B <- 8B"]
    kl, logprob, total = size["kl"], size["logprob"], report["end_to_end"]
    ours = kl["ours, reverse"]
    errors = [row["ours, reverse"] for row in report["gradient_error"].values()]
    rows = [
        ("KL forward + backward, ms", ours["ms"], 85),
        ("... over its bare products", ours["ms"] / size["ceilings"]["products_ms"], 1.25),
        ("... over Liger's default (<= 1/2.5)", ours["ms"] / kl["Liger LigerFusedLinearJSD (default)"]["ms"], 0.4),
        ("... extra memory over the formulas'", ours["gb"] / kl["formulas"]["gb"], 0.1),
        ("KL gradient error, worst", max((x if isinstance(x, float) else math.nan) for x in errors), 0.003),
        ("log-probability forward, ms", logprob["ours, forward"]["ms"], 18),
        ("log-probability backward, ms", logprob["ours, backward"]["ms"], 46),
        ("OPD update, exact / sampled token", total["ours, reverse"]["ms"] / total["sampled token, ours"]["ms"], 1.3),
    ]
    return [dict(bar=name, measured=value, wanted=limit, met=value <= limit) for name, value, limit in rows]


def write(report, slug):
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"bench_{slug}.json").write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [f"# Fused losses on {report['device']}", "", f"{versions}; {report['date']}; `{report['command']}`", "",
             "| bar | wanted at most | measured | met |", "|---|---|---|---|"]
    lines += [f"| {r['bar']} | {r['wanted']} | {r['measured']:.4g} | {'yes' if r['met'] else 'NO'} |"
              for r in report["bars"]]
    for size, tables in report["sizes"].items():
        rates = ", ".join(f"{k} {v:.4g}" for k, v in tables["ceilings"].items())
        lines += ["", f"## {size}: {tables['shape']}", "", f"Ceilings: {rates}", "", "| | ms | extra GB | |",
                  "|---|---|---|---|"]
        lines += [f"| {table}: {name} | {row['ms']:.2f} | {row['gb']:.2f} | {row.get('note', '')} |"
                  for table in ("kl", "logprob") for name, row in tables[table].items()]
    lines += ["", "## Gradient error against float64, by mean KL", ""]
    lines += [f"- KL {kl}: {row}" for kl, row in report["gradient_error"].items()]
    (RESULTS / f"bench_{slug}.md").write_text("\n".join(lines) + "\n")
    try:
        import matplotlib
    except ImportError:
        return print("no chart: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    size, tables = next(iter(report["sizes"].items()))
    rows = [(name, row["ms"], row["gb"]) for name, row in tables["kl"].items() if row["ms"] == row["ms"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.4 * len(rows) + 1.4), sharey=True)
    for axis, column, label in zip(axes, (1, 2), ("ms, forward + backward", "extra GB")):
        colors = ["C0" if "ours" in row[0] else "0.6" for row in rows]
        axis.barh([row[0] for row in rows], [row[column] for row in rows], color=colors)
        axis.set_xlabel(label)
    axes[0].axvline(tables["ceilings"]["products_ms"], color="k", ls=":", label="its matrix products alone")
    axes[0].legend()
    axes[0].invert_yaxis()
    figure.suptitle(f"Full-vocabulary KL, {size}, {tables['shape']}, {report['device']}")
    figure.tight_layout()
    figure.savefig(RESULTS / f"bench_{slug}.png", dpi=150)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU bars only")
    parser.add_argument("--assert-memory", action="store_true", help="with --cpu: fail where the memory bar is not met")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, any device, writes nothing")
    parser.add_argument("--peak", nargs=2, metavar=("OP", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak_of_one_step(*args.peak)
    if args.cpu:
        return cpu_bars(args.assert_memory)
    if not (torch.cuda.is_available() or args.tiny):
        print("No GPU here, so no GPU table (--tiny exercises it at toy sizes). The CPU bars instead:")
        return cpu_bars(args.assert_memory)
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.cuda else platform.machine()
    report = dict(device=name, date=datetime.date.today().isoformat(), command="python -m tests.bench_kernels",
                  sizes={}, versions={p: version(p) for p in ("torch", "triton", "liger-kernel", "trl", "transformers")})
    print(name, report["versions"])
    for size, shape in (TINY if args.tiny else SIZES).items():
        print(f"{size}: N, Ds, Dt, V = {shape}")
        tables = report["sizes"][size] = dict(shape=shape, ceilings=ceilings(device, *shape))
        print("  ceilings", {k: round(x, 2) for k, x in tables["ceilings"].items()})
        tables["kl"], tables["logprob"] = kl_table(device, shape), logprob_table(device, *shape)
    n, ds, _, v = shape = next(iter(report["sizes"].values()))["shape"]
    print("Gradient error against float64")
    report["gradient_error"] = gradient_errors(device, min(n, 256), ds, v)
    print("OPD update without sampling, exact KL and sampled token")
    report["end_to_end"] = end_to_end(device, n, args.tiny)
    if not args.tiny:
        report["bars"] = bars(report)
        for r in report["bars"]:
            print(f"{'met ' if r['met'] else 'NOT '} {r['bar']}: {r['measured']:.4g} (wanted <= {r['wanted']})")
        write(report, name.lower().replace(" ", "_"))


if __name__ == "__main__":
    main()
