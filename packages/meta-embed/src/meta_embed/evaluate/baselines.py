"""What personalization is compared with, each tuned on the held-back members as carefully as our own model.

- `no_personalization`: the same global and meta block, trained without any member's own vector.
- `retrained_id`: a table with a row per member, the whole model retrained with the newcomers' supports in it.
- `wide_and_deep`: the same with a perceptron on [item, member row, features] beside crossed categories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.config import Config
from meta_embed.evaluate.buckets import Scores
from meta_embed.evaluate.metrics import log_loss
from meta_embed.model.blocks import perceptron
from meta_embed.model.build import build_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Array, Vocabulary
from meta_embed.tasks.events import Events, ranges
from meta_embed.tasks.ragged import TaskBatch
from meta_embed.tasks.split import Split
from meta_embed.train.outer import held_back_tasks
from meta_embed.train.warm import TableOptions, train_table

EPOCHS = (2, 3, 4, 6, 12, 25)
SHRINKAGES = (1.0, 3.0, 10.0, 30.0)


def no_personalization(
    events: Events,
    held_back: Events,
    config: Config,
    vocabulary: Vocabulary,
    seed: int = 0,
    epochs: Sequence[int] = EPOCHS,
) -> Personalizer:
    """Global and meta block alone; the number of epochs is chosen on the held-back members.

    Args:
        events: Of the training members.
        held_back: Of the members that decide.
        config: Options.
        vocabulary: Of the categories.
        seed: Seed.
        epochs: Numbers of epochs to try, ascending; it stops where more of them are worse.

    Returns:
        The model; score it with `model_scores(..., adapted=False)`.
    """
    tasks = list(held_back_tasks(held_back, config.episodes))
    lowest, best = float("inf"), None
    for count in epochs:
        model = build_model(config, vocabulary, seed)
        train_table(model, events, TableOptions(count, config.train.warm_lr, float("inf")), seed)
        loss = unadapted_loss(model, tasks)
        if loss > lowest:
            break
        lowest, best = loss, model
    assert best is not None
    return best


def unadapted_loss(model: Personalizer, tasks: list[TaskBatch]) -> float:
    """Mean log loss of queries scored with the vectors of members without events."""
    total = weight = 0.0
    with torch.no_grad():
        for batch in tasks:
            query = batch.query
            e = model.prior(batch.member_ids, batch.member_dense)[query.owner]
            logits = model.logits(query.ids, query.dense, e)
            total += float((query.w * binary_cross_entropy_with_logits(logits, query.y, reduction="none")).sum())
            weight += float(query.w.sum())
    return total / weight


@dataclass(frozen=True)
class IdChoice:
    """How an ID model is trained.

    Attributes:
        epochs: Passes over the events.
        shrinkage: Precision of a member row's prior.
    """

    epochs: int
    shrinkage: float


Maker = Callable[[], Personalizer]


def retrained_id(
    make: Maker, events: Events, asked: Events, split: Split, choice: IdChoice, lr: float, seed: int = 0
) -> Scores:
    """Retrain with the supports of the asked members among the training events, and score their queries.

    Args:
        make: A new model; its global and meta block are trained together with the table.
        events: Of the training members.
        asked: Of the members who are asked.
        split: Their tasks; only their supports are seen in training.
        choice: Length and shrinkage.
        lr: Adam's rate.
        seed: Seed.

    Returns:
        The scores.
    """
    model = make()
    both, rows = _with_supports(events, asked, split)
    vectors = train_table(model, both, TableOptions(choice.epochs, lr, choice.shrinkage), seed, rows)
    query = ranges(split.query_start, split.query)
    owner = np.repeat(split.members, split.query)
    e = vectors[len(events) + torch.from_numpy(owner)]
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(asked.ids[query]), torch.from_numpy(asked.dense[query]), e)
    return Scores(logits.double().numpy(), asked.y[query], owner)


def _with_supports(events: Events, asked: Events, split: Split) -> tuple[Events, Array]:
    """Both logs, and the rows that training may see: all of the one, the supports of the other."""
    both = Events(
        offsets=np.concatenate([events.offsets, events.offsets[-1] + asked.offsets[1:]]),
        **{
            name: np.concatenate([getattr(events, name), getattr(asked, name)])
            for name in Events.__dataclass_fields__
            if name != "offsets"
        },
    )
    seen = ranges(split.support_start, split.support) + len(events.time)
    return both, np.concatenate([np.arange(len(events.time)), seen])


def tune_id(
    make: Maker,
    events: Events,
    held_back: Events,
    split: Split,
    lr: float,
    seed: int = 0,
    epochs: Sequence[int] = EPOCHS,
    shrinkages: Sequence[float] = SHRINKAGES,
) -> IdChoice:
    """Length and shrinkage with the lowest log loss on the held-back members' queries, retrained for each.

    Args:
        make: A new model.
        events: Of the training members.
        held_back: Of the members that decide.
        split: Their tasks, with supports of the size that will be asked about.
        lr: Adam's rate.
        seed: Seed.
        epochs: Numbers of epochs to try, ascending; of each shrinkage until they make the loss worse.
        shrinkages: Shrinkages to try.

    Returns:
        The best.
    """
    trials: list[tuple[float, float, int]] = []
    for shrinkage in shrinkages:
        lowest = float("inf")
        for count in epochs:
            scores = retrained_id(make, events, held_back, split, IdChoice(count, shrinkage), lr, seed)
            loss = log_loss(scores.logit, scores.y)
            trials.append((loss, shrinkage, count))
            if loss > lowest:
                break
            lowest = loss
    _, shrinkage, count = min(trials)
    return IdChoice(count, shrinkage)


def id_maker(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Maker:
    """Models of the architecture that the MAP head stands on."""
    plain = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, method="map"))
    return lambda: build_model(plain, vocabulary, seed)


class WideAndDeep(Personalizer):
    """Wide-and-deep with the member's row in the deep part and its products with the item in the wide part.

    Args:
        inner: A model whose blocks are used.
        hidden: Width of the perceptron.
        seed: Of its weights.
    """

    def __init__(self, inner: Personalizer, hidden: int = 32, seed: int = 0) -> None:
        super().__init__(inner.global_block)
        self.inner = inner
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.deep = perceptron([2 * inner.width, hidden, hidden, 1])

    def prior(self, ids: Tensor, dense: Tensor) -> Tensor:
        """See `Personalizer`."""
        return self.inner.prior(ids, dense)

    def adapt(self, member_ids: Tensor, member_dense: Tensor, support: Any) -> tuple[Tensor, Tensor | None]:
        """See `Personalizer`: an ID model has nothing to adapt but its table."""
        del support
        return self.prior(member_ids, member_dense), None

    def logits(self, ids: Tensor, dense: Tensor, e: Tensor) -> Tensor:
        """See `Personalizer`."""
        base, h = self.global_block(ids, dense)
        out: Tensor = base + (h * e).sum(-1) + self.deep(torch.cat([h, e], -1))[..., 0]
        return out


def wide_maker(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Maker:
    """Wide-and-deep ID models."""
    make = id_maker(config, vocabulary, seed)
    return lambda: WideAndDeep(make(), seed=seed)
