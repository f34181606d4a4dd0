r"""What a predictor could know at best: the posterior mean of the probability, given the support and the true world.

$$ \Pr(y = 1 \mid \text{support}) = \mathbb{E}[\sigma(b + u^\top v) \mid \text{support}], $$

with Laplace's approximation to the posterior of u and Gauss-Hermite quadrature over the logit; so a *near*-oracle.
"""

import numpy as np
import torch
from core_tensor.ops.map_head import map_head

from meta_embed.evidence.generator import World
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import ranges
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
