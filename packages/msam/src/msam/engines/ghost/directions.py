r"""From recorded factors to the ascent direction of every micro-batch: norms, low rank or materialised form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from core_tensor import ghost_norms
from torch import Tensor

from msam.engines.ghost.errors import UnsupportedError
from msam.engines.ghost.factors import Factors, Kept, LowRank, Tokens, cast, high, joined
from msam.step.batches import Shards
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
        shards: How the batch of pass 1 was cut.
        norms: ||T g_j|| of every micro-batch, once finished.
        low_rank: Directions in factors, by parameter.
        tokens: Directions of embeddings, by parameter.
        kept: Products of the batch itself, by call; pass 2 takes them over.
        biases: Biases that move along with a direction in factors.
    """

    tracked: Tracked
    shards: Shards
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

    def gradient(self, index: int, shard: int) -> Tensor:
        """One micro-batch's gradient of one parameter, put together from what was collected (before `finish`).

        Args:
            index: Index of the parameter.
            shard: The micro-batch j.

        Returns:
            Its share of the whole loss's gradient, in the parameter's shape.
        """
        total = torch.zeros_like(self.tracked.parameters[index])
        run, place = next(
            (i, shard - first) for i, (first, count, _) in enumerate(self.shards.runs) if shard < first + count
        )
        for owner, uses in self._factors.items():
            for use in uses:
                left, right = use.left[run][place], use.right[run][place]  # (r, d_0), (r, d_1)
                if owner == index:
                    total += (left.mT @ right).view_as(total)
                if use.bias == index:
                    total += (right if use.flipped else left).sum(0)
        for keys, rows in self._tokens.get(index, []):
            mine = keys // total.shape[0] == shard
            total.index_add_(0, keys[mine] % total.shape[0], rows[mine].to(total))
        return total + self._dense[index][shard] if index in self._dense else total

    def indices(self) -> set[int]:
        """Parameters that something was collected of.

        Returns:
            Their indices.
        """
        biases = {use.bias for uses in self._factors.values() for use in uses if use.bias is not None}
        return biases | set(self._factors) | set(self._tokens) | set(self._dense)

    def dtypes(self) -> set[torch.dtype]:
        """Types of what was collected, which under autocast are not those of the parameters.

        Returns:
            The types.
        """
        factors = {t.dtype for uses in self._factors.values() for use in uses for t in (*use.left, *use.right)}
        rows = {r.dtype for parts in self._tokens.values() for _, r in parts}
        return factors | rows | {t.dtype for t in self._dense.values()}

    def collected(self) -> Plan:
        """What was collected, as it stands before `finish` and pass 2 use it up.

        Returns:
            A plan with the same tensors.
        """
        plan = Plan(self.tracked, self.shards)
        plan._shapes, plan._dense = dict(self._shapes), dict(self._dense)
        plan._factors = {index: list(uses) for index, uses in self._factors.items()}
        plan._tokens = {index: list(parts) for index, parts in self._tokens.items()}
        return plan

    # -- deciding and measuring ---

    def finish(self, reach: float = 1.0) -> None:
        """Choose a form for every direction and compute the norms.

        These few numbers come to the host, once per step: their check reads them anyway, and what is made of them takes
        a fraction there of the time of half a dozen calls on tensors of m elements.

        Args:
            reach: Factor of all radii; at 0 pass 2 runs at the weights themselves, in the same forms.
        """
        users = [bias for uses in self._factors.values() for bias in {use.bias for use in uses}]
        for index, uses in [(i, uses) for i, uses in self._factors.items() if not self._pays(i, uses, users)]:
            self._materialise(index, uses)
        for index in [i for i in self._tokens if i in self._dense or i in self._factors]:
            self._tokens_to_rest(index)
        squares = [self._low_rank_squares()] if self._factors else []
        squares += [self._token_squares(index, parts) for index, parts in self._tokens.items()]
        squares += self._dense_squares()  # last: biases of scaled matrices have joined by now
        total = squares[0] if len(squares) == 1 else torch.stack(squares or [torch.zeros(self.shards.count)]).sum(0)
        self.norms = [math.sqrt(max(square, 0.0)) for square in total.tolist()]  # NaN stays NaN
        self._device = total.device
        self._coefficients = {radius: self._over_norms(radius * reach) for radius in set(self.tracked.radii)}
        for index, direction in self.low_rank.items():
            direction.coefficient = self._by_run(self._coefficient(index), direction.left)
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
        rows = sum(max(left.shape[1] for left in use.left) for use in uses)
        work = rows * (first + second)
        products = work * rows * self.shards.count
        if (work >= KAPPA * first * second and products > FEW) or index in self._dense:
            return False
        bias = uses[0].bias
        if any(use.bias != bias for use in uses):
            return False
        alone = users.count(bias) == 1 and bias not in self._dense and index not in self._tokens
        return bias is None or (alone and self.tracked.radii[index] > 0)

    def _materialise(self, index: int, uses: list[Factors]) -> None:
        for use in uses:
            parts = [torch.bmm(left.mT, right) for left, right in zip(use.left, use.right, strict=True)]
            self.add_dense(index, joined([[part] for part in parts], 0)[0].view(-1, *self._shapes[index]))
            self._bias_sums(use)
        del self._factors[index]

    def _bias_sums(self, use: Factors) -> None:
        if use.bias is not None:
            sums = [[g.sum(1)] for g in (use.right if use.flipped else use.left)]
            self.add_dense(use.bias, joined(sums, 0)[0])

    def _tokens_to_rest(self, index: int) -> None:
        """An embedding tied to a linear layer: its rows join the layer's direction."""
        vocabulary, width = self._shapes[index]
        for keys, rows in self._tokens.pop(index):
            if index in self._dense:
                flat = self._dense[index].reshape(-1, width).index_add(0, keys, rows)
                self._dense[index] = flat.view(-1, vocabulary, width)
                continue
            uses, slots = self._factors[index], keys // vocabulary
            left, right = [], []
            for first, count, _ in self.shards.runs:
                inside = [(slots == first + j).nonzero()[:, 0] for j in range(count)]
                longest = max(len(i) for i in inside)
                pick = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i in inside])
                valid = torch.stack([torch.arange(longest, device=i.device) < len(i) for i in inside])
                token = keys[pick] % vocabulary
                left.append(torch.nn.functional.one_hot(token, vocabulary).to(rows) * valid[..., None])
                right.append(rows[pick])
            uses.append(Factors(left, right))

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
        sides: list[list[tuple[Tensor, Tensor]]] = []  # by matrix and stretch, the result's side and the input's
        biases = []
        for index, uses in self._factors.items():
            left, moved, right, bias = self._factors_of(index, uses)
            biases.append(0.0 if bias is None else 1.0)  # a bias is one more input that is always 1
            ratio = 0.0 if bias is None else self.tracked.radii[bias] / self.tracked.radii[index]
            self.low_rank[index] = LowRank(moved, right, ratio, bias)
            if bias is not None:
                self.biases.add(bias)
            pairs = zip(right, left, strict=True) if uses[0].flipped else zip(left, right, strict=True)
            sides.append([(high(outer), high(inner)) for outer, inner in pairs])
        squares = [
            ghost_norms([outer for outer, _ in stretch], [inner for _, inner in stretch], biases)
            for stretch in zip(*sides, strict=True)
        ]
        return squares[0] if len(squares) == 1 else torch.cat(squares)

    def _factors_of(
        self, index: int, uses: list[Factors]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], int | None]:
        """Factors of all uses of a matrix together.

        Returns:
            Left factors of T g, left factors of T^2 g, right factors, and the bias that they share with it.
        """
        left, right = joined([use.left for use in uses], 1), joined([use.right for use in uses], 1)
        scale = self._scale(index)
        if scale is None:
            return left, left, right, uses[0].bias
        for use in uses:  # the bias then needs another left factor than the matrix
            self._bias_sums(use)
        left = [x * scale.flatten().to(x) for x in left]
        return left, [x * scale.flatten().to(x) for x in left], right, None

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
        return squares.new_zeros(self.shards.count).index_add_(0, keys // vocabulary, squares)

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

    def _by_run(self, coefficient: Tensor, like: list[Tensor]) -> list[Tensor]:
        if len(like) == 1:
            return [cast(coefficient, like[0].dtype)]
        counts = [count for _, count, _ in self.shards.runs]
        return [cast(c, x.dtype) for c, x in zip(coefficient.split(counts), like, strict=True)]

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

        Raises:
            UnsupportedError: If it moves in another form, which a use without gradient did not ask for.
        """
        if index in self._own:
            return parameter + (self._own[index] - parameter).detach()
        if index in self.biases or index in self.low_rank or index in self.tokens:
            raise UnsupportedError("a parameter that is used in a second way, without gradient")
        if index is None or index not in self._dense:
            return parameter[None]
        gradient, scale = self._dense[index], self._scale(index)
        if scale is not None:
            gradient = gradient * scale.square()
        c = self._coefficient(index).view(-1, *[1] * parameter.ndim)
        return torch.addcmul(parameter, gradient.to(parameter), c.to(parameter))

    def shift(self, index: int | None, parameter: Tensor | None) -> Tensor | None:
        """The materialised direction of a vector.

        Args:
            index: Index of the parameter, or None.
            parameter: The parameter, or None.

        Returns:
            eps_j, shape (m, *shape), or None if it does not move in this form.
        """
        if parameter is None or not self.is_dense(index):
            return None
        return (self.perturbed(index, parameter) - parameter).detach()

    def own(self, index: int, parameter: Tensor) -> Tensor:
        """Every micro-batch's own copy of a large parameter, without graph; computed once for all uses.

        Args:
            index: Index of a parameter whose direction is materialised.
            parameter: The parameter w.

        Returns:
            w + eps_j, shape (m, *shape).
        """
        if index not in self._own:
            with torch.no_grad():
                self._own[index] = self.perturbed(index, parameter)
            del self._dense[index]
        return self._own[index]

    def release(self) -> None:
        """Drop the directions: what the second backward pass needs of them is in its graph, and goes with it."""
        self.low_rank, self.tokens, self.kept = {}, {}, {}
        self._factors, self._tokens, self._dense, self._own = {}, {}, {}, {}

    def shape_of(self, index: int) -> torch.Size:
        """Shape of a tracked matrix that was used.

        Args:
            index: Index of the parameter.

        Returns:
            Its shape.
        """
        return self._shapes[index]
