"""What later batches may bring that the first one did not."""

import copy

import pytest
import torch
from msam import MSAM
from torch import nn
from torch.nn import functional as F


class Parts(nn.Module):
    """Parameters from which the losses below are made."""

    def __init__(self):
        super().__init__()
        self.inner, self.head, self.classes = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 30)
        self.positions, self.table = nn.Parameter(torch.randn(20, 8)), nn.Embedding(20, 8)
        self.tokens, self.matrix, self.shift = (
            nn.Embedding(30, 8),
            nn.Parameter(torch.randn(8, 8)),
            nn.Parameter(torch.randn(8)),
        )


def score(model, hidden, target):
    return F.mse_loss(model.head(torch.tanh(hidden)).mean(1)[:, 0], target)


def sliced(model, batch, step):
    return score(model, model.inner(batch[0]) + model.positions[: batch[0].shape[1]], batch[1])


def middle(model, batch, step):
    return score(model, model.inner(batch[0]) + model.positions[1:5], batch[1])


def looked_up(model, batch, step):
    return score(model, model.inner(batch[0]) + model.table(torch.arange(batch[0].shape[1])), batch[1])


def time_first_targets(model, batch, step):
    logits = model.classes(torch.tanh(model.tokens(batch[0].t()))).flatten(0, 1)
    return F.cross_entropy(logits, batch[1].t().flatten())


def time_first_rows(model, batch, step):
    rows = batch[0].transpose(0, 1).reshape(-1, 8)
    return F.mse_loss(
        model.head(torch.tanh(F.linear(rows, model.matrix))).view(batch[0].shape[1], -1).mean(0), batch[1]
    )


def packed(model, batch, step):
    hidden = model.tokens(batch[0])
    out = torch.zeros_like(hidden)
    out[batch[2]] = torch.tanh(model.inner(hidden[batch[2]]))
    return score(model, out, batch[1])


def detached_use(model, batch, step):
    used = model.inner(torch.tanh(F.linear(batch[0], model.matrix, model.shift)))
    return (used - F.linear(batch[1], model.matrix).detach()).square().mean()


def other_bias(model, batch, step):
    used = model.inner(torch.tanh(F.linear(batch[0], model.matrix, model.shift)))
    return (used - F.linear(batch[1], model.matrix, model.inner.bias).detach()).square().mean()


def bias_as_shift(model, batch, step):
    used = model.inner(torch.tanh(F.linear(batch[0], model.matrix, model.shift)))
    return (used - (batch[1] + model.shift).detach()).square().mean()


def sequence_first(model, batch, step):
    return F.mse_loss(model.head(torch.tanh(model.inner(batch[0].transpose(0, 1)))).mean(0)[:, 0], batch[1])


def turned(model, batch, step):
    hidden = torch.tanh(model.inner(batch[0].transpose(0, 1) if step else batch[0]))
    return F.mse_loss(model.head(hidden.transpose(0, 1) if step else hidden).mean((1, 2)), batch[1])


def classified(model, batch, step):
    return F.cross_entropy(model.classes(torch.tanh(model.inner(batch[0]))), batch[1], weight=torch.arange(1.0, 31))


def plainly_classified(model, batch, step):
    return F.cross_entropy(model.classes(torch.tanh(model.inner(batch[0]))), batch[1])


def summed(model, batch, step):
    logits = model.classes(torch.tanh(model.inner(batch[0])))
    return F.cross_entropy(logits, batch[1], reduction="sum") / (batch[1] != -100).sum()


def masked(model, batch, step):
    errors = (model.head(torch.tanh(model.inner(batch[0])))[:, 0] - batch[1]).square()
    return (errors * batch[2]).sum() / batch[2].sum()


def to_a_sum(model, batch, step):
    errors = (model.head(torch.tanh(model.inner(batch[0])))[:, 0] - batch[1]).square()
    return errors.sum() if step else errors.mean()


def penalised(model, batch, step):
    x = batch[0].detach().requires_grad_()
    out = model.head(torch.tanh(model.inner(x)))[:, 0]
    loss = F.mse_loss(out, batch[1])
    return loss + torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().sum(1).mean() if step else loss


def expanded(model, batch, step):
    each = model.matrix.expand(len(batch[0]), 8, 8)
    return F.mse_loss(model.head(torch.tanh(torch.bmm(batch[0][:, None], each)[:, 0]))[:, 0], batch[1])


def kinked(model, batch, step):
    return score(model, F.relu(F.linear(batch[0], model.matrix, model.shift)), batch[1])


def sequences(examples, length):
    return torch.randn(examples, length, 8), torch.randn(examples)


