r"""The outer loop: minimize the query loss of vectors adapted on supports, over episodes of the training members.

$$ \min_{\theta, \phi} \; \mathbb{E}_t \, L(\text{query}_t; e_t(\theta, \phi), \phi). $$

It overfits easily, so tasks of held-back members decide when to stop. Under `torchrun` every process takes its share of
the tasks of each batch and gradients are summed, so that two processes do what one does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from core_tensor.app.ranks import ALONE, Ranks
from torch import nn

from meta_embed.config import Config
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Array
from meta_embed.tasks.episodes import EpisodeOptions, epoch
from meta_embed.tasks.events import Events
from meta_embed.tasks.ragged import TaskBatch, task_batch
from meta_embed.tasks.split import by_key, split_at
from meta_embed.train import checkpoint
from meta_embed.train.checkpoint import Progress
from meta_embed.train.warm import TableOptions, train_table

Report = Callable[[dict[str, float]], None]
HELD_BACK_SIZES = (0, 4, 16, 32)
"""Supports at which the held-back members' loss is measured; their mean decides."""


def fit(
    model: Personalizer,
    events: Events,
    held_back: Events,
    config: Config,
    *,
    seed: int = 0,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
    report: Report | None = None,
) -> Progress:
    """Train a model in place: warm start, then meta-training with early stopping.

    Args:
        model: The model; it ends with the weights of the best epoch.
        events: Of the training members.
        held_back: Of the members that decide when to stop.
        config: Options.
        seed: Of everything random.
        folder: Where checkpoints go; a killed training continues from there to the same result.
        ranks: The processes that share the work.
        report: Called with every entry of the history.

    Returns:
        The history, and the best epoch.

    Raises:
        ValueError: If a part has no events to learn from, or the training diverges.
    """
    options = config.train
    if len(events) == 0 or len(held_back) == 0:
        raise ValueError("events: expected members to train on and to hold back, got none in one of the parts")
    if not (events.w.any() and held_back.w.any()):
        raise ValueError("weights: expected some above 0 among the members to train on and to hold back, got none")
    if events.y.min() == events.y.max():
        raise ValueError(
            f"labels: expected both kinds, got {events.y[0]:g} alone; where only clicks are logged, sample rows"
            " that were not clicked"
        )
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.decay)
    progress = checkpoint.load(folder, model, optimizer, rng) if folder else None
    tasks = list(held_back_tasks(held_back, config.episodes))
    if progress is None:
        progress = Progress()
        if options.warm_epochs:
            table = TableOptions(options.warm_epochs, options.warm_lr, config.model.precision)
            train_table(model, events, table, seed)
        ranks.broadcast_module(model)
        _measure(model, tasks, progress, 0.0, report)
    while progress.epoch < options.epochs and progress.epoch - progress.best_epoch < options.patience:
        with _diverging():
            model.train()
            total = weight = 0.0
            for _ in range(options.repeats):
                for batch, batch_weight in epoch(events, config.episodes, rng, ranks.rank, ranks.size):
                    total += outer_step(model, optimizer, batch, batch_weight, ranks)
                    weight += batch_weight
            progress.epoch += 1
            total = float(ranks.sum(torch.tensor(total, dtype=torch.float64)))
            _measure(model, tasks, progress, total / max(weight, 1e-12), report)
        if folder and ranks.first:
            checkpoint.save(folder, model, optimizer, rng, progress)
    model.load_state_dict(progress.best_state)
    model.eval()
    return progress


@contextmanager
def _diverging() -> Iterator[None]:
    """Name the rate where weights have become such that an operator refuses them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"train.lr: the training diverged ({error}); lower the rate") from error


def outer_step(
    model: Personalizer, optimizer: torch.optim.Optimizer, batch: TaskBatch, weight: float, ranks: Ranks = ALONE
) -> float:
    """One step on the mean query loss of all processes' tasks.

    Args:
        model: The model.
        optimizer: Its optimizer.
        batch: This process's tasks.
        weight: Query weights of all processes' tasks.
        ranks: The processes.

    Returns:
        The summed loss of this process's tasks.
    """
    optimizer.zero_grad(set_to_none=False)
    loss = model.query_loss(batch) if len(batch) else next(model.parameters()).sum() * 0.0
    (loss * (ranks.size / weight)).backward()  # averaging over the processes leaves the sum over the tasks
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    ranks.average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return float(loss.detach())


def held_back_tasks(events: Events, options: EpisodeOptions) -> Iterator[TaskBatch]:
    """Fixed tasks of the held-back members, at several sizes of the support."""
    sizes = [n for n in HELD_BACK_SIZES if n <= options.support]
    for n in sizes:
        members = np.flatnonzero(events.counts > n)
        if not len(members):
            continue
        split = split_at(events, n, options.query, members=members)
        for part in np.array_split(np.arange(len(split.members)), -(-len(split.members) // 1024)):
            yield task_batch(
                events,
                split.members[part],
                (split.support_start[part], split.support[part]),
                (split.query_start[part], split.query[part]),
            )


def mean_loss(model: Personalizer, tasks: list[TaskBatch]) -> float:
    """Mean over tasks of their queries' mean log loss: every support size counts by its members."""
    model.eval()
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in tasks:
            total += float(model.query_loss(batch))
            weight += float(batch.query.w.sum())
    return total / max(weight, 1e-12)


def _measure(
    model: Personalizer, tasks: list[TaskBatch], progress: Progress, train: float, report: Report | None
) -> None:
    """Add an entry to the history and keep the weights if they are the best so far."""
    held_back = mean_loss(model, tasks)
    if not np.isfinite(held_back):
        raise ValueError(f"the held-back loss is {held_back}")
    entry = {"epoch": float(progress.epoch), "train_loss": train, "held_back_loss": held_back}
    progress.history.append(entry)
    if held_back < progress.best - 1e-6:
        progress.best, progress.best_epoch = held_back, progress.epoch
        progress.best_state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if report is not None:
        report(entry)


def split_members(events: Events, config: Config, seed: int) -> tuple[Array, Array, Array]:
    """Members to train on, to hold back, and to test on, by their keys.

    Args:
        events: The log.
        config: The shares.
        seed: Seed.

    Returns:
        Positions of each part.
    """
    held_back, tested, train = by_key(events.keys, (config.train.held_back, config.train.tested), seed)
    return train, held_back, tested
