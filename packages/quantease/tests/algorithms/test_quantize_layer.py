import core_tensor
import pytest
import torch
from core_tensor.dev.testing import AWKWARD_SCALES
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease import ALGORITHMS, GramFolds, LayerConfig, Shrinkage, quantize_layer, relative_error


def _gram(p, seed=0):
    x = torch.randn(3 * p, p, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 9), st.integers(1, 33), st.sampled_from([-1, 1, 8]), st.sampled_from(ALGORITHMS)
)
def test_packed_codes_round_trip_for_odd_sizes(bits, q, p, group_size, algorithm):
    weight = torch.randn(q, p, generator=torch.Generator().manual_seed(p))
    config = LayerConfig(algorithm=algorithm, bits=bits, group_size=group_size, sweeps=3, refits=1)
    layer = quantize_layer(weight, _gram(p), config)
    assert layer.codes.dtype == torch.uint8
    assert int(layer.codes.max()) < 2**bits
    assert int(layer.zeros.max()) < 2**bits
    assert layer.scales.shape == layer.zeros.shape == (q, 1 if group_size == -1 else -(-p // group_size))
    words = core_tensor.pack_bits(layer.codes, bits)
    assert torch.equal(core_tensor.unpack_bits(words, bits, p), layer.codes)
    assert layer.report.bits_per_weight == pytest.approx(bits + layer.scales.shape[1] * (16 + bits) / p)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dequantize_is_exact_in_float32_with_half_scales(algorithm):
    layer = quantize_layer(torch.randn(6, 17), _gram(17), LayerConfig(algorithm=algorithm, bits=8))
    assert torch.equal(layer.dequantize().double(), layer.dequantize(torch.float64))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_input_same_result(algorithm):
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    a, b = (quantize_layer(weight, _gram(24), LayerConfig(algorithm=algorithm)) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("scale", AWKWARD_SCALES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_scale_of_weights_and_inputs_does_not_matter(algorithm, scale):
    weight, sigma = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), _gram(24)
    config = LayerConfig(algorithm=algorithm, scale_dtype="float32")
    plain = quantize_layer(weight, sigma, config)
    weights_scaled = quantize_layer(weight * scale, sigma, config)
    inputs_scaled = quantize_layer(weight, sigma * scale, config)
    for other in (weights_scaled, inputs_scaled):
        assert other.report.calibration_error == pytest.approx(plain.report.calibration_error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    weight = torch.randn(4, 12, dtype=dtype)
    layer = quantize_layer(weight, _gram(12))
    assert layer.report.calibration_error == pytest.approx(
        relative_error(weight.float(), layer.dequantize(), _gram(12)), rel=1e-6
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_weights_and_zero_inputs(algorithm):
    config = LayerConfig(algorithm=algorithm)
    zero = quantize_layer(torch.zeros(3, 8), _gram(8), config)
    assert torch.equal(zero.dequantize(), torch.zeros(3, 8))
    assert zero.report.calibration_error == 0.0
    weight = torch.randn(3, 8)
    unused = quantize_layer(weight, torch.zeros(8, 8), config)
    assert bool(((unused.dequantize() - weight).abs() <= unused.scales.float()).all())


def test_reports_become_json():
    gram = GramFolds(10, segment=8)
    gram.update(torch.randn(64, 10))
    values = quantize_layer(torch.randn(4, 10), gram).report.to_dict()
    assert values["tokens"] == 64
    assert values["largest_row_gap"] <= 1e-12
    assert values["shrinkage"]["target"] in {"diagonal", "identity"}
    assert values["seconds"] > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_layer(torch.randn(3), _gram(3)), ValueError, "weight: expected 2 dimensions"),
        (lambda: quantize_layer(torch.zeros(2, 3, dtype=torch.int32), _gram(3)), TypeError, "weight: "),
        (lambda: quantize_layer(torch.full((2, 3), torch.inf), _gram(3)), ValueError, "weight: expected finite"),
        (lambda: quantize_layer(torch.zeros(0, 3), _gram(3)), ValueError, "weight: expected at least one"),
        (lambda: quantize_layer(torch.randn(2, 3), _gram(4)), ValueError, "gram: expected shape"),
        (lambda: quantize_layer(torch.randn(2, 3), -_gram(3)), ValueError, "gram: expected a non-negative"),
        (lambda: quantize_layer(torch.randn(2, 3), _gram(3).half()), TypeError, "gram: expected dtype"),
        (
            lambda: quantize_layer(torch.randn(2, 3), _gram(3), LayerConfig(shrinkage="heldout")),
            TypeError,
            "gram: expected GramFolds",
        ),
        (lambda: LayerConfig(algorithm="awq"), ValueError, "algorithm: "),
        (lambda: LayerConfig(bits=9), ValueError, "bits: "),
        (lambda: LayerConfig(bits=1, symmetric=True), ValueError, "bits: "),
        (lambda: LayerConfig(group_size=0), ValueError, "group_size: "),
        (lambda: LayerConfig(relax=1), ValueError, "relax: "),
        (lambda: LayerConfig(sweeps=0), ValueError, "sweeps: "),
        (lambda: LayerConfig(block=4096), ValueError, "block: "),
        (lambda: LayerConfig(outliers=0.6), ValueError, "outliers: "),
        (lambda: LayerConfig(algorithm="gptq", outliers=0.01), ValueError, "outliers: "),
        (lambda: LayerConfig(shrinkage="oas"), ValueError, "shrinkage: "),
        (lambda: LayerConfig(scale_dtype="float64"), ValueError, "scale_dtype: "),
        (lambda: Shrinkage("much"), TypeError, "strength: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
