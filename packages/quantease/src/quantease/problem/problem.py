"""The quadratic problem of one layer, and its candidate solutions, compared row by row."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from quantease.problem.grid import Grid
from quantease.problem.objective import row_objective

Trace = tuple[tuple[str, float], ...]
"""Names of steps and the relative objective after each."""

_ROUNDING = 1e-12  # of the row's objective: below it a change is float64 rounding, not descent


@dataclass(frozen=True)
class Problem:
    r"""$\min_{\hat W} \operatorname{tr}\,(W - \hat W)\,\Sigma\,(W - \hat W)^\top$, one independent problem per row.

    Attributes:
        weight: W, shape (q, p), float32 (or float64).
        sigma: $\Sigma$ with a mean diagonal near 1, shape (p, p), of the same dtype.
        factors: Triangular factors of it that GPTQ has made, by damping and order.
    """

    weight: Tensor
    sigma: Tensor
    factors: dict[tuple[float, bool], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def scaled(cls, weight: Tensor, sigma: Tensor) -> "Problem":
        """The problem with the Gram matrix divided by a power of two, which is exact and changes no solution.

        Args:
            weight: W, shape (q, p).
            sigma: Gram matrix of any scale, shape (p, p).

        Returns:
            The problem.
        """
        mean = float(sigma.diagonal().mean())
        exponent = math.frexp(mean)[1] if mean > 0 else 0
        return cls(weight, (sigma * 2.0**-exponent).to(weight.dtype))

    @cached_property
    def sigma64(self) -> Tensor:
        """The Gram matrix in float64."""
        return self.sigma.double()

    @cached_property
    def energy(self) -> Tensor:
        """Diagonal of the Gram matrix, shape (p,); zero for a dead feature."""
        return self.sigma.diagonal().contiguous()

    @cached_property
    def normalized(self) -> Tensor:
        r"""$\tilde\Sigma$: row j of $\Sigma$ over $\Sigma_{jj}$, with a zero diagonal; zero rows for dead features."""
        energy = self.energy[:, None]
        tilde = torch.where(energy > 0, self.sigma / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0.0)
        tilde.fill_diagonal_(0.0)
        return tilde

    @cached_property
    def scale(self) -> float:
        """Objective of the zero matrix, by which traces are divided; 1 where that is zero."""
        return float(row_objective(self.weight, self.sigma64).sum()) or 1.0

    def rows(self, index: Tensor) -> "Problem":
        """The problem of some rows.

        Args:
            index: Row numbers, int64.

        Returns:
            The problem, which shares everything that belongs to the Gram matrix.
        """
        part = Problem(self.weight[index], self.sigma, self.factors)
        part.__dict__["sigma64"] = self.sigma64
        return part

    def candidate(self, codes: Tensor, grid: Grid, sparse: Tensor | None = None) -> "Candidate":
        """Evaluate a solution in float64.

        Args:
            codes: Shape (q, p), uint8.
            grid: Scales and zero points.
            sparse: Outliers H, added to the dequantized codes, shape (q, p).

        Returns:
            The candidate.
        """
        residual = self.weight.double() - grid.dequantize(codes, torch.float64)
        if sparse is not None:
            residual -= sparse
        return Candidate(codes, grid, row_objective(residual, self.sigma64), sparse)

    def unevaluated(self, codes: Tensor, grid: Grid) -> "Candidate":
        """A start for a descent, whose objective does not matter because anything is better than it.

        Args:
            codes: Shape (q, p), uint8.
            grid: Scales and zero points.

        Returns:
            The candidate, with an infinite objective.
        """
        return Candidate(codes, grid, self.weight.new_full(codes.shape[:1], torch.inf, dtype=torch.float64))


@dataclass(frozen=True)
class Candidate:
    r"""Codes on their grid, with the objective of every row.

    Attributes:
        codes: Shape (q, p), uint8.
        grid: Scales and zero points.
        objective: Shape (q,), float64.
        sparse: Outliers H, added to the dequantized codes, shape (q, p); None without outliers.
        gradient: $(W - \hat W)\,\Sigma$ as a float64 product gave it, shape (q, p); None where none was formed.
    """

    codes: Tensor
    grid: Grid
    objective: Tensor
    sparse: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def total(self) -> float:
        """Sum over the rows."""
        return float(self.objective.sum())

    def best_rows(self, other: "Candidate") -> "Candidate":
        """Take from the other candidate the rows in which it is strictly better.

        Args:
            other: A candidate of the same problem, with outliers if this one has them.

        Returns:
            The best of both, row by row.
        """
        better = (other.objective < self.objective)[:, None]  # (q, 1)
        grid = replace(
            self.grid,
            scale=torch.where(better, other.grid.scale, self.grid.scale),
            zero=torch.where(better, other.grid.zero, self.grid.zero),
        )
        codes = torch.where(better, other.codes, self.codes)
        sparse, gradient = self.sparse, None
        if sparse is not None and other.sparse is not None:
            sparse = torch.where(better, other.sparse, sparse)
        if self.gradient is not None and other.gradient is not None:
            gradient = torch.where(better, other.gradient, self.gradient)
        return Candidate(codes, grid, torch.minimum(self.objective, other.objective), sparse, gradient)

    def rows(self, index: Tensor) -> "Candidate":
        """Some rows.

        Args:
            index: Row numbers, int64.

        Returns:
            A candidate of `Problem.rows`.
        """
        sparse, gradient = (None if part is None else part[index] for part in (self.sparse, self.gradient))
        return Candidate(self.codes[index], self.grid.rows(index), self.objective[index], sparse, gradient)

    def with_rows(self, index: Tensor, other: "Candidate") -> "Candidate":
        """Replace some rows, without outliers.

        Args:
            index: Row numbers, int64.
            other: A candidate of `Problem.rows`.

        Returns:
            The candidate.
        """

        def put(own: Tensor, new: Tensor) -> Tensor:
            return own.index_copy(0, index, new)

        grid = replace(
            self.grid, scale=put(self.grid.scale, other.grid.scale), zero=put(self.grid.zero, other.grid.zero)
        )
        gradient = None
        if self.gradient is not None and other.gradient is not None:
            gradient = put(self.gradient, other.gradient)
        return Candidate(put(self.codes, other.codes), grid, put(self.objective, other.objective), None, gradient)


@dataclass(frozen=True)
class Certificate:
    """Proof that no single code can be changed for the better.

    Attributes:
        gaps: By how much the best change of one code would lower the objective of each row, relative to it (to one
            step's worth where it is zero), shape (q,), float64.
    """

    gaps: Tensor

    @property
    def holds(self) -> bool:
        """Whether every gap is zero up to the rounding of float64."""
        return bool((self.gaps <= _ROUNDING).all())


@dataclass(frozen=True)
class Solution:
    """What an algorithm found.

    Attributes:
        candidate: Codes, grid and objectives.
        certificate: Of a coordinate-wise minimum; None for algorithms that do not aim at it.
        starts: Rows won by each start.
        trace: Relative objective after every step.
        mask: Positions of the outliers, shape (q, p), bool; None without outliers.
    """

    candidate: Candidate
    certificate: Certificate | None = None
    starts: dict[str, int] = field(default_factory=dict)
    trace: Trace = ()
    mask: Tensor | None = None
