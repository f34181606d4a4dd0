import numpy as np
from meta_embed.model.build import build_model
from meta_embed.train.outer import held_back_tasks, mean_loss
from meta_embed.train.tune import still_improving, tune, with_warm_start
from meta_embed.train.warm import TableOptions, train_table


def test_one_training_judges_every_number_of_epochs(trained):
    """What is chosen is what separate trainings of every length would have chosen."""
    train, held_back = trained.events.choose(np.arange(90)), trained.events.choose(np.arange(90, 120))
    seen: list[dict[str, float]] = []
    chosen = tune(train, held_back, trained.config, trained.vocabulary, 0, (1.0, 10.0), 4, seen.append)
    tasks = list(held_back_tasks(held_back, trained.config.episodes))
    losses = {}
    for row in seen:
        precision, epochs = row["precision"], int(row["warm_epochs"])
        model = build_model(with_warm_start(trained.config, precision, 0), trained.vocabulary, 0)
        train_table(model, train, TableOptions(epochs, trained.config.train.warm_lr, precision), 0)
        losses[precision, epochs] = mean_loss(model, tasks)
        assert abs(losses[precision, epochs] - row["held_back_loss"]) < 1e-7
    best = min(losses, key=losses.__getitem__)
    assert (chosen.model.precision, chosen.train.warm_epochs) == best
    assert chosen.columns == trained.config.columns


def test_patience_grows_with_what_it_took():
    assert still_improving([3.0])
    assert still_improving([3.0, 4.0])
    assert not still_improving([3.0, 4.0, 4.0])
    rest = [
        9.0,
        8.0,
        7.0,
        6.0,
        6.1,
        6.1,
        6.1,
    ]  # the fourth epoch was the best, so four more may come without a better one
    assert still_improving(rest)
    assert not still_improving([*rest, 6.1])
    assert still_improving([*rest, 5.9, 6.0, 6.0])


def test_a_judge_ends_the_training(trained):
    calls = []

    def judge(vectors):
        calls.append(vectors.shape)
        return len(calls) < 2

    model = build_model(trained.config, trained.vocabulary, 0)
    vectors = train_table(model, trained.events, TableOptions(9), judge=judge)
    assert calls == [vectors.shape] * 2
    other = build_model(trained.config, trained.vocabulary, 0)
    assert np.array_equal(train_table(other, trained.events, TableOptions(2)), vectors)