def vectors(examples):
    return torch.randn(examples, 8), torch.randn(examples)


def ragged(*lengths):
    size = len(lengths)
    return torch.randint(30, (size, size)), torch.randn(size), torch.arange(size) < torch.tensor(lengths)[:, None]


def labelled(shape, inputs=None, ignored=()):
    targets = torch.randint(30, shape)
    targets[list(ignored)] = -100
    return torch.randint(30, shape) if inputs is None else torch.randn(*shape, inputs), targets


# loss, batches, and the mode that the last one must be computed in
CASES = {
    "a slice as long as the batch": (sliced, lambda: [sequences(6, 4), sequences(6, 6)], "ghost"),
    "a slice as long as a smaller batch": (middle, lambda: [sequences(6, 4), sequences(4, 4)], "ghost"),
    "a slice of one": (sliced, lambda: [sequences(6, 4), sequences(6, 1)], "ghost"),
    "a position looked up": (looked_up, lambda: [sequences(6, 4), sequences(6, 1)], "ghost"),
    "targets time first": (
        time_first_targets, lambda: [labelled((6, 6)), labelled((6, 6)), labelled((6, 6), ignored=[0])], "ghost"),
    "rows time first": (time_first_rows, lambda: [sequences(6, 1), sequences(6, 4)], "ghost"),
    "packed rows": (packed, lambda: [ragged(*[6] * 6)] * 3 + [ragged(6, 5, 4, 3, 2, 4)], "sequential"),
    "a constant first batch": (
        sequence_first, lambda: [(torch.zeros(6, 6, 8), torch.zeros(6)), sequences(6, 6), sequences(6, 6)], "ghost"),
    "other dimensions": (turned, lambda: [sequences(6, 6) for _ in range(4)], "ghost"),
    "class weights": (
        classified, lambda: [(torch.randn(9, 8), torch.zeros(9).long())] * 2 + [labelled((9,), 8)], "ghost"),
    "a sum over its targets": (
        summed, lambda: [labelled((9,), 8)] * 2 + [labelled((9,), 8, ignored=[1])], "ghost"),
    "a mask": (
        masked, lambda: [(*vectors(9), torch.ones(9))] * 3 + [(*vectors(9), torch.arange(9.0))], "ghost"),
    "a sum": (to_a_sum, lambda: [vectors(9)] * 4, "ghost"),
    "second derivatives": (penalised, lambda: [vectors(9)] * 3, "sequential"),
    "as many examples as rows": (expanded, lambda: [vectors(9), vectors(8)], "ghost"),
    "a use without gradient": (detached_use, lambda: [(torch.randn(9, 8), torch.randn(9, 8))], "ghost"),
    "that use with another bias": (other_bias, lambda: [(torch.randn(9, 8), torch.randn(9, 8))], "ghost"),
    "a bias without gradient": (bias_as_shift, lambda: [(torch.randn(9, 8), torch.randn(9, 8))], "ghost"),
    "activations at a kink": (kinked, lambda: [(torch.zeros(6, 4, 8), torch.randn(6)), sequences(6, 4)], "ghost"),
}  # fmt: skip


def run(model, mode, loss, batches, **options):
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.5, mode=mode, **({"num_micro_batches": 3} | options))
    for step, batch in enumerate(batches):
        opt.zero_grad()
        opt.backward(lambda part, step=step: loss(model, part, step), batch)
    return opt, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:msam.")
