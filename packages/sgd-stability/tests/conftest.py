"""Shared by the tests: dense oracles of the second moment, tiny networks with dense Hessians."""

from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from sgd_stability import Sampling, Update
from sgd_stability.theory.quadratic import random_hessians
from torch import nn

ALIGNMENTS = ("isotropic", "aligned", "clustered", "dominant")


def dense_threshold(H, sampling):
    """eta* from the dense pencil (Q, D) on range(H): Kronecker matrices, no code of the package."""
    values, vectors = torch.linalg.eigh(H.mean(0))
    V = vectors[:, values > 1e-12 * values[-1]]
    G = V.T @ H @ V
    h, eye = G.mean(0), torch.eye(V.shape[1], dtype=H.dtype)
    D = torch.kron(h, eye) + torch.kron(eye, h)
    noise = torch.einsum("iab,icd->acbd", G, G).reshape(D.shape) / len(H)
    Q = sampling.a * torch.kron(h, h) + sampling.s * noise
    return 1 / scipy.linalg.eigh(Q.numpy(), D.numpy(), eigvals_only=True)[-1]


def random_family(seed, scheme, largest_d=6):
    """A random family and a batch size, deterministic in the seed."""
    g = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    n, d = integer(2, 13), integer(1, largest_d)
    H = random_hessians(n, d, integer(1, d), ALIGNMENTS[integer(0, 3)], seed=seed)
    return H, Sampling(n, integer(1, n), scheme)


def state_space_radius(H, sampling, update: Update, lr):
    """Radius of the second moment of (delta, velocity) as torch.optim.SGD moves it, by the dense 4d^2 x 4d^2 matrix."""
    d = H.shape[1]
    eye = torch.eye(d, dtype=H.dtype)
    beta, tau, decay = update.momentum, update.dampening, update.weight_decay

    def transition(G):
        g = G if update.decoupled else G + decay * eye
        v_delta, v_v = (1 - tau) * g, beta * eye
        keep = 1 - lr * decay if update.decoupled else 1.0
        if update.nesterov:
            d_delta, d_v = eye - lr * (g + beta * v_delta), -lr * beta * v_v
        else:
            d_delta, d_v = keep * eye - lr * v_delta, -lr * v_v
        return torch.cat([torch.cat([d_delta, d_v], 1), torch.cat([v_delta, v_v], 1)])

    zero = transition(torch.zeros_like(eye))
    mean = transition(H.mean(0))
    total = torch.kron(mean, mean) + (sampling.a - 1) * torch.kron(mean - zero, mean - zero)
    for Hi in H:
        noise = transition(Hi) - zero
        total += sampling.s / len(H) * torch.kron(noise, noise)
    return float(torch.linalg.eigvals(total).abs().max())


def tiny_network(outputs=3, seed=0, n=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, torch.randn(n, 4).double(), torch.randint(0, outputs, (n,))


def dense_sample_hessians(model, losses):
    """Hessian of every entry of losses() by autograd, one row at a time, shape (n, d, d)."""
    parameters = list(model.parameters())
    found = []
    for loss in losses():
        first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in first]
        found.append(torch.stack([torch.cat([p.reshape(-1) for p in row]) for row in rows]))
    return torch.stack(found)


@pytest.fixture
def oracle():
    return SimpleNamespace(
        dense_threshold=dense_threshold,
        random_family=random_family,
        state_space_radius=state_space_radius,
        tiny_network=tiny_network,
        dense_sample_hessians=dense_sample_hessians,
    )
