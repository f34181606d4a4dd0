r"""What a predictor could know at best: the posterior mean of the probability, given the support and the true world.

$$ \Pr(y = 1 \mid \text{support}) = \mathbb{E}[\sigma(b + u^\top v) \mid \text{support}], $$

with Laplace's approximation to the posterior of u and Gauss-Hermite quadrature over the logit; so a *near*-oracle.
"""

import numpy as np
import torch
from core_tensor.ops.map_head import map_head

from meta_embed.evaluate.metrics import Scores
from meta_embed.evidence.generator import World
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events, ranges
from meta_embed.tasks.ragged import pad
from meta_embed.tasks.split import Split


def near_oracle(world: World, item: Array, y: Array, split: Split) -> Array:
    """Probabilities of all query rows.

    Args:
        world: The truth.
        item: Item of every event, in the order of the log, shape (N,).
        y: Label of every event, shape (N,).
        split: Tasks; members are positions in the world.

    Returns:
        Shape (query rows,).
    """
    d = world.items.shape[1]
    support, query = ranges(split.support_start, split.support), ranges(split.query_start, split.query)
    lengths = torch.from_numpy(split.support)
    h, base = torch.from_numpy(world.items[item[support]]), torch.from_numpy(world.bias[item[support]])
    labels = torch.from_numpy(y[support].astype(np.float64))
    P = torch.eye(d, dtype=torch.float64) / world.tau**2
    mu = torch.from_numpy(world.preference_mean[split.members])
    one = torch.ones_like(labels)
    e, H = map_head(pad(h, lengths), pad(base, lengths), pad(labels, lengths), pad(one, lengths), lengths, mu, P)
    owner = torch.from_numpy(np.repeat(np.arange(len(split.members)), split.query))
    v = torch.from_numpy(world.items[item[query]])
    z = torch.from_numpy(world.bias[item[query]]) + (e[owner] * v).sum(1)
    covariance = torch.linalg.inv(H)[owner]
    spread = (v[:, None, :] @ covariance @ v[:, :, None]).flatten().clamp_min(0).sqrt()
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    points = z[:, None] + spread[:, None] * torch.from_numpy(nodes)
    probability = (points.sigmoid() * torch.from_numpy(weights / weights.sum())).sum(1)
    return np.asarray(probability.numpy())


def oracle_scores(world: World, asked: Events, split: Split) -> Scores:
    """The near-oracle's logits on the query rows of some members of a world.

    Args:
        world: The truth.
        asked: Log of the members, whose keys are their positions in the world.
        split: Tasks in that log.

    Returns:
        The scores.
    """
    member = asked.keys[split.members]
    begin = np.searchsorted(np.asarray(world.table["member"]), member)  # the world is sorted as the log is
    shift = begin - asked.offsets[:-1][split.members]
    moved = Split(member, split.support_start + shift, split.support, split.query_start + shift, split.query)
    item, clicked = np.asarray(world.table["item"]), np.asarray(world.table["clicked"])
    p = np.clip(near_oracle(world, item, clicked, moved), 1e-12, 1 - 1e-12)
    query = ranges(split.query_start, split.query)
    return Scores(np.log(p / (1 - p)), asked.y[query], np.repeat(split.members, split.query))
