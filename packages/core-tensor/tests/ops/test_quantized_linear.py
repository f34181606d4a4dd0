import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.quantized_linear import reference


def _layer(q, p, bits, group_size, sparse, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-p // group_size)
    words = core_tensor.pack_bits(torch.randint(0, 1 << bits, (q, p), generator=generator, dtype=torch.uint8), bits)
    scale = torch.rand(q, groups, generator=generator) + 0.1
    zero = torch.randint(0, 1 << bits, (q, groups), generator=generator, dtype=torch.uint8)
    outliers = None
    if sparse:
        mask = torch.rand(q, p, generator=generator) < 0.1
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        outliers = (offsets, mask.nonzero()[:, 1].int(), torch.randn(int(mask.sum()), generator=generator))
    return words, scale, zero, bits, group_size, outliers


def _truth(x, layer):
    words, scale, zero, bits, group_size, outliers = layer
    size = x.shape[-1] if group_size == -1 else group_size
    weight = reference.dequantize(words, scale, zero, bits, size, x.shape[-1], *(outliers or (None,) * 3))
    return x.double() @ weight.double().T


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9, 33])
@pytest.mark.parametrize(
    ("q", "p", "group_size", "sparse"),
    [(1, 1, -1, False), (5, 7, -1, True), (9, 64, 16, False), (130, 131, 8, True), (3, 40, 32, False)],
)
def test_equal_to_float64(bits, tokens, q, p, group_size, sparse):
    layer = _layer(q, p, bits, group_size, sparse, seed=bits)
    x = torch.randn(tokens, p, generator=torch.Generator().manual_seed(p))
    assert_close("y", _truth(x, layer), core_tensor.quantized_linear(x, *layer), 1e-5)


def test_more_rows_than_one_buffer_holds():
    layer = _layer(1200, 1031, 3, -1, True)
    x = torch.randn(6, 1031)
    assert_close("y", _truth(x, layer), core_tensor.quantized_linear(x, *layer), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_leading_dimensions(dtype):
    layer = _layer(9, 64, 3, 16, True)
    x = torch.randn(2, 3, 64).to(dtype)
    y = core_tensor.quantized_linear(x, *layer)
    assert y.shape == (2, 3, 9)
    assert y.dtype == dtype
    assert_close("y", _truth(x, layer), y, 1e-2)


@pytest.mark.parametrize("tokens", [2, 9])
def test_gradient_is_the_transposed_map(tokens):
    layer = _layer(9, 40, 4, 8, True)
    x = torch.randn(tokens, 40, requires_grad=True)
    upstream = torch.randn(tokens, 9)
    (gradient,) = torch.autograd.grad(core_tensor.quantized_linear(x, *layer), x, upstream)
    dense = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_truth(dense, layer), dense, upstream.double())
    assert_close("gradient", expected, gradient, 1e-5)


def test_empty_batch():
    assert core_tensor.quantized_linear(torch.zeros(0, 40), *_layer(9, 40, 4, 8, True)).shape == (0, 9)


def test_bad_input_names_the_argument():
    words, scale, zero, _, _, outliers = _layer(9, 40, 4, 8, True)
    x = torch.zeros(1, 40)
    for call, error, name in (
        ((x, words, scale, zero, 4, 7), ValueError, "group_size"),
        ((x[:, :32], words, scale, zero, 4, 8), ValueError, "words"),
        ((x, words, scale[:, :2], zero, 4, 8), ValueError, "scale"),
        ((x, words, scale, zero.int(), 4, 8), TypeError, "zero"),
        ((x.double(), words, scale, zero, 4, 8), TypeError, "x"),
        ((x, words, scale, zero, 4, 8, (outliers[0][:-1], *outliers[1:])), ValueError, "outliers"),
    ):
        with pytest.raises(error, match=name):
            core_tensor.quantized_linear(*call)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck():
    words, scale, zero, bits, group_size, outliers = _layer(5, 24, 3, 8, True)
    x = torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(
        torch.ops.core_tensor.quantized_linear.default, (x, words, scale, zero, bits, group_size, *outliers)
    )
