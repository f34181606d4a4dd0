"""Gram matrices of the inputs of a block's weight matrices, from token windows that stream through the model."""

from collections.abc import Mapping, Sequence

import torch.distributed
from torch import Tensor, nn

from quantease.model.block_stream import BlockStream, EnoughSeen
from quantease.model.matrices import Group, Matrix, group_by_input, observe
from quantease.problem.gram import GramFolds


def input_groups(
    stream: BlockStream, index: int, block: nn.Module, matrices: Sequence[Matrix], *, merged: bool
) -> list[Group]:
    """Which matrices of a block read the same input, in order of use, from a run over the first window.

    Args:
        stream: Hidden states before the block.
        index: Number of the block.
        block: The block, in memory.
        matrices: Its matrices.
        merged: One group for the whole block.

    Returns:
        The groups.
    """
    calls: list[tuple[str, Tensor]] = []  # holding the inputs keeps their addresses from being used again
    with observe(block, matrices, lambda name, x: calls.append((name, x))):
        next(stream.run(index, block))
    return group_by_input(calls, matrices, merged)


def collect_grams(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    matrices: Sequence[Matrix],
    group: Group,
    *,
    folds: int = 2,
    segment: int = 256,
) -> dict[str, GramFolds]:
    """Accumulate the inputs of a group's matrices over all windows (of all ranks, when torch.distributed is on).

    Args:
        stream: Hidden states before the block.
        index: Number of the block.
        block: The block, in memory.
        matrices: Matrices of the block.
        group: The ones to accumulate; those that share an input share one `GramFolds`.
        folds: Token folds.
        segment: Consecutive tokens that stay in one fold.

    Returns:
        Gram matrices by the matrices' names.
    """
    by_name = {m.name: m for m in matrices}
    leaders = list(dict.fromkeys(group.leader[name] for name in group.names))
    grams = {
        name: GramFolds(by_name[name].weight(block).shape[1], folds=folds, segment=segment, device=stream.lm.device)
        for name in leaders
    }
    # With experts nobody knows which call is the last; without, the run can end at the last leader's input.
    last = leaders[-1] if all(by_name[name].expert is None for name in leaders) else None

    def accumulate(name: str, x: Tensor) -> None:
        grams[name].update(x)
        if name == last:
            raise EnoughSeen

    with observe(block, [by_name[name] for name in leaders], accumulate):
        for _ in stream.run(index, block):
            pass
    _sum_over_ranks(grams)
    return {name: grams[group.leader[name]] for name in group.names}


def _sum_over_ranks(grams: Mapping[str, GramFolds]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for gram in grams.values():
        torch.distributed.all_reduce(gram.folds)
        counts = gram.counts.to(gram.folds.device)
        torch.distributed.all_reduce(counts)
        gram.counts.copy_(counts)
