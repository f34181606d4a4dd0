"""CPU (C++) and CUDA (Triton) kernels behind torch operators, shared by the paper packages of this repository.

Operators are imported when they are first named, so that `core_tensor.app`, which every command line uses, loads
no torch.
"""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

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
    from core_tensor.ops.map_head import map_head
    from core_tensor.ops.project_assignment import project_assignment
    from core_tensor.ops.project_blocks import project_blocks
    from core_tensor.ops.quantized_gather import dequantize_rows, quantize_rows, quantized_gather
    from core_tensor.ops.quantized_linear import quantized_linear
    from core_tensor.ops.row_update import row_update
    from core_tensor.ops.stable_hash import stable_hash

__all__ = [
    "BlockData",
    "assignment",
    "backends",
    "block_curvature",
    "cd_block",
    "cd_sparse",
    "centred_moments",
    "dequantize_rows",
    "dual_bounds",
    "dual_pass",
    "ghost_norms",
    "gptq_block",
    "low_rank_add",
    "map_head",
    "pack_bits",
    "project_assignment",
    "project_blocks",
    "quantize_rows",
    "quantized_gather",
    "quantized_linear",
    "row_update",
    "stable_hash",
    "unpack_bits",
]
__getattr__, __dir__, _ = lazy(__name__)
