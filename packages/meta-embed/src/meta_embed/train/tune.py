"""Shrinkage and length of the warm start, chosen on the held-back members before meta-training."""

from collections.abc import Callable, Sequence

import msgspec
from torch import Tensor

from meta_embed.config import Config
from meta_embed.model.build import build_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Vocabulary
from meta_embed.tasks.events import Events
from meta_embed.tasks.ragged import TaskBatch
from meta_embed.train.outer import held_back_tasks, mean_loss
from meta_embed.train.warm import TableOptions, train_table

PRECISIONS = (3.0, 10.0, 30.0)
EPOCHS = 100
"""Of a trial at most; it ends earlier where more of them no longer help."""
PATIENCE = 2
"""Epochs without a better loss before a trial ends, at least."""


def tune(
    events: Events,
    held_back: Events,
    config: Config,
    vocabulary: Vocabulary,
    seed: int = 0,
    precisions: Sequence[float] = PRECISIONS,
    epochs: int = EPOCHS,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Config:
    """Options with the best precision and number of warm epochs, by the held-back members' loss without meta-training.

    Args:
        events: Of the training members.
        held_back: Of the members that decide.
        config: Options to start from.
        vocabulary: Of the categories.
        seed: Seed.
        precisions: Prior precisions to try.
        epochs: Warm epochs at most; a trial ends earlier where more of them no longer help.
        report: Called with every epoch of a trial, when it has ended.

    Returns:
        The options with the winner in them.
    """
    tasks = list(held_back_tasks(held_back, config.episodes))
    trials: list[tuple[float, float, int]] = []
    for precision in precisions:
        model = build_model(with_warm_start(config, precision, 0), vocabulary, seed)
        losses = _curve(model, events, tasks, TableOptions(epochs, config.train.warm_lr, precision), seed)
        trials += [(loss, precision, epoch) for epoch, loss in enumerate(losses, 1)]
        if report is not None:
            for loss, _, epoch in trials[-len(losses) :]:
                report({"precision": precision, "warm_epochs": float(epoch), "held_back_loss": loss})
    _, precision, count = min(trials)
    return with_warm_start(config, precision, count)


def _curve(
    model: Personalizer, events: Events, tasks: list[TaskBatch], options: TableOptions, seed: int
) -> list[float]:
    """Loss of the held-back members after each epoch of the warm start, until it no longer falls."""
    losses: list[float] = []

    def judge(_: Tensor) -> bool:
        losses.append(mean_loss(model, tasks))
        return still_improving(losses)

    train_table(model, events, options, seed, judge=judge)
    return losses


def with_warm_start(config: Config, precision: float, epochs: int) -> Config:
    """The same options with another warm start.

    Args:
        config: Options.
        precision: Starting value of the prior's precision.
        epochs: Warm epochs.

    Returns:
        The options.
    """
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, precision=precision),
        train=msgspec.structs.replace(config.train, warm_epochs=epochs),
    )


def still_improving(losses: Sequence[float], patience: int = PATIENCE) -> bool:
    """Whether a lower loss may still come: not after as many epochs again as led to the lowest one.

    A loss that rests while item and member vectors grow from almost nothing falls again later; one that overfits from
    its second epoch on is not watched for long.

    Args:
        losses: One per epoch.
        patience: Epochs to wait at least.

    Returns:
        Whether to go on.
    """
    best = min(range(len(losses)), key=losses.__getitem__)
    return len(losses) - 1 - best < max(patience, best + 1)
