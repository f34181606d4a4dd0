import functools
import math

import pytest
import torch
from core_tensor.dev.testing import assert_close
from sgd_stability import CurvatureFamily, StabilityReport, Update, analyze
from sgd_stability.curvature.gauss_newton import gauss_newton_operator, gauss_newton_product
from sgd_stability.curvature.ghost import gradient_norms, gram, sample_blocks
from sgd_stability.curvature.jacobian import output_jacobian, weighted_jacobian
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.curvature.truncated import loss_hessian_operator, projected_hessians
from sgd_stability.theory.almost_sure import almost_sure_threshold
from torch import nn
from torch.nn import functional as F


class Shared(nn.Module):
    """One layer called twice, one weight tied to another layer, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.twice, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.gain * (self.a(h) + self.b(h).tanh())


def _quartic(z, y):
    return (z - F.one_hot(y, z.shape[1])).pow(4).sum(1)


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (4,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 3, bias=False),
        ),
        (2, 6, 6),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 12, 4, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (2, 3),
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)), (2, 3, 3)),
    "sequence": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3)), (2, 20)),
    "shared": (Shared, (4,)),
}


def _network(name, loss="cross_entropy", n=7):
    torch.manual_seed(0)
    build, shape = CASES[name]
    targets = torch.randint(0, 3, (n,))
    if loss in {"squared_error", "mse"}:
        targets = torch.randn(n, 3).double()
    return make_network(build().double(), resolve_loss(loss), torch.randn(n, *shape).double(), targets)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", CASES)
def test_ghost_gram_equals_the_explicit_one(name, loss):
    network = _network(name, loss)
    Z = weighted_jacobian(network)
    flat = Z.flatten(0, 1)
    assert_close("K", flat @ flat.T, gram(network), 1e-13)
    assert_close("blocks", Z @ Z.mT, sample_blocks(network, chunk=3), 1e-13)
    slopes = network.output_gradient()[:, None] @ output_jacobian(network)
    assert_close("gradients", slopes[:, 0].norm(dim=1), gradient_norms(network, chunk=4), 1e-12)


@pytest.mark.parametrize("loss", ["squared_error", "mse", "cross_entropy", _quartic])
def test_output_factors_against_autograd(loss):
    network = _network("mlp", loss)
    z, y = network.outputs, network.targets
    factor = network.factor
    W = factor.times(torch.eye(factor.rank, dtype=z.dtype).expand(len(z), -1, -1))
    signs = torch.ones(len(z), factor.rank) if factor.signs is None else factor.signs
    mine = (W * signs[:, None, :]) @ W.mT

    def value(flat, i):
        return network.loss.values(flat[None], y[i : i + 1])[0]

    for i in range(len(z)):
        exact = torch.autograd.functional.hessian(lambda flat, i=i: value(flat, i), z[i])
        assert_close("Lambda", exact, mine[i], 1e-10)
    x = torch.randn(len(z), z.shape[1], 2, dtype=z.dtype)
    assert_close("adjoint", W.mT @ x, factor.transpose_times(x), 1e-13)


def test_cross_entropy_with_positions_is_the_mean_over_them():
    z, y = torch.randn(2, 3, 4).double(), torch.randint(0, 3, (2, 4))
    loss = resolve_loss("cross_entropy")
    factor = loss.factor(z, y)
    W = factor.times(torch.eye(12, dtype=z.dtype).expand(2, -1, -1))
    for i in range(2):
        exact = torch.autograd.functional.hessian(
            lambda v, i=i: F.cross_entropy(v.reshape(1, 3, 4), y[i : i + 1]), z[i].reshape(-1)
        )
        assert_close("Lambda", exact, W[i] @ W[i].T, 1e-12)
    assert_close("values", loss.values(z, y).mean(), F.cross_entropy(z, y), 1e-14)


def test_operators_equal_dense_hessians(oracle):
    model, x, y = oracle.tiny_network()
    network = make_network(model, resolve_loss("cross_entropy"), x, y)
    dense = oracle.dense_sample_hessians(model, lambda: F.cross_entropy(model(x), y, reduction="none"))
    eye = torch.eye(network.size, dtype=torch.float64)
    hessian = loss_hessian_operator(network)
    assert_close("Hessian", dense.mean(0), torch.stack([hessian(e) for e in eye]), 1e-12)
    Z = weighted_jacobian(network)
    ggn = gauss_newton_operator(network, chunk=3)
    assert_close("GGN", (Z.mT @ Z).mean(0), torch.stack([ggn(e) for e in eye]), 1e-12)
    one = gauss_newton_product(network, eye[3], chunk=3)
    assert_close("product", (Z.mT @ Z).mean(0)[3], one.product, 1e-12)
    assert_close("forms", Z[:, :, 3].square().sum(1), one.forms, 1e-12)
    p = network.outputs.softmax(1)
    assert_close("traces", 1 - p.square().sum(1), one.output_curvature, 1e-12)
    scale = torch.rand(network.size).double() + 0.5
    scaled = scale[:, None] * dense.mean(0) * scale
    operator = loss_hessian_operator(network, scale=scale)
    assert_close("preconditioned", scaled, torch.stack([operator(e) for e in eye]), 1e-12)
    family = projected_hessians(network, eye, chunk=3)
    direct = CurvatureFamily.from_hessians(dense)
    assert_close("spectrum", direct.h, family.h, 1e-9)
    assert_close("L_i", direct.sample_curvature, family.sample_curvature, 1e-9)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_every_route_gives_the_same_report(oracle, loss):
    model, x, y = oracle.tiny_network()
    y = torch.randn(8, 3).double() if loss == "mse" else y
    reports = {m: analyze(model, loss, (x, y), method=m, k=200) for m in ("gram", "jacobian", "truncated")}
    base = reports["gram"]
    for B in (1, 3, 8):
        exact = base.lr_threshold(B).exact
        assert reports["jacobian"].lr_threshold(B).exact == pytest.approx(exact, rel=1e-8)
        assert reports["truncated"].lr_threshold(B).upper == pytest.approx(exact, rel=1e-4)
        assert reports["truncated"].lr_threshold(B).lower <= exact * (1 + 1e-12)
    for report in reports.values():
        assert report.lambda_max == pytest.approx(base.lambda_max, rel=1e-6)
        assert report.max_sample_curvature == pytest.approx(base.max_sample_curvature, rel=1e-9)
        assert [c.id for c in report.culprits(3)] == [c.id for c in base.culprits(3)]


def test_hessian_and_gauss_newton_agree_at_an_interpolating_minimum(oracle):
    from sgd_stability.report.nonlinear import interpolate

    model, x, _ = oracle.tiny_network()
    y = torch.randn(8, 3).double()
    assert interpolate(model, x, y) < 1e-20
    ggn = analyze(model, "squared_error", (x, y))
    hessian = analyze(model, "squared_error", (x, y), curvature="hessian")
    assert ggn.interpolating
    assert hessian.lambda_max == pytest.approx(ggn.lambda_max, rel=1e-8)
    # mse is 2/3 of the squared error here: curvature scales, thresholds inversely
    mse = analyze(model, "mse", (x, y))
    assert mse.lr_threshold(2).exact == pytest.approx(1.5 * ggn.lr_threshold(2).exact, rel=1e-8)


def test_a_random_point_is_reported_as_no_minimum(oracle):
    model, x, y = oracle.tiny_network()
    report = analyze(model, "cross_entropy", (x, y))
    assert not report.interpolating
    assert report.relative_residual > 1e-3
    assert "not an interpolating minimum" in str(report)
    slopes = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
        for loss in F.cross_entropy(model(x), y, reduction="none")
    ]
    assert report.gradient_rms == pytest.approx(float(torch.stack(slopes).square().sum(1).mean().sqrt()))


def test_sharp_points_with_a_loss_are_reported_as_no_minimum():
    # A large curvature makes steps in the weights tiny; the outputs still miss their targets.
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = 1e4 * torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    for loss, targets in (("cross_entropy", y), ("squared_error", F.one_hot(y, 3).double())):
        report = analyze(model, loss, (x, targets))
        assert report.mean_loss > 0.1
        assert not report.interpolating


def test_subsamples_use_the_true_n_and_certify_nothing(oracle):
    model, x, y = oracle.tiny_network(n=40)
    report = analyze(model, "cross_entropy", (x, y), max_samples=12, seed=3)
    assert (report.n, len(report.ids), report.complete) == (40, 12, False)
    again = analyze(model, "cross_entropy", (x, y), max_samples=12, seed=3)
    assert torch.equal(report.ids, again.ids)
    assert not report.lr_threshold(4).certified
    assert not report.verdict(1.0, 4).certified
    assert "estimates" in str(report)
    assert report.lr_threshold(40).exact == pytest.approx(2 / report.lambda_max)  # no noise at B = n
    assert report.lr_threshold(12).exact < report.lr_threshold(40).exact


def test_a_preconditioner_is_a_change_of_variables(oracle):
    model, x, y = oracle.tiny_network()
    P = torch.rand(sum(p.numel() for p in model.parameters())).double() + 0.1
    report = analyze(model, "cross_entropy", (x, y), preconditioner=P)
    network = make_network(model, resolve_loss("cross_entropy"), x, y)
    Z = weighted_jacobian(network) / P.sqrt()
    direct = CurvatureFamily.from_factors(Z)
    assert report.method == "jacobian"
    assert report.lambda_max == pytest.approx(direct.lambda_max, rel=1e-10)
    truncated = analyze(model, "cross_entropy", (x, y), preconditioner=P, method="truncated", k=100)
    assert truncated.lr_threshold(2).upper == pytest.approx(report.lr_threshold(2).exact, rel=1e-3)
    assert truncated.max_sample_curvature == pytest.approx(direct.max_sample_curvature, rel=1e-10)


def test_verdicts_thresholds_and_batch_sizes_are_consistent(oracle):
    model, x, y = oracle.tiny_network(n=20)
    for update in (Update(), Update(momentum=0.9), Update(momentum=0.8, weight_decay=0.01)):
        report: StabilityReport = analyze(model, "cross_entropy", (x, y), update=update)
        rates = report.max_lr([1, 2, 5, 20])
        assert list(rates.values()) == sorted(rates.values())
        for B, rate in rates.items():
            threshold = report.lr_threshold(B)
            assert threshold.lower <= threshold.exact * (1 + 1e-9)
            assert threshold.exact <= threshold.upper * (1 + 1e-9)
            assert report.verdict(0.99 * rate, B).state == "stable"
            assert report.verdict(1.01 * rate, B).state == "unstable"
            assert report.verdict(1.01 * rate, B).margin == pytest.approx(1.01)
            assert report.min_batch_size((1 - 1e-7) * rate) == B
            assert f"eta* {threshold.exact:.4g} (" in str(threshold)
            assert str(report.verdict(2 * rate, B)).startswith("unstable: learning rate 2 times")
        assert report.min_batch_size(1.1 * report.update.edge(report.lambda_max)) is None
        grid = report.stability_map([0.5 * rates[5], 1.5 * rates[5]], [5, 20])
        assert grid.stable[:, 0].tolist() == [True, False]


def test_almost_sure_kind_lies_above(oracle, monkeypatch):
    short = functools.partial(almost_sure_threshold, steps=200, paths=8, tolerance=0.05)
    monkeypatch.setattr("sgd_stability.report.report.almost_sure_threshold", short)
    model, x, y = oracle.tiny_network(n=6)
    report = analyze(model, "cross_entropy", (x, y))
    assert report.lr_threshold(1, kind="almost_sure").exact > report.lr_threshold(1).exact
    partial = analyze(model, "cross_entropy", (x, y), max_samples=3)
    with pytest.raises(ValueError, match="kind: "):
        partial.lr_threshold(1, kind="almost_sure")


def test_report_is_json_ready(oracle):
    import json

    model, x, y = oracle.tiny_network()
    text = json.dumps(analyze(model, "cross_entropy", (x, y)).to_dict(), allow_nan=False)
    assert set(json.loads(text)["thresholds"]) == {"1", "4"}


def test_data_forms_agree(oracle):
    from torch.utils.data import DataLoader, TensorDataset

    model, x, y = oracle.tiny_network(n=20)
    dataset = TensorDataset(x, y)
    forms = [(x, y), dataset, DataLoader(dataset, batch_size=3, shuffle=True), [(x[:9], y[:9]), (x[9:], y[9:])]]
    forms[3] = iter(forms[3])
    found = [analyze(model, "cross_entropy", form).lambda_max for form in forms]
    assert found == pytest.approx([found[0]] * 4, rel=1e-12)
    streamed = analyze(model, "cross_entropy", iter([(x[:9], y[:9]), (x[9:], y[9:])]), max_samples=5)
    assert (streamed.n, len(streamed.ids)) == (20, 5)


def test_samplers_of_a_loader(oracle):
    from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

    model, x, y = oracle.tiny_network(n=20)
    dataset = TensorDataset(x, y)
    report = analyze(model, "cross_entropy", DataLoader(dataset, 4, sampler=SubsetRandomSampler([2, 3, 5, 7])))
    assert report.n == 4
    direct = analyze(model, "cross_entropy", (x[[2, 3, 5, 7]], y[[2, 3, 5, 7]]))
    assert report.lambda_max == pytest.approx(direct.lambda_max)
    weighted = DataLoader(dataset, 4, sampler=WeightedRandomSampler(torch.ones(20), 20))
    with pytest.raises(ValueError, match=r"data: .*WeightedRandomSampler"):
        analyze(model, "cross_entropy", weighted)


def test_mappings_as_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.linear(a * b)

    torch.manual_seed(0)
    model = Two().double()
    inputs = {"a": torch.randn(6, 4).double(), "b": torch.randn(6, 4).double()}
    y = torch.randint(0, 3, (6,))
    mapped = analyze(model, "cross_entropy", (inputs, y))
    plain = analyze(model.linear, "cross_entropy", (inputs["a"] * inputs["b"], y))
    assert mapped.lr_threshold(2).exact == pytest.approx(plain.lr_threshold(2).exact)
    explicit = analyze(model, "cross_entropy", (inputs, y), method="jacobian")
    assert explicit.lambda_max == pytest.approx(plain.lambda_max)


def _bad(loss="cross_entropy", model=None, data=None, **options):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    return analyze(model or nn.Linear(4, 3), loss, (x, y) if data is None else data, **options)


FLOATS = (torch.linspace(-3, 3, 24).reshape(6, 4), torch.ones(6, 3))


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _bad(model=nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))), ValueError, "sum over samples.*batch"),
        (lambda: _bad(model=Mixes()), ValueError, "model: .*own sample"),
        (lambda: _bad(model=nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))), ValueError, "model: .*repeat"),
        (lambda: _bad(model=nn.Flatten()), ValueError, "model: expected at least one parameter"),
        (lambda: _bad(model=nn.Linear(4, 3, dtype=torch.complex64)), TypeError, "parameters: .*complex"),
        (lambda: _bad(loss="hinge"), ValueError, "loss: expected one of"),
        (lambda: _bad(loss=nn.CrossEntropyLoss(reduction="sum")), ValueError, "loss: .*reduction"),
        (lambda: _bad(loss=nn.L1Loss()), ValueError, "loss: expected one with curvature"),
        (lambda: _bad(loss=nn.SmoothL1Loss(beta=0.0)), ValueError, "loss: expected one with curvature"),
        (lambda: _bad(loss=nn.KLDivLoss()), ValueError, "loss: .*reduction|loss: KLDivLoss is not built in"),
        (lambda: _bad(loss=nn.NLLLoss()), ValueError, "outputs: expected log probabilities"),
        (
            lambda: _bad(loss=nn.BCELoss(), data=(torch.randn(6, 4), torch.ones(6, 3))),
            ValueError,
            "outputs: expected probabilities",
        ),
        (lambda: _bad(loss=lambda z, y: F.cross_entropy(z, y)), ValueError, "loss: expected one loss per sample"),
        (lambda: _bad(loss=lambda z, y: (z - z.mean(0)).square().sum(1)), ValueError, "loss: expected a sum over"),
        (lambda: _bad(loss=lambda z, y: z.sum(1) * math.nan), ValueError, "loss: expected finite"),
        (lambda: _bad(loss="mse"), ValueError, "targets: expected shape"),
        (lambda: _bad(loss=3), TypeError, "loss: "),
        (lambda: _bad(data=(torch.randn(2, 4), torch.tensor([-100, -100]))), ValueError, "targets: .*ignored"),
        (
            lambda: _bad(data=(torch.randn(2, 4), torch.tensor([1, 3]))),
            ValueError,
            "targets: .*classes from 0",
        ),
        (lambda: _bad(data=(torch.randn(0, 4), torch.randint(0, 3, (0,)))), ValueError, "data: .*at least one"),
        (
            lambda: _bad(data=(torch.randn(5, 4), torch.randint(0, 3, (6,)))),
            ValueError,
            "data: .* of one length",
        ),
        (lambda: _bad(data=3), TypeError, "data: "),
        (lambda: _bad(data=(torch.full((6, 4), math.nan), torch.zeros(6).long())), ValueError, "model: .*finite"),
        (lambda: _bad().lr_threshold(7), ValueError, "batch_size: "),
        (lambda: _bad().lr_threshold(0), ValueError, "batch_size: "),
        (lambda: _bad().verdict(0.0, 2), ValueError, "lr: "),
        (lambda: _bad().verdict(-1.0, 2), ValueError, "lr: "),
        (lambda: _bad(method="gram", curvature="hessian"), ValueError, "method: "),
        (lambda: _bad(preconditioner=-torch.ones(15)), ValueError, "preconditioner: "),
        (lambda: _bad(parameters=["nothing"]), ValueError, "model: |parameters: "),
        (lambda: _bad(sampling="random"), ValueError, "sampling: "),
        (lambda: _bad(method="truncated").coherence_matrix, ValueError, "coherence_matrix: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_run_leaves_by_its_loss_where_the_distance_does_not_show_it():
    """One sharp direction among a thousand flat ones: the loss explodes long before the distance doubles."""
    from sgd_stability.nonlinear import LEAVES, run_sgd

    class Sharp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.flat = nn.Parameter(torch.zeros(1).double()), nn.Parameter(torch.zeros(3000).double())

        def forward(self, x):
            return 10 * torch.tanh(30 * self.w) * x + 0 * self.flat.sum()

    x, y = torch.ones(8, 1).double(), torch.zeros(8, 1).double()
    left = run_sgd(Sharp(), "squared_error", x, y, lr=1.2 * 2 / 300**2, batch_size=8, steps=200)
    assert left.distance < LEAVES
    assert left.final_loss > 10 * left.first_loss
    assert left.outcome == "leaves"
    assert run_sgd(Sharp(), "squared_error", x, y, lr=0.8 * 2 / 300**2, batch_size=8, steps=200).outcome == "returns"


def test_a_report_says_what_it_means_away_from_a_minimum():
    report = _bad()
    assert not report.interpolating
    assert "SGD does not rest at this point" in str(report)
    assert report.to_dict()["meaning"] == report.meaning
