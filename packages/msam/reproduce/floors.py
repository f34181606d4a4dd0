"""How much of a ghost step is arithmetic: the same step written by hand, without any engine. `results/floors.json`.

    python packages/msam/reproduce/floors.py [--quick] [-o FOLDER]

Each step by hand calls the kernels that ghost mode calls, in the same order, for one fixed model: no vmap, no autograd,
no choice of forms, no checks. Its gradients are compared with ghost mode's before anything is timed. No engine that
runs a loss function it does not know can be faster. CPU time of one thread over a plain step, in turns.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from core_tensor import ghost_norms, low_rank_add
from core_tensor.app.files import write_json
from msam import MSAM
from msam.study.cost import model_and_batch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results"
RHO = 0.05
CASES = {
    "small MLP": ("mlp", 8, 20, 40), "large MLP": ("large-mlp", 8, 2, 16), "CNN": ("cnn", 4, 2, 24),
}  # fmt: skip
"""Model, micro-batches, steps of a turn, turns."""

MANY = {"small MLP": ("mlp", 16, 8, 16), "large MLP": ("large-mlp", 16, 2, 8)}
"""The same, with sequential mode besides."""

Step = Callable[[], None]
Sides = tuple[list[Tensor], list[Tensor]]
"""Inputs and output gradients of all layers."""

Factors = tuple[list[Tensor], list[Tensor], Tensor]
ATEN: Any = torch.ops.aten
STRIDED = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
"""Stride, padding, dilation, transposed, output padding, groups of all convolutions of the CNN."""


class Perceptron:
    """Steps of an MLP, whose directions stay in factors."""

    def __init__(self, model: Any, batch: tuple[Tensor, Tensor], m: int, chained: bool) -> None:
        self.layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.weights = [layer.weight.detach() for layer in self.layers]
        self.biases = [layer.bias.detach() for layer in self.layers]
        self.sgd, self.m, self.chained = torch.optim.SGD(model.parameters(), lr=1e-4), m, chained
        self.x, self.y = batch
        self.labels = F.one_hot(self.y, len(self.biases[-1])).float()
        self.last: Sides | None = None

    def directions(self, sides: Sides) -> Factors:
        """Inputs and output gradients by micro-batch, and the coefficients."""
        inner, outer = ([t.view(self.m, len(self.x) // self.m, -1) for t in side] for side in sides)
        squares = ghost_norms(outer, inner, [1.0] * len(self.layers)).tolist()
        return inner, outer, torch.tensor([RHO / square**0.5 for square in squares])

    def forward(self, along: Factors | None, known: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Inputs of all layers, the scores, and the first product."""
        inputs, first, h = [self.x], self.x, self.x
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            if along is None:
                h = torch.addmm(b, inputs[i], w.t())
            elif i == 0 and known is not None:
                h = low_rank_add(known, inputs[i], along[0][i], along[1][i], along[2], 1.0)
            else:
                h = low_rank_add(b, inputs[i], along[0][i], along[1][i], along[2], 1.0).addmm_(inputs[i], w.t())
            first = h if i == 0 else first
            if i < len(self.weights) - 1:
                inputs.append(torch.relu(h) if i == 0 else torch.relu_(h))
        return inputs, h, first

    def below(self, dy: Tensor, along: Factors | None, i: int, x: Tensor) -> Tensor:
        """Gradient at the result of the layer below."""
        if along is None:
            dx = dy.mm(self.weights[i])
        else:
            dx = low_rank_add(None, dy, along[1][i], along[0][i], along[2], 0.0).addmm_(dy, self.weights[i])
        found: Tensor = ATEN.threshold_backward(dx, x, 0.0)
        return found

    @torch.no_grad()
    def step(self) -> None:
        """Both passes, or the one of a chained ascent, and SGD's update."""
        along, known, n, last = None, None, len(self.x), len(self.layers) - 1
        if not self.chained:
            inputs, scores, known = self.forward(None, None)
            outputs = [(scores.softmax(1) - self.labels) * (self.m / n)]
            for i in range(last, 0, -1):
                outputs.insert(0, self.below(outputs[0], None, i, inputs[i]))
            along = self.directions((inputs, outputs))
        elif self.last is not None:
            along = self.directions(self.last)
        inputs, scores, _ = self.forward(along, known)
        log = scores.log_softmax(1)
        F.nll_loss(log, self.y)
        outputs = [(log.exp() - self.labels) / n]
        for i in range(last, -1, -1):
            self.layers[i].weight.grad, self.layers[i].bias.grad = outputs[0].t().mm(inputs[i]), outputs[0].sum(0)
            if i:
                outputs.insert(0, self.below(outputs[0], along, i, inputs[i]))
        self.last = (inputs, outputs) if self.chained else None
        self.sgd.step()


