"""Shrinkage and length of the warm start, chosen on the held-back members before meta-training."""

from collections.abc import Callable, Sequence

import msgspec

from meta_embed.config import Config
from meta_embed.model.build import build_model
from meta_embed.tasks.encode import Vocabulary
from meta_embed.tasks.events import Events
from meta_embed.train.outer import held_back_tasks, mean_loss
from meta_embed.train.warm import TableOptions, train_table

PRECISIONS = (3.0, 10.0, 30.0)
EPOCHS = (3, 6, 12, 25)


def tune(
    events: Events,
    held_back: Events,
    config: Config,
    vocabulary: Vocabulary,
    seed: int = 0,
    precisions: Sequence[float] = PRECISIONS,
    epochs: Sequence[int] = EPOCHS,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Config:
    """Options with the best precision and number of warm epochs, by the held-back members' loss without meta-training.

    Of each precision, epochs are added until they make the loss worse.

    Args:
        events: Of the training members.
        held_back: Of the members that decide.
        config: Options to start from.
        vocabulary: Of the categories.
        seed: Seed.
        precisions: Prior precisions to try.
        epochs: Numbers of warm epochs to try, ascending.
        report: Called with every trial.

    Returns:
        The options with the winner in them.
    """
    tasks = list(held_back_tasks(held_back, config.episodes))
    trials: list[tuple[float, float, int]] = []
    for precision in precisions:
        trial = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, precision=precision))
        best = float("inf")
        for count in epochs:
            model = build_model(trial, vocabulary, seed)
            train_table(model, events, TableOptions(count, config.train.warm_lr, precision), seed)
            loss = mean_loss(model, tasks)
            trials.append((loss, precision, count))
            if report is not None:
                report({"precision": precision, "warm_epochs": float(count), "held_back_loss": loss})
            if loss > best:
                break
            best = loss
    _, precision, count = min(trials)
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, precision=precision),
        train=msgspec.structs.replace(config.train, warm_epochs=count),
    )
