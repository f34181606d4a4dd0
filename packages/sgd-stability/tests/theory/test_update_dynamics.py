import math

import pytest
import torch
from sgd_stability import SCHEMES, CurvatureFamily, Sampling, Update, lr_threshold, quadratic, update_threshold
from sgd_stability.theory.almost_sure import almost_sure_threshold, lyapunov_exponent

UPDATES = [
    Update(momentum=0.9),
    Update(momentum=0.9, dampening=0.9),
    Update(momentum=0.5, nesterov=True),
    Update(momentum=0.95, nesterov=True, weight_decay=0.1),
    Update(weight_decay=0.3),
    Update(momentum=0.8, weight_decay=0.3, decoupled=True),
]


@pytest.mark.parametrize("update", UPDATES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_threshold_equals_the_doubled_state_space(scheme, update, oracle):
    for seed in range(6):
        H, sampling = oracle.random_family(seed, scheme, largest_d=3)
        H = H + 0.05 * H.mean().abs() * torch.eye(H.shape[1])  # no flat directions, where the radius is one
        found = update_threshold(CurvatureFamily.from_hessians(H), sampling, update, tolerance=1e-7).value
        assert oracle.state_space_radius(H, sampling, update, found * (1 - 1e-5)) < 1
        assert oracle.state_space_radius(H, sampling, update, found * (1 + 1e-5)) > 1
        for share in (0.03, 0.3, 0.7, 0.95):  # stable all the way below: the crossing found is the first
            assert oracle.state_space_radius(H, sampling, update, share * found) < 1


def test_plain_updates_and_full_batches_are_the_known_edges():
    family = CurvatureFamily.from_hessians(quadratic.random_hessians(6, 4, 2, "isotropic", seed=1))
    lambda1 = family.lambda_max
    assert update_threshold(family, Sampling(6, 2)).value == lr_threshold(family, Sampling(6, 2)).value
    full = Sampling(6, 6)
    heavy = update_threshold(family, full, Update(momentum=0.9)).value
    assert heavy == pytest.approx(2 * 1.9 / lambda1)
    adam = update_threshold(family, full, Update(momentum=0.9, dampening=0.9)).value
    assert adam == pytest.approx(38 / lambda1)  # 2 (1 + b1) / (1 - b1)
    nesterov = update_threshold(family, full, Update(momentum=0.9, nesterov=True)).value
    assert nesterov == pytest.approx(2 * 1.9 / (2.8 * lambda1))
    decay = update_threshold(family, full, Update(weight_decay=0.5)).value
    assert decay == pytest.approx(2 / (lambda1 + 0.5))


@pytest.mark.parametrize("update", [u for u in UPDATES if not u.decoupled], ids=str)
def test_edge_is_where_torch_sgd_diverges_on_a_parabola(update):
    edge = update.edge(3.0)
    sizes = []
    for factor in (0.97, 1.03):
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD(
            [w],
            lr=factor * edge,
            momentum=update.momentum,
            dampening=update.dampening,
            nesterov=update.nesterov,
            weight_decay=update.weight_decay,
        )
        for _ in range(1000):
            w.grad = 3.0 * w.detach()
            optimizer.step()
        sizes.append(abs(w.item()))
    assert sizes[0] < 1e-3
    assert not sizes[1] < 1e3  # it may have overflowed


def test_zero_family_and_impossible_updates():
    zero = CurvatureFamily.from_hessians(torch.zeros(3, 2, 2))
    assert update_threshold(zero, Sampling(3, 1), Update(momentum=0.9)).value == math.inf
    with pytest.raises(ValueError, match="momentum: "):
        Update(momentum=1.0)
    with pytest.raises(ValueError, match="nesterov: "):
        Update(nesterov=True)
    with pytest.raises(ValueError, match="decoupled: "):
        Update(momentum=0.9, nesterov=True, decoupled=True)


def test_almost_sure_threshold_lies_above_the_mean_square_one_and_is_right_in_one_dimension():
    # d = 1, B = 1: |1 - eta h_i| has geometric mean one at the threshold.
    H = torch.tensor([0.5, 4.0], dtype=torch.float64).reshape(2, 1, 1)
    family, sampling = CurvatureFamily.from_hessians(H), Sampling(2, 1)
    found = almost_sure_threshold(family, sampling, steps=2000, paths=32, tolerance=5e-3)
    # |1 - eta/2| |4 eta - 1| = 1 for eta in (1/4, 2): 2 eta^2 - 4.5 eta + 2 = 0
    assert found == pytest.approx((4.5 - math.sqrt(4.5**2 - 16)) / 4, rel=0.02)
    assert found > lr_threshold(family, sampling).value


def test_lyapunov_exponent_is_seeded_and_bounded_by_the_radius():
    from sgd_stability import second_moment_radius

    family = CurvatureFamily.from_hessians(quadratic.random_hessians(6, 3, 1, "isotropic", seed=4))
    sampling = Sampling(6, 2)
    lr = 1.1 * lr_threshold(family, sampling).value
    first = lyapunov_exponent(family, lr, sampling, seed=3)
    assert first == lyapunov_exponent(family, lr, sampling, seed=3)
    assert first.value < math.log(second_moment_radius(family, lr, sampling).value) / 2
    heavy = lyapunov_exponent(family, 0.2 * lr, sampling, update=Update(momentum=0.9))
    assert heavy.value < 0
