"""A run's model against tuned baselines on its test members: `meta-embed evaluate`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meta_embed.evaluate import baselines as tuned
from meta_embed.evaluate import buckets
from meta_embed.evaluate.buckets import SIZES, last_events, model_scores
from meta_embed.evaluate.metrics import Scores
from meta_embed.evaluate.mixture import Mixture, fit_mixture
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.events import Events
from meta_embed.tasks.split import Split, split_at
from meta_embed.train.run import load_with_parts

Predictor = Callable[[Split], Scores]


def compare_run(
    run: Path, events: Path | None, baselines: Sequence[str], *, by_activity: bool, query: int, start: int
) -> list[dict[str, Any]]:
    """Figures of the run's model and of baselines.

    Args:
        run: Run folder.
        events: Events; None for those of the training.
        baselines: Out of `none`, `id`, `deep`, `wide`, `hybrid`.
        by_activity: By activity before each member's last events; otherwise by support size before a fixed query.
        query: Events of a query at most.
        start: Position of the fixed query.

    Returns:
        Rows; columns of our model begin with `ours`, among them its gains over the baselines.

    Raises:
        ValueError: If no activity has queries with both labels.
    """
    model, config, vocabulary, _, (train, held_back, tested) = load_with_parts(run, events)
    support = config.episodes.support
    sizes = [n for n in SIZES if n <= min(start, support)]

    def judged(split: Split) -> Split:
        """Tasks of the held-back members like those that will be asked."""
        if by_activity:
            return last_events(held_back, query, support)
        return split_at(held_back, int(split.support.max(initial=0)), query, start=start)

    predictors: dict[str, Predictor] = {}
    if "none" in baselines:
        plain = tuned.no_personalization(train, held_back, config, vocabulary)
        predictors["none"] = lambda split: model_scores(plain, tested, split, adapted=False)
    makers = {"id": tuned.id_maker, "deep": tuned.deep_maker, "wide": tuned.wide_maker}
    for name in makers:
        if name in baselines:
            make = makers[name](config, vocabulary)
            predictors[name] = retrained(make, train, held_back, tested, judged, config.train.warm_lr)
    predictors["ours"] = lambda split: model_scores(model, tested, split)
    if "hybrid" in baselines:
        make, lr = tuned.id_maker(config, vocabulary), config.train.warm_lr
        by_id = predictors.get("id") or retrained(make, train, held_back, tested, judged, lr)
        splits = {n: split_at(held_back, n, query, start=start) for n in sizes if n}
        weights = hybrid_weights(make, model, train, held_back, splits, lr)
        predictors["hybrid"] = functools.partial(mixed, by_id, predictors["ours"], weights)
    if by_activity:
        rows = buckets.by_activity(tested, query, support, predictors, "ours")
        if not rows:
            raise ValueError("events: expected both labels among the test members' queries, got one; it has no AUC")
        return rows
    return buckets.by_size(tested, sizes, query, start, predictors, "ours")


def retrained(
    make: tuned.Maker, train: Events, held_back: Events, asked: Events, judged: Callable[[Split], Split], lr: float
) -> Predictor:
    """A predictor that tunes and retrains an ID model for every split it is asked about.

    Args:
        make: A new model.
        train: Training log.
        held_back: Log of the members that decide about its options.
        asked: Log of the members who are asked.
        judged: Tasks of the held-back members that are like a split.
        lr: Adam's rate.

    Returns:
        The predictor.
    """

    @functools.cache
    def predict(split: Split) -> Scores:
        found = tuned.tune_id(make, train, held_back, [judged(split)], lr)[0]
        return tuned.retrained_id(make, train, asked, split, found.choice, lr)

    return predict


def hybrid_weights(
    make: tuned.Maker, model: Personalizer, train: Events, held_back: Events, splits: Mapping[int, Split], lr: float
) -> Mixture:
    """Weights per n of a retrained ID embedding and a model, fitted on the held-back members.

    Args:
        make: A new ID model.
        model: The model.
        train: Training log.
        held_back: Log of the members that decide.
        splits: Their tasks by support size, 0 not among them.
        lr: Adam's rate of the ID model.

    Returns:
        The mixture; without events it is the model alone, since an ID embedding knows nobody then.

    Raises:
        ValueError: If there is no split.
    """
    if not splits:
        raise ValueError("hybrid: expected supports of some events, got none; ask with a larger start")
    logits, y = {}, {}
    for (n, split), found in zip(
        splits.items(), tuned.tune_id(make, train, held_back, list(splits.values()), lr), strict=True
    ):
        logits[n] = (found.scores.logit, model_scores(model, held_back, split).logit)
        y[n] = found.scores.y
    fitted = fit_mixture(logits, y)
    return Mixture((0, *fitted.sizes), np.concatenate([[[0.0, 1.0]], fitted.weights]))


def mixed(first: Predictor, second: Predictor, weights: Mixture, split: Split) -> Scores:
    """Scores of two predictors mixed by the events of each member's support."""
    one, other = first(split), second(split)
    n = np.repeat(split.support, split.query)
    return Scores(weights.mix((one.logit, other.logit), n), one.y, one.owner)
