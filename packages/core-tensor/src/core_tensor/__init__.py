"""CPU (C++) and CUDA (Triton) kernels behind torch operators, shared by the paper packages of this repository."""

from core_tensor._operator import backends
from core_tensor.bit_packing import pack_bits, unpack_bits
from core_tensor.cd_block import cd_block
from core_tensor.cd_sparse import cd_sparse
from core_tensor.gptq_block import gptq_block
from core_tensor.quantized_linear import quantized_linear

__all__ = [
    "backends",
    "cd_block",
    "cd_sparse",
    "gptq_block",
    "pack_bits",
    "quantized_linear",
    "unpack_bits",
]
