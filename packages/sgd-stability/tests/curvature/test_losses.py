"""Every loss and every option of it: values against torch's own mean, curvature against autograd."""

import pytest
import torch
from core_tensor.dev.testing import assert_close
from sgd_stability import StabilityMonitor, analyze
from sgd_stability.curvature.data import collect
from sgd_stability.curvature.losses import resolve_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


def _outputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _classes(*shape, ignore=None):
    y = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))
    if ignore is not None:
        y.view(-1)[::3] = ignore
    return y


WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
PROBABILITIES = _outputs(5, 4).softmax(1)
ZERO_ONE = (_outputs(5, 3) > 0).double()
CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), _outputs(5, 4), _classes(5)),
    "ignored": (nn.CrossEntropyLoss(ignore_index=2), _outputs(5, 4), _classes(5, ignore=2)),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHT), _outputs(5, 4), _classes(5)),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), _outputs(5, 4), _classes(5)),
    "all of them": (
        nn.CrossEntropyLoss(WEIGHT, ignore_index=-1, label_smoothing=0.2), _outputs(5, 4, 3), _classes(5, 3, ignore=-1)
    ),
    "positions": (nn.CrossEntropyLoss(), _outputs(5, 4, 2, 3), _classes(5, 2, 3)),
    "probabilities": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), _outputs(5, 4), PROBABILITIES),
    "int32": (nn.CrossEntropyLoss(), _outputs(5, 4), _classes(5).int()),
    "uint8": (nn.CrossEntropyLoss(), _outputs(5, 4), _classes(5).byte()),
    "function": (F.cross_entropy, _outputs(5, 4), _classes(5)),
    "nll": (nn.NLLLoss(WEIGHT, ignore_index=3), _outputs(5, 4).log_softmax(1), _classes(5, ignore=3)),
    "mse": (nn.MSELoss(), _outputs(5, 3), _outputs(5, 3) + 1),
    "mse of vectors": (nn.MSELoss(), _outputs(5), _outputs(5) * 2),
    "mse of integers": (nn.MSELoss(), _outputs(5), _classes(5)),
    "bce": (nn.BCEWithLogitsLoss(), _outputs(5, 3), ZERO_ONE),
    "bce of vectors": (nn.BCEWithLogitsLoss(), _outputs(5), ZERO_ONE[:, 0]),
    "bce of integers": (nn.BCEWithLogitsLoss(), _outputs(5, 3), ZERO_ONE.long()),
    "bce with weights": (
        nn.BCEWithLogitsLoss(weight=WEIGHT[:3], pos_weight=WEIGHT[1:]), _outputs(5, 3), ZERO_ONE
    ),
    "bce of probabilities": (nn.BCELoss(weight=WEIGHT[:3]), _outputs(5, 3).sigmoid(), ZERO_ONE),
    "huber": (nn.HuberLoss(delta=0.7), _outputs(5, 3), _outputs(5, 3).flip(0)),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), _outputs(5, 3), _outputs(5, 3).flip(0)),
    "poisson": (nn.PoissonNLLLoss(), _outputs(5, 3), ZERO_ONE * 3),
    "poisson of rates": (nn.PoissonNLLLoss(log_input=False, eps=1e-6), _outputs(5, 3).exp(), ZERO_ONE * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_torchs(name):
    module, z, y = CASES[name]
    loss = resolve_loss(module)
    loss = loss.fit(z[:1], y) if loss.fit else loss
    like = y if y.is_floating_point() else y.long()
    floating = not isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and module is not F.cross_entropy
    expected = module(z, like.double() if floating else like)
    assert_close("mean", expected, loss.values(z, y).mean(), 1e-12)
    factor = loss.factor(z, y)
    W = factor.times(torch.eye(factor.rank, dtype=z.dtype).expand(len(z), -1, -1))
    signs = torch.ones(len(z), factor.rank, dtype=z.dtype) if factor.signs is None else factor.signs
    if isinstance(module, nn.NLLLoss):  # of the logits behind log probabilities, in which it is linear
        loss = resolve_loss(nn.CrossEntropyLoss(module.weight, ignore_index=module.ignore_index)).fit(z[:1], y)
    for i in range(len(z)):
        exact = torch.autograd.functional.hessian(
            lambda v, i=i: loss.values(v.view(1, *z.shape[1:]), y[i : i + 1])[0], z[i]
        ).reshape(factor.rank, factor.rank)
        assert_close("Lambda", exact, (W[i] * signs[i]) @ W[i].T, 1e-10)
    assert_close("trace", (W @ W.mT).diagonal(dim1=1, dim2=2).sum(1), factor.trace().to(W), 1e-12)


def test_ignored_samples_change_the_answer():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    found = analyze(model, nn.CrossEntropyLoss(ignore_index=1), (x, y))
    kept = analyze(model, nn.CrossEntropyLoss(), (x[y != 1], y[y != 1]))
    assert found.lambda_max == pytest.approx(kept.lambda_max, rel=1e-9)
    assert found.mean_loss == pytest.approx(kept.mean_loss, rel=1e-9)


def test_labels_of_a_causal_model_are_shifted_as_transformers_shift_them():
    z, labels = _outputs(3, 6, 4), _classes(3, 6, ignore=-100)
    loss = resolve_loss("causal_lm").fit(z[:1], labels)
    expected = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close("loss", expected, loss.values(z, labels).mean(), 1e-12)


def test_mappings_with_labels_and_batch_samplers():
    x, y = torch.randn(20, 4), torch.arange(20, dtype=torch.int32) % 3
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    class Keyword(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    model = Keyword(4, 3)
    expected = analyze(model, "cross_entropy", (x, y)).lambda_max
    sampler = BatchSampler(RandomSampler(rows), batch_size=5, drop_last=False)
    for data in ({"x": x, "labels": y}, rows, DataLoader(rows, batch_size=7), DataLoader(rows, batch_sampler=sampler)):
        assert analyze(model, "cross_entropy", data).lambda_max == pytest.approx(expected, rel=1e-5)
    monitor = StabilityMonitor(model, "cross_entropy", DataLoader(rows, batch_sampler=sampler))
    assert monitor.batch_size == 5
    with pytest.raises(ValueError, match=r"data: its samples cannot be put into one batch \(RuntimeError: stack"):
        collect([(x[:2], 0), (x[:3], 1)])
    for batches in ([(x[:4], y[:4]), (x[4:8], y[4:8])], [{"x": x[:4], "labels": y[:4]}]):  # list(loader)
        with pytest.raises(ValueError, match=r"data: .* got a list that may hold samples or batches; pass iter"):
            collect(batches)
        assert collect(iter(batches)).n == 4 * len(batches)
    with pytest.raises(TypeError, match="data: expected a mapping of inputs with one of labels"):
        collect({"x": x, "y": y})
    with pytest.raises(TypeError, match=r"data: expected batches .* of 3"):
        collect(TensorDataset(x, x, y))


def test_samples_take_the_precision_of_the_model():
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    model = nn.Linear(4, 2).double()
    assert analyze(model, "mse", TensorDataset(x, y)).n == 9
