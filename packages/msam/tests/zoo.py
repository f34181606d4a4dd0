"""Models and losses that couple examples, keep state or change late, against mSAM by the definition on copies.

Every loss is a function of the model, a micro-batch (x, y, ids) and the step. `error` says how far an optimizer is off,
in its gradients and in what it leaves in the model; with random numbers, how far one micro-batch reaches another one.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from msam import MSAM
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

RHO, STEPS, SIZES = 0.3, 3, (4, 4, 4)
Loss = Callable[["Bag", tuple[Tensor, Tensor, Tensor], int], Tensor]


class Bag(nn.Module):
    """Parameters and buffers for all losses."""

    mean: Tensor
    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.w, self.v, self.s = (
            nn.Parameter(torch.randn(8, 8)),
            nn.Parameter(torch.rand(8)),
            nn.Parameter(torch.ones(())),
        )
        self.table, self.prelu, self.norm, self.bn = nn.Embedding(10, 8), nn.PReLU(), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.conv, self.deconv = nn.Conv1d(2, 2, 3, padding=1), nn.ConvTranspose1d(2, 2, 2, stride=2)
        self.gru, self.lstm = nn.GRU(8, 4, batch_first=True), nn.LSTM(8, 4, bidirectional=True, batch_first=True)
        self.attention, self.query = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(1, 1, 8))
        self.bias = nn.Parameter(torch.randn(2, 3, 3))
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("codes", torch.zeros(4, 8))
        self.calls = 0


def ends(m: Bag, h: Tensor, part: Any) -> Tensor:
    return F.cross_entropy(m.c(torch.tanh(h)), part[1])


class Hidden(torch.autograd.Function):
    """Takes its weight out of sight of torch functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ x


def branch(m: Bag, p: Any, k: int) -> Tensor:
    h = m.a(p[0])
    return ends(m, m.b(h) if bool(h.sum() > 0) else h, p)


def running_mean(m: Bag, p: Any, k: int) -> Tensor:
    h = m.a(p[0])
    m.mean.mul_(0.9).add_(0.1 * h.mean(0).detach())
    return ends(m, h - m.mean, p)


def codebook(m: Bag, p: Any, k: int) -> Tensor:
    m.codes.data.add_(p[0][:4].detach())
    return ends(m, m.a(p[0]) - m.codes, p)


def counted(m: Bag, p: Any, k: int) -> Tensor:
    m.calls += 1
    return ends(m, m.a(p[0]) * (1 + m.calls % 2), p)


def contrast(m: Bag, p: Any, k: int) -> Tensor:
    h = F.normalize(m.a(p[0]), dim=1)
    return F.cross_entropy(h @ h.T * m.s.exp(), torch.arange(len(h)))


def gradient_penalty(m: Bag, p: Any, k: int) -> Tensor:
    x = p[0].detach().requires_grad_()
    h = m.a(x)
    return ends(m, h, p) + torch.autograd.grad(torch.tanh(h).sum(), x, create_graph=True)[0].square().mean()


def in_place(m: Bag, p: Any, k: int) -> Tensor:
    h = m.a(p[0]).add_(1)
    h[:, 0] = 0
    return ends(m, m.b(h).mul_(2), p)


def attended(m: Bag, p: Any, k: int) -> Tensor:
    x = m.table(p[2])
    return ends(m, m.attention(m.query.expand(len(x), -1, -1), x, x)[0][:, 0], p)


def relative_positions(m: Bag, p: Any, k: int) -> Tensor:
    x = m.a(m.table(p[2])).unflatten(-1, (2, 4)).transpose(1, 2)
    return ends(m, F.scaled_dot_product_attention(x, x, x, attn_mask=m.bias).transpose(1, 2).flatten(2).mean(1), p)


