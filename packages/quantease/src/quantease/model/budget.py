"""What a model's layers share out by what each gains: one budget of outliers, bits under one average."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from core_tensor.app.ranks import current
from torch import Tensor, nn

from quantease.algorithms.gptq import gptq
from quantease.algorithms.heldout import make_grid
from quantease.model.block_stream import BlockStream
from quantease.model.calibration import block_shape, named
from quantease.model.causal_lm import CausalLM
from quantease.model.matrices import Matrix, observe
from quantease.problem.config import LayerConfig
from quantease.problem.gram import GramFolds, Shrinkage
from quantease.problem.problem import Problem

Key = TypeVar("Key")
Names = tuple[int, str]
"""Number of a block and name of a matrix in it."""

_BINS = torch.arange(-60.0, 20.0, 0.125)  # edges in log2 of a score: steps of 9 %
_MOST = 0.5  # of a layer's weights


def outlier_fractions(
    lm: CausalLM, tokens: Tensor, matrices: Sequence[Sequence[Matrix]], config: LayerConfig
) -> dict[Names, float]:
    r"""Fractions of outliers per layer that together make up `config.outliers` of all weights.

    Rounding weight $W_{ij}$ costs its layer about $\Sigma_{jj} (W_{ij} - q(W_{ij}))^2$ of the output's energy
    $\|W X\|_F^2$. Relative costs of all layers are put in one order, and the weights above the cut become outliers. It
    takes one pass of the tokens through the model as it is, before anything is quantized.

    Args:
        lm: The model.
        tokens: Calibration tokens, shape (windows, length), int64 (of this rank).
        matrices: The matrices to be quantized, by block.
        config: Bits, grid and fraction.

    Returns:
        Fraction by block and name, each at most one half.
    """
    stream = BlockStream(lm, tokens)
    counts: dict[Names, Tensor] = {}
    sizes: dict[Names, int] = {}
    for index, block_matrices in enumerate(matrices):
        with lm.loaded(index) as block:
            seen = _Energies({m.name: m.weight(block) for m in block_matrices})
            with observe(block, block_matrices, seen.add):
                stream.advance(index, block)
            for matrix in block_matrices:
                cost = _relative_cost(matrix.weight(block).float(), *seen.of(matrix.name), config)
                logs = cost.flatten().log2_().nan_to_num_(neginf=-1e9).cpu()
                counts[index, matrix.name] = torch.bincount(torch.bucketize(logs, _BINS), minlength=len(_BINS) + 1)
                sizes[index, matrix.name] = cost.numel()
    return _cut(counts, sizes, config.outliers)


class _Energies:
    """Sums of squares of the inputs and outputs of a block's matrices."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        device = next(iter(weights.values())).device
        self.inputs = {n: torch.zeros(w.shape[1], dtype=torch.float64, device=device) for n, w in weights.items()}
        self.outputs = {n: torch.zeros((), dtype=torch.float64, device=device) for n in weights}

    def add(self, name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.inputs[name] += flat.square().sum(0)
        self.outputs[name] += (flat @ self.weights[name].float().T).square().sum()

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        ranks = current()
        return ranks.sum(self.inputs[name]), ranks.sum(self.outputs[name])


def _relative_cost(W: Tensor, energy: Tensor, output: Tensor, config: LayerConfig) -> Tensor:
    grid = make_grid(W, energy.float(), config, clip=config.clips)
    error = (W - grid.dequantize(grid.quantize(W))).square_().mul_(energy)
    return error.div_(output) if float(output) > 0 else error.zero_()


def _cut(counts: Mapping[Names, Tensor], sizes: Mapping[Names, int], fraction: float) -> dict[Names, float]:
    # The costliest weights of all layers up to the budget; of the bin in which it ends, every layer the same part.
    wanted = fraction * sum(sizes.values())
    above = torch.stack(list(counts.values())).sum(0).flip(0).cumsum(0).flip(0)  # weights in a bin or costlier
    last = int((above >= wanted).nonzero()[-1])
    costlier = float(above[last + 1]) if last + 1 < len(above) else 0.0
    part = (wanted - costlier) / max(float(above[last]) - costlier, 1.0)
    taken = {name: float(count[last + 1 :].sum()) + part * float(count[last]) for name, count in counts.items()}
    return {name: min(taken[name] / sizes[name], _MOST) for name in counts}


# ----------------------------------------------------------------------------------------------------------------------
# Bits per layer by measured error, under one average for the model


def candidates(average: float, symmetric: bool) -> range:
    """Bits that layers may get: the two next to the average, and one more on either side.

    Args:
        average: Bits per weight over the model.
        symmetric: Symmetric grids begin at 2 bits.

    Returns:
        The choices.
    """
    return range(max(2 if symmetric else 1, math.floor(average) - 1), min(8, math.ceil(average) + 1) + 1)


def bits_by_layer(
    lm: CausalLM, tokens: Tensor, matrices: Sequence[Sequence[Matrix]], config: LayerConfig, average: float
) -> dict[Names, int]:
    r"""Bits of every group g of matrices that read one input; engines that fuse those need them to be equal.

    $$ \min_b \sum_g e_g(b_g) \quad\text{with}\quad \sum_g n_g b_g \le \bar b \sum_g n_g , \qquad
    e_g(b) = \sum_{W \in g} \sum_t \bigl(\gamma_t^\top D_b\, x_t\bigr)^2 , $$

    where $b_g$ are its bits, $n_g$ its number of weights, $D_b$ the error of W quantized to b bits for the inputs $x_t$
    it sees at full precision, and $\gamma_t$ the gradient of the loss with respect to the output for token t, with
    labels drawn from the model: up to a factor the second-order estimate of the KL divergence that the error causes.
    Solved by giving the next bit to where a bit gains most, on the lower convex hull of $e_g$. It takes a forward and a
    backward pass of the tokens, block by block, and a GPTQ per layer and number of bits.

    Args:
        lm: The model.
        tokens: Calibration tokens, shape (windows, length), int64.
        matrices: The matrices to be quantized, by block.
        config: Algorithm, groups and grid.
        average: Bits per weight over all matrices, without scales and zero points.

    Returns:
        Bits by block and name.
    """
    stream = BlockStream(lm, tokens)
    entering: list[list[Tensor]] = []
    for index in range(len(lm.blocks)):
        entering.append(list(stream.hidden))
        with lm.loaded(index) as block:
            stream.advance(index, block)
    generator = torch.Generator().manual_seed(0)
    gradients = [_loss_gradient(stream, window, generator) for window in range(len(tokens))]
    errors: dict[tuple[Names, ...], dict[int, float]] = {}
    sizes: dict[tuple[Names, ...], int] = {}
    for index in reversed(range(len(lm.blocks))):
        stream.hidden = entering.pop()
        chosen = matrices[index] if index < len(matrices) else ()
        with lm.loaded(index) as block, named(f"block {index}"):
            groups, residuals = _quantized_errors(stream, index, block, chosen, config, average)
            found = _backward(stream, index, block, residuals, gradients)
            for readers in groups:
                key = tuple((index, name) for name in readers)
                sizes[key] = sum(residuals[name][0].numel() for name in readers)
                errors[key] = {
                    bits: sum(float(found[name][place]) for name in readers)
                    for place, bits in enumerate(candidates(average, config.symmetric))
                }
    return {name: bits for key, bits in share_bits(errors, sizes, average).items() for name in key}


def _loss_gradient(stream: BlockStream, window: int, generator: torch.Generator) -> Tensor:
    """Gradient of the summed loss with respect to the last hidden states, for labels that the model draws."""
    final = stream.hidden[window].to(stream.lm.device).requires_grad_()
    with torch.enable_grad():
        logs = stream.head(final, window).float().log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
        logs.gather(1, labels).sum().neg().backward()
    assert final.grad is not None
    return final.grad


def _quantized_errors(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    matrices: Sequence[Matrix],
    config: LayerConfig,
    average: float,
) -> tuple[list[list[str]], dict[str, list[Tensor]]]:
    """Matrices by the input they read, and W less what it is quantized to at every number of bits."""
    if not matrices:
        return [], {}
    shape = block_shape(stream, index, block, matrices, merged=True)
    groups: dict[str, list[str]] = {}
    for name, leader in shape.leaders.items():
        groups.setdefault(leader, []).append(name)
    grams: dict[str, GramFolds] = {}

    def add(name: str, x: Tensor) -> None:
        gram = grams.setdefault(name, GramFolds(x.shape[-1], folds=1, device=stream.lm.device))
        with named(name):
            gram.update(x)

    with observe(block, [m for m in matrices if m.name in groups], add):
        for _ in stream.run(index, block):
            pass
    residuals: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        W = matrix.weight(block).float().contiguous()
        sigma = Shrinkage(0.1)(grams[shape.leaders[matrix.name]].total)
        with named(matrix.name):
            residuals[matrix.name] = [
                W - _quantized(Problem.scaled(W, sigma), replace(config, bits=bits))
                for bits in candidates(average, config.symmetric)
            ]
    return list(groups.values()), residuals


def _quantized(problem: Problem, config: LayerConfig) -> Tensor:
    grid = make_grid(problem.weight, problem.energy, config, clip=config.clips)
    rounds = config.algorithm == "rtn"
    return grid.dequantize(grid.quantize(problem.weight) if rounds else gptq(problem, grid, damping=config.damping))


def _backward(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    residuals: Mapping[str, Sequence[Tensor]],
    gradients: list[Tensor],
) -> dict[str, Tensor]:
    """Take the gradients behind a block to before it; on the way, what every matrix's errors do to the loss."""
    found = {name: torch.zeros(len(errors), dtype=torch.float64) for name, errors in residuals.items()}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        y.retain_grad()
        calls.append((name, x.detach(), y))

    handles = [
        block.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: keep(name, x[0], y))
        for name in residuals
    ]
    try:
        for window, gradient in enumerate(gradients):
            hidden = stream.hidden[window].to(stream.lm.device).requires_grad_()
            with torch.enable_grad():
                stream.apply(block, hidden, index, window).backward(gradient)
            for name, x, y in calls:
                if y.grad is not None:
                    effects = [(y.grad.float() * (x.float() @ error.T)).sum(-1) for error in residuals[name]]
                    found[name] += torch.stack([effect.double().square().sum() for effect in effects]).cpu()
            calls.clear()
            gradients[window] = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
    finally:
        for handle in handles:
            handle.remove()
    return found


