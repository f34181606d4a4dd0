import pytest
import torch
from core_tensor.ops.bit_packing import reference


@pytest.mark.parametrize("bits", range(1, 9))
def test_values(bits):
    from core_tensor.ops.bit_packing import triton as kernels

    codes = torch.randint(0, 1 << bits, (2, 43), dtype=torch.uint8)
    words = reference.pack_bits(codes, bits)
    assert torch.equal(kernels.pack_bits(codes, bits), words)
    assert torch.equal(kernels.unpack_bits(words, bits, 43), codes)