LOSSES: dict[str, Loss] = {
    "plain": lambda m, p, k: ends(m, m.a(p[0]), p),
    "batch mean": lambda m, p, k: ends(m, m.a(p[0] - p[0].mean(0)), p),
    "a little of the batch mean": lambda m, p, k: ends(m, (h := m.a(p[0])) - 1e-6 * h.mean(0), p),
    "batch softmax": lambda m, p, k: ends(m, m.a(p[0]).softmax(0), p),
    "batch deviation": lambda m, p, k: ends(m, (h := m.a(p[0])) / (1 + h.std()), p),
    "gate by data": lambda m, p, k: ends(m, torch.where(p[0][:, :1] > 1, (h := m.a(p[0])).flip(0), h), p),
    "gate that opens once": lambda m, p, k: ends(m, m.a(p[0]).flip(0) if k == 2 else m.a(p[0]), p),
    "sorting": lambda m, p, k: ends(m, m.a(p[0]).sort(0).values, p),
    "cumulative sum": lambda m, p, k: ends(m, m.a(p[0]).cumsum(0), p),
    "rolling": lambda m, p, k: F.triplet_margin_loss(h := m.a(p[0]), m.b(p[0]), h.roll(1, 0)),
    "hardest examples": lambda m, p, k: F.cross_entropy(m.c(m.a(p[0])), p[1], reduction="none").topk(2).values.mean(),
    "distances": lambda m, p, k: torch.cdist(m.a(p[0]), m.b(p[0])).square().mean(),
    "log-sum-exp": lambda m, p, k: ends(m, h := m.a(p[0]), p) + h.logsumexp((0, 1)),
    "contrast": contrast,
    "ramp": lambda m, p, k: ends(m, m.a(p[0]), p) + 0.1 * k * contrast(m, p, k),
    "batch norm": lambda m, p, k: ends(m, m.bn(m.a(p[0])), p),
    "layer norm": lambda m, p, k: ends(m, m.norm(m.a(p[0])), p),
    "prelu": lambda m, p, k: ends(m, m.prelu(m.a(p[0])), p),
    "logit scale": lambda m, p, k: F.cross_entropy(m.c(m.a(p[0])) * m.s.exp(), p[1]),
    "weight norm by hand": lambda m, p, k: ends(m, p[0] @ (m.w / m.w.norm(dim=1, keepdim=True)).T, p),
    "weight norm": lambda m, p, k: ends(m, m.normed(p[0]), p),
    "spectral norm": lambda m, p, k: ends(m, m.spectral(p[0]), p),
    "weight decay": lambda m, p, k: ends(m, m.a(p[0]), p) + 0.1 * sum(q.square().sum() for q in m.parameters()),
    "orthogonality": lambda m, p, k: ends(m, p[0] @ m.w, p) + (m.w @ m.w.T - torch.eye(8)).square().mean(),
    "einsum": lambda m, p, k: ends(m, torch.einsum("ni,ij->nj", p[0], m.w), p),
    "bilinear": lambda m, p, k: ends(m, torch.einsum("ni,ij,nj->n", p[0], m.w, m.a(p[0]))[:, None] * m.v, p),
    "slices": lambda m, p, k: ends(m, p[0][:, :4] @ m.w[:4] + m.v, p),
    "stacked": lambda m, p, k: ends(m, torch.stack([p[0] @ q for q in (m.w, m.a.weight)]).mean(0), p),
    "used twice": lambda m, p, k: ends(m, m.a(torch.tanh(m.a(p[0]))), p),
    "tied": lambda m, p, k: F.cross_entropy(m.table(p[2]).mean(1) @ m.table.weight.T, p[1]),
    "embedding": lambda m, p, k: ends(m, m.a(m.table(p[2])).mean(1), p),
    "convolution": lambda m, p, k: ends(m, torch.tanh(m.conv(p[0].unflatten(1, (2, 4)))).flatten(1), p),
    "transposed": lambda m, p, k: ends(m, m.deconv(p[0].unflatten(1, (2, 4)))[..., ::2].flatten(1), p),
    "attention": attended,
    "relative positions": relative_positions,
    "gru": lambda m, p, k: ends(m, m.gru(m.table(p[2]))[0].flatten(1)[:, :8], p),
    "lstm": lambda m, p, k: ends(m, m.lstm(m.table(p[2]))[0][:, -1], p),
    "class weights": lambda m, p, k: F.cross_entropy(m.c(m.a(p[0])), p[1], weight=torch.arange(1.0, 6)),
    "label smoothing": lambda m, p, k: F.cross_entropy(m.c(m.a(p[0])), p[1], label_smoothing=0.1),
    "branch": branch,
    "number read": lambda m, p, k: ends(m, (h := m.a(p[0])) / (1 + abs(h.mean().item())), p),
    "running mean": running_mean,
    "codebook": codebook,
    "counter": counted,
    "second derivatives": gradient_penalty,
    "checkpointing": lambda m, p, k: ends(m, checkpoint(m.a, p[0], use_reentrant=False), p),
    "in place": in_place,
    "out of sight": lambda m, p, k: ends(m, Hidden.apply(p[0], m.w), p),
    "out of sight later": lambda m, p, k: ends(m, Hidden.apply(p[0], m.w) if k else p[0] @ m.w.T, p),
    "another path later": lambda m, p, k: ends(m, m.b(m.a(p[0])) if k else m.a(p[0]), p),
    "hook later": lambda m, p, k: ends(m, m.a(p[0]), p),
    "thaw later": lambda m, p, k: ends(m, m.a(p[0]), p),
    "backward hook": lambda m, p, k: ends(m, m.a(p[0]), p),
    "backward pre-hook later": lambda m, p, k: ends(m, m.a(p[0]), p),
    "gradient hook later": lambda m, p, k: ends(m, m.a(p[0]), p),
}  # fmt: skip

RANDOM: dict[str, Loss] = {
    "dropout": lambda m, p, k: ends(m, F.dropout(m.a(p[0]), 0.5), p),
    "random gate": lambda m, p, k: ends(m, torch.where(torch.rand(len(p[0]), 1) < 0.3, (h := m.a(p[0])).flip(0), h), p),
    "mixup": lambda m, p, k: ends(m, m.a(p[0] + 0.3 * p[0][torch.randperm(len(p[0]))]), p),
    "noise": lambda m, p, k: ends(m, (h := m.a(p[0])) + 0.1 * torch.randn_like(h) * h.mean(0), p),
}