def share_bits(errors: Mapping[Key, Mapping[int, float]], sizes: Mapping[Key, int], average: float) -> dict[Key, int]:
    """Bits that make the sum of errors least under an average, up to the last group that no longer fits.

    Args:
        errors: Error of every group at every number of bits.
        sizes: Weights of every group.
        average: Bits per weight over all groups.

    Returns:
        Bits by group; every average that they leave unused is less than the cheapest next step.
    """
    hulls = {key: _hull(found) for key, found in errors.items()}
    bits = {key: hull[0][0] for key, hull in hulls.items()}
    left = average * sum(sizes.values()) - sum(bits[key] * sizes[key] for key in bits)
    steps = [
        (-(before[1] - after[1]) / ((after[0] - before[0]) * sizes[key]), number, after[0], key)
        for number, (key, hull) in enumerate(hulls.items())
        for before, after in pairwise(hull)
    ]
    stuck = set()
    for _, number, after_bits, key in sorted(steps, key=lambda step: step[:3]):
        cost = (after_bits - bits[key]) * sizes[key]
        if number in stuck or cost > left + 1e-6:
            stuck.add(number)
            continue
        bits[key], left = after_bits, left - cost
    return bits


def _hull(errors: Mapping[int, float]) -> list[tuple[int, float]]:
    """Points of the lower convex hull of an error over bits, from the fewest bits on."""
    hull: list[tuple[int, float]] = []
    for point in sorted(errors.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        if not hull or point[1] < hull[-1][1]:
            hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
