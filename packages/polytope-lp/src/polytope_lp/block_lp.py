r"""LPs with a general matrix over blocks of polytopes: `BlockLP`, and `linprog_blocks` in scipy's shape.

$$ \min c'x \quad \text{s.t.} \quad A_{ub} x \le b_{ub}, \; A_{eq} x = b_{eq}, \; x_i \in C_i, $$

several rows per variable, signs mixed, blocks of capped boxes, of any `Polytope`, or of plain bounds that may be
infinite. Capped boxes and bounds are solved exactly by `newton`; other polytopes by L-BFGS on the smoothed dual.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult

from polytope_lp import continuation
from polytope_lp.evaluation import KEEP, Evaluation
from polytope_lp.newton import Conic, Exact, Face, solve_exact
from polytope_lp.options import SMALLEST_TOL, Options
from polytope_lp.polytopes import CappedBox, Polytope
from polytope_lp.search import Search

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bounds:
    """Plain bounds on a run of variables; either side may be infinite.

    Attributes:
        lower: Lower bounds, shape (variables,).
        upper: Upper bounds, shape (variables,).
    """

    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class Group:
    """A run of variables that is divided into blocks of one kind.

    Attributes:
        kind: Polytope of the blocks, or bounds of the variables.
        offsets: Bounds of the blocks within the run, shape (blocks + 1,), int64.
    """

    kind: Polytope | Bounds
    offsets: NDArray[np.int64]

    @property
    def variables(self) -> int:
        """Number of variables of the run."""
        return int(self.offsets[-1])


@dataclass(frozen=True, eq=False)
class BlockLP:
    """A checked LP over blocks.

    Attributes:
        c: Costs, shape (n,).
        A: Rows, inequalities first, shape (m, n), CSR.
        b: Right-hand sides, shape (m,).
        inequalities: Number of rows that are `<=`; the others are equations.
        groups: Runs of variables in order.
    """

    c: Array
    A: scipy.sparse.csr_array
    b: Array
    inequalities: int
    groups: tuple[Group, ...]

    @classmethod
    def build(
        cls,
        c: ArrayLike,
        A_ub: Any = None,
        b_ub: ArrayLike | None = None,
        A_eq: Any = None,
        b_eq: ArrayLike | None = None,
        bounds: Any = None,
        blocks: Sequence[tuple[Polytope, ArrayLike]] | None = None,
    ) -> "BlockLP":
        """Check the parts and put them together.

        Args:
            c: Costs, shape (n,).
            A_ub: Rows of the inequalities, shape (m_ub, n), dense or sparse.
            b_ub: Their right-hand sides, shape (m_ub,).
            A_eq: Rows of the equations, shape (m_eq, n), dense or sparse.
            b_eq: Their right-hand sides, shape (m_eq,).
            bounds: As in `scipy.optimize.linprog`; used where there are no blocks.
            blocks: Polytopes in the order of the variables, each with the lengths of its blocks.

        Returns:
            The LP.

        Raises:
            ValueError: If a shape does not fit, a value is not finite, or a block is empty of points.
        """
        costs = np.asarray(c, dtype=np.float64).reshape(-1)
        n = costs.size
        rows_ub, rhs_ub = _rows("ub", A_ub, b_ub, n)
        rows_eq, rhs_eq = _rows("eq", A_eq, b_eq, n)
        if not np.isfinite(costs).all():
            raise ValueError("c: expected finite values, got NaN or infinite ones")
        if blocks is not None and bounds is not None:
            raise ValueError("bounds: expected either bounds or blocks, got both")
        groups: tuple[Group, ...]
        if blocks is None:
            groups = (Group(_bounds(bounds, n), np.arange(n + 1)),)
        else:
            groups = tuple(_group(kind, lengths) for kind, lengths in blocks)
        total = sum(group.variables for group in groups)
        if total != n:
            raise ValueError(f"blocks: expected {n} variables in all, got {total}")
        A = scipy.sparse.csr_array(scipy.sparse.vstack([rows_ub, rows_eq]))
        return cls(costs, A, np.concatenate([rhs_ub, rhs_eq]), rhs_ub.size, groups)

    def project(self, point: Array) -> Array:
        """Projection of a point onto the product of the blocks.

        Args:
            point: Shape (n,).

        Returns:
            Shape (n,).
        """
        parts, at = [], 0
        for group in self.groups:
            piece = point[at : at + group.variables]
            at += group.variables
            if isinstance(group.kind, Bounds):
                parts.append(np.clip(piece, group.kind.lower, group.kind.upper))
            else:
                offsets = torch.from_numpy(group.offsets)
                parts.append(group.kind.project(torch.from_numpy(np.ascontiguousarray(piece)), offsets).numpy())
        return np.concatenate(parts) if parts else point

    def lower_bound(self, lam: Array) -> float:
        r"""A certified bound, $\sum_i \min_{v \in C_i} (c_i + A_i'\lambda)'v - \lambda'b$.

        Args:
            lam: Multipliers, shape (m,); negative ones of inequalities are taken as zero.

        Returns:
            The bound; -inf where an unbounded variable has a reduced cost of the wrong sign.
        """
        lam = lam.copy()
        lam[: self.inequalities] = np.maximum(lam[: self.inequalities], 0.0)
        reduced, total, at = self.c + self.A.T @ lam, -float(lam @ self.b), 0
        for group in self.groups:
            r = reduced[at : at + group.variables]
            at += group.variables
            if isinstance(group.kind, Bounds):
                side = np.where(r > 0, group.kind.lower, group.kind.upper)
                total += float(np.where(r == 0, 0.0, r * np.where(r == 0, 0.0, side)).sum())
            else:
                v = group.kind.minimiser(torch.from_numpy(r.copy()), torch.from_numpy(group.offsets))
                total += float(r @ v.numpy())
        return total


def _optimum(**fields: Any) -> OptimizeResult:
    result = OptimizeResult()
    result.update(fields)
    return result


def linprog_blocks(
    c: ArrayLike,
    A_ub: Any = None,
    b_ub: ArrayLike | None = None,
    A_eq: Any = None,
    b_eq: ArrayLike | None = None,
    bounds: Any = None,
    blocks: Sequence[tuple[Polytope, ArrayLike]] | None = None,
    *,
    tol: float = 1e-9,
    time_limit: float | None = None,
) -> OptimizeResult:
    """Solve an LP over blocks; arguments and result as in `scipy.optimize.linprog`.

    Args:
        c: Costs, shape (n,).
        A_ub: Rows of the inequalities, shape (m_ub, n), dense or sparse.
        b_ub: Their right-hand sides, shape (m_ub,).
        A_eq: Rows of the equations, shape (m_eq, n), dense or sparse.
        b_eq: Their right-hand sides, shape (m_eq,).
        bounds: As in scipy; used where there are no blocks.
        blocks: Polytopes in the order of the variables, each with the lengths of its blocks.
        tol: Relative residuals to reach.
        time_limit: Seconds after which the best point so far is returned.

    Returns:
        `x`, `fun`, `lam` (multipliers, inequalities first), `lower_bound` (certified; -inf if none), `violation` (rows,
        over 1 + |b| + |A| |x|), `dual_residual`, `gap`, `nit` (proximal steps), `status`, `success` and `message`:
        0 residuals and gap below 100 tol, 1 limit reached, 2 infeasible (a ray proves it), 4 accuracy not reached.
    """
    started = time.monotonic()
    lp = BlockLP.build(c, A_ub, b_ub, A_eq, b_eq, bounds, blocks)
    if any(not isinstance(group.kind, (Bounds, CappedBox)) for group in lp.groups):
        return _solve_smoothed(lp, tol, time_limit)

    def late() -> bool:
        return time_limit is not None and time.monotonic() - started > time_limit

    scaled, rows, columns, size = _scaled(lp)
    found = solve_exact(scaled, tol, deadline=late, infeasible=lambda ray: _proves_infeasible(lp, ray * rows))
    n = lp.c.size
    x = lp.project(found.x[:n] * columns[:n] * size[1])
    lam = found.lam * rows * size[0]
    return _result(lp, x, lam, found, tol, late())


def _solve_smoothed(lp: BlockLP, tol: float, time_limit: float | None) -> OptimizeResult:
    dual = BlockDual(lp)
    search = Search(dual, Options(tol=max(tol, SMALLEST_TOL), time_limit=time_limit))
    ended = continuation.run(search, None, lambda _: None)
    if search.incumbent is None or search.price is None:
        raise RuntimeError("the run ended before its first evaluation")
    best = search.incumbent.evaluation
    x = dual.primal(best.lam, best.gamma, search.incumbent.anchor).numpy() * dual.factors(best.shrink)
    good = ended in {"optimal", "optimal_residual"}
    codes = {"infeasible": 2, "time_limit": 1, "evaluation_limit": 1}
    excess = lp.A @ x - lp.b
    excess[: lp.inequalities] = np.maximum(excess[: lp.inequalities], 0.0)
    fun = float(lp.c @ x)
    return _optimum(
        x=x,
        fun=fun,
        lam=search.price.numpy(),
        lower_bound=search.lower,
        violation=float((np.abs(excess) / (1 + np.abs(lp.b))).max(initial=0.0)),
        dual_residual=0.0,
        gap=(fun - search.lower) / search.size,
        nit=len(search.history),
        status=0 if good else codes.get(ended, 4),
        success=good,
        message=ended,
    )


class BlockDual:
    """The smoothed dual of a `BlockLP` whose blocks are compact; see `polytope_lp.evaluation.Dual`.

    Args:
        lp: The LP.
    """

    def __init__(self, lp: BlockLP) -> None:
        self.lp, self._start = lp, time.monotonic()
        parts = []
        for group in lp.groups:
            if isinstance(group.kind, Bounds):
                parts.append(np.maximum(np.abs(group.kind.lower), np.abs(group.kind.upper)))
            else:
                parts.append(group.kind.limits(torch.from_numpy(group.offsets)).numpy())
        limits = np.concatenate(parts)
        if not np.isfinite(limits).all():
            raise ValueError("bounds: expected finite bounds beside polytopes that only have an oracle")
        norms = np.sqrt(np.asarray((lp.A * lp.A).sum(axis=1)).ravel())
        self.scale = torch.from_numpy(np.exp2(-np.round(np.log2(np.where(norms > 0, norms, 1.0)))))
        self.free = torch.arange(lp.b.size) >= lp.inequalities
        self.budgets = torch.from_numpy(lp.b)
        self.blocks = sum(group.offsets.size - 1 for group in lp.groups)
        self.ceiling = float(np.abs(lp.c) @ limits) * (1 + 1e-9)
        self.gamma_start = max(float(np.abs(lp.c).mean()), 1e-12) / max(float(limits.mean()), 1e-300)
        closed = all(not isinstance(g.kind, Bounds) and g.kind.down_closed for g in lp.groups)
        signs = lp.A.nnz == 0 or bool(lp.A.data.min() >= 0)
        self.repairable = closed and signs and bool((lp.b >= 0).all()) and lp.inequalities == lp.b.size
        self._columns = scipy.sparse.csc_array(lp.A)

    def factors(self, shrink: torch.Tensor | None) -> Array:
        """Factor of every variable: the least over the rows it stands in.

        Args:
            shrink: Factors by row, or None.

        Returns:
            Shape (n,).
        """
        result = np.ones(self.lp.c.size)
        if shrink is not None:
            owner = np.repeat(np.arange(result.size), np.diff(self._columns.indptr))
            used = self._columns.data != 0
            np.minimum.at(result, owner[used], shrink.numpy()[self._columns.indices[used]])
        return result

    def primal(self, lam: torch.Tensor, gamma: float, anchor: torch.Tensor | None = None) -> torch.Tensor:
        """See `polytope_lp.evaluation.Dual.primal`.

        Args:
            lam: Multipliers, shape (m,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal centre, or None for the origin.

        Returns:
            Shape (n,), float64.
        """
        target = -(self.lp.c + self.lp.A.T @ lam.numpy()) / gamma
        return torch.from_numpy(self.lp.project(target if anchor is None else target + anchor.numpy()))

    def evaluate(self, lam: torch.Tensor, gamma: float, anchor: torch.Tensor | None = None) -> Evaluation:
        """See `polytope_lp.evaluation.Dual.evaluate`.

        Args:
            lam: Multipliers, shape (m,), float64.
            gamma: Weight of the ridge.
            anchor: Proximal centre, or None for the origin.

        Returns:
            Value, gradient and bounds.
        """
        lp = self.lp
        x = self.primal(lam, gamma, anchor).numpy()
        load = lp.A @ x
        gradient = torch.from_numpy(load - lp.b)
        cost, shrink, upper = float(lp.c @ x), None, np.inf
        if self.repairable:
            keep = lp.b * KEEP
            shrink = torch.from_numpy(np.where(load > keep, keep / np.where(load > 0, load, 1.0), 1.0))
            upper = float(lp.c @ (x * self.factors(shrink)))
        move = x if anchor is None else x - anchor.numpy()
        excess = torch.where(self.free, gradient.abs(), gradient) / (1 + self.budgets.abs())
        return Evaluation(
            lam=lam,
            gamma=gamma,
            value=cost + gamma / 2 * float(move @ move) + float(lam @ gradient),
            gradient=gradient,
            lower=lp.lower_bound(lam.numpy()),
            upper=upper,
            cost=cost,
            shrink=shrink,
            violation=max(float(excess.max()), 0.0) if excess.numel() else 0.0,
            fractional=0,
            nonzero=int((x > 0).sum()),
        )

    def elapsed(self) -> float:
        """See `polytope_lp.evaluation.Dual.elapsed`.

        Returns:
            Seconds.
        """
        return time.monotonic() - self._start


def _result(lp: BlockLP, x: Array, lam: Array, found: Exact, tol: float, late: bool) -> OptimizeResult:
    activity = lp.A @ x - lp.b
    activity[: lp.inequalities] = np.maximum(activity[: lp.inequalities], 0.0)
    # Relative to what is summed: rows of large entries carry rounding in proportion.
    summed = 1 + np.abs(lp.b) + abs(lp.A) @ np.abs(x)
    violation = float((np.abs(activity) / summed).max(initial=0.0))
    fun, bound = float(lp.c @ x), lp.lower_bound(lam)
    dual_value = -float(lam @ lp.b) + float((lp.c + lp.A.T @ lam) @ x)
    gap = abs(fun - dual_value) / max(1.0, abs(fun))
    good = violation <= 100 * tol and found.dual <= 100 * tol and gap <= max(100 * tol, 1e-6)
    status, message = (0, "optimal: residuals and gap below tolerance") if good else (4, "accuracy not reached")
    if not good and found.ray is not None:
        status, message = 2, "infeasible: the multipliers are a ray along which the dual grows without bound"
    elif not good and late:
        status, message = 1, "time limit reached"
    return _optimum(
        x=x,
        fun=fun,
        lam=lam,
        lower_bound=bound,
        violation=violation,
        dual_residual=found.dual,
        gap=gap,
        nit=found.outer,
        newton=found.newton,
        status=status,
        success=good,
        message=message,
    )


def _proves_infeasible(lp: BlockLP, lam: Array) -> bool:
    # With zero costs the dual value at lam bounds 0'x = 0 from below: above zero there is no feasible x.
    size = float(np.abs(lam).max(initial=0.0))
    if size == 0.0:
        return False
    ray = BlockLP(np.zeros_like(lp.c), lp.A, lp.b, lp.inequalities, lp.groups)
    return ray.lower_bound(lam / size) > 1e-9 * (1 + float(np.abs(lp.b).max(initial=0.0)))


def _scaled(lp: BlockLP) -> tuple[Conic, Array, Array, tuple[float, float]]:
    # The LP in equations with slacks, equilibrated; factors of rows and columns, the units of costs and amounts.
    m, n, k = lp.b.size, lp.c.size, lp.inequalities
    slack = scipy.sparse.vstack([scipy.sparse.eye_array(k), scipy.sparse.csr_array((m - k, k))])
    M = scipy.sparse.csc_array(scipy.sparse.hstack([lp.A, slack]) if k else lp.A)
    c = np.concatenate([lp.c, np.zeros(k)])
    plain = all(isinstance(group.kind, Bounds) for group in lp.groups)
    fixed = np.zeros(n + k, dtype=bool) if plain else np.arange(n + k) < n  # a scaled simplex is none
    rows, columns = np.ones(m), np.ones(n + k)
    # Columns and the unit of amounts are powers of two: a bound then stays a bound to the last bit.
    for _ in range(10):  # Ruiz
        scaled = abs(scipy.sparse.diags_array(rows) @ M @ scipy.sparse.diags_array(columns))
        high = np.sqrt(scaled.max(axis=1).toarray().ravel())
        wide = np.sqrt(scaled.max(axis=0).toarray().ravel())
        rows /= np.where(high > 0, high, 1.0)
        columns /= np.where((wide > 0) & ~fixed, wide, 1.0)
    columns = np.exp2(np.round(np.log2(columns)))
    M = scipy.sparse.csc_array(scipy.sparse.diags_array(rows) @ M @ scipy.sparse.diags_array(columns))
    norms = np.sqrt(np.asarray((M * M).sum(axis=1)).ravel())
    norms[norms == 0] = 1.0
    rows, M = rows / norms, scipy.sparse.csc_array(scipy.sparse.diags_array(1 / norms) @ M)
    c, b = c * columns, lp.b * rows
    unit_c = float(np.linalg.norm(c)) or 1.0
    unit_x = float(np.exp2(np.round(np.log2(float(np.linalg.norm(b)) or 1.0))))

    def project(v: Array) -> Array:
        amounts = v * columns * unit_x
        inside = np.concatenate([lp.project(amounts[:n]), np.maximum(amounts[n:], 0.0)])
        return np.asarray(inside / (columns * unit_x))

    def face(x: Array) -> Face:
        amounts = x * columns * unit_x
        free, cuts = _face(lp, amounts[:n])
        if cuts is not None:
            cuts = scipy.sparse.csc_array(scipy.sparse.vstack([cuts, scipy.sparse.csc_array((k, cuts.shape[1]))]))
        return Face(np.concatenate([free, amounts[n:] > 0]), cuts)

    return Conic(M, b / unit_x, c / unit_c, project, face), rows, columns, (unit_c, unit_x)


def _face(lp: BlockLP, x: Array) -> tuple[NDArray[np.bool_], scipy.sparse.csc_array | None]:
    free, cuts, at = [], [], 0
    for group in lp.groups:
        mine = x[at : at + group.variables]
        at += group.variables
        if isinstance(group.kind, Bounds):
            free.append((mine > group.kind.lower) & (mine < group.kind.upper))
            cuts.append(scipy.sparse.csc_array((group.variables, 0)))
            continue
        if not isinstance(group.kind, CappedBox):
            raise TypeError(f"blocks: expected capped boxes, got {type(group.kind).__name__}")
        inside, tight = group.kind.face(torch.from_numpy(mine.copy()), torch.from_numpy(group.offsets))
        free.append(inside)
        cuts.append(tight)
    if not any(part.shape[1] for part in cuts):
        return np.concatenate(free), None
    return np.concatenate(free), scipy.sparse.csc_array(scipy.sparse.block_diag(cuts, format="csc"))


def _rows(name: str, A: Any, b: ArrayLike | None, n: int) -> tuple[scipy.sparse.csr_array, Array]:
    if (A is None) != (b is None):
        raise ValueError(f"A_{name}, b_{name}: expected both or neither")
    if A is None or b is None:
        return scipy.sparse.csr_array((0, n)), np.zeros(0)
    matrix = scipy.sparse.csr_array(A, dtype=np.float64)
    rhs = np.asarray(b, dtype=np.float64).reshape(-1)
    if matrix.shape != (rhs.size, n):
        raise ValueError(f"A_{name}: expected shape ({rhs.size}, {n}), got {matrix.shape}")
    if not np.isfinite(matrix.data).all() or not np.isfinite(rhs).all():
        raise ValueError(f"A_{name}, b_{name}: expected finite values, got NaN or infinite ones")
    return matrix, rhs


def _bounds(bounds: Any, n: int) -> Bounds:
    if bounds is None:
        return Bounds(np.zeros(n), np.full(n, np.inf))
    raw = np.array(bounds, dtype=object)
    if raw.size == 0:
        return Bounds(np.zeros(n), np.full(n, np.inf))
    pairs = np.broadcast_to(raw.reshape(1, 2) if raw.size == 2 else raw, (n, 2))
    lower = np.array([-np.inf if v is None else float(v) for v in pairs[:, 0]])
    upper = np.array([np.inf if v is None else float(v) for v in pairs[:, 1]])
    if np.isnan(lower).any() or np.isnan(upper).any() or (lower > upper).any():
        raise ValueError("bounds: expected lower <= upper and no NaN")
    return Bounds(lower, upper)


def _group(kind: Polytope, lengths: ArrayLike) -> Group:
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if sizes.size == 0 or (sizes < 0).any():
        raise ValueError("blocks: expected lengths of at least 0, got none or a negative one")
    group = Group(kind, np.concatenate([[0], np.cumsum(sizes)]))
    kind.check(torch.from_numpy(group.offsets))
    return group
