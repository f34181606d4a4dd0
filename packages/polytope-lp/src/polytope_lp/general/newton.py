r"""Exact LP solutions by the proximal method of multipliers, each step by semismooth Newton on its dual.

$$ \min_{x \in C} c'x \text{ s.t. } A x = b, \qquad
x^{k+1}, \lambda^{k+1} = \arg\min_{x \in C} \max_\lambda \; c'x + \tfrac{\gamma}{2} \lVert x - x^k \rVert^2
+ \lambda'(A x - b) - \tfrac{\delta}{2} \lVert \lambda - \lambda^k \rVert^2 . $$

The step's dual is concave and piecewise quadratic, with $x(\lambda) = \mathrm{Proj}_C(x^k - (c + A'\lambda) / \gamma)$,
gradient $A x - b - \delta (\lambda - \lambda^k)$ and generalized Hessian $-(A P A' / \gamma + \delta I)$, P the
projection onto the face that contains x. Inequalities become equations with slacks in C. Blocks need not be compact.

Source: the proximal outer loop of `continuation`, with second-order steps (semismooth Newton for LPs: Li, Sun, Toh).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

from polytope_lp.polytopes.base import Face

Array = NDArray[np.float64]
PATIENCE = 25
"""Proximal steps without progress after which the method gives up."""
DENSE_ROWS = 1200
"""Up to so many rows the Newton system is factored densely."""


@dataclass(frozen=True)
class Conic:
    r"""An LP in equations over a product of polyhedra.

    Attributes:
        A: Matrix, shape (m, n), CSC.
        b: Right-hand sides, shape (m,).
        c: Costs, shape (n,).
        project: Projection of a point onto C.
        face: Face of a projected point: given the point it came from, and its projection.
        ridge: Weights q of a term $\frac12 \sum_j q_j x_j^2$ in the objective, equal within every block; shape (n,).
    """

    A: scipy.sparse.csc_array
    b: Array
    c: Array
    project: Callable[[Array], Array]
    face: Callable[[Array, Array], Face]
    ridge: Array | float = 0.0


@dataclass(frozen=True)
class Exact:
    """What the method found.

    Attributes:
        x: Primal, shape (n,).
        lam: Multipliers, shape (m,).
        primal: ||A x - b|| / (1 + ||b||).
        dual: ||x - Proj(x - c - A'lam)|| / (1 + ||c||).
        outer: Proximal steps.
        newton: Newton steps.
        ray: Multipliers that prove infeasibility, shape (m,), or None.
    """

    x: Array
    lam: Array
    primal: float
    dual: float
    outer: int
    newton: int
    ray: Array | None = None


def solve_exact(
    lp: Conic,
    tol: float = 1e-9,
    outer: int = 200,
    gamma: float = 1.0,
    deadline: Callable[[], bool] = lambda: False,
    infeasible: Callable[[Array], bool] = lambda _: False,
    accept: Callable[[Exact], bool] = lambda _: True,
    report: Callable[[Exact], None] = lambda _: None,
) -> Exact:
    """Run the proximal method of multipliers until both residuals are below `tol`.

    Args:
        lp: The problem; scale it so that rows, costs and right-hand sides are of order one.
        tol: Relative residual to reach.
        outer: Most proximal steps.
        gamma: First primal weight.
        deadline: Whether to stop now.
        infeasible: Whether a direction of the multipliers proves that there is no feasible point.
        accept: Whether a point below `tol` also meets it in the problem's own units; if not, the method continues.
        report: Called after every proximal step.

    Returns:
        The last point with its residuals.
    """
    n, m = lp.c.size, lp.b.size
    x, lam, newton = lp.project(np.zeros(n)), np.zeros(m), 0
    delta = 1e-2
    best = Exact(x, lam, np.inf, np.inf, 0, 0)
    ray, since = None, 0
    for k in range(outer):
        before = lam
        x, lam, steps = _step(lp, x, lam, gamma, delta, max(0.1 * min(best.primal, best.dual, 1.0), tol / 10))
        newton += steps
        primal = float(np.linalg.norm(lp.A @ x - lp.b)) / (1 + float(np.linalg.norm(lp.b)))
        reduced = lp.c + lp.ridge * x + lp.A.T @ lam
        dual = float(np.linalg.norm(x - lp.project(x - reduced))) / (1 + float(np.linalg.norm(lp.c)))
        found = Exact(x, lam, primal, dual, k + 1, newton)
        since += 1
        if max(primal, dual) < max(best.primal, best.dual) or k == 0:
            best, since = found, 0
        report(found)
        if primal > 1e-6 and k >= 3 and infeasible(lam - before):
            ray = lam - before  # with no feasible point the multipliers run away, in the end along a ray
        done = max(primal, dual) <= tol and accept(found)
        if done:
            best = found
        if done or deadline() or ray is not None or since >= PATIENCE:
            return Exact(best.x, best.lam, best.primal, best.dual, k + 1, newton, ray)
        # The primal residual falls with delta, the dual one with gamma: lower what is behind.
        if dual > 0.3 * primal:
            gamma = max(gamma * 0.4, 1e-7)
        if primal > 0.3 * dual:
            delta = max(delta * 0.4, 1e-9)
    return Exact(best.x, best.lam, best.primal, best.dual, outer, newton)


def _step(
    lp: Conic, center: Array, start: Array, gamma: float, delta: float, tol: float, most: int = 60
) -> tuple[Array, Array, int]:
    lam, scale, weight = start, 1 + float(np.linalg.norm(lp.b)), gamma + lp.ridge

    def value(x: Array, lam: Array) -> float:
        move, shift = x - center, lam - start
        bent = float(lp.c @ x + gamma / 2 * move @ move + (lp.ridge * x) @ x / 2)
        return bent + float(lam @ (lp.A @ x - lp.b) - delta / 2 * shift @ shift)

    point = (gamma * center - lp.c - lp.A.T @ lam) / weight
    x = lp.project(point)
    now = value(x, lam)
    for step in range(most):
        gradient = lp.A @ x - lp.b - delta * (lam - start)
        if float(np.linalg.norm(gradient)) <= tol * scale:
            return x, lam, step
        direction = _newton_direction(lp, lp.face(point, x), gradient, weight, delta)
        slope, t = float(gradient @ direction), 1.0
        while True:
            trial = lam + t * direction
            target = (gamma * center - lp.c - lp.A.T @ trial) / weight
            reached = lp.project(target)
            then = value(reached, trial)
            if then >= now + 1e-4 * t * slope - 1e-13 * abs(now) or t < 1e-10:
                break
            t /= 2
        if t < 1e-10:
            return x, lam, step
        lam, point, x, now = trial, target, reached, then
    return x, lam, most


def _newton_direction(lp: Conic, face: Face, gradient: Array, weight: Array | float, delta: float) -> Array:
    # (A P D^-1 A' + delta I) d = gradient, D = diag(weight), which is constant within every block
    H, m = curvature(lp.A, face, 1.0 / np.broadcast_to(weight, lp.c.shape)), lp.b.size
    if m <= DENSE_ROWS:
        dense = H.toarray()
        dense.flat[:: m + 1] += delta
        factor = scipy.linalg.cho_factor(dense, overwrite_a=True, check_finite=False)
        return np.asarray(scipy.linalg.cho_solve(factor, gradient, check_finite=False))
    system = (H + delta * scipy.sparse.eye_array(m)).tocsc()
    solver = scipy.sparse.linalg.splu(system, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    return np.asarray(solver.solve(gradient))


def curvature(A: scipy.sparse.csc_array, face: Face, scale: Array) -> scipy.sparse.csc_array:
    """$A P S A'$ with the generalized Jacobian P of a projection and S = diag(scale), constant within every block.

    Args:
        A: Matrix, shape (m, n), CSC.
        face: The generalized Jacobian.
        scale: Positive numbers, shape (n,).

    Returns:
        Shape (m, m).
    """
    root = np.sqrt(scale)
    free = np.flatnonzero(face.free)
    B = A[:, free] @ scipy.sparse.diags_array(root[free])
    H = B @ B.T
    for columns, sign in ((face.cuts, -1.0), (face.spans, 1.0)):
        if columns is not None and columns.shape[1]:
            W = A @ (scipy.sparse.diags_array(root) @ columns)
            H = H + sign * (W @ W.T)
    return scipy.sparse.csc_array(H)