def ramp(gradient: Tensor) -> Tensor:
    """What a hook makes of a gradient."""
    return gradient * torch.linspace(0, 1, gradient.shape[-1])


def change(model: Bag, case: str, step: int) -> None:
    """What happens to the model before a step."""
    if case == "hook later" and step == 1:
        model.a.register_forward_hook(lambda module, inputs, result: result - result.mean(0))
    if case == "backward hook" and step == 0:
        model.c.register_full_backward_hook(lambda module, inputs, outputs: (ramp(inputs[0]),))
    if case == "backward pre-hook later" and step == 1:
        model.a.register_full_backward_pre_hook(lambda module, outputs: (ramp(outputs[0]),))
    if case == "gradient hook later" and step == 1:
        model.a.weight.register_hook(ramp)
    if case == "thaw later":
        model.a.weight.requires_grad_(step > 0)


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator, n = torch.Generator().manual_seed(seed), sum(SIZES)

    def integers(top: int, *shape: int) -> Tensor:
        return torch.randint(top, (n, *shape), generator=generator)

    return [(torch.randn(n, 8, generator=generator), integers(5), integers(10, 3)) for _ in range(STEPS)]


def definition(model: Bag, case: str, chained: bool) -> list[Tensor]:
    """Gradients of all steps, one micro-batch after the other; the model's state moves in the first pass of each."""
    found: list[Tensor] = []
    last: list[list[Tensor | None]] = [[]] * len(SIZES)
    loss, weights = LOSSES[case], [p.detach().clone() for p in model.parameters()]
    for step, batch in enumerate(as_double(batches())):
        change(model, case, step)
        total: list[Tensor] = [torch.zeros_like(p) for p in model.parameters()]
        for j, part in enumerate(zip(*(t.split(SIZES) for t in batch), strict=True)):
            climb = last[j] if chained else gradients(model, loss, part, step)
            state = [(b, b.clone()) for b in model.buffers()], model.calls
            norm = float(torch.stack([torch.zeros(()), *(g.norm() for g in climb if g is not None)]).norm())
            with torch.no_grad():
                for p, g in zip(model.parameters(), climb, strict=False):
                    p.add_(torch.zeros_like(p) if g is None else g, alpha=RHO / norm if norm > 0 else 0.0)
            last[j] = gradients(model, loss, part, step)
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
                if not chained:
                    model.calls = state[1]
                    for buffer, value in state[0]:
                        buffer.copy_(value)
            share = len(part[0]) / len(batch[0])
            total = [t if g is None else t + share * g for t, g in zip(total, last[j], strict=True)]
        found.append(torch.cat([t.flatten() for t in total]))
    return found


def gradients(model: Bag, loss: Loss, part: Any, step: int) -> list[Tensor | None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = iter(torch.autograd.grad(loss(model, part, step), trained, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in model.parameters()]


def trained(model: Bag, case: str, loss: Loss, data: Any, **options: Any) -> list[Tensor]:
    """Gradients of all steps of an optimizer."""
    opt, found = MSAM(model, torch.optim.SGD, lr=0.0, rho=RHO, num_micro_batches=len(SIZES), **options), []
    for step, batch in enumerate(data):
        change(model, case, step)
        opt.step(lambda part, step=step: loss(model, part, step), batch)
        found.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        )
    return found


def error(case: str, mode: str = "ghost", ascent: str = "full") -> float:
    """The largest relative error of a step's gradient and of the model's buffers.

    Args:
        case: One of `LOSSES` or `RANDOM`.
        mode: The optimizer's mode.
        ascent: Its ascent.

    Returns:
        The error; with random numbers, the reach of a micro-batch without weight.
    """
    torch.manual_seed(0)
    model = Bag().double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="msam.")
        if case in RANDOM:
            return reach(model, case, mode, ascent)
        if case == "thaw later" and ascent == "chained":
            return 0.0  # other parameters make another chain, which the definition above does not follow
        twin = copy.deepcopy(model)
        truth = definition(twin, case, ascent == "chained")
        found = trained(model, case, LOSSES[case], as_double(batches()), mode=mode, ascent=ascent)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    state, right = dict(model.named_buffers()), dict(twin.named_buffers())
    return max([worst, *(float((state[n].double() - t.double()).norm()) for n, t in right.items())])


def reach(model: Bag, case: str, mode: str, ascent: str) -> float:
    """Gradients where only the first micro-batch counts, with other data in the others, from the same random state."""
    data, other = as_double(batches()), as_double(batches(1))
    mixed = [
        tuple(torch.cat([s[: SIZES[0]], t[SIZES[0] :]]) for s, t in zip(x, y, strict=True))
        for x, y in zip(data, other, strict=True)
    ]
    found = []
    for chosen in (data, mixed):
        first = [x[0][0] for x in chosen]
        torch.manual_seed(1)
        found.append(
            trained(
                copy.deepcopy(model),
                case,
                RANDOM[case],
                chosen,
                mode=mode,
                ascent=ascent,
                shard_weight=lambda part, first=first: float(any(torch.equal(part[0][0], x) for x in first)),
            )
        )
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))


def as_double(data: Any) -> Any:
    return [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in data]
