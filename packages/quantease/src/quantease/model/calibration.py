"""Gram matrices of the inputs of a block's weight matrices, and how far the block has drifted from full precision."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from core_tensor.app.ranks import current
from torch import Tensor, nn

from quantease.model.block_stream import BlockStream, EnoughSeen
from quantease.model.matrices import Group, Matrix, Sums, group_by_input, observe
from quantease.problem.gram import GramFolds

INPUT = ""
"""Key in `GramFolds.cross` of the drift of the inputs themselves; other keys are matrices."""


@dataclass(frozen=True)
class BlockShape:
    """How a block uses its matrices, seen in a run over the first window.

    Attributes:
        groups: Matrices that read the same input, in order of use.
        sums: Matrices whose output is added to others, with the number of terms; see `matrices.Sums`.
        once: Matrices that are used exactly once, so that two runs can be compared.
    """

    groups: list[Group]
    sums: Mapping[str, int]
    once: frozenset[str]

    @property
    def leaders(self) -> dict[str, str]:
        """For every matrix the one that has the same input."""
        return {name: leader for group in self.groups for name, leader in group.leader.items()}


def block_shape(
    stream: BlockStream, index: int, block: nn.Module, matrices: Sequence[Matrix], *, merged: bool
) -> BlockShape:
    """Run the first window through a block and see what its matrices read and what becomes of their outputs.

    Args:
        stream: Hidden states before the block.
        index: Number of the block.
        block: The block, in memory.
        matrices: Its matrices.
        merged: One group for the whole block.

    Returns:
        The groups and sums.
    """
    calls: list[tuple[str, Tensor]] = []  # holding the inputs keeps their addresses from being used again
    terms: dict[str, int] = {}
    sums = Sums([m.name for m in matrices if m.expert is None], lambda name, _: _count(terms, name))
    with observe(block, matrices, lambda name, x: calls.append((name, x))), sums.following(block):
        next(stream.run(index, block))
    uses: dict[str, int] = {}
    for name, _ in calls:
        _count(uses, name)
    once = frozenset(m.name for m in matrices if m.expert is None and uses.get(m.name) == 1)
    summed = {name: count for name, count in terms.items() if count > 1 and name in once}
    return BlockShape(group_by_input(calls, matrices, merged), summed, once)


def _count(terms: dict[str, int], name: str) -> None:
    terms[name] = terms.get(name, 0) + 1


@dataclass
class FullPrecision:
    """The same windows behind full-precision blocks: what a block's matrices read and add up to there.

    Attributes:
        stream: Hidden states at full precision before the block.
        shape: How the block uses its matrices.
        originals: Weights of the matrices at full precision; empty where everything was kept.
        kept: Per window what `values` returns.
    """

    stream: BlockStream
    shape: BlockShape
    originals: dict[str, Tensor] = field(default_factory=dict)
    kept: list[dict[tuple[str, str], Tensor]] = field(default_factory=list)

    @classmethod
    def before(
        cls, stream: BlockStream, shape: BlockShape, index: int, block: nn.Module, matrices: Sequence[Matrix], room: int
    ) -> "FullPrecision":
        """Run all windows through a block that is still at full precision, and keep what is seen if it fits.

        Args:
            stream: Hidden states at full precision before the block; they are behind it afterwards.
            shape: How the block uses its matrices.
            index: Number of the block.
            block: The block, not quantized yet.
            matrices: Its matrices.
            room: Bytes that may be kept; else `values` runs the block again.

        Returns:
            The passage.
        """
        dense = [m for m in matrices if m.expert is None]
        width = sum(m.weight(block).shape[1] for m in dense if shape.leaders[m.name] == m.name)
        width += sum(m.weight(block).shape[0] for m in dense if m.name in shape.sums)
        size = width * stream.tokens.numel() * stream.hidden[0].element_size()
        entering = stream.fork()
        passage = cls(entering, shape)
        outputs: list[Tensor] = []
        if size <= room:
            for window in range(len(stream.tokens)):
                seen = _Seen(shape, {*shape.leaders.values()}, {*shape.sums})
                with seen.watching(block, dense):
                    outputs.append(stream.window(index, block, window).cpu())
                passage.kept.append({key: value.cpu() for key, value in seen.values.items()})
        else:
            passage.originals = {m.name: m.weight(block).clone() for m in dense}
            outputs = [out.cpu() for _, out in stream.run(index, block)]
        stream.hidden = outputs
        return passage

    def values(
        self, index: int, block: nn.Module, matrices: Sequence[Matrix], window: int, leaders: set[str], sums: set[str]
    ) -> dict[tuple[str, str], Tensor]:
        """What matrices read and add up to in one window at full precision.

        Args:
            index: Number of the block.
            block: The block, possibly quantized in part.
            matrices: Its matrices.
            window: Number of the window.
            leaders: Matrices whose inputs are wanted.
            sums: Matrices whose sums are wanted.

        Returns:
            Tensors by ("input" or "sum", matrix).
        """
        if self.kept:
            return self.kept[window]
        dense = [m for m in matrices if m.expert is None]
        seen = _Seen(self.shape, leaders, sums, stop=True)
        with _weights(block, dense, self.originals), seen.watching(block, dense):
            self.stream.window(index, block, window)
        return seen.values


@contextmanager
def _weights(block: nn.Module, matrices: Sequence[Matrix], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The block with other weights in place, and its own back afterwards."""
    before = {m.name: m.weight(block).clone() for m in matrices}
    try:
        for matrix in matrices:
            matrix.assign(block, values[matrix.name])
        yield
    finally:
        for matrix in matrices:
            matrix.assign(block, before[matrix.name])


