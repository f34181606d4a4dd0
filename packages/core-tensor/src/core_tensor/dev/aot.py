"""Ahead-of-time compilation of Triton kernels, so that machines without a GPU can prove that they compile."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core_tensor.ops._compile import CompileRow


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses on the device: registers per thread and bytes of stack and shared memory."""

    registers: int
    stack: int
    shared: int


def compile_row(row: CompileRow, capability: int) -> Resources:
    """Compile one kernel for a CUDA capability and read its resources with the `cuobjdump` that Triton ships.

    Args:
        row: Kernel, signature and constants.
        capability: 80 for sm_80, 90 for sm_90.

    Returns:
        Registers, stack and shared memory. A stack above zero means that registers spill.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**row.signature, **dict.fromkeys(row.constants, "constexpr")}
    order = [name for name in row.kernel.arg_names if name in signature]
    source = ASTSource(
        fn=row.kernel, signature={name: signature[name] for name in order}, constexprs=dict(row.constants)
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": row.num_warps, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", report)}
    return Resources(registers=usage["REG"], stack=usage["STACK"], shared=usage.get("SHARED", 0))
