import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.gptq_block import reference


def _factor(sigma, damping=0.01):
    sigma = sigma + damping * sigma.diagonal().mean() * torch.eye(len(sigma), dtype=sigma.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(sigma), upper=True)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 31, 64, 130])
@pytest.mark.parametrize("q", [1, 7, 64, 65])
def test_equal_to_reference(layer_problem, p, q):
    weight, sigma, scale, zero, group, max_code = layer_problem(p, q, groups=3, seed=p * 100 + q)
    arguments = (weight, _factor(sigma), scale, zero, group, max_code)
    for name, expected, got in zip(
        ("quantized", "error"), reference.gptq_block(*arguments), core_tensor.gptq_block(*arguments), strict=True
    ):
        assert_close(name, expected, got, 1e-12)


def test_equal_to_optimal_brain_quantization(layer_problem):
    """The textbook form: quantize, then move later weights by the inverse Hessian of the features that are left."""
    weight, sigma, scale, zero, group, max_code = layer_problem(12, 5, seed=4)
    sigma = sigma + torch.eye(12, dtype=torch.float64)
    w, inverse = weight.clone(), torch.linalg.inv(sigma)
    for j in range(12):
        q = scale[0] * ((torch.round(w[j] / scale[0]) + zero[0]).clamp(0, max_code) - zero[0])
        w[j:] -= torch.outer(inverse[j:, j] / inverse[j, j], w[j] - q)
        w[j] = q
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    factor = torch.linalg.cholesky(torch.linalg.inv(sigma), upper=True)
    quantized, _ = core_tensor.gptq_block(weight, factor, scale, zero, group, max_code)
    torch.testing.assert_close(quantized, w, rtol=0, atol=1e-9)


def test_bad_input_names_the_argument(layer_problem):
    weight, sigma, scale, zero, group, max_code = layer_problem(5, 4)
    with pytest.raises(ValueError, match="factor"):
        core_tensor.gptq_block(weight, sigma[:4], scale, zero, group, max_code)
    with pytest.raises(TypeError, match="scale"):
        core_tensor.gptq_block(weight, sigma, scale.float(), zero, group, max_code)


def test_opcheck(layer_problem):
    weight, sigma, scale, zero, group, max_code = layer_problem(9, 5)
    torch.library.opcheck(
        torch.ops.core_tensor.gptq_block.default, (weight, _factor(sigma), scale, zero, group, max_code)
    )
