"""What personalization is compared with, each tuned on the held-back members as carefully as our own model.

- `no_personalization`: the same global and meta block, trained without any member's own vector.
- `retrained_id`: a table with a row per member, the whole model retrained with the newcomers' supports in it. The score
  is the MAP head's (`id_maker`), a perceptron's on [item, member, item * member] (`deep_maker`), or the sum of both
  (`wide_maker`, wide and deep).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.config import Config
from meta_embed.evaluate.metrics import Scores, log_loss
from meta_embed.model.blocks import perceptron
from meta_embed.model.build import build_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Array, Vocabulary
from meta_embed.tasks.events import Events, ranges
from meta_embed.tasks.ragged import TaskBatch
from meta_embed.tasks.split import Split
from meta_embed.train.outer import held_back_tasks
from meta_embed.train.tune import EPOCHS, still_improving
from meta_embed.train.warm import TableOptions, train_table

SHRINKAGES = (1.0, 3.0, 10.0, 30.0)


def no_personalization(
    events: Events, held_back: Events, config: Config, vocabulary: Vocabulary, seed: int = 0, epochs: int = EPOCHS
) -> Personalizer:
    """Global and meta block alone, at the epoch that is best on the held-back members.

    Args:
        events: Of the training members.
        held_back: Of the members that decide.
        config: Options.
        vocabulary: Of the categories.
        seed: Seed.
        epochs: Epochs at most.

    Returns:
        The model; score it with `model_scores(..., adapted=False)`.
    """
    tasks = list(held_back_tasks(held_back, config.episodes))
    model, losses, best = build_model(config, vocabulary, seed), list[float](), dict[str, Any]()

    def judge(_: Tensor) -> bool:
        losses.append(unadapted_loss(model, tasks))
        if losses[-1] == min(losses):
            best.update(copy.deepcopy(model.state_dict()))
        return still_improving(losses)

    train_table(model, events, TableOptions(epochs, config.train.warm_lr, float("inf")), seed, judge=judge)
    model.load_state_dict(best)
    return model


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
    return total / max(weight, 1e-12)


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
    both, rows = _with_supports(events, asked, [split])
    vectors = train_table(model, both, TableOptions(choice.epochs, lr, choice.shrinkage), seed, rows)
    return _table_scores(model, vectors[len(events) :], asked, split)


def _table_scores(model: Personalizer, vectors: Tensor, asked: Events, split: Split) -> Scores:
    """Scores of the queries, with the members' vectors from the table."""
    query, owner = ranges(split.query_start, split.query), np.repeat(split.members, split.query)
    ids, dense = torch.from_numpy(asked.ids[query]), torch.from_numpy(asked.dense[query])
    with torch.no_grad():
        logits = model.logits(ids, dense, vectors[torch.from_numpy(owner)])
    return Scores(logits.double().numpy(), asked.y[query], owner)


def _with_supports(events: Events, asked: Events, splits: Sequence[Split]) -> tuple[Events, Array]:
    """Both logs, the second once per split, and the rows that training may see: all of the first, then the supports."""
    parts = [events, *[asked] * len(splits)]
    first = np.cumsum([len(part.time) for part in parts])
    both = Events(
        offsets=np.concatenate([[0], *(p.offsets[1:] + n - p.offsets[-1] for p, n in zip(parts, first, strict=True))]),
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in Events.__dataclass_fields__
            if name != "offsets"
        },
    )
    seen = [ranges(s.support_start, s.support) + n for s, n in zip(splits, first[:-1], strict=True)]
    return both, np.concatenate([np.arange(len(events.time)), *seen])


@dataclass(frozen=True)
class TunedId:
    """The best options for one kind of task.

    Attributes:
        choice: The options.
        loss: Log loss on the held-back members.
        scores: Scores of their queries.
    """

    choice: IdChoice
    loss: float
    scores: Scores


def tune_id(
    make: Maker,
    events: Events,
    held_back: Events,
    splits: Sequence[Split],
    lr: float,
    seed: int = 0,
    epochs: int = EPOCHS,
    shrinkages: Sequence[float] = SHRINKAGES,
) -> list[TunedId]:
    """Length and shrinkage with the lowest log loss on the held-back members' queries, for each of several splits.

    One training per shrinkage judges all splits after every epoch: a held-back member has a row of the table for each
    split, trained on that split's support alone. The other parameters learn from the supports of all splits.

    Args:
        make: A new model.
        events: Of the training members.
        held_back: Of the members that decide.
        splits: Their tasks, with supports of the sizes that will be asked about.
        lr: Adam's rate.
        seed: Seed.
        epochs: Epochs at most; of each shrinkage as long as the loss of any split falls.
        shrinkages: Shrinkages to try.

    Returns:
        The best for each split.
    """
    both, rows = _with_supports(events, held_back, splits)
    best: list[TunedId | None] = [None] * len(splits)

    def trial(shrinkage: float) -> None:
        model, curves = make(), [list[float]() for _ in splits]

        def judge(vectors: Tensor) -> bool:
            for j, (split, own) in enumerate(zip(splits, vectors[len(events) :].split(len(held_back)), strict=True)):
                scores = _table_scores(model, own, held_back, split)
                loss = log_loss(scores.logit, scores.y)
                curves[j].append(loss)
                former = best[j]
                if former is None or loss < former.loss:
                    best[j] = TunedId(IdChoice(len(curves[j]), shrinkage), loss, scores)
            return any(still_improving(curve) for curve in curves)

        train_table(model, both, TableOptions(epochs, lr, shrinkage), seed, rows, judge)

    for shrinkage in shrinkages:
        trial(shrinkage)
    return [found for found in best if found is not None]


def id_maker(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Maker:
    """Models of the architecture that the MAP head has."""
    plain = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, method="map"))
    return lambda: build_model(plain, vocabulary, seed)


class DeepId(Personalizer):
    """A perceptron on [item, member, item * member], alone or beside the terms that the MAP head has (wide and deep).

    Args:
        inner: A model whose blocks are used.
        hidden: Width of the perceptron.
        wide: Whether logit and product of the inner model are added.
        seed: Of the perceptron's weights.
    """

    def __init__(self, inner: Personalizer, hidden: int = 32, *, wide: bool = False, seed: int = 0) -> None:
        super().__init__(inner.global_block)
        self.inner, self.wide = inner, wide
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.deep = perceptron([3 * inner.width, hidden, 1])

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
        deep: Tensor = self.deep(torch.cat([h, e, h * e], -1))[..., 0]
        return base + (h * e).sum(-1) + deep if self.wide else deep


def deep_maker(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Maker:
    """ID models whose score is a perceptron's."""
    make = id_maker(config, vocabulary, seed)
    return lambda: DeepId(make(), seed=seed)


def wide_maker(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Maker:
    """Wide-and-deep ID models."""
    make = id_maker(config, vocabulary, seed)
    return lambda: DeepId(make(), wide=True, seed=seed)
