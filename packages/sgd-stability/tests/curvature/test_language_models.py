"""Many outputs per sample: nothing of the size of (outputs, outputs) or (outputs, parameters) is ever formed."""

import pytest
import torch
from core_tensor.dev.testing import assert_close
from sgd_stability import CurvatureFamily, StabilityMonitor, analyze
from sgd_stability.curvature.jacobian import weighted_jacobian
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.curvature.sample_curvature import Effort
from sgd_stability.curvature.sample_curvature import sample_curvature as curvature_of
from sgd_stability.curvature.truncated import projected_family
from torch import nn
from torch.nn import functional as F


class Tiny(nn.Module):
    """A one-layer causal transformer: tokens (n, P) to logits (n, P, V)."""

    def __init__(self, vocabulary=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, vocabulary)

    def forward(self, tokens):
        h = self.embed(tokens)
        q, k, v = self.qkv(h).chunk(3, 2)
        scores = q @ k.mT / q.shape[2] ** 0.5
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return self.out(h + scores.masked_fill(mask, -1e9).softmax(2) @ v)


def _tokens(n=6, length=5):
    torch.manual_seed(0)
    model = Tiny().double()
    tokens = torch.randint(0, 7, (n, length + 1))
    return model, tokens[:, :-1], tokens[:, 1:].clone()


def test_token_cross_entropy_is_torchs_with_ignored_positions():
    model, x, y = _tokens()
    y[:, 0] = -100
    loss = resolve_loss("token_cross_entropy")
    z = model(x).detach()
    assert_close("loss", F.cross_entropy(z.flatten(0, 1), y.flatten()), loss.values(z, y).mean(), 1e-12)
    factor = loss.factor(z, y)
    W = factor.times(torch.eye(factor.rank, dtype=z.dtype).expand(len(z), -1, -1))
    for i in range(2):
        exact = torch.autograd.functional.hessian(lambda v, i=i: loss.values(v.view(1, 5, 7), y[i : i + 1])[0], z[i])
        assert_close("Lambda", exact.reshape(35, 35), W[i] @ W[i].T, 1e-12)
    assert_close("trace", (W @ W.mT).diagonal(dim1=1, dim2=2).sum(1), factor.trace(), 1e-12)
    y[0, 1:4] = -100  # now one sequence has fewer tokens: torch divides by the number of all of them
    fitted = loss.fit(z[:1], y)
    assert_close("uneven", F.cross_entropy(z.flatten(0, 1), y.flatten()), fitted.values(z, y).mean(), 1e-12)
    assert_close("of a part", fitted.values(z, y)[:2], fitted.values(z[:2], y[:2]), 1e-12)
    W = fitted.factor(z, y).times(torch.eye(35, dtype=z.dtype).expand(len(z), -1, -1))
    exact = torch.autograd.functional.hessian(lambda v: fitted.values(v.view(1, 5, 7), y[:1])[0], z[0])
    assert_close("Lambda", exact.reshape(35, 35), W[0] @ W[0].T, 1e-12)


def test_truncated_route_folds_many_outputs_into_few():
    model, x, y = _tokens()
    network = make_network(model, resolve_loss("token_cross_entropy"), x, y)
    Z = weighted_jacobian(network)
    V, _ = torch.linalg.qr(torch.randn(network.size, 9, dtype=torch.float64))
    direct = CurvatureFamily.from_factors(Z @ V)
    folded = projected_family(network, V)
    assert folded.factors.shape[1] <= 9 < network.factor.rank
    assert_close("h", direct.h, folded.h, 1e-10)
    assert_close("H_i", direct.sample_curvature, CurvatureFamily.from_factors(folded.factors).sample_curvature, 1e-10)
    blocks = curvature_of(network)
    assert_close("L_i", blocks, curvature_of(network, effort=Effort(block=1)), 1e-5)
    report = analyze(model, "token_cross_entropy", (x, y), method="truncated", k=30)
    exact = analyze(model, "token_cross_entropy", (x, y), method="jacobian")
    assert report.lr_threshold(2).upper == pytest.approx(exact.lr_threshold(2).exact, rel=0.02)
    assert report.lr_threshold(2).lower <= exact.lr_threshold(2).exact
    assert report.trace == pytest.approx(exact.trace, rel=1e-9)


def test_signed_factors_are_folded_too():
    torch.manual_seed(0)
    model = nn.Linear(3, 6).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 6).double()
    network = make_network(model, resolve_loss(lambda z, t: (z.tanh() - t).square().sum(1)), x, y)
    V, _ = torch.linalg.qr(torch.randn(network.size, 3, dtype=torch.float64))
    direct = CurvatureFamily.from_factors(weighted_jacobian(network) @ V, network.factor.signs)
    folded = projected_family(network, V)
    assert network.factor.signs is not None
    assert_close("h", direct.h, folded.h, 1e-10)
    M = torch.eye(len(direct.h), dtype=torch.float64)
    noise = (torch.linalg.eigvalsh(family.noise(M)) for family in (direct, folded))  # eigenvectors of H have no sign
    assert_close("noise", *noise, 1e-9)


def test_the_monitor_watches_a_language_model():
    model, x, y = _tokens(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    monitor = StabilityMonitor(model, "token_cross_entropy", (x, y), batch_size=4, every=2).attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    assert [c.step for c in monitor.history] == [2, 4]
    exact = monitor.exact().lr_threshold(4)
    assert float(exact) <= monitor.check().upper * 1.01