@pytest.mark.parametrize("case", CASES)
def test_later_batches(double, case):
    loss, make_batches, mode = CASES[case]
    torch.manual_seed(0)
    model, batches = Parts(), make_batches()
    if case == "activations at a kink":
        model.shift.data.zero_()
    opt, found = run(copy.deepcopy(model), "ghost", loss, batches)
    _, truth = run(model, "sequential", loss, batches)
    assert opt.record.mode == mode
    assert (found - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.filterwarnings("ignore:msam.")
@pytest.mark.parametrize("ignored", [[], [2]])
@pytest.mark.parametrize("sizes", [{}, {"num_micro_batches": None, "micro_batch_size": 4}])
@pytest.mark.parametrize("examples", [12, 10, 7])
def test_halves_of_every_size(double, ignored, sizes, examples):
    """Halves of 3 and 4 examples have one size; targets ignored outside of the halves are seen in pass 2."""
    torch.manual_seed(0)
    model = Parts()
    batches = [labelled((examples,), 8), labelled((examples,), 8, ignored)]
    opt, found = run(copy.deepcopy(model), "ghost", plainly_classified, batches, ascent="half", **sizes)
    other, truth = run(model, "sequential", plainly_classified, batches, ascent="half", **sizes)
    assert opt.record.mode == "ghost"
    assert (found - truth).norm() <= 1e-12 * truth.norm()
    torch.testing.assert_close(opt.record.gradient_norms, other.record.gradient_norms, rtol=1e-12, atol=0)


def test_a_path_that_changes_between_the_passes(double, oracle):
    """A counter says which, and the model may not write one in ghost mode: the statistics move once all the same."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.last = nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 5)
            self.calls, self.skip = 0, None

        def forward(self, x):
            self.calls += 1
            x = self.norm(x)
            return self.last(x if self.calls == self.skip else torch.tanh(self.first(x)))

    model, batch = Dropped(), (torch.randn(12, 20), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=3, mode="ghost")
    model.skip = model.calls + 2
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="the loss writes calls of the model"):
        opt.step(oracle.loss_of(model), batch)
    assert model.calls == 3
    MSAM(twin, torch.optim.SGD, lr=0.0, rho=0.3, num_micro_batches=3, mode="sequential").step(
        oracle.loss_of(twin), batch
    )
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean, rtol=1e-12, atol=1e-12)
    assert oracle.relative_error(oracle.gradients(model), oracle.gradients(twin)) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_ends_no_ghost(double, oracle, bad):
    """The fourth batch is due for a proof, which it cannot give; GradScaler skips the step, and the fifth goes on."""
    model, scaler = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), torch.amp.GradScaler("cpu")
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=3, mode="ghost")
    for step in range(5):
        x = torch.randn(12, 20)
        x[4] = bad if step == 3 else x[4]
        opt.step(oracle.loss_of(model), (x, torch.randint(5, (12,))), scaler=scaler)
        scaler.update()
        assert opt.record.mode == "ghost"
        assert opt.record.skipped == (step == 3)


@pytest.mark.filterwarnings("ignore:msam.")
def test_what_stands_in_draws_the_same_numbers(double):
    """A later batch has micro-batches that disagree: the sequential step has the dropout masks of sequential mode."""
    model = Parts()

    def loss(m, part, step):
        errors = (m.head(F.dropout(torch.tanh(m.inner(part[0])), 0.5))[:, 0] - part[1]).square()
        return (errors * part[2]).sum() / float(part[2].sum())

    batches, found = [(*vectors(9), torch.ones(9))] * 3 + [(*vectors(9), torch.arange(9.0))], []
    for mode in ("ghost", "sequential"):
        opt = MSAM(copy.deepcopy(model), torch.optim.SGD, lr=0.0, rho=0.5, mode=mode, num_micro_batches=3)
        for batch in batches:
            torch.manual_seed(3)
            opt.zero_grad()
            opt.backward(lambda part, opt=opt: loss(opt.model, part, 0), batch)
        assert opt.record.mode == "sequential"
        found.append(torch.cat([p.grad.flatten() for p in opt.model.parameters() if p.grad is not None]))
    assert torch.equal(*found)


class Padded(nn.Module):
    """Skips the mask where nothing is padded, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.inner(x)))
        valid = x[:, :16] != 0
        return self.head(hidden if valid.all() else hidden * valid)


@pytest.mark.parametrize("ascent", ["full", "chained"])
@pytest.mark.parametrize("bn", ["first", "both"])
def test_runs_that_agree_on_a_decision_stay_in_ghost_mode(double, oracle, ascent, bn):
    """Micro-batches 1, 2 and 5 of six are padded, in the second batch none, in the third every second one."""
    model, found, modes = Padded(), [], []
    batches = [(torch.randn(18, 20), torch.randint(5, (18,))) for _ in range(3)]
    for padded, batch in zip(([4, 7, 16], [], [0, 6, 12]), batches, strict=True):
        batch[0][padded, 3] = 0
    for mode in ("ghost", "sequential"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.1, rho=0.3, num_micro_batches=6, mode=mode, ascent=ascent, bn=bn)
        for batch in batches[: 2 if mode == "ghost" else 3]:
            opt.step(oracle.loss_of(twin), batch)
            modes.append(opt.record.mode)
            norms = opt.record.gradient_norms
        if mode == "ghost":  # no two neighbors agree
            with pytest.warns(UserWarning, match="reads a number .`__bool__`. that differs"):
                opt.step(oracle.loss_of(twin), batches[2])
            norms = opt.record.gradient_norms
        found.append([*oracle.gradients(twin), norms, *(twin.norm.buffers() if bn == "first" else [])])
    assert modes == ["ghost"] * 2 + ["sequential"] * 3
    assert oracle.relative_error(*found) < 1e-12