class Convolutional:
    """Steps of the CNN, whose directions are materialised."""

    def __init__(self, model: Any, batch: tuple[Tensor, Tensor], m: int, chained: bool) -> None:
        self.convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        self.norms = [layer for layer in model if isinstance(layer, nn.GroupNorm)]
        self.head = next(layer for layer in model if isinstance(layer, nn.Linear))
        self.parameters = list(model.parameters())  # of each stage kernel, bias, scale, shift; then the head's
        self.sgd, self.m, self.chained = torch.optim.SGD(model.parameters(), lr=1e-4), m, chained
        self.x, self.y = batch
        self.labels, size = F.one_hot(self.y, self.head.out_features).float(), len(self.x) // m
        self.bounds = [(j * size, (j + 1) * size) for j in range(m)]
        self.last: list[Tensor] | None = None

    def stage(self, i: int, h: Tensor, own: list[Tensor] | None) -> tuple[Tensor, Tensor, list[Any]]:
        """Result of a convolution, of its norm and its ReLU, and the statistics of every micro-batch."""
        conv, norm, k = self.convolutions[i], self.norms[i], 4 * i
        if own is None:
            z = torch.convolution(h, conv.weight, conv.bias, *STRIDED)
            whole, mean, rstd = normalized(z, norm.weight, norm.bias, norm.num_groups)
            return z, torch.relu_(whole), [(mean[a:b], rstd[a:b]) for a, b in self.bounds]
        kernels, parts = (
            zip(own[k], own[k + 1], self.bounds, strict=True),
            zip(own[k + 2], own[k + 3], self.bounds, strict=True),
        )
        z = torch.cat([torch.convolution(h[a:b], w, shift, *STRIDED) for w, shift, (a, b) in kernels])
        found = [normalized(z[a:b], scale, shift, norm.num_groups) for scale, shift, (a, b) in parts]
        return z, torch.relu_(torch.cat([part[0] for part in found])), [part[1:] for part in found]

    def classify(self, features: Tensor, own: list[Tensor] | None, each: bool, share: float) -> list[Tensor]:
        """Gradients of the features, and of the head's weight and bias."""
        rows, head = features.view(self.m, -1, features.shape[1]), self.head
        if own is None:
            scores = torch.addmm(head.bias, features, head.weight.t())
        else:
            scores = torch.baddbmm(own[-1][:, None], rows, own[-2].mT).flatten(0, 1)
        d = (scores.softmax(1) - self.labels) * share
        own_d = d.view(self.m, -1, d.shape[1])
        below = d.mm(head.weight) if own is None else torch.bmm(own_d, own[-2]).flatten(0, 1)
        if each:
            return [below, torch.bmm(own_d.mT, rows), own_d.sum(1)]
        return [below, d.t().mm(features), d.sum(0)]

    def norm_back(self, i: int, da: Tensor, z: Tensor, told: list[Any], own: list[Tensor] | None) -> list[Any]:
        """Gradients of a norm's input, scale and shift, by micro-batch."""
        norm, k = self.norms[i], 4 * i
        shape = (z.shape[1], z.shape[2:].numel(), norm.num_groups, [True, True, True])
        scales = [norm.weight] * self.m if own is None else own[k + 2]
        triples = zip(told, scales, self.bounds, strict=True)
        return [ATEN.native_group_norm_backward(da[a:b], z[a:b], *t, w, b - a, *shape) for t, w, (a, b) in triples]

    def conv_back(
        self, i: int, parts: list[Tensor], h: Tensor, own: list[Tensor] | None, each: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of a convolution's input, of its kernel and of its bias."""
        conv, below = self.convolutions[i], i > 0
        kernels = [conv.weight] * self.m if own is None else own[4 * i]
        triples = list(zip(parts, kernels, self.bounds, strict=True))
        size = [parts[0].shape[1]]
        if each:
            found = [
                ATEN.convolution_backward(d, h[a:b], w, size, *STRIDED, (below, True, True)) for d, w, (a, b) in triples
            ]
            dw, db = (torch.stack([call[q] for call in found]) for q in (1, 2))
        else:
            _, dw, db = ATEN.convolution_backward(torch.cat(parts), h, conv.weight, size, *STRIDED, (False, True, True))
            found = [
                ATEN.convolution_backward(d, h[a:b], w, None, *STRIDED, (True, False, False))
                for d, w, (a, b) in triples if below
            ]  # fmt: skip
        return torch.cat([call[0] for call in found]) if below else None, dw, db

    def gradients(self, own: list[Tensor] | None, each: bool, share: float) -> list[Tensor]:
        """Of every micro-batch, shape (m, *shape), or their sum, at own weights or the shared ones."""
        h, saved = self.x, []
        for i in range(len(self.convolutions)):
            z, after, told = self.stage(i, h, own)
            saved.append((h, z, told, after))
            h = after
        df, *found = self.classify(h.mean((2, 3)), own, each, share)
        dh: Tensor | None = (df / h.shape[2:].numel())[:, :, None, None].expand(h.shape).contiguous()
        for i in range(len(saved) - 1, -1, -1):
            h, z, told, after = saved[i]
            parts = self.norm_back(i, ATEN.threshold_backward(dh, after, 0.0), z, told, own)
            affine = [torch.stack([part[q] for part in parts]) for q in (1, 2)]
            dh, dw, db = self.conv_back(i, [part[0] for part in parts], h, own, each)
            found = [dw, db, *(affine if each else [t.sum(0) for t in affine]), *found]
        return found

    def moved(self, along: list[Tensor]) -> list[Tensor]:
        """All weights of every micro-batch."""
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in along])
        c = RHO / torch.linalg.vector_norm(norms, dim=0)
        pairs = zip(self.parameters, along, strict=True)
        return [torch.addcmul(p, g, c.view(-1, *[1] * p.ndim)) for p, g in pairs]

    @torch.no_grad()
    def step(self) -> None:
        """Both passes, or the one of a chained ascent, and SGD's update."""
        n = len(self.x)
        if self.chained:
            self.last = self.gradients(None if self.last is None else self.moved(self.last), True, 1 / n)
            found = [g.sum(0) for g in self.last]
        else:
            found = self.gradients(self.moved(self.gradients(None, True, self.m / n)), False, 1 / n)
        for p, g in zip(self.parameters, found, strict=True):
            p.grad = g
        self.sgd.step()


