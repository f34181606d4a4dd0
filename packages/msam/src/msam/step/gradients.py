"""Gradients of all micro-batches of a step, each parameter's in the form in which its uses have given it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    r"""Gradient factors of one use of a matrix, $g_j = L_j^\top R_j$.

    Attributes:
        left: Rows on the side of the matrix's first dimension, (m, r, d_0).
        right: Rows on the side of its second, (m, r, d_1).
        bias: Index of the bias that the use adds to the result, or None.
        flipped: Whether the result is on the second dimension's side (`x @ W` instead of `x @ W.T`).
    """

    left: Tensor
    right: Tensor
    bias: int | None = None
    flipped: bool = False

    def bias_sums(self) -> Tensor:
        """The bias's gradients, shape (m, d)."""
        return (self.right if self.flipped else self.left).sum(1)


@dataclass
class Gradients:
    """Gradients of m micro-batches; what is given for a parameter in several forms, or several times, adds up.

    Attributes:
        count: Micro-batches m.
        shapes: Shape of every parameter with factors or rows; dimensions after the first count as one.
        factors: Of matrices, by parameter.
        tokens: Rows of embeddings, by parameter: keys micro-batch * V + token, shape (n,), and rows, shape (n, d).
        dense: Whole gradients, by parameter, shape (m, *shape).
    """

    count: int
    shapes: dict[int, torch.Size] = field(default_factory=dict)
    factors: dict[int, list[Factors]] = field(default_factory=dict)
    tokens: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    dense: dict[int, Tensor] = field(default_factory=dict)

    # -- collecting ---

    def add_dense(self, index: int, gradient: Tensor) -> None:
        """Add every micro-batch's gradient of a parameter, shape (m, *shape)."""
        self.dense[index] = gradient if index not in self.dense else self.dense[index] + gradient

    def add_factors(self, index: int, shape: torch.Size, factors: Factors) -> None:
        """Add a matrix's gradient factors."""
        self.shapes[index] = shape
        self.factors.setdefault(index, []).append(factors)

    def add_tokens(self, index: int, shape: torch.Size, keys: Tensor, rows: Tensor) -> None:
        """Add an embedding's gradient rows."""
        self.shapes[index] = shape
        self.tokens.setdefault(index, []).append((keys, rows))

    # -- changing the form ---

    def materialise(self, index: int) -> None:
        """Multiply the factors of a matrix."""
        for use in self.factors.pop(index):
            self.add_dense(index, torch.bmm(use.left.mT, use.right).view(-1, *self.shapes[index]))
            if use.bias is not None:
                self.add_dense(use.bias, use.bias_sums())

    def fold_tokens(self, index: int) -> None:
        """Let the rows of an embedding join what the same parameter has in another form, as when tied to a head."""
        vocabulary, width = self.shapes[index]
        for keys, rows in self.tokens.pop(index):
            if index in self.dense:
                flat = self.dense[index].reshape(-1, width).index_add(0, keys, rows)
                self.dense[index] = flat.view(-1, vocabulary, width)
                continue
            slots = keys // vocabulary
            inside = [(slots == j).nonzero()[:, 0] for j in range(self.count)]
            longest = max(len(i) for i in inside)
            pick = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i in inside])
            valid = torch.stack([torch.arange(longest, device=i.device) < len(i) for i in inside])
            left = torch.nn.functional.one_hot(keys[pick] % vocabulary, vocabulary).to(rows) * valid[..., None]
            self.factors[index].append(Factors(left, rows[pick]))

    def whole(self) -> dict[int, Tensor]:
        """All gradients in full, shape (m, *shape), by parameter."""
        found = self.copy()
        for index in list(found.factors):
            found.materialise(index)
        for index, parts in list(found.tokens.items()):
            vocabulary, width = found.shapes[index]
            if index not in found.dense:
                found.dense[index] = parts[0][1].new_zeros(self.count, vocabulary, width)
            found.fold_tokens(index)
        return found.dense

    # -- some of the micro-batches ---

    def copy(self) -> Gradients:
        """The same tensors in new containers."""
        factors = {index: list(uses) for index, uses in self.factors.items()}
        tokens = {index: list(parts) for index, parts in self.tokens.items()}
        return Gradients(self.count, dict(self.shapes), factors, tokens, dict(self.dense))

    def placed(self, start: int, stop: int, first: int, count: int) -> Gradients:
        """Gradients of some micro-batches among others, which have none.

        Args:
            start: First micro-batch to take.
            stop: First one not to take any more.
            first: Where the first one goes.
            count: Micro-batches of the result.

        Returns:
            The gradients, as views where nothing is added.
        """
        if (start, stop, first, count) == (0, self.count, 0, self.count):
            return self.copy()

        def moved(t: Tensor) -> Tensor:
            t = t[start:stop]
            if stop - start == count:
                return t
            wide = t.new_zeros(count, *t.shape[1:])
            wide[first : first + stop - start] = t
            return wide

        found = Gradients(count, dict(self.shapes), dense={index: moved(t) for index, t in self.dense.items()})
        for index, uses in self.factors.items():
            found.factors[index] = [Factors(moved(u.left), moved(u.right), u.bias, u.flipped) for u in uses]
        for index, parts in self.tokens.items():
            vocabulary = self.shapes[index][0]
            for keys, rows in parts:
                mine = (keys >= start * vocabulary) & (keys < stop * vocabulary)
                found.add_tokens(index, self.shapes[index], keys[mine] + (first - start) * vocabulary, rows[mine])
        return found

    def add(self, other: Gradients) -> None:
        """Add gradients of as many micro-batches."""
        self.shapes |= other.shapes
        for index, uses in other.factors.items():
            self.factors.setdefault(index, []).extend(uses)
        for index, parts in other.tokens.items():
            self.tokens.setdefault(index, []).extend(parts)
        for index, gradient in other.dense.items():
            self.add_dense(index, gradient)

    def without(self, slots: Sequence[int]) -> Gradients:
        """The same with zeros for some micro-batches, whatever they had."""
        keep = torch.ones(self.count, dtype=torch.bool)
        keep[list(slots)] = False

        def cleared(t: Tensor) -> Tensor:
            return torch.where(keep.to(t.device).view(-1, *[1] * (t.ndim - 1)), t, 0)

        found = Gradients(self.count, dict(self.shapes), dense={index: cleared(t) for index, t in self.dense.items()})
        for index, uses in self.factors.items():
            found.factors[index] = [Factors(cleared(u.left), cleared(u.right), u.bias, u.flipped) for u in uses]
        for index, parts in self.tokens.items():
            for keys, rows in parts:
                mine = keep.to(keys.device)[keys // self.shapes[index][0]]
                found.add_tokens(index, self.shapes[index], keys[mine], rows[mine])
        return found

    # -- for checkpoints ---

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        found = list(self.dense.values())
        found += [t for uses in self.factors.values() for u in uses for t in (u.left, u.right)]
        return found + [t for parts in self.tokens.values() for pair in parts for t in pair]

    def state(self) -> dict[str, Any]:
        """Plain containers and tensors, as `torch.load` takes them with `weights_only`."""
        factors = {i: [[u.left, u.right, u.bias, u.flipped] for u in uses] for i, uses in self.factors.items()}
        shapes = {index: list(shape) for index, shape in self.shapes.items()}
        tokens = {index: [list(pair) for pair in parts] for index, parts in self.tokens.items()}
        return {"count": self.count, "shapes": shapes, "factors": factors, "tokens": tokens, "dense": dict(self.dense)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Gradients:
        """The gradients that `state` has described, on a device."""
        factors = {
            i: [Factors(left.to(device), right.to(device), bias, flipped) for left, right, bias, flipped in uses]
            for i, uses in state["factors"].items()
        }
        tokens = {i: [(k.to(device), r.to(device)) for k, r in parts] for i, parts in state["tokens"].items()}
        dense = {i: t.to(device) for i, t in state["dense"].items()}
        shapes = {i: torch.Size(shape) for i, shape in state["shapes"].items()}
        return cls(int(state["count"]), shapes, factors, tokens, dense)
