"""Our exact reverse KL beside the chunked loss in the authors' public code for an earlier paper, forward and backward.

    git clone https://github.com/HJSang/OPSD_OnPolicyDistillation AUTHORS
    python -m tests.bench_authors --authors AUTHORS --out results/losses/authors.md

The comparison begins where both losses can: at the hidden states and output matrices of student and teacher. It ends at
the gradients of the student's hidden states and output matrix. The authors' loss takes logits, so their side multiplies
first, the teacher without a graph, as their worker does. Their chunks have 512 tokens, their default. All is in float32.

CPU seconds are of all threads, and the least of some runs that alternate. Extra memory is what one forward and backward
pass adds to the highest resident memory of a process of its own. Both include the two gradients that are the result.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels import fused_linear_kl

SIZES = {
    "SmolLM2-135M": (1024, 576, 49152),
    "Qwen3-0.6B": (1024, 1024, 151936),
}  # tokens T, hidden size D, vocabulary V
TINY = {"tiny": (96, 32, 1100)}
LOSSES = Path("src/opd/losses.py")  # in the authors' repository


def authors_loss(directory: Path):
    """Their compute_reverse_kl_loss."""
    spec = importlib.util.spec_from_file_location("authors_losses", directory / LOSSES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_reverse_kl_loss


def inputs(tokens: int, hidden: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Student's hidden states (T, D) and matrix (V, D), then the teacher's, which differs from it by a little."""
    torch.manual_seed(0)
    states, weight = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden).mul_(2 / hidden**0.5)
    teacher_states = states + 0.3 * torch.randn_like(states)
    teacher_weight = torch.randn_like(weight).mul_(0.1 / hidden**0.5).add_(weight)
    return states.requires_grad_(), weight.requires_grad_(), teacher_states, teacher_weight


def mean_kl(side: str, authors: Path | None, states, weight, teacher_states, teacher_weight) -> torch.Tensor:
    """The mean over tokens of KL(student || teacher)."""
    if side == "ours":
        targets = torch.zeros(len(states), dtype=torch.int64)
        return fused_linear_kl(states, weight, teacher_states, teacher_weight, targets).loss / len(states)
    loss = authors_loss(authors)
    with torch.no_grad():
        teacher_logits = teacher_states @ teacher_weight.T
    return loss(teacher_logits, states @ weight.T)[0]


def run(options: argparse.Namespace) -> None:
    """Prints, as JSON, what one side costs and its loss; writes its gradients to --gradients."""
    torch.set_num_threads(options.threads)
    arguments = inputs(*options.size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(options.repeats):
        start = time.process_time()
        loss = mean_kl(options.side, options.authors, *arguments)
        gradients = torch.autograd.grad(loss, arguments[:2])
        seconds.append(time.process_time() - start)
        if len(seconds) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if len(seconds) < options.repeats:
            del gradients
    torch.save(gradients, options.gradients)
    print(json.dumps(dict(seconds=min(seconds), megabytes=(peak - before) / 1024, loss=loss.item())))


def measure(
    side: str, size: tuple[int, int, int], options: argparse.Namespace
) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """One side in a process of its own: its figures, and its gradients."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "gradients.pt")
        words = [sys.executable, "-m", "tests.bench_authors", *sys.argv[1:], "--side", side, "--gradients", str(path)]
        done = subprocess.run(
            [*words, "--size", *map(str, size)], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1]), torch.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=lambda p: Path(p).resolve(), required=True, help="copy of their repository")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--tiny", action="store_true", help="at toy sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--side", choices=["ours", "authors"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return run(options)
    rows = []
    for name, size in (TINY if options.tiny else SIZES).items():
        (mine, my_gradients), (theirs, their_gradients) = (measure(side, size, options) for side in ("ours", "authors"))
        apart = [((a - b).norm() / b.norm()).item() for a, b in zip(my_gradients, their_gradients)]
        del my_gradients, their_gradients
        rows.append(
            f"| {name}: T={size[0]}, D={size[1]}, V={size[2]} | {mine['seconds']:.2f} | {theirs['seconds']:.2f} "
            f"| {mine['seconds'] / theirs['seconds']:.2f} | {mine['megabytes']:.0f} | {theirs['megabytes']:.0f} "
            f"| {mine['megabytes'] / theirs['megabytes']:.2f} | {abs(mine['loss'] / theirs['loss'] - 1):.1e} "
            f"| {max(apart):.1e} |"
        )
        print(rows[-1], flush=True)
    text = "\n".join([
        "The exact reverse KL, forward and backward, ours beside the authors' chunked loss (`src/opd/losses.py` of "
        f"HJSang/OPSD_OnPolicyDistillation): CPU seconds, least of {options.repeats} runs, and extra memory. A "
        f"{os.cpu_count()}-core x86-64 CPU, 24 GB, {options.threads} thread{'s' * (options.threads > 1)}, float32, PyTorch "
        f"{torch.__version__}, {options.date}, load {os.getloadavg()[2]:.1f}.",
        "",
        "| size | ours, s | authors', s | ratio (bar 0.80) | ours, MB | authors', MB | ratio (bar 0.25) | loss differs by "
        "| gradient differs by |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
