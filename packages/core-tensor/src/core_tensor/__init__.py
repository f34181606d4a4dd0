"""CPU (C++) and CUDA (Triton) kernels behind torch operators, shared by the paper packages of this repository."""

from core_tensor._operator import backends
from core_tensor.assignment import assignment
from core_tensor.bit_packing import pack_bits, unpack_bits
from core_tensor.block_curvature import block_curvature
from core_tensor.cd_block import cd_block
from core_tensor.cd_sparse import cd_sparse
from core_tensor.centred_moments import centred_moments
from core_tensor.dual_bounds import dual_bounds
from core_tensor.dual_pass import BlockData, dual_pass
from core_tensor.ghost_norms import ghost_norms
from core_tensor.gptq_block import gptq_block
from core_tensor.low_rank_add import low_rank_add
from core_tensor.project_assignment import project_assignment
from core_tensor.project_blocks import project_blocks
from core_tensor.quantized_linear import quantized_linear

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
