import math

import pytest
import torch
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.monitor.directional import batch_sharpness, critical_sharpness
from torch import nn


def _stepped(lr, seed=0):
    """A linear regression (a quadratic loss), one full-batch step of gradient descent, and g'Hg / g'g before it."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 2, bias=False).double()
    network = make_network(model, resolve_loss("squared_error"), torch.randn(9, 5).double(), torch.randn(9, 2).double())
    sharpness = batch_sharpness(network)
    before = [p.detach().clone() for p in model.parameters()]
    loss = network.loss.values(model(network.inputs), network.targets).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return network, before, sharpness


@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0, 30.0])
def test_critical_sharpness_is_the_directional_one_on_a_quadratic(lr):
    network, before, sharpness = _stepped(lr)
    after = [p.detach().clone() for p in network.parameters.values()]
    found = critical_sharpness(network, before, lr, evaluations=40)
    assert found == pytest.approx(sharpness, rel=1e-3)  # L(w - eta g) is back at L(w) at eta = 2 / (g'Hg / g'g)
    coarse = critical_sharpness(network, before, lr)
    assert coarse == pytest.approx(sharpness, rel=0.5)
    assert all(torch.equal(p, a) for p, a in zip(network.parameters.values(), after, strict=True))


def test_critical_sharpness_of_no_step_and_of_no_crossing():
    network, before, _ = _stepped(0.1)
    assert math.isnan(critical_sharpness(network, [p.detach() for p in network.parameters.values()], 0.1))
    assert math.isnan(critical_sharpness(network, before, 0.0))
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    linear = make_network(model, resolve_loss(lambda z, _: -z[:, 0]), torch.ones(4, 3), torch.zeros(4))
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.weight.add_(1)
    assert critical_sharpness(linear, start, 0.1) == 0  # downhill for ever
    with torch.no_grad():
        model.weight.sub_(2)
    assert critical_sharpness(linear, start, 0.1) == math.inf  # uphill from the start
