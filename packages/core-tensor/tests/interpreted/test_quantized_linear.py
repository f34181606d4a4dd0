import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.bit_packing.reference import pack_bits
from core_tensor.ops.quantized_linear import reference


@pytest.mark.parametrize(("bits", "group_size", "sparse"), [(3, 40, False), (4, 8, True), (8, 16, False)])
def test_values(bits, group_size, sparse):
    from core_tensor.ops.quantized_linear import triton as kernels

    q, p, tokens = 70, 40, 5
    generator = torch.Generator().manual_seed(bits)
    words = pack_bits(torch.randint(0, 1 << bits, (q, p), generator=generator, dtype=torch.uint8), bits)
    groups = -(-p // group_size)
    scale = torch.rand(q, groups, generator=generator) + 0.1
    zero = torch.randint(0, 1 << bits, (q, groups), generator=generator, dtype=torch.uint8)
    outliers = (None, None, None)
    if sparse:
        mask = torch.rand(q, p, generator=generator) < 0.1
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        outliers = (offsets, mask.nonzero()[:, 1].int(), torch.randn(int(mask.sum()), generator=generator))
    arguments = (torch.randn(tokens, p, generator=generator), words, scale, zero, bits, group_size, *outliers)
    assert_close("y", reference.quantized_linear(*arguments), kernels.quantized_linear(*arguments), 1e-5)
