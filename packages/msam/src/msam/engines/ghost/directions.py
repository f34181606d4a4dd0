r"""From recorded factors to the ascent direction of every micro-batch: norms, low rank or materialised form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from core_tensor import ghost_norms
from torch import Tensor

from msam.engines.ghost.factors import Factors, Kept, LowRank, Tokens, cast, high, joined
from msam.step.perturbation import Tracked, scale_of

KAPPA = 1 / 3
"""Low rank pays below this ratio r (d_in + d_out) / (d_in d_out); above it a materialised direction is cheaper."""

FEW = 1 << 21
"""Multiply-adds of a low-rank product up to which the number of calls decides, and low rank has fewer."""

SMALL = 1024
"""Elements up to which a materialised direction is copied together with others to measure them in one reduction."""


@dataclass
class Plan:
    """Collects the contributions of all uses, then holds the directions.

    Attributes:
        tracked: Parameters, radii, scaling.
        count: Micro-batches m.
        norms: ||T g_j|| of every micro-batch, once finished.
        low_rank: Directions in factors, by parameter.
        tokens: Directions of embeddings, by parameter.
        kept: Products of the batch itself, by call; pass 2 takes them over.
        biases: Biases that move along with a direction in factors.
    """

    tracked: Tracked
    count: int
    norms: list[float] = field(init=False)
    kept: dict[int, Kept] = field(default_factory=dict)
    low_rank: dict[int, LowRank] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    biases: set[int] = field(default_factory=set)
    _shapes: dict[int, torch.Size] = field(default_factory=dict)
    _factors: dict[int, list[Factors]] = field(default_factory=dict)
    _tokens: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _dense: dict[int, Tensor] = field(default_factory=dict)
    _coefficients: dict[float, Tensor] = field(default_factory=dict)
    _device: torch.device = field(init=False)
    _own: dict[int, Tensor] = field(default_factory=dict)

    # -- collecting ---

    def add_dense(self, index: int, gradient: Tensor) -> None:
        """Add every micro-batch's gradient of a parameter.

        Args:
            index: Index of the parameter.
            gradient: Shape (m, *shape).
        """
        self._dense[index] = gradient if index not in self._dense else self._dense[index] + gradient

    def add_factors(self, index: int, shape: torch.Size, factors: Factors) -> None:
        """Add a matrix's gradient factors.

        Args:
            index: Index of the parameter.
            shape: Its whole shape; dimensions after the first count as one.
            factors: The factors.
        """
        self._shapes[index] = shape
        self._factors.setdefault(index, []).append(factors)

    def add_tokens(self, index: int, shape: torch.Size, keys: Tensor, rows: Tensor) -> None:
        """Add an embedding's gradient rows.

        Args:
            index: Index of the parameter.
            shape: (V, d).
            keys: micro-batch * V + token, shape (n,).
            rows: Gradient rows, shape (n, d).
        """
        self._shapes[index] = shape
        self._tokens.setdefault(index, []).append((keys, rows))

    # -- deciding and measuring ---

    def finish(self) -> None:
        """Choose a form for every direction and compute the norms.

        These few numbers come to the host, once per step: their check reads them anyway, and what is made of them takes
        a fraction there of the time of half a dozen calls on tensors of m elements.
        """
        users = [bias for uses in self._factors.values() for bias in {use.bias for use in uses}]
        for index, uses in [(i, uses) for i, uses in self._factors.items() if not self._pays(i, uses, users)]:
            self._materialise(index, uses)
        for index in [i for i in self._tokens if i in self._dense or i in self._factors]:
            self._tokens_to_rest(index)
        squares = [self._low_rank_squares()] if self._factors else []
        squares += [self._token_squares(index, parts) for index, parts in self._tokens.items()]
        squares += self._dense_squares()  # last: biases of scaled matrices have joined by now
        total = squares[0] if len(squares) == 1 else torch.stack(squares or [torch.zeros(self.count)]).sum(0)
        self.norms = [math.sqrt(max(square, 0.0)) for square in total.tolist()]  # NaN stays NaN
        self._device = total.device
        self._coefficients = {radius: self._over_norms(radius) for radius in set(self.tracked.radii)}
        for index, direction in self.low_rank.items():
            direction.coefficient = cast(self._coefficient(index), direction.left.dtype)
        for index, found in self.tokens.items():
            found.rows = found.rows * self._coefficient(index)[found.keys // self._shapes[index][0]][:, None]

    def per_micro_batch(self, values: list[float]) -> Tensor:
        """Numbers where the directions live, in the parameters' type, but at least float32.

        Args:
            values: One per micro-batch.

        Returns:
            Shape (m,).
        """
        return torch.tensor(values, dtype=self._dtype, device=self._device)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.tracked.parameters[0].dtype, torch.float32)

    def _over_norms(self, radius: float) -> Tensor:
        lowest = radius / torch.finfo(self._dtype).max  # a gradient of zero, or all but zero, has no direction
        return self.per_micro_batch([0.0 if norm <= lowest else radius / norm for norm in self.norms])

    def _coefficient(self, index: int) -> Tensor:
        return self._coefficients[self.tracked.radii[index]]

    def _pays(self, index: int, uses: list[Factors], users: list[int | None]) -> bool:
        """Whether low rank is cheaper, and the matrix and its bias, which matrices use, serve only each other.

        Returns:
            True if the direction keeps its factors.
        """
        first, second = self._shapes[index][0], self._shapes[index][1:].numel()
        rows = sum(use.left.shape[1] for use in uses)
        work = rows * (first + second)
        products = work * rows * self.count
        if (work >= KAPPA * first * second and products > FEW) or index in self._dense:
            return False
        bias = uses[0].bias
        if any(use.bias != bias or (bias is not None and use.flipped != uses[0].flipped) for use in uses):
            return False
        alone = users.count(bias) == 1 and bias not in self._dense and index not in self._tokens
        return bias is None or (alone and self.tracked.radii[index] > 0)

    def _materialise(self, index: int, uses: list[Factors]) -> None:
        for use in uses:
            self.add_dense(index, torch.bmm(use.left.mT, use.right).view(-1, *self._shapes[index]))
            self._bias_sums(use)
        del self._factors[index]

    def _bias_sums(self, use: Factors) -> None:
        if use.bias is not None:
            self.add_dense(use.bias, (use.right if use.flipped else use.left).sum(1))

    def _tokens_to_rest(self, index: int) -> None:
        """An embedding tied to a linear layer: its rows join the layer's direction."""
        vocabulary, width = self._shapes[index]
        for keys, rows in self._tokens.pop(index):
            if index in self._dense:
                flat = self._dense[index].reshape(-1, width).index_add(0, keys, rows)
                self._dense[index] = flat.view(-1, vocabulary, width)
                continue
            slots = keys // vocabulary
            inside = [(slots == j).nonzero()[:, 0] for j in range(self.count)]
            longest = max(len(i) for i in inside)
            pick = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i in inside])
            valid = torch.stack([torch.arange(longest, device=i.device) < len(i) for i in inside])
            left = torch.nn.functional.one_hot(keys[pick] % vocabulary, vocabulary).to(rows) * valid[..., None]
            self._factors[index].append(Factors(left, rows[pick]))

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
        for index, uses in self._factors.items():
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
            self._bias_sums(use)
        left = left * scale.flatten().to(left)
        return left, left * scale.flatten().to(left), right, None

    def _token_squares(self, index: int, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        vocabulary, width = self._shapes[index]
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
        for index, dense in self._dense.items():
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
        return index in self._dense or index in self._own

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
        if index in self._dense:
            gradient, scale = self._dense[index], self._scale(index)
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
            self._dense.pop(index, None)
        return self._own[index]

    def release(self) -> None:
        """Drop the directions: what the second backward pass needs of them is in its graph, and goes with it."""
        self.low_rank, self.tokens, self.kept = {}, {}, {}
        self._factors, self._tokens, self._dense, self._own = {}, {}, {}, {}
