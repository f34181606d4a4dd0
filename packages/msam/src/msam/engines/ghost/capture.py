"""Pass 1 of ghost mode: forward, backward to activations only, and the directions that follow."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msam.engines.ghost.directions import Plan
from msam.engines.ghost.errors import ChangedError, UnsupportedError
from msam.engines.ghost.table import Table
from msam.engines.ghost.tape import Path, Tape
from msam.engines.ghost.uses.rules import RULES
from msam.engines.sequential import Scale
from msam.step.batches import Shards
from msam.step.checks import check_loss
from msam.step.perturbation import Tracked

LossFunction = Callable[[Any], Tensor]


def capture(
    loss_fn: LossFunction,
    batch: Any,
    shards: Shards,
    tracked: Tracked,
    table: Table,
    paths: Sequence[Path],
    *,
    scale: Scale | None = None,
    finite: bool = False,
    equal: bool = True,
) -> tuple[Plan, Tensor]:
    """Pass 1: forward, backward to activations only, and the directions that follow.

    Args:
        loss_fn: Mean loss of a batch.
        batch: Tree of tensors, examples first.
        shards: How it is cut.
        tracked: What is perturbed, and how far.
        table: Finds tracked parameters.
        paths: Proved paths.
        scale: GradScaler's scaling of a loss, or None.
        finite: Whether a NaN loss raises.
        equal: Whether micro-batches weigh by their examples alone.

    Returns:
        The plan, to be finished, and the detached loss.

    Raises:
        UnsupportedError: If no use was recorded.
        ChangedError: If no path was proved for these calls, or one whose gradient was zero in the proof now has one.
    """
    tape = Tape(table, shards, "capture", RULES, paths, equal=equal)
    with tape:
        loss = loss_fn(batch)
    loss = check_loss(loss, finite)
    tape.finish()
    if not tape.uses:
        raise UnsupportedError("the loss uses no perturbed parameter that ghost mode can see")
    targets: Any = [use.target for use in tape.uses]
    gradients = torch.autograd.grad(loss if scale is None else scale(loss), targets, allow_unused=True)
    silent = tape.paths[0].silent
    if silent and any(g is not None and g.any() for u, g in zip(tape.uses, gradients, strict=True) if u.call in silent):
        raise ChangedError("a call whose gradient was zero in the proof has one now")
    plan = Plan(tracked, shards, kept=tape.kept)
    for use, gradient in zip(tape.uses, gradients, strict=True):  # neither has a graph, nor what a use remembers
        if gradient is not None:
            use.contribute(plan, gradient)
    tape.uses.clear()
    return plan, loss.detach()
