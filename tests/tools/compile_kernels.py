"""Compiles every Triton kernel with its production constants for GPUs that are not there, and reads the machine code.

    python -m tests.tools.compile_kernels > results/kernels/compile.md

Exit status 1 if any kernel keeps registers in memory (a stack, LDL or STL instructions, AMD scratch) or if the tile
kernel does not use the tensor cores. About a minute on one core; Triton caches what it has compiled.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
TENSOR_CORES = r"\b(HMMA|HGMMA|UTCHMMA|UTCOMMA)\b|v_mfma"
VOCABULARY, D = 151936, 2048  # Qwen3's rows; the student's hidden size


def variants(target):
    """(label, kernel, constants, pointer types that are not fp32, launch options)."""
    row = dict(V=VOCABULARY, BLOCK=kernels.ROW["BLOCK"])
    options = {"num_warps": kernels.ROW["num_warps"]}
    bf16_grad = {"grad_ptr": "*bf16"}
    for direction in ("reverse", "forward"):
        kl = row | dict(REVERSE=direction == "reverse", WITH_GRAD=True)
        for gradient, constants, types in (("bf16", kl, bf16_grad), ("fp32", kl, {}), ("no", kl | dict(WITH_GRAD=False), {})):
            yield f"KL rows, {direction}, {gradient} gradient", kernels._kl_row_kernel, constants, types, options
    odd = kl | dict(V=VOCABULARY - 267)
    yield "KL rows, forward, bf16 gradient, odd vocabulary", kernels._kl_row_kernel, odd, bf16_grad, options
    yield "log-probability gradient, bf16", kernels._logprob_grad_kernel, row | dict(V=19008), bf16_grad, options
    bf16_tile = {"sm_90": kernels.HOPPER_TILE, "gfx942": kernels.AMD_TILE}.get(target, kernels.TILE)
    for operand, tile in (("bf16", dict(bf16_tile)), ("fp32", dict(kernels.FP32_TILE))):
        options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
        types = {"hidden_ptr": f"*{operand}", "weight_ptr": f"*{operand}"}
        label = f"log-probability tile {tile['BLOCK_N']}x{tile['BLOCK_V']}x{tile['BLOCK_D']}, {operand}"
        yield label, kernels._logprob_tile_kernel, tile | dict(D=D, WIDEN=False), types, options


def compile_one(kernel, constants, types, options, target):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, "*i64" if name == "target_ptr" else "*fp32")
        else:
            signature[name] = "fp32" if name == "inv_temperature" else "i32"
        if name.endswith(("_ptr", "_stride")):  # what the launcher finds at run time for tensors of this shape
            aligned[i,] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget(*target), options=options)


def inspect(compiled):
    """-> registers a thread, bytes of stack, count of spill instructions, shared memory, tensor-core instructions."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        found = [int(re.search(rf"{name}:\s*(\d+)", code)[1]) for name in ("NumVgprs", "ScratchSize", "vgpr_spill_count")]
        return *found, shared, len(re.findall(TENSOR_CORES, code))
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, flag, file.name], check=True, capture_output=True, text=True).stdout
                       for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", code)), shared, len(re.findall(TENSOR_CORES, code))


def main():
    if kernels.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it.")
    print(f"""# Every Triton kernel as machine code

Triton {triton.__version__}, production constants, vocabulary {VOCABULARY}, hidden size {D}; no GPU involved.
Registers and bytes of stack are a thread's; spills are LDL and STL instructions (AMD: spilled registers).
Command: `python -m tests.tools.compile_kernels > results/kernels/compile.md`

| kernel | target | registers | stack | spills | shared KB | tensor-core instructions | verdict |
|---|---|---|---|---|---|---|---|""")
    bad = 0
    for target in TARGETS:
        for label, *source in variants(target):
            registers, stack, spills, shared, tensor = inspect(compile_one(*source, TARGETS[target]))
            ok = stack == spills == 0 and (tensor > 0 or "tile" not in label or "fp32" in label)
            bad += not ok
            print(f"| {label} | {target} | {registers} | {stack} | {spills} | {shared / 1024:.0f} | {tensor} | "
                  f"{'ok' if ok else 'BAD'} |", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main() > 0)
