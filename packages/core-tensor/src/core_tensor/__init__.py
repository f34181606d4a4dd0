"""CPU (C++) and CUDA (Triton) kernels behind torch operators, shared by the paper packages of this repository.

Operators are imported when they are first named, so that `core_tensor.app`, on which every command line stands, loads
no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core_tensor.ops import backends
    from core_tensor.ops.assignment import assignment
    from core_tensor.ops.bit_packing import pack_bits, unpack_bits
    from core_tensor.ops.block_curvature import block_curvature
    from core_tensor.ops.cd_block import cd_block
    from core_tensor.ops.cd_sparse import cd_sparse
    from core_tensor.ops.centred_moments import centred_moments
    from core_tensor.ops.dual_bounds import dual_bounds
    from core_tensor.ops.dual_pass import BlockData, dual_pass
    from core_tensor.ops.ghost_norms import ghost_norms
    from core_tensor.ops.gptq_block import gptq_block
    from core_tensor.ops.low_rank_add import low_rank_add
    from core_tensor.ops.project_assignment import project_assignment
    from core_tensor.ops.project_blocks import project_blocks
    from core_tensor.ops.quantized_linear import quantized_linear

_FOLDERS = {"BlockData": "dual_pass", "pack_bits": "bit_packing", "unpack_bits": "bit_packing"}
"""Folders of the names that are not called like theirs."""

__all__ = [
    "BlockData",
    "assignment",
    "backends",
    "block_curvature",
    "cd_block",
    "cd_sparse",
    "centred_moments",
    "dual_bounds",
    "dual_pass",
    "ghost_norms",
    "gptq_block",
    "low_rank_add",
    "pack_bits",
    "project_assignment",
    "project_blocks",
    "quantized_linear",
    "unpack_bits",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "core_tensor.ops" if name == "backends" else f"core_tensor.ops.{_FOLDERS.get(name, name)}"
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
