r"""From recorded factors to the ascent direction of every micro-batch: norms, low rank or materialised form."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from core_tensor import ghost_norms
from torch import Tensor

from msam.engines.ghost.factors import Kept, LowRank, Tokens, cast, high, joined
from msam.step.gradients import Factors, Gradients
from msam.step.perturbation import Tracked, scale_of

KAPPA = 1 / 3
"""Low rank pays below this ratio r (d_in + d_out) / (d_in d_out); above it a materialised direction is cheaper."""

FEW = 1 << 21
"""Multiply-adds of a low-rank product up to which the number of calls decides, and low rank has fewer."""

SMALL = 1024
"""Elements up to which a materialised direction is copied together with others to measure them in one reduction."""


def pays(rows: int, shape: torch.Size, count: int) -> bool:
    """Whether a direction of so many rows in each of the micro-batches is cheaper in factors than materialised."""
    first, second = shape[0], shape[1:].numel()
    work = rows * (first + second)
    return work < KAPPA * first * second or work * rows * count <= FEW


@dataclass
class Plan:
    """Directions of all micro-batches.

    Attributes:
        tracked: Parameters, radii, scaling.
        gradients: What the directions follow; the plan changes it.
        norms: ||T g_j|| of every micro-batch, once finished.
        low_rank: Directions in factors, by parameter.
        tokens: Directions of embeddings, by parameter.
        kept: Products of the batch itself, by call; pass 2 takes them over.
        biases: Biases that move along with a direction in factors.
    """

    tracked: Tracked
    gradients: Gradients
    norms: list[float] = field(init=False)
    kept: dict[int, Kept] = field(default_factory=dict)
    low_rank: dict[int, LowRank] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    biases: set[int] = field(default_factory=set)
    _coefficients: dict[float, Tensor] = field(default_factory=dict)
    _device: torch.device = field(init=False)
    _own: dict[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Micro-batches m."""
        return self.gradients.count

    # -- deciding and measuring ---

    def finish(self) -> None:
        """Choose a form for every direction and compute the norms.

        These few numbers come to the host, once per step: their check reads them anyway, and what is made of them takes
        a fraction there of the time of half a dozen calls on tensors of m elements.
        """
        g = self.gradients
        users = Counter([bias for uses in g.factors.values() for bias in {use.bias for use in uses}])
        for index in [i for i, uses in g.factors.items() if not self._keeps(i, uses, users)]:
            g.materialise(index)
        for index in [i for i in g.tokens if i in g.dense or i in g.factors]:
            g.fold_tokens(index)
        squares = [self._low_rank_squares()] if g.factors else []
        squares += [self._token_squares(index, parts) for index, parts in g.tokens.items()]
        squares += self._dense_squares()  # last: biases of scaled matrices have joined by now
        total = squares[0] if len(squares) == 1 else torch.stack(squares or [torch.zeros(self.count)]).sum(0)
        self.norms = [math.sqrt(max(square, 0.0)) for square in total.tolist()]  # NaN stays NaN
        self._device = total.device
        self._coefficients = {radius: self._over_norms(radius) for radius in dict.fromkeys(self.tracked.radii)}
        for index, direction in self.low_rank.items():
            direction.coefficient = cast(self._coefficient(index), direction.left.dtype)
        for index, found in self.tokens.items():
            found.rows = found.rows * self._coefficient(index)[found.keys // g.shapes[index][0]][:, None]

    def per_micro_batch(self, values: list[float]) -> Tensor:
        """Numbers where the directions live, in the parameters' type, but at least float32.

        Args:
            values: One per micro-batch.

        Returns:
            Shape (m,).
        """
        return torch.tensor(values, dtype=self._dtype, device=self._device)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.tracked.parameters[0].dtype, torch.float32)

    def _over_norms(self, radius: float) -> Tensor:
        lowest = radius / torch.finfo(self._dtype).max  # a gradient of zero, or all but zero, has no direction
        return self.per_micro_batch([0.0 if norm <= lowest else radius / norm for norm in self.norms])

    def _coefficient(self, index: int) -> Tensor:
        return self._coefficients[self.tracked.radii[index]]

    def _keeps(self, index: int, uses: list[Factors], users: Counter[int | None]) -> bool:
        """Whether low rank is cheaper, and the matrix and its bias, which matrices use, serve only each other."""
        rows = sum(use.left.shape[1] for use in uses)
        if index in self.gradients.dense or not pays(rows, self.gradients.shapes[index], self.count):
            return False
        bias, flipped = uses[0].bias, uses[0].flipped
        if any(use.bias != bias or (bias is not None and use.flipped != flipped) for use in uses[1:]):
            return False
        alone = users[bias] == 1 and bias not in self.gradients.dense and index not in self.gradients.tokens
        return bias is None or (alone and self.tracked.radii[index] > 0)

    # -- squared norms, each (m,) ---

    def _scale(self, index: int) -> Tensor | None:
        if self.tracked.scaling == "none":
            return None
        return scale_of(self.tracked.parameters[index], self.tracked.scaling)

    def _low_rank_squares(self) -> Tensor:
        """Squares of all directions that keep their factors, which are stored for pass 2.

        Returns:
            Shape (m,), float64.
        """
        outer, inner, biases = [], [], []  # by matrix, the result's side and the input's
        for index, uses in self.gradients.factors.items():
            left, moved, right, bias = self._factors_of(index, uses)
            biases.append(0.0 if bias is None else 1.0)  # a bias is one more input that is always 1
            ratio = 0.0 if bias is None else self.tracked.radii[bias] / self.tracked.radii[index]
            self.low_rank[index] = LowRank(moved, right, ratio, bias, uses[0].flipped)
            if bias is not None:
                self.biases.add(bias)
            outer.append(high(right if uses[0].flipped else left))
            inner.append(high(left if uses[0].flipped else right))
        return ghost_norms(outer, inner, biases)

    def _factors_of(self, index: int, uses: list[Factors]) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """Factors of all uses of a matrix together.

        Returns:
            Left factors of T g, left factors of T^2 g, right factors, and the bias that they share with it.
        """
        left, right = joined([use.left for use in uses]), joined([use.right for use in uses])
        scale = self._scale(index)
        if scale is None:
            return left, left, right, uses[0].bias
        for use in uses:  # the bias then needs another left factor than the matrix
            if use.bias is not None:
                self.gradients.add_dense(use.bias, use.bias_sums())
        left = left * scale.flatten().to(left)
        return left, left * scale.flatten().to(left), right, None

    def _token_squares(self, index: int, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        vocabulary, width = self.gradients.shapes[index]
        keys, inverse = torch.unique(torch.cat([k for k, _ in parts]), return_inverse=True)
        rows = high(torch.cat([r for _, r in parts]))
        rows = rows.new_zeros(len(keys), width).index_add_(0, inverse, rows)
        scale = self._scale(index)
        if scale is not None:
            own = scale.expand(vocabulary, -1)[keys % vocabulary] if scale.ndim else scale
            squares, rows = (rows * own).square().sum(1), rows * own.square()
        else:
            squares = rows.square().sum(1)
        self.tokens[index] = Tokens(keys, rows)
        return squares.new_zeros(self.count).index_add_(0, keys // vocabulary, squares)

    def _dense_squares(self) -> list[Tensor]:
        found, small = [], []
        for index, dense in self.gradients.dense.items():
            scale = self._scale(index)
            flat = high(dense if scale is None else dense * scale).reshape(len(dense), -1)
            if flat.shape[1] > SMALL:
                found.append(torch.linalg.vector_norm(flat, dim=1).square_())
            else:
                small.append(flat)
        if small:  # biases, scales and shifts: one reduction for all of them
            found.append(torch.linalg.vector_norm(torch.cat(small, 1), dim=1).square_())
        return found

    # -- applying ---

    def is_dense(self, index: int | None) -> bool:
        """Whether a direction is materialised.

        Args:
            index: Index of the parameter, or None.

        Returns:
            True if so.
        """
        return index in self.gradients.dense or index in self._own

    def perturbed(self, index: int | None, parameter: Tensor) -> Tensor:
        """Every micro-batch's own copy of a parameter, differentiable with respect to the shared one.

        Args:
            index: Index of the parameter, or None if it is not perturbed.
            parameter: The parameter w.

        Returns:
            w + eps_j, shape (m, *shape); w alone, shape (1, *shape), if it does not move.
        """
        if index in self._own:
            return parameter + (self._own[index] - parameter).detach()
        if index in self.gradients.dense:
            gradient, scale = self.gradients.dense[index], self._scale(index)
            if scale is not None:
                gradient = gradient * scale.square()
            c = self._coefficient(index).view(-1, *[1] * parameter.ndim)
            return torch.addcmul(parameter, gradient.to(parameter), c.to(parameter))
        step = self._spread_out(index, parameter)
        return parameter[None] if step is None else parameter + step

    def _spread_out(self, index: int | None, parameter: Tensor) -> Tensor | None:
        """A direction in factors or rows as a tensor, for a use that had no gradient in pass 1 to ask for it."""
        if index in self.low_rank:
            found = self.low_rank[index]
            return (found.coefficient[:, None, None] * (found.left.mT @ found.right)).view(-1, *parameter.shape)
        if index in self.tokens:
            rows = self.tokens[index]
            flat = parameter.new_zeros(self.count * parameter.shape[0], parameter.shape[1])
            return flat.index_copy_(0, rows.keys, rows.rows.to(flat)).view(self.count, *parameter.shape)
        for found in self.low_rank.values() if index in self.biases else ():
            if found.owner == index:
                return (found.bias * found.coefficient)[:, None] * found.outer.sum(1)
        return None

    def moves(self, index: int | None) -> bool:
        """Whether a parameter has a direction, in whatever form.

        Args:
            index: Index of the parameter, or None.

        Returns:
            True if so.
        """
        return self.is_dense(index) or index in self.low_rank or index in self.tokens or index in self.biases

    def shift(self, index: int | None, parameter: Tensor | None) -> Tensor | None:
        """The direction of a vector.

        Args:
            index: Index of the parameter, or None.
            parameter: The parameter, or None.

        Returns:
            eps_j, shape (m, *shape), or None if it does not move.
        """
        if parameter is None or not self.moves(index):
            return None
        return (self.perturbed(index, parameter) - parameter).detach()

    def own(self, index: int, parameter: Tensor) -> Tensor:
        """Every micro-batch's own copy of a large parameter, without graph; computed once for all uses.

        Args:
            index: Index of a parameter with a direction.
            parameter: The parameter w.

        Returns:
            w + eps_j, shape (m, *shape).
        """
        if index not in self._own:
            with torch.no_grad():
                self._own[index] = self.perturbed(index, parameter)
            self.gradients.dense.pop(index, None)
        return self._own[index]

    def release(self) -> None:
        """Drop the directions: what the second backward pass needs of them is in its graph, and goes with it."""
        self.low_rank, self.tokens, self.kept, self._own = {}, {}, {}, {}
        self.gradients = Gradients(self.count)