def normalized(z: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Any:
    """Group norm, and its statistics."""
    return ATEN.native_group_norm(z, weight, bias, *z.shape[:2], z.shape[2:].numel(), groups, 1e-5)


def by_hand(model: Any, batch: tuple[Tensor, Tensor], m: int, chained: bool) -> Step:
    """A step without an engine."""
    kind = Convolutional if any(isinstance(layer, nn.Conv2d) for layer in model) else Perceptron
    return kind(model, batch, m, chained).step


def engine(model: Any, batch: tuple[Tensor, Tensor], m: int, chained: bool, mode: Any = "ghost") -> Step:
    """A step of msam's."""
    ascent: Any = "chained" if chained else "full"
    opt = MSAM(model, torch.optim.SGD, lr=1e-4, rho=RHO, num_micro_batches=m, mode=mode, ascent=ascent)

    def step() -> None:
        opt.step(lambda part: F.cross_entropy(model(part[0]), part[1]), batch)

    return step


def plain(model: Any, batch: tuple[Tensor, Tensor], m: int, chained: bool) -> Step:
    """A step of SGD."""
    del m, chained
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        sgd.step()

    return step


def measured(name: str, m: int, chained: bool, steps: int, turns: int, **more: Any) -> dict[str, float]:
    """Ratios to a plain step of the step by hand and of msam's, after a check that both compute the same.

    Args:
        name: The model.
        m: Micro-batches.
        chained: Whether the ascent is chained.
        steps: Steps of a turn.
        turns: Turns.
        more: Makers of further steps, by name.

    Returns:
        Ratios by name.
    """
    model, batch = model_and_batch(name)
    twin = copy.deepcopy(model)
    one, two = by_hand(model, batch, m, chained), engine(twin, batch, m, chained)
    for _ in range(3):
        one()
        two()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    makers = {"plain": plain, "by_hand": by_hand, "msam": engine, **more}
    seconds: dict[str, list[float]] = {key: [] for key in makers}
    for _ in range(2):  # two places in memory
        methods = {key: make(copy.deepcopy(model), batch, m, chained) for key, make in makers.items()}
        for turn in range(turns // 2 + 1):
            for key, step in methods.items():
                start = time.process_time()
                for _ in range(steps):
                    step()
                if turn:
                    seconds[key].append(time.process_time() - start)
    pairs = {key: zip(seconds[key], seconds["plain"], strict=True) for key in makers if key != "plain"}
    return {key: statistics.median(a / b for a, b in own) for key, own in pairs.items()}


def main() -> None:
    """Time every case and write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small MLP, few turns")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for floors.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = []
    for label, (name, m, steps, turns) in CASES.items():
        if options.quick and name != "mlp":
            continue
        for chained in (False, True):
            found = measured(name, m, chained, steps, 4 if options.quick else turns)
            ascent = "chained" if chained else "full"
            table.append({"model": label, "m": m, "ascent": ascent} | {k: round(v, 3) for k, v in found.items()})
    against = []
    for label, (name, m, steps, turns) in ({} if options.quick else MANY).items():
        found = measured(name, m, False, steps, turns, sequential=partial(engine, mode="sequential"))
        gains = {f"gain_{key}": found["sequential"] / found[key] for key in ("by_hand", "msam")}
        against.append({"model": label, "m": m} | {k: round(v, 3) for k, v in (found | gains).items()})
    write_json(options.out / "floors.json", {"table": table, "against_sequential": against})


if __name__ == "__main__":
    main()
