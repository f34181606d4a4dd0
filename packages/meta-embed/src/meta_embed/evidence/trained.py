"""A model trained on the generator's members, beside a baseline, with members set aside: for demo and bench."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from meta_embed.config import Config, ModelOptions, TrainOptions
from meta_embed.evaluate.baselines import no_personalization
from meta_embed.evidence.generator import SCHEMA, World, make_world
from meta_embed.model.build import build_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Vocabulary, build_vocabulary
from meta_embed.tasks.events import Events, build_events
from meta_embed.train.outer import fit, split_members
from meta_embed.train.tune import tune

QUERY, START = 40, 32
"""Events of a query, and of a history before it at least."""


@dataclass(frozen=True)
class TrainedWorld:
    """A world and what was trained on it.

    Attributes:
        world: The truth and the log.
        config: Options, tuned on the held-back members.
        vocabulary: Of the items.
        model: Meta-trained.
        plain: Without personalization, as carefully tuned.
        tested: Log of the members that no training saw.
    """

    world: World
    config: Config
    vocabulary: Vocabulary
    model: Personalizer
    plain: Personalizer
    tested: Events


def trained_world(members: int, seed: int, say: Callable[[str], None] = lambda _: None) -> TrainedWorld:
    """Make a world and train on it.

    Args:
        members: Members of the generator.
        seed: Seed.
        say: Called with what is going on.

    Returns:
        The world and the models.
    """
    world = make_world(members, least=START + QUERY, seed=seed)
    config = Config(columns=SCHEMA, model=ModelOptions(width=9, hidden=0), train=TrainOptions(epochs=20, tested=0.2))
    vocabulary = build_vocabulary(world.table, SCHEMA)
    events = build_events(world.table, SCHEMA, vocabulary)
    train, held_back, tested = split_members(events, config, seed)
    say(f"{members} members, {len(events.time)} events; training on {len(train)} members")
    known, judge = events.choose(train), events.choose(held_back)
    plain = no_personalization(known, judge, config, vocabulary, seed)
    fast = msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, warm_lr=0.02))
    config = tune(known, judge, fast, vocabulary, seed, precisions=(6.0, 20.0))
    model = build_model(config, vocabulary, seed)
    progress = fit(model, known, judge, config, seed=seed)
    say(f"meta-trained {progress.epoch} epochs, best held-back loss {progress.best:.4f}")
    return TrainedWorld(world, config, vocabulary, model, plain, events.choose(tested))
