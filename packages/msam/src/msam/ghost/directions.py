r"""From recorded factors to the ascent direction of every micro-batch: norms, low rank or materialised form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from msam.batches import Shards
from msam.perturbation import Tracked, scale_of

KAPPA = 1 / 3
"""Low rank pays below this ratio r (d_in + d_out) / (d_in d_out); above it a materialised direction is cheaper."""


@dataclass
class Factors:
    r"""Gradient factors of one use of a matrix, $g_j = L_j^\top R_j$.

    Attributes:
        left: Rows on the side of the matrix's first dimension, one tensor (n, r, d_0) per stretch.
        right: Rows on the side of its second, (n, r, d_1).
        bias: Index of the bias that the use adds to the result, or None.
        flipped: Whether the result lies on the second dimension's side (`x @ W` instead of `x @ W.T`).
    """

    left: list[Tensor]
    right: list[Tensor]
    bias: int | None = None
    flipped: bool = False


@dataclass
class LowRank:
    """A direction that is applied through its factors.

    Attributes:
        left: Factors by stretch, (n, r, d_0), with ASAM's T^2 multiplied in.
        right: Factors by stretch, (n, r, d_1).
        coefficient: c_j of the matrix by stretch, (n, 1, 1).
        bias: Index of the bias that moves along, or None.
        bias_coefficient: c_j of that bias by stretch, (n, 1, 1).
    """

    left: list[Tensor]
    right: list[Tensor]
    coefficient: list[Tensor]
    bias: int | None
    bias_coefficient: list[Tensor]


@dataclass
class Tokens:
    """A direction of few rows of an embedding.

    Attributes:
        keys: Sorted micro-batch * V + token, shape (n,).
        rows: The rows' directions, shape (n, d).
    """

    keys: Tensor
    rows: Tensor


class Kept(NamedTuple):
    """A product whose input is no activation, to be taken over by pass 2 if nothing was overwritten meanwhile.

    Attributes:
        x: Input, without graph.
        y: Result, without graph.
        versions: Version counters of both.
    """

    x: Tensor
    y: Tensor
    versions: tuple[int, int]

    def serves(self, x: Tensor) -> bool:
        """Whether an input is this one, unchanged.

        Args:
            x: Input of the same call in pass 2.

        Returns:
            True if the result may be taken over.
        """
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        return same and x.dtype == self.x.dtype and (x._version, self.y._version) == self.versions


@dataclass
class Plan:
    """Collects the contributions of all uses, then holds the directions.

    Attributes:
        tracked: Parameters, radii, scaling.
        shards: How the batch of pass 1 was cut.
        norms: ||T g_j||, shape (m,), once finished.
        squares: The share of every parameter in their squares, each (m,).
        low_rank: Directions in factors, by parameter.
        tokens: Directions of embeddings, by parameter.
        kept: Products of the batch itself, by call; pass 2 takes them over.
    """

    tracked: Tracked
    shards: Shards
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    squares: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    _shapes: dict[int, torch.Size] = field(default_factory=dict)
    _factors: dict[int, list[Factors]] = field(default_factory=dict)
    _tokens: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _dense: dict[int, Tensor] = field(default_factory=dict)
    low_rank: dict[int, LowRank] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)

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
        """Choose a form for every direction, compute the norms, and scale the directions to their radii."""
        costly = [(index, uses) for index, uses in self._factors.items() if not self._pays(index, uses)]
        for index, uses in costly:
            self._materialise(index, uses)
        for index in [i for i in self._tokens if i in self._dense or i in self._factors]:
            self._tokens_to_rest(index)
        self.squares = self._low_rank_squares() | self._token_squares() | self._dense_squares()
        if not self.squares:
            self.squares = {0: torch.zeros(self.shards.count)}
        self.norms = torch.stack(list(self.squares.values())).sum(0).sqrt()
        inverse = torch.where(self.norms > 0, 1 / self.norms, 0.0)
        by_radius = {radius: inverse * radius for radius in set(self.tracked.radii)}
        coefficient = [by_radius[radius] for radius in self.tracked.radii]
        for index, direction in self.low_rank.items():
            direction.coefficient = self._by_run(coefficient[index], direction.left)
            if direction.bias is not None:
                direction.bias_coefficient = self._by_run(coefficient[direction.bias], direction.left)
        for index, found in self.tokens.items():
            slot = found.keys // self._shapes[index][0]
            found.rows = found.rows * coefficient[index][slot][:, None]
        for index, dense in self._dense.items():
            scale = self._scale(index)
            if scale is not None:
                dense = dense * scale.square()
            self._dense[index] = dense * coefficient[index].view(-1, *[1] * (dense.ndim - 1)).to(dense)

    def _pays(self, index: int, uses: list[Factors]) -> bool:
        """Whether low rank is cheaper, and the matrix and its bias are used together and nowhere else.

        Returns:
            True if the direction keeps its factors.
        """
        first, second = self._shapes[index][0], self._shapes[index][1:].numel()
        rows = sum(max(left.shape[1] for left in use.left) for use in uses)
        biases = {use.bias for use in uses}
        elsewhere = {use.bias for other, group in self._factors.items() if other != index for use in group}
        alone = len(biases) == 1 and not (biases - {None}) & (elsewhere | set(self._dense))
        tied = index in self._tokens and biases != {None}
        return rows * (first + second) < KAPPA * first * second and index not in self._dense and alone and not tied

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

    def _low_rank_squares(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for index, uses in self._factors.items():
            left = joined([use.left for use in uses], 1)
            right = joined([use.right for use in uses], 1)
            scale, bias, flipped = self._scale(index), uses[0].bias, uses[0].flipped
            if scale is not None:  # the bias then needs another left factor than the matrix
                for use in uses:
                    self._bias_sums(use)
                bias = None
            scaled = left if scale is None else [x * scale.flatten().to(x) for x in left]
            squares, bias_squares = [], []
            for a, b in zip(scaled, right, strict=True):
                aa, bb = torch.bmm(high(a), high(a).mT), torch.bmm(high(b), high(b).mT)
                squares.append((aa * bb).sum((1, 2)))
                bias_squares.append((bb if flipped else aa).sum((1, 2)))
            (found[index],) = joined([[s] for s in squares], 0)
            if bias is not None:
                (found[bias],) = joined([[s] for s in bias_squares], 0)
            moved = left if scale is None else [x * scale.flatten().square().to(x) for x in left]
            self.low_rank[index] = LowRank(moved, right, [], bias, [])
        return found

    def _token_squares(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for index, parts in self._tokens.items():
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
            found[index] = squares.new_zeros(self.shards.count).index_add_(0, keys // vocabulary, squares)
            self.tokens[index] = Tokens(keys, rows)
        return found

    def _dense_squares(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for index, dense in self._dense.items():
            scale = self._scale(index)
            found[index] = high(dense if scale is None else dense * scale).flatten(1).square().sum(1)
        return found

    def _by_run(self, coefficient: Tensor, like: list[Tensor]) -> list[Tensor]:
        if len(like) == 1:
            return [coefficient.view(-1, 1, 1).to(like[0])]
        counts = [count for _, count, _ in self.shards.runs]
        return [c.view(-1, 1, 1).to(x) for c, x in zip(coefficient.split(counts), like, strict=True)]

    # -- applying ---

    def dense_of(self, index: int | None) -> Tensor | None:
        """A materialised direction.

        Args:
            index: Index of the parameter, or None.

        Returns:
            eps_j, shape (m, *shape), or None if there is none.
        """
        return None if index is None else self._dense.get(index)

    def release(self) -> None:
        """Drop the directions: what the second backward pass needs of them is in its graph, and goes with it."""
        self.low_rank, self.tokens, self.kept = {}, {}, {}
        self._factors, self._tokens, self._dense = {}, {}, {}

    def shape_of(self, index: int) -> torch.Size:
        """Shape of a tracked matrix that was used.

        Args:
            index: Index of the parameter.

        Returns:
            Its shape.
        """
        return self._shapes[index]

    def dense_direction(self, index: int, parameter: Tensor) -> Tensor:
        """A materialised direction, zero for a parameter that got no gradient.

        Args:
            index: Index of the parameter.
            parameter: The parameter.

        Returns:
            eps_j, broadcastable to (m, *shape).
        """
        found = self._dense.get(index)
        return parameter.new_zeros(self.shards.count, *[1] * parameter.ndim) if found is None else found


def joined(lists: list[list[Tensor]], dim: int) -> list[Tensor]:
    """Concatenate tensors of equal places in several lists; one list stays as it is, without a copy.

    Args:
        lists: Lists of equal length.
        dim: Dimension to join along.

    Returns:
        One tensor per place.
    """
    return lists[0] if len(lists) == 1 else [torch.cat(parts, dim) for parts in zip(*lists, strict=True)]


def high(x: Tensor) -> Tensor:
    """At least float32: sums of squares of half precision numbers overflow or lose their digits.

    Args:
        x: Any floating-point tensor.

    Returns:
        The tensor, or its float32 copy.
    """
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
