r"""LPs with a general matrix over blocks of polytopes.

$$ \min c'x \quad \text{s.t.} \quad A_{ub} x \le b_{ub}, \; A_{eq} x = b_{eq}, \; x_i \in C_i, $$

several rows per variable, signs mixed, blocks of any `Polytope` or of plain bounds that may be infinite.
`block_solution` solves them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import ArrayLike, NDArray

from polytope_lp.general.newton import Conic
from polytope_lp.polytopes import CappedBox, Face, Polytope

if TYPE_CHECKING:
    from polytope_lp.matching.problem import MatchingProblem

Array = NDArray[np.float64]
ROUNDING = 1e-13
"""What sums of products that cancel may be off by, relative to the sum of their sizes."""


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
        if n == 0:
            raise ValueError("c: expected at least one variable, got none")
        A = scipy.sparse.csr_array(scipy.sparse.vstack([rows_ub, rows_eq]))
        return cls(costs, A, np.concatenate([rhs_ub, rhs_eq]), rhs_ub.size, groups)

    @classmethod
    def from_matching(cls, problem: "MatchingProblem") -> "BlockLP":
        """A matching problem as a general LP: its inequalities first, then its equations.

        Args:
            problem: The problem.

        Returns:
            The LP.
        """
        d = problem.data
        n, rows = d.variables, d.index.reshape(d.variables, -1)
        k = rows.shape[1]
        a = np.ones(n * k) if d.coefficient is None else d.coefficient.double().numpy().ravel()
        A = scipy.sparse.csr_array((a, (rows.numpy().ravel(), np.repeat(np.arange(n), k))), shape=(problem.rows, n))
        equal, b = problem.equality.numpy(), problem.budgets.numpy()
        upper, weight = (None if part is None else part.double() for part in (d.upper, d.weight))
        kind = CappedBox(d.cap, upper, weight, d.equality)
        lengths = np.diff(d.offsets.numpy())
        return cls.build(d.cost.double().numpy(), A[~equal], b[~equal], A[equal], b[equal], blocks=[(kind, lengths)])

    def pieces(self) -> Iterator[tuple[slice, Group]]:
        """The groups with the variables that each takes.

        Yields:
            Slice of the variables, and the group.
        """
        at = 0
        for group in self.groups:
            yield slice(at, at + group.variables), group
            at += group.variables

    @cached_property
    def repairable(self) -> bool:
        """Whether shrinking makes a point feasible: A and b at least 0, no equations, down-closed blocks."""
        closed = all(
            bool((g.kind.lower == 0).all()) if isinstance(g.kind, Bounds) else g.kind.down_closed for g in self.groups
        )
        signs = self.A.nnz == 0 or bool(self.A.data.min() >= 0)
        return closed and signs and bool((self.b >= 0).all()) and self.inequalities == self.b.size

    def project(self, point: Array) -> Array:
        """Projection of a point onto the product of the blocks.

        Args:
            point: Shape (n,).

        Returns:
            Shape (n,).
        """
        x = np.empty_like(point)
        for at, group in self.pieces():
            if isinstance(group.kind, Bounds):
                x[at] = np.clip(point[at], group.kind.lower, group.kind.upper)
            else:
                x[at] = group.kind.project(_tensor(point[at]), torch.from_numpy(group.offsets)).numpy()
        return x

    def face(self, point: Array, x: Array) -> Face:
        """The face that a projection is on.

        Args:
            point: Shape (n,).
            x: Its projection, shape (n,).

        Returns:
            The generalized Jacobian of the projection.
        """
        faces = []
        for at, group in self.pieces():
            if isinstance(group.kind, Bounds):
                faces.append(Face((x[at] > group.kind.lower) & (x[at] < group.kind.upper)))
            else:
                faces.append(group.kind.face(_tensor(point[at]), _tensor(x[at]), torch.from_numpy(group.offsets)))
        free = np.concatenate([face.free for face in faces])
        return Face(free, _stack(faces, "cuts"), _stack(faces, "spans"))

    def least(self, reduced: Array) -> float:
        r"""$\sum_i \min_{v \in C_i} r_i'v$.

        Args:
            reduced: Reduced costs r, shape (n,).

        Returns:
            The sum; -inf where an unbounded variable has a cost of the wrong sign.
        """
        total = 0.0
        for at, group in self.pieces():
            r = reduced[at]
            if isinstance(group.kind, Bounds):
                side = np.where(r > 0, group.kind.lower, group.kind.upper)
                total += float(np.where(r == 0, 0.0, r * np.where(r == 0, 0.0, side)).sum())
            else:
                total += float(r @ group.kind.minimizer(_tensor(r), torch.from_numpy(group.offsets)).numpy())
        return total

    def box(self) -> tuple[Array, Array] | None:
        """Bounds of all variables, if every block is a box.

        Returns:
            Lower and upper bounds, shape (n,) each; None where a block is something else.
        """
        lower, upper = np.zeros(self.c.size), np.full(self.c.size, np.inf)
        for at, group in self.pieces():
            kind = group.kind
            if isinstance(kind, Bounds):
                lower[at], upper[at] = kind.lower, kind.upper
            elif isinstance(kind, CappedBox) and not bool(torch.isfinite(torch.as_tensor(kind.cap)).any()):
                upper[at] = np.inf if kind.upper is None else np.broadcast_to(kind.upper, (group.variables,))
            else:
                return None
        return lower, upper

    def lower_bound(self, lam: Array) -> float:
        r"""A certified bound, $\sum_i \min_{v \in C_i} (c_i + A_i'\lambda)'v - \lambda'b$.

        Args:
            lam: Multipliers, shape (m,); negative ones of inequalities are taken as zero.

        Returns:
            The bound; -inf where an unbounded variable has a reduced cost of the wrong sign.
        """
        lam = self.signed(lam)
        return self.least(self.c + self.A.T @ lam) - float(lam @ self.b)

    def signed(self, lam: Array) -> Array:
        """Multipliers with those of inequalities at least zero.

        Args:
            lam: Multipliers, shape (m,).

        Returns:
            Shape (m,).
        """
        return np.concatenate([np.maximum(lam[: self.inequalities], 0.0), lam[self.inequalities :]])

    def proves_infeasible(self, lam: Array) -> bool:
        r"""Whether multipliers are a certificate of infeasibility: the dual value at zero costs is above zero.

        Args:
            lam: Multipliers, shape (m,).

        Returns:
            Whether $\sum_i \min_{v \in C_i} (A_i'\lambda)'v - \lambda'b > 0$ beyond rounding, for which no x serves.
        """
        lam = self.signed(lam)
        size = float(np.abs(lam).max(initial=0.0))
        if size == 0.0:
            return False
        lam = lam / size
        reduced = self.A.T @ lam
        box = self.box()
        if box is not None:  # on a side without a bound, what cancels up to rounding is zero
            rounding = np.abs(reduced) <= ROUNDING * (abs(self.A.T) @ np.abs(lam))
            reduced = np.where(rounding & (np.isinf(box[0]) | np.isinf(box[1])), 0.0, reduced)
        return self.least(reduced) - float(lam @ self.b) > 1e-9 * (1 + float(np.abs(self.b).max(initial=0.0)))

    def excess(self, x: Array) -> Array:
        """By how much each row is violated.

        Args:
            x: Shape (n,).

        Returns:
            Positive parts of A x - b for inequalities, absolute values for equations, shape (m,).
        """
        over = self.A @ x - self.b
        return np.concatenate([np.maximum(over[: self.inequalities], 0.0), np.abs(over[self.inequalities :])])

    def repaired(self, x: Array) -> Array:
        """The point shrunk into the rows: every variable by the smallest factor of its rows.

        Args:
            x: A point of the blocks, shape (n,).

        Returns:
            A feasible point if the LP is `repairable`, shape (n,).
        """
        load, keep = self.A @ x, self.b * (1.0 - 1e-12)
        factor = np.where(load > keep, keep / np.where(load > 0, load, 1.0), 1.0)
        columns, factors = scipy.sparse.csc_array(self.A), np.ones(x.size)
        owner = np.repeat(np.arange(x.size), np.diff(columns.indptr))
        used = columns.data != 0
        np.minimum.at(factors, owner[used], factor[columns.indices[used]])
        return x * factors


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _stack(faces: list[Face], name: str) -> scipy.sparse.csc_array | None:
    parts = [getattr(face, name) for face in faces]
    if not any(part is not None and part.shape[1] for part in parts):
        return None
    parts = [scipy.sparse.csc_array((f.free.size, 0)) if p is None else p for f, p in zip(faces, parts, strict=True)]
    return scipy.sparse.csc_array(scipy.sparse.block_diag(parts, format="csc"))


def equilibrated(lp: BlockLP) -> tuple[Conic, Array, Array, tuple[float, float]]:
    """The LP in equations with slacks, scaled so that rows, costs and right-hand sides are of order one.

    Args:
        lp: The LP.

    Returns:
        The scaled LP, factors of rows and columns, and the units of costs and amounts.
    """
    m, n, k = lp.b.size, lp.c.size, lp.inequalities
    slack = scipy.sparse.vstack([scipy.sparse.eye_array(k), scipy.sparse.csr_array((m - k, k))])
    M = scipy.sparse.csc_array(scipy.sparse.hstack([lp.A, slack]) if k else lp.A)
    c = np.concatenate([lp.c, np.zeros(k)])
    plain = all(isinstance(group.kind, Bounds) for group in lp.groups)
    fixed = np.zeros(n + k, dtype=bool) if plain else np.arange(n + k) < n  # a scaled simplex is not a simplex
    rows, columns = np.ones(m), np.ones(n + k)
    # Columns and the unit of amounts are powers of two: a bound then stays a bound to the last bit.
    for _ in range(10 if m else 0):  # Ruiz
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

    def face(v: Array, x: Array) -> Face:
        units = columns * unit_x
        found = lp.face((v * units)[:n], (x * units)[:n])
        pad = scipy.sparse.csc_array((k, 0))
        cuts, spans = (
            None if part is None else scipy.sparse.csc_array(scipy.sparse.block_diag([part, pad], format="csc"))
            for part in (found.cuts, found.spans)
        )
        return Face(np.concatenate([found.free, x[n:] > 0]), cuts, spans)

    return Conic(M, b / unit_x, c / unit_c, project, face), rows, columns, (unit_c, unit_x)


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
    if not isinstance(kind, Polytope):
        raise TypeError(f"blocks: expected (polytope, lengths) pairs, got {type(kind).__name__}")
    group = Group(kind.fresh(), np.concatenate([[0], np.cumsum(sizes)]))
    kind.check(torch.from_numpy(group.offsets))
    return group
