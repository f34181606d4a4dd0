"""CPU (C++) and CUDA (Triton) kernels behind torch operators, shared by the paper packages of this repository."""

from core_tensor._operator import backends
from core_tensor.bit_packing import pack_bits, unpack_bits

__all__ = ["backends", "pack_bits", "unpack_bits"]
