import pytest
import torch
from core_tensor.dev.testing import assert_close
from quantease.problem.objective import relative_error, row_objective


@pytest.mark.parametrize(("q", "p"), [(3, 1), (4, 255), (5, 256), (2, 257), (6, 600), (0, 300)])
def test_objective_is_the_error_of_the_outputs(q, p):
    """Against the outputs themselves; widths below, at and above those of the panels."""
    generator = torch.Generator().manual_seed(p)
    X = torch.randn(2 * p, p, generator=generator, dtype=torch.float64)
    D = torch.randn(q, p, generator=generator)
    outputs = (X @ D.double().T).square().sum(0)
    assert_close("objective", outputs, row_objective(D, X.T @ X), 1e-12)
    if q:
        W = torch.randn(q, p, generator=generator)
        expected = float(outputs.sum() / (X @ W.double().T).square().sum())
        assert relative_error(W, W.double() - D.double(), X.T @ X) == pytest.approx(expected, rel=1e-12)
