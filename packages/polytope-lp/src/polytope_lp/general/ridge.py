r"""The ridge-smoothed allocation to full precision, and its derivative: gradients through the solver.

$$ x^\star = \arg\min_x \; c'x + \tfrac{\gamma}{2} \lVert x \rVert^2 \quad \text{s.t.} \; A x \le b, \; x_i \in C_i. $$

With P the projection onto the face that contains $x^\star$ and J the rows with positive multipliers, differentiating
$x = \mathrm{Proj}_C(-(c + A'\lambda)/\gamma)$ and $A_J x = b_J$ at that fixed active set gives

$$ dx = -P (dc + A_J' d\lambda_J) / \gamma, \qquad A_J P A_J' \, d\lambda_J = -A_J P \, dc - \gamma \, db_J. $$

Source: the smoothed dual of arXiv 2103.05277; implicit differentiation of QPs (Amos and Kolter, 2017).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from core_tensor.checks import check_number, check_tensor
from numpy.typing import NDArray
from torch import Tensor

from polytope_lp.general.block_lp import BlockLP, equilibrated
from polytope_lp.general.newton import curvature, solve_exact
from polytope_lp.matching.problem import MatchingProblem

Array = NDArray[np.float64]
ACTIVE = 1e-7
"""Multipliers above this part of the greatest one count as positive."""


def ridge_allocation(
    problem: MatchingProblem | BlockLP, gamma: float, values: Tensor | None = None, budgets: Tensor | None = None
) -> Tensor:
    r"""The smoothed allocation, differentiable in values and budgets.

    Args:
        problem: Edges, coefficients and polytopes; at most some thousand rows (a system of that size is factored).
        gamma: Weight of the ridge; the gradient is that of this smoothed problem, not of the LP.
        values: Values $-c$ of the variables in the problem's order, shape (variables,), float64; the problem's own if
            None.
        budgets: Right-hand sides, shape (rows,), float64, in the problem's order (of a `BlockLP`: inequalities first);
            the problem's own if None.

    Returns:
        Amounts, shape (variables,), float64.

    Raises:
        ValueError: If a shape does not fit, or no point satisfies the budgets.
    """
    check_number("gamma", gamma, low=0.0, open_low=True)
    order = torch.arange(problem.b.size if isinstance(problem, BlockLP) else problem.rows)
    lp = problem
    if not isinstance(lp, BlockLP):
        order, lp = torch.argsort(lp.equality.long(), stable=True), BlockLP.from_matching(lp)
    v = torch.from_numpy(-lp.c) if values is None else values
    b = torch.from_numpy(lp.b)[torch.argsort(order)] if budgets is None else budgets
    check_tensor("values", v, shape=(lp.c.size,), dtype=torch.float64, finite=True)
    check_tensor("budgets", b, shape=(lp.b.size,), dtype=torch.float64, finite=True)
    x: Tensor = _Ridge.apply(v, b[order], lp, gamma)
    return x


def _solve(lp: BlockLP, gamma: float) -> tuple[Array, Array]:
    # The proximal method of multipliers with the ridge in its objective, then one Newton step on the active set.
    scaled, rows, _, (unit_c, unit_x) = equilibrated(lp)
    n = lp.c.size
    ridge = np.concatenate([np.full(n, gamma * unit_x / unit_c), np.zeros(lp.inequalities)])
    found = solve_exact(dataclasses.replace(scaled, ridge=ridge), 1e-9)
    lam = lp.signed(found.lam * rows * unit_c)
    if found.primal > 1e-7:
        raise ValueError("budgets: no allocation was found that satisfies them (is the problem feasible?)")
    point = -(lp.c + lp.A.T @ lam) / gamma
    x, active = lp.project(point), _active(lp, lam)
    H = curvature(lp.A.tocsc()[active], lp.face(point, x), np.ones(n)).toarray()
    lam[active] += gamma * np.linalg.lstsq(H, (lp.A @ x - lp.b)[active], rcond=1e-12)[0]
    return lam, lp.project(-(lp.c + lp.A.T @ lam) / gamma)


def _active(lp: BlockLP, lam: Array) -> NDArray[np.int64]:
    positive = lam > ACTIVE * float(np.abs(lam).max(initial=0.0))
    return np.flatnonzero(positive | (np.arange(lam.size) >= lp.inequalities))


class _Ridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, budgets: Tensor, lp: BlockLP, gamma: float) -> Tensor:
        lp = dataclasses.replace(lp, c=-values.detach().numpy(), b=budgets.detach().numpy())
        lam, x = _solve(lp, gamma)
        ctx.lp, ctx.gamma, ctx.lam, ctx.x = lp, gamma, lam, x
        return torch.from_numpy(x.copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lp, gamma, lam = ctx.lp, ctx.gamma, ctx.lam
        face, active = lp.face(-(lp.c + lp.A.T @ lam) / gamma, ctx.x), _active(lp, lam)
        inward, A = face.apply(gradient.numpy()), lp.A[active]
        y = np.zeros(lp.b.size)
        H = curvature(A.tocsc(), face, np.ones(lp.c.size)).toarray()
        y[active] = np.linalg.lstsq(H, A @ inward, rcond=1e-12)[0]
        to_values = (inward - face.apply(lp.A.T @ y)) / gamma  # values are -c
        return torch.from_numpy(to_values), torch.from_numpy(y), None, None
