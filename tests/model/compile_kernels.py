"""Compile every kernel of model/fused_kernels.py for a GPU, without having one, and print the sizes of the results.

    python tests/model/compile_kernels.py

It needs triton, which includes the assembler, but no GPU. It prints one JSON object: the bytes of shared memory and of
machine code of each kernel. Do not set TRITON_INTERPRET.
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import fused_kernels as kernels

HOPPER = GPUTarget("cuda", 90, 32)
INTEGERS = {"frames", "tokens", "channels", "slots", "pixels", "numbers"}
FLOATS = {"eps", "offset", "floor", "root"}
CONSTANTS = {
    "_norm_kernel": {"HAS_BRANCH": True, "HAS_GATE": True, "BLOCK": 2048},
    "_split_kernel": {"HEAD": 128, "BLOCK": 2048},
    "_norm_silu_kernel": {"KEPT": 2, "HAS_BIAS": True, "PIXELS": 32, "BLOCK": 128},
    "_add_kernel": {"BLOCK": 1024},
}


def kind(name: str) -> str:
    """Return the type of an argument, from its name. The default is a bfloat16 tensor."""
    if name in FLOATS:
        return "fp32"
    if name in INTEGERS or name.endswith(("_batch", "_frame", "_token")):
        return "i32"
    return {"index": "*i64", "table": "*fp32"}.get(name, "*bf16")


def compiled(name: str) -> dict[str, int]:
    """Return the bytes of shared memory and of machine code of one kernel."""
    kernel, constants = getattr(kernels, name), CONSTANTS[name]
    signature = {one: "constexpr" if one in constants else kind(one) for one in kernel.arg_names}
    result = triton.compile(ASTSource(kernel, signature, constants), target=HOPPER)
    return {"shared": result.metadata.shared, "code": len(result.asm["cubin"])}


if __name__ == "__main__":
    print(json.dumps({name: compiled(name) for name in CONSTANTS}))
