import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.cd_block import reference as cd_reference
from core_tensor.ops.cd_sparse import reference as sparse_reference
from core_tensor.ops.gptq_block import reference as gptq_reference


def _problem(p, q, groups=2):
    generator = torch.Generator().manual_seed(p)
    weight = torch.randn(p, q, generator=generator)
    inputs = torch.randn(p, 2 * p, generator=generator)
    sigma = inputs @ inputs.T
    scale = torch.rand(groups, q, generator=generator) * 0.2 + 0.3
    zero = torch.randint(2, 6, (groups, q), generator=generator).float()
    return weight, sigma, scale, zero, torch.arange(p) * groups // p


@pytest.mark.parametrize(("masked", "quantize"), [(False, True), (True, True), (False, False)])
def test_cd_block(masked, quantize):
    from core_tensor.ops.cd_block import triton as kernels

    weight, sigma, scale, zero, group = _problem(70, 35)  # two parts of a block, two programs each
    sigma = (sigma / sigma.diagonal()[:, None]).fill_diagonal_(0)
    residual = weight - weight.round()
    mask = torch.rand(weight.shape) < 0.2 if masked else None
    arguments = (sigma @ residual, weight, residual, sigma, scale, zero, group, mask, 7, quantize)
    assert_close("residual", cd_reference.cd_block(*arguments), kernels.cd_block(*arguments), 1e-5)


def test_gptq_block():
    from core_tensor.ops.gptq_block import triton as kernels

    weight, sigma, scale, zero, group = _problem(70, 35)
    factor = torch.linalg.cholesky(torch.linalg.inv(sigma + torch.eye(70)), upper=True)
    arguments = (weight, factor, scale, zero, group, 7)
    for expected, got in zip(gptq_reference.gptq_block(*arguments), kernels.gptq_block(*arguments), strict=True):
        assert_close("gptq", expected, got, 1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_cd_sparse(frozen):
    from core_tensor.ops.cd_sparse import triton as kernels

    weight, sigma, scale, zero, group = _problem(20, 3)
    w, s, z = weight.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()
    codes = (torch.round(w / s[:, group]) + z[:, group]).clamp(0, 7)
    gradient = (w - s[:, group] * (codes - z[:, group])) @ sigma
    held = torch.rand(w.shape) < 0.3 if frozen else None
    arguments = (codes.to(torch.uint8), gradient, sigma, s, group, held, 7, 50)
    expected, got = sparse_reference.cd_sparse(*arguments), kernels.cd_sparse(*arguments)
    assert torch.equal(expected[0], got[0])
    assert_close("gradient", expected[1], got[1], 1e-4)
    assert torch.equal(expected[2], got[2])
    assert torch.equal(expected[3], got[3])
