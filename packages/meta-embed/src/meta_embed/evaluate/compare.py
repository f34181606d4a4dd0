"""A run's model against tuned baselines on its test members: `meta-embed evaluate`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meta_embed.evaluate import baselines as tuned
from meta_embed.evaluate import buckets
from meta_embed.evaluate.buckets import SIZES, last_events, model_scores
from meta_embed.evaluate.metrics import Scores
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
        baselines: Out of `none`, `id`, `deep`, `wide`.
        by_activity: By activity before each member's last events; otherwise by support size before a fixed query.
        query: Events of a query at most.
        start: Position of the fixed query.

    Returns:
        Rows; columns of our model begin with `ours`.
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
    if by_activity:
        return buckets.by_activity(tested, query, support, predictors)
    return buckets.by_size(tested, sizes, query, start, predictors)


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

    def predict(split: Split) -> Scores:
        found = tuned.tune_id(make, train, held_back, [judged(split)], lr)[0]
        return tuned.retrained_id(make, train, asked, split, found.choice, lr)

    return predict
