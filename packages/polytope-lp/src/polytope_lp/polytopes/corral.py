r"""Projection onto the hull of vertices that an oracle names one at a time: Wolfe's nearest-point method.

The corral is a set of affinely independent vertices whose hull holds the current point x. Each round asks the oracle
for $q = \arg\max_v (y - x)'v$; if $(y - x)'(q - x) \le$ tol, x is within $\sqrt{\text{tol}}$ of the projection, else q
joins. The nearest point of the corral's affine hull is found in differences from the first vertex,
$\min_a \lVert D'a - (y - s_0) \rVert$, D with rows $s_k - s_0$: entries of order one whatever the size of y (Grams of
$S - y$ have entries of order $1 / \gamma^2$ and lose everything for small ridges).

Source: arXiv 2103.05277, the vertex-oriented projection; Wolfe (1976). The solution is mostly one or two vertices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Oracle = Callable[[Array], Array]
"""Vertex that maximizes a direction's inner product."""

TOLERANCE = 1e-15
"""Default bound of $(y - x)'(q - x)$, relative to the size of both: the square of the distance's accuracy."""


@dataclass(frozen=True)
class Corral:
    """A point as a convex combination of vertices.

    Attributes:
        vertices: Shape (k, n).
        weights: Positive, summing to one, shape (k,).
        calls: Oracle calls that it took.
        complete: Whether the point is the projection; False when the corral outgrew its limit.
    """

    vertices: Array
    weights: Array
    calls: int
    complete: bool = True

    @property
    def point(self) -> Array:
        """The combination, shape (n,)."""
        return np.asarray(self.weights @ self.vertices)


def project(
    y: Array, oracle: Oracle, warm: Array | None = None, tol: float = TOLERANCE, limit: int | None = None
) -> Corral:
    r"""Project a point, $\min_{x \in \mathrm{conv}(V)} \lVert x - y \rVert^2$.

    Args:
        y: The point, shape (n,).
        oracle: Vertex that maximizes a direction's inner product.
        warm: Vertices of an earlier corral to start from, shape (k, n).
        tol: Bound of $(y - x)'(q - x)$ at which to stop, relative to the products' own size.
        limit: Size of the corral at which to give up, None for no limit.

    Returns:
        The corral of the projection.
    """
    if warm is None:
        S, w, calls = oracle(y)[None, :], np.ones(1), 1
    else:
        S, w, calls = warm[:1], np.ones(1), 0
        for vertex in warm[1:]:  # re-enter one at a time: each minor cycle keeps the set independent
            S, w = _minor(np.vstack([S, vertex]), np.append(w, 0.0), y)
    for _ in range(1000 + 10 * y.size):
        x = w @ S
        step = y - x
        q = oracle(step)
        calls += 1
        gain = float(step @ (q - x))
        if gain <= tol * (1.0 + abs(float(step @ x)) + abs(float(step @ q))) or (q == S).all(1).any():
            return Corral(S, w, calls)
        if limit is not None and S.shape[0] >= limit:
            return Corral(S, w, calls, complete=False)
        T, v = _minor(np.vstack([S, q]), np.append(w, 0.0), y)
        moved = v @ T - x
        if float(step @ moved) <= 0.5 * float(moved @ moved):  # ||y - x|| no longer falls: all that rounding allows
            return Corral(S, w, calls)
        S, w = T, v
    return Corral(S, w, calls, complete=False)


def _minor(S: Array, w: Array, y: Array) -> tuple[Array, Array]:
    # Move to the affine minimizer; where that leaves the hull, stop at its boundary and drop what fell to zero.
    while S.shape[0] > 1:
        a = _affine(S, y)
        alpha = np.concatenate([[1.0 - a.sum()], a])
        if (alpha > -1e-14).all():
            keep = alpha > 1e-14
            return S[keep], alpha[keep] / alpha[keep].sum()
        negative = alpha < 0
        theta = float(np.min(w[negative] / (w[negative] - alpha[negative])))
        w = (1 - theta) * w + theta * alpha
        w[np.argmin(np.where(negative, w, np.inf))] = 0.0
        keep = w > 1e-14
        S, w = S[keep], w[keep] / w[keep].sum()
    return S, np.ones(S.shape[0])


def _affine(S: Array, y: Array) -> Array:
    # Coordinates of the affine hull's nearest point, along the differences from the first vertex.
    D, away = S[1:] - S[0], y - S[0]
    if D.shape[0] == 1:  # by far the most common
        return np.asarray(D @ away / (D[0] @ D[0]))
    try:
        return np.asarray(np.linalg.solve(D @ D.T, D @ away))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(D.T, away, rcond=None)[0])
