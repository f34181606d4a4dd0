import numpy as np
import pytest
import torch
from meta_embed.evaluate import baselines
from meta_embed.evaluate.buckets import model_scores
from meta_embed.evaluate.metrics import log_loss
from meta_embed.tasks.split import split_at
from meta_embed.train.outer import held_back_tasks
from meta_embed.train.tune import still_improving
from meta_embed.train.warm import TableOptions, train_table


@pytest.fixture(scope="module")
def parts(trained):
    train, held_back = trained.events.choose(np.arange(90)), trained.events.choose(np.arange(90, 120))
    return train, held_back, trained.config, trained.vocabulary


def _split(events, n):
    return split_at(events, n, 8, start=6)


def test_no_personalization_is_the_best_epoch(parts):
    train, held_back, config, vocabulary = parts
    model = baselines.no_personalization(train, held_back, config, vocabulary, epochs=5)
    tasks = list(held_back_tasks(held_back, config.episodes))
    apart = []
    for epochs in range(1, 6):
        other = baselines.build_model(config, vocabulary, 0)
        train_table(other, train, TableOptions(epochs, config.train.warm_lr, float("inf")))
        apart.append(baselines.unadapted_loss(other, tasks))
    seen = next((e for e in range(1, 5) if not still_improving(apart[:e])), 5)
    assert baselines.unadapted_loss(model, tasks) == pytest.approx(min(apart[:seen]), abs=1e-9)


@pytest.mark.parametrize("maker", [baselines.id_maker, baselines.deep_maker, baselines.wide_maker])
def test_an_id_model_tuned_for_several_supports(parts, maker):
    train, held_back, config, vocabulary = parts
    make = maker(config, vocabulary)
    splits = [_split(held_back, n) for n in (2, 6)]
    found = baselines.tune_id(make, train, held_back, splits, 0.02, epochs=2, shrinkages=(1.0, 30.0))
    for best, split in zip(found, splits, strict=True):
        assert best.choice.epochs in (1, 2)
        assert best.choice.shrinkage in (1.0, 30.0)
        assert best.loss == log_loss(best.scores.logit, best.scores.y)
        assert np.array_equal(best.scores.owner, np.repeat(split.members, split.query))
    # of one split it is the retraining itself
    alone = baselines.tune_id(make, train, held_back, splits[:1], 0.02, epochs=2, shrinkages=(3.0,))[0]
    scores = baselines.retrained_id(make, train, held_back, splits[0], alone.choice, 0.02)
    assert np.array_equal(scores.logit, alone.scores.logit)


def test_training_sees_the_supports_and_nothing_else_of_the_asked(parts):
    train, held_back, _, _ = parts
    splits = [_split(held_back, n) for n in (2, 6)]
    both, rows = baselines._with_supports(train, held_back, splits)
    assert len(both) == len(train) + 2 * len(held_back)
    assert np.array_equal(both.counts, np.concatenate([train.counts, held_back.counts, held_back.counts]))
    assert np.array_equal(rows[: len(train.time)], np.arange(len(train.time)))
    first = len(train.time)
    for split in splits:
        expected = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(split.support_start, split.support, strict=True)]
        )
        own = rows[(rows >= first) & (rows < first + len(held_back.time))] - first
        assert np.array_equal(own, expected)
        asked = np.concatenate([np.arange(a, a + n) for a, n in zip(split.query_start, split.query, strict=True)])
        assert not set(own) & set(asked)
        first += len(held_back.time)


def test_a_member_without_events_has_the_prior_mean(parts):
    train, held_back, config, vocabulary = parts
    make = baselines.id_maker(config, vocabulary)
    scores = baselines.retrained_id(make, train, held_back, _split(held_back, 0), baselines.IdChoice(1, 3.0), 0.02)
    model = make()
    both, rows = baselines._with_supports(train, held_back, [_split(held_back, 0)])
    train_table(model, both, TableOptions(1, 0.02, 3.0), rows=rows)
    expected = model_scores(model, held_back, _split(held_back, 0), adapted=False)
    np.testing.assert_allclose(scores.logit, expected.logit, atol=1e-6)


def test_wide_and_deep_is_the_sum_of_both(parts):
    _, held_back, config, vocabulary = parts
    plain = baselines.id_maker(config, vocabulary)()
    deep, wide = baselines.deep_maker(config, vocabulary)(), baselines.wide_maker(config, vocabulary)()
    ids, dense = torch.from_numpy(held_back.ids[:9]), torch.from_numpy(held_back.dense[:9])
    e = torch.randn(9, plain.width, generator=torch.Generator().manual_seed(0))
    total = plain.logits(ids, dense, e) + deep.logits(ids, dense, e)
    torch.testing.assert_close(wide.logits(ids, dense, e), total)
