r"""Members whose preferences are known: the default data of the demo, with a near-oracle in `evidence.oracle`.

$$ u_t \sim N(M m_t, \tau^2 I), \qquad \text{logit} = b + b_i + u_t^\top v_i, \qquad
P(n_t = n) \propto (n + 1)^{-1.1}, \; n \le 500, $$

with member features m_t, item vectors v_i and activity n_t. With `drift` preferences walk at random between events.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from meta_embed.tasks.encode import Array
from meta_embed.tasks.schema import Feature, Schema

DAY = 86_400.0


@dataclass(frozen=True)
class World:
    """Events and the truth behind them.

    Attributes:
        table: Columns member, time, clicked, item, profile (list), one row per event, sorted by member and time.
        preference_mean: M m_t, shape (members, d).
        tau: Spread of a member's preference about it.
        items: Item vectors v_i, shape (items, d).
        bias: b + b_i, shape (items,).
        logits: True logit of every event, shape (rows,).
    """

    table: pa.Table
    preference_mean: Array
    tau: float
    items: Array
    bias: Array
    logits: Array


SCHEMA = Schema(
    entity="member",
    time="time",
    label="clicked",
    row=(Feature("item"),),
    member=(Feature("profile", "dense", width=4),),
)
"""The generator's columns."""


def make_world(
    members: int = 2000,
    items: int = 200,
    d: int = 6,
    tau: float = 0.7,
    drift: float = 0.0,
    longest: int = 500,
    least: int = 40,
    seed: int = 0,
) -> World:
    """Draw members, items and events.

    Args:
        members: Number of members.
        items: Number of items.
        d: Length of preferences.
        tau: Spread of preferences about what the profile says.
        drift: Standard deviation of a preference's random walk over one day, as a share of tau.
        longest: Most events that lie before the last `least` ones.
        least: Events that every member has besides, so that each can be asked about.
        seed: Seed.

    Returns:
        The world.
    """
    rng = np.random.default_rng(seed)
    profile = rng.standard_normal((members, 4))
    M = rng.standard_normal((4, d)) * 0.35
    mean = profile @ M
    u = mean + tau * rng.standard_normal((members, d))
    v = rng.standard_normal((items, d)) * np.sqrt(2.0 / d) * 1.2
    bias = -0.3 + 0.5 * rng.standard_normal(items)
    sizes = np.arange(longest + 1)
    share = (sizes + 1.0) ** -1.1
    n = rng.choice(sizes, members, p=share / share.sum()) + least
    owner = np.repeat(np.arange(members), n)
    item = rng.integers(0, items, len(owner))
    gaps = rng.exponential(DAY / 4, len(owner))
    begin = np.concatenate([[0], n.cumsum()[:-1]])
    elapsed = gaps.cumsum() - np.repeat(np.concatenate([[0.0], gaps.cumsum()])[begin], n)
    current = u[owner]
    if drift:
        walk = rng.standard_normal((len(owner), d)) * (drift * tau * np.sqrt(gaps / DAY))[:, None]
        total = walk.cumsum(0)
        current = current + total - np.repeat(np.concatenate([np.zeros((1, d)), total])[begin], n, axis=0)
    logits = bias[item] + (current * v[item]).sum(1)
    clicked = rng.random(len(owner)) < 1 / (1 + np.exp(-logits))
    start = 1.7e9
    table = pa.table(
        {
            "member": owner,
            "time": start + elapsed,
            "clicked": clicked.astype(np.float32),
            "item": item,
            "profile": pa.FixedSizeListArray.from_arrays(pa.array(profile[owner].astype(np.float32).ravel()), 4),
        }
    )
    return World(table, mean, tau, v, bias, logits)
