import pytest
import torch


@pytest.fixture
def layer_problem():
    """A random layer: feature-major weights, their grid, and a Gram matrix with one dead feature."""

    def make(p, q, bits=3, groups=1, seed=0, dtype=torch.float64, weight_scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(p, q, generator=generator, dtype=torch.float64) * weight_scale
        inputs = torch.randn(p, 2 * p + 1, generator=generator, dtype=torch.float64)
        if p > 2:
            inputs[p // 2] = 0.0
        sigma = inputs @ inputs.T
        max_code = (1 << bits) - 1
        group = torch.arange(p) * groups // max(p, 1)
        low, high = weight.amin().clamp(max=0), weight.amax().clamp(min=0)
        scale = ((high - low) / max_code).expand(groups, q) * (1 + 0.1 * torch.rand(groups, q, generator=generator))
        zero = torch.round(-low / scale).clamp(0, max_code)
        return weight.to(dtype), sigma.to(dtype), scale.to(dtype).contiguous(), zero.to(dtype), group, max_code

    return make
