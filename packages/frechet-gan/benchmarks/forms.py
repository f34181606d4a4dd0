"""What the bars are measured against that no package offers: the FD-loss form, and one rank of a distributed step."""

from typing import Any

import numpy as np
import torch
from frechet_gan import TransportLoss
from PIL import Image
from torch import Tensor


def principal_root(covariance: Tensor) -> Tensor:
    """Symmetric root of a covariance, which FD-loss computes once for its reference."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    return root


def fd_loss(fake: Tensor, mean: Tensor, covariance: Tensor, root: Tensor) -> Tensor:
    """The Frechet distance as FD-loss (arXiv 2604.28190) writes it, for autograd through `eigvalsh`, in float64."""
    rows = fake.double()
    own = rows.mean(0)
    centred = rows - own
    own_covariance = centred.mT @ centred / (rows.shape[0] - 1)
    values = torch.linalg.eigvalsh(root @ own_covariance @ root)
    trace = own_covariance.diagonal().sum() + covariance.diagonal().sum() - 2 * values.clamp_min(0).sqrt().sum()
    distance: Tensor = (own - mean).square().sum() + trace
    return distance


def clean_fid_image(path: str, size: int) -> Tensor:
    """An image as clean-fid 0.1.35 reads it (mode `clean`): RGB, then bicubic in floats, channel by channel."""
    pixels = np.array(Image.open(path).convert("RGB"))
    channels = []
    for i in range(3):
        channel = Image.fromarray(pixels[:, :, i].astype(np.float32), mode="F")
        channels.append(np.asarray(channel.resize((size, size), resample=Image.Resampling.BICUBIC)).clip(0, 255))
    return torch.from_numpy(np.stack(channels).astype(np.float32))


def rank_gradient(rank: int, ranks: int, fake: Tensor, real: Tensor, rows: int, options: dict[str, Any]) -> Tensor:
    """One rank's share of what averaging over the ranks leaves, shape (own rows, d)."""
    own, target = (t.split([rows, t.shape[0] - rows])[rank].clone() for t in (fake, real))
    own.requires_grad_()
    TransportLoss(**options)(own, target).backward()
    assert own.grad is not None
    share: Tensor = own.grad / ranks
    return share
