r"""Projection onto $\{x \ge 0, Gx \le h\}$ by a small QP, which takes over where a corral grows too large."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    r"""A polytope as rows, $\{x \ge 0, Gx \le h\}$.

    Attributes:
        G: Matrix, shape (m, n), CSR.
        h: Right-hand sides, shape (m,).
        equation: Rows that are equations, shape (m,), bool.
    """

    G: scipy.sparse.csr_array
    h: Array
    equation: NDArray[np.bool_]

    def face(self, x: Array) -> tuple[NDArray[np.bool_], Array]:
        """The face that a point is on.

        Args:
            x: A point of the polytope, shape (n,).

        Returns:
            Positive entries, shape (n,), and an orthonormal basis of the tight rows restricted to them, shape (n, r).
        """
        free = x > 0
        tight = self.equation | (np.abs(self.G @ x - self.h) <= 1e-9 * (1 + np.abs(self.h)))
        dense = self.G.toarray()[tight] * free
        return free, np.asarray(scipy.linalg.orth(dense.T, rcond=1e-10)) if tight.any() else np.zeros((x.size, 0))


def project_rows(y: Array, rows: Rows, tol: float = 1e-13) -> Array:
    r"""Project onto $\{x \ge 0, Gx \le h\}$ (equations where said) through its dual, a small smooth concave problem.

    Args:
        y: Point, shape (n,).
        rows: The polytope.
        tol: Decrease of the dual, relative to the size of the point, at which to stop.

    Returns:
        The projection, shape (n,).
    """
    h, equation = rows.h, rows.equation
    dense, scale = rows.G.toarray(), 1.0 + float(np.abs(y).max(initial=0.0))
    mu = np.zeros(h.size)

    def at(mu: Array) -> tuple[float, Array]:
        x = np.maximum(y - mu @ dense, 0.0)
        return 0.5 * float(x @ x) + float(mu @ h), x

    value, x = at(mu)
    for _ in range(200):  # semismooth Newton on the coordinates that are not held at zero
        gradient = h - dense @ x
        moving = equation | (mu > 0) | (gradient < 0)
        if float(np.abs(gradient[moving]).max(initial=0.0)) <= tol * scale:
            break
        B = dense[np.ix_(moving, x > 0)]
        hessian = B @ B.T
        hessian.flat[:: hessian.shape[0] + 1] += 1e-10
        direction = np.zeros_like(mu)
        direction[moving] = -np.linalg.solve(hessian, gradient[moving])
        t = 1.0
        while True:
            trial = mu + t * direction
            trial = np.where(equation, trial, np.maximum(trial, 0.0))
            then, reached = at(trial)
            if then <= value + 1e-4 * float(gradient @ (trial - mu)) or t < 1e-12:
                break
            t /= 2
        if t < 1e-12:
            break
        mu, value, x = trial, then, reached
    return x
