import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.map_head import reference


def _arguments(tasks, rows, d, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + 10 * rows + d)
    h = torch.randn(tasks, rows, d, generator=g, dtype=torch.float64)
    base = torch.randn(tasks, rows, generator=g, dtype=torch.float64)
    y = (torch.rand(tasks, rows, generator=g) < 0.5).double()
    w = torch.rand(tasks, rows, generator=g, dtype=torch.float64) + 0.1
    lengths = torch.randint(0, rows + 1, (tasks,), generator=g)
    mu = torch.randn(tasks, d, generator=g, dtype=torch.float64)
    A = torch.randn(d, d, generator=g, dtype=torch.float64)
    P = A @ A.T / d + 0.5 * torch.eye(d, dtype=torch.float64)
    return [t if t is lengths else t.to(dtype) for t in (h, base, y, w, lengths, mu, P)]


def _spoiled(arguments):
    """Padding that must not be read."""
    h, base, y, w, lengths, _, _ = arguments
    behind = torch.arange(h.shape[1]) >= lengths[:, None]
    for t in (h, base, y, w):
        t[behind] = torch.nan
    return arguments


@pytest.mark.parametrize(("tasks", "rows", "d"), [(0, 3, 2), (2, 0, 3), (2, 4, 5), (1, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_reference(tasks, rows, d, dtype):
    from core_tensor.ops.map_head import triton as kernels

    arguments = _spoiled(_arguments(tasks, rows, d, dtype))
    ratio = 1e-11 if dtype == torch.float64 else 2e-7
    expected = reference.map_head(*arguments, 50)
    got = kernels.map_head(*arguments, 50)
    for name, one, other in zip(("e", "H"), expected, got, strict=True):
        assert_close(name, one, other, ratio)
    v = torch.randn(tasks, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    adjoint = reference.map_head_backward(v, expected[0], *arguments)
    found = kernels.map_head_backward(v, expected[0], *arguments)
    for name, one, other in zip(("h", "base", "y", "w", "mu", "P"), adjoint, found, strict=True):
        assert_close(name, one, other, 10 * ratio)


@pytest.mark.parametrize("case", ["separable", "saturated", "uneven", "few steps"])
def test_hard_supports_take_the_same_steps(case):
    """Step sizes below one, and steps that end before the minimum."""
    from core_tensor.ops.map_head import triton as kernels

    h, base, y, w, lengths, mu, P = _arguments(1, 4, 3, torch.float64)
    lengths, steps = lengths.clamp_min(3), 50
    if case == "separable":
        h, base, y, mu, P = 3 * h, 0 * base, (h.sum(2) > 0).double(), 0 * mu, 1e-6 * P
    elif case == "saturated":
        base, P = 200 * (0.5 - y), 1e-2 * P
    elif case == "uneven":
        h[:, ::3] *= 1e3
    else:
        h, steps = 4 * h, 2
    arguments = (h, base, y, w, lengths, mu, P)
    for one, other in zip(reference.map_head(*arguments, steps), kernels.map_head(*arguments, steps), strict=True):
        assert_close(case, one, other, 1e-7)
