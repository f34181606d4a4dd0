"""The projected L-BFGS against scipy's L-BFGS-B, which searches along a generalized Cauchy point instead."""

import numpy as np
import pytest
import torch
from polytope_lp import Marketplace, generate
from polytope_lp.matching.evaluation import FusedDual
from polytope_lp.optimizers import lbfgs
from scipy.optimize import minimize


def _run(objective, n, free, first=1e-2, iterations=500):
    state = lbfgs.start(objective, torch.zeros(n, dtype=torch.float64))
    for _ in range(iterations):
        state = lbfgs.step(objective, state, free, first)
        if state.stalled:
            break
    return state


def _peer(objective, n, free):
    def both(x):
        value, gradient = objective(torch.from_numpy(x.copy()))
        return value, gradient.numpy().copy()

    bounds = [(None, None) if f else (0, None) for f in free.tolist()]
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(both, np.zeros(n), jac=True, method="L-BFGS-B", bounds=bounds, options=options)


@pytest.mark.parametrize("seed", range(5))
def test_bounded_quadratic_meets_its_kkt_conditions(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 30
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    H, b = (
        root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64),
        torch.randn(n, dtype=torch.float64, generator=generator),
    )
    free = torch.rand(n, generator=generator) < 0.3

    def objective(x):
        return float(x @ H @ x / 2 - b @ x), H @ x - b

    state = _run(objective, n, free)
    x, gradient = state.point, state.gradient
    assert bool((x[~free] >= 0).all())
    assert bool((~free & (x == 0)).any())  # otherwise the bounds were never tried
    inside = free | (x > 0)
    assert float(gradient[inside].abs().max()) <= 1e-6
    assert float(gradient[~inside].min()) >= -1e-6
    assert state.value == pytest.approx(_peer(objective, n, free).fun, rel=1e-9)


def test_dual_of_a_marketplace_reaches_the_value_of_l_bfgs_b():
    dual = FusedDual(generate(Marketplace(sources=500, destinations=20)))

    def objective(mu):
        found = dual.evaluate(mu * dual.scale, 1e-2)
        return -found.value, -(found.gradient * dual.scale)

    state = _run(objective, 20, dual.free)
    assert state.value == pytest.approx(_peer(objective, 20, dual.free).fun, rel=1e-8)
