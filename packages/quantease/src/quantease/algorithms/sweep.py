"""Dense cyclic coordinate descent over all features, in blocks: matrix products outside, a kernel inside."""

import math

import core_tensor
import torch
from torch import Tensor

from quantease.problem.grid import Grid
from quantease.problem.problem import Problem


class Sweeper:
    r"""Sweeps on one grid.

    Coordinate j of all rows at once, with the others fixed:

    $$ \beta_j = w_j + \sum_{k \ne j} \tilde\Sigma_{jk} D_k, \qquad
    \hat w_j \leftarrow q(\beta_j) \;\text{(quantised)} \quad\text{or}\quad \beta_j \;\text{(relaxed, masked)} . $$

    The sum over all blocks at the block's start is one matrix product; what changes inside the block is corrected
    by `core_tensor.cd_block`. In exact arithmetic the result is that of the column loop, for any block size. Weights
    and scales are multiplied by a power of two, `unit`, so that no square leaves the range of float32.

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points.
        mask: Coordinates that stay off the grid (outliers), shape (q, p), bool.
        block: Features per block.

    Source: arXiv 2309.01885, Alg. 2; the blocked form is ours.
    """

    def __init__(self, problem: Problem, grid: Grid, *, mask: Tensor | None = None, block: int = 512) -> None:
        self.problem, self.grid, self.block = problem, grid, block
        self.unit = 2.0 ** -math.frexp(float(problem.weight.abs().max()))[1]
        self.weight = problem.weight.T.contiguous() * self.unit  # (p, q)
        self.scale = grid.scale.T.contiguous().to(self.weight) * self.unit  # (G, q)
        self.zero = grid.zero.T.contiguous().to(self.weight)
        self.mask = None if mask is None else mask.T.contiguous()

    def sweep(self, residual: Tensor, *, quantize: bool = True, objective: Tensor | None = None) -> None:
        r"""Visit every feature once, in their natural order.

        Args:
            residual: $D = (W - \hat W)^\top$ times `unit`, shape (p, q); changed in place.
            quantize: False leaves the grid (a relaxed sweep).
            objective: $f$ of every row of W times `unit` squared, shape (q,); brought up to date in place if given.
        """
        D, tilde = residual, self.problem.normalized
        for start in range(0, D.shape[0], self.block):
            rows = slice(start, min(start + self.block, D.shape[0]))
            correction = tilde[rows] @ D  # (B, q)
            inner = tilde[rows, rows].contiguous()
            new = core_tensor.cd_block(
                correction,
                self.weight[rows],
                D[rows],
                inner,
                self.scale,
                self.zero,
                self.grid.group[rows],
                None if self.mask is None else self.mask[rows],
                self.grid.max_code,
                quantize,
            )
            if objective is not None:
                step = new - D[rows]
                pull = torch.addmm(step, inner, step).add_(correction, alpha=2).add_(D[rows], alpha=2)
                objective += self.problem.energy[rows] @ pull.mul_(step)
            D[rows] = new

    def residual(self, values: Tensor) -> Tensor:
        r"""The state of given values.

        Args:
            values: $\hat W$, on the grid or not, shape (q, p).

        Returns:
            D times `unit`, shape (p, q).
        """
        return self.weight - values.T * self.unit

    def values(self, residual: Tensor) -> Tensor:
        r"""The values of a state.

        Args:
            residual: D times `unit`, shape (p, q).

        Returns:
            $\hat W$, shape (q, p).
        """
        return (self.weight - residual).T / self.unit

    def codes(self, residual: Tensor) -> Tensor:
        """Codes of a state on the grid (the nearest ones of a state off it).

        Args:
            residual: D times `unit`, shape (p, q).

        Returns:
            Codes, shape (q, p), uint8.
        """
        return self.grid.quantize(self.values(residual))


def schedule(sweeps: int, relax: int) -> list[bool]:
    """Which sweeps are quantised.

    Sweep t, counted from 0, is relaxed when t mod `relax` = 1, except the last one and those after t = 25.

    Args:
        sweeps: Number of sweeps.
        relax: Period; 0 relaxes none.

    Returns:
        True for a quantised sweep, one entry per sweep.

    Source: arXiv 2309.01885, section 3; the exceptions as in the authors' code.
    """
    return [not relax or t % relax != 1 or t == sweeps - 1 or t > 25 for t in range(sweeps)]
