"""The compile table of a Triton kernel: what `core_tensor.dev.aot` compiles ahead of time."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileRow:
    """One row of a kernel's compile table.

    Attributes:
        kernel: The `@triton.jit` function.
        signature: Triton type of every run-time argument, such as `{"x": "*fp32", "n": "i32"}`.
        constants: Value of every `tl.constexpr` argument.
        num_warps: Warps per program.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
