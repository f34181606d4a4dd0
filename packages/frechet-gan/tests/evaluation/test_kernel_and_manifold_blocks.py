import importlib

import pytest
import torch
from frechet_gan import cmmd, manifold

# the modules, which functions of the same name hide in the package
MODULES = [importlib.import_module(f"frechet_gan.{name}") for name in ("transport.mmd", "evaluation.manifold")]


def _by_definition(fake, real, k):
    """The four shares by loops over balls, as the two papers write them."""

    def radius(x):
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]

    cross = torch.cdist(fake, real, compute_mode="donot_use_mm_for_euclid_dist")
    ball_real, ball_fake = radius(real), radius(fake)
    precision = sum(bool((cross[i] <= ball_real).any()) for i in range(len(fake))) / len(fake)
    recall = sum(bool((cross[:, j] <= ball_fake).any()) for j in range(len(real))) / len(real)
    density = sum(int((cross[i] <= ball_real).sum()) for i in range(len(fake))) / (k * len(fake))
    coverage = sum(bool(cross[:, j].min() <= ball_real[j]) for j in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("block", [1, 7, 50])
def test_manifold_and_cmmd_equal_their_definitions_at_any_block(monkeypatch, block):
    for module in MODULES:
        monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 0.7 + 0.5
    real = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    found = manifold(fake, real, k=3)
    truth = _by_definition(fake, real, 3)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(truth, abs=1e-12)
    x, y = (torch.nn.functional.normalize(t) for t in (fake, real))

    def kernel(a, b):
        return (-(torch.cdist(a, b) ** 2) / 200).exp().mean()

    assert cmmd(fake, real) == pytest.approx(float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))), rel=1e-6)