class _Seen:
    """Inputs and finished sums of one run of a block; ends it once everything wanted was seen, if `stop` is set."""

    def __init__(self, shape: BlockShape, leaders: set[str], sums: set[str], stop: bool = False) -> None:
        self.shape, self.leaders, self.sums, self.stop = shape, leaders, sums, stop
        self.values: dict[tuple[str, str], Tensor] = {}
        self._terms: dict[str, int] = {}

    @contextmanager
    def watching(self, block: nn.Module, matrices: Sequence[Matrix]) -> Iterator[None]:
        watched = [m for m in matrices if m.name in self.leaders]
        follow = Sums([m.name for m in matrices if m.name in self.sums], self._extended)
        with observe(block, watched, lambda name, x: self._add("input", name, x)):
            if self.sums:
                with follow.following(block), _until_enough():
                    yield
            else:
                with _until_enough():
                    yield

    def _extended(self, name: str, value: Tensor) -> None:
        _count(self._terms, name)
        if self._terms[name] == self.shape.sums[name]:
            self._add("sum", name, value)

    def _add(self, kind: str, name: str, value: Tensor) -> None:
        self.values[kind, name] = value.detach().clone()  # what follows may add to it in place
        if self.stop and len(self.values) == len(self.leaders) + len(self.sums):
            raise EnoughSeen


@contextmanager
def _until_enough() -> Iterator[None]:
    with suppress(EnoughSeen):
        yield


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say in the errors of what is done inside what it was done for.

    Args:
        what: A matrix or a block.

    Raises:
        ValueError: With `what` before the message; also for matrices that linear algebra cannot factorize.
    """
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{what}: {error}") from error


def collect_grams(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    matrices: Sequence[Matrix],
    group: Group,
    *,
    folds: int = 2,
    segment: int = 256,
    first: int = 0,
    reference: FullPrecision | None = None,
) -> dict[str, GramFolds]:
    r"""Accumulate the inputs of a group's matrices over all windows (of all ranks, when torch.distributed is on).

    Args:
        stream: Hidden states before the block.
        index: Number of the block.
        block: The block, in memory.
        matrices: Matrices of the block.
        group: The ones to accumulate; those that share an input share one `GramFolds`.
        folds: Token folds.
        segment: Consecutive tokens that stay in one fold.
        first: Tokens of other ranks before this one's.
        reference: The same windows at full precision. Then `GramFolds.cross` has, for inputs X, $X^\top
        (X_\text{fp} - X)$ under `INPUT`, and under the name of a matrix whose output is added to others $X^\top
        (Z_\text{fp} - Z)$ for the sum Z. Groups with experts, which see other tokens at full precision, and with
            matrices that a block does not use exactly once, have neither.

    Returns:
        Gram matrices by the matrices' names.
    """
    by_name = {m.name: m for m in matrices}
    leaders = list(dict.fromkeys(group.leader[name] for name in group.names))
    grams = {
        name: GramFolds(
            by_name[name].weight(block).shape[1],
            folds=folds,
            segment=segment,
            dtype=torch.float64,
            products=torch.float32,
            first=first,
            device=stream.lm.device,
        )
        for name in leaders
    }
    if reference is None or not reference.shape.once.issuperset(leaders):
        _accumulate_inputs(stream, index, block, [by_name[name] for name in leaders], grams)
    else:
        _accumulate_with_drift(stream, index, block, matrices, group, grams, reference)
    ranks = current()
    for gram in grams.values():
        for values in (gram.folds, *gram.cross.values(), gram.counts):
            ranks.sum(values)
    return {name: grams[group.leader[name]] for name in group.names}


def _accumulate_inputs(
    stream: BlockStream, index: int, block: nn.Module, leaders: Sequence[Matrix], grams: Mapping[str, GramFolds]
) -> None:
    # With experts nobody knows which call is the last; without, the run can end at the last leader's input.
    last = leaders[-1].name if all(m.expert is None for m in leaders) else None

    def accumulate(name: str, x: Tensor) -> None:
        with named(name):
            grams[name].update(x)
        if name == last:
            raise EnoughSeen

    with observe(block, leaders, accumulate):
        for _ in stream.run(index, block):
            pass


def _accumulate_with_drift(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    matrices: Sequence[Matrix],
    group: Group,
    grams: Mapping[str, GramFolds],
    reference: FullPrecision,
) -> None:
    leaders, summed = {*grams}, {name for name in group.names if name in reference.shape.sums}
    dense = [m for m in matrices if m.expert is None]
    for window in range(len(stream.tokens)):
        here = _Seen(reference.shape, leaders, summed, stop=True)
        with here.watching(block, dense):
            stream.window(index, block, window)
        there = reference.values(index, block, matrices, window, leaders, summed)
        for leader, gram in grams.items():
            x = here.values["input", leader].float()
            readers = [name for name in group.names if group.leader[name] == leader]
            beside = {n: there["sum", n].to(x) - here.values["sum", n].float() for n in readers if n in summed}
            if any(name not in summed for name in readers):
                beside[INPUT] = there["input", leader].to(x) - x
            with named(leader):
                gram.update(x, beside)
