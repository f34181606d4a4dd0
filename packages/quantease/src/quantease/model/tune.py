r"""Tuning with the codes fixed: one multiplier per row of every quantized matrix, and the weights of the norms.

Quantizing layers one by one leaves errors that the layers could still make up for between them. Row i of a matrix
becomes $(1 + u_i)\,s_i (c_i - z_i) + H_i$, a norm's weight $w + v \operatorname{rms}(w)$; u and v start at 0 and are
found by Adam, one calibration window a step (the coarser the grid, the longer), to lower

$$ \frac{\|h - h_\text{fp}\|_F^2}{\|h_\text{fp}\|_F^2} \;\text{(hidden states behind the block)} \quad\text{or}\quad
\mathrm{KL}(p_\text{fp} \,\|\, p) \;\text{(the whole model's predictions)}. $$

Scales and norms are rounded to their storage and kept only if they then lower the mean loss over all windows.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from core_tensor.app.ranks import Ranks
from core_tensor.checks import check_tensor
from torch import Tensor, nn
from torch.func import functional_call

from quantease.model.block_stream import BlockStream
from quantease.model.layer_store import Tuned
from quantease.model.matrices import Matrix
from quantease.problem.grid import store_scale
from quantease.problem.layer import QuantizedLayer

RATE, BETAS, WARM_UP = 0.036, (0.9, 0.95), 4
"""Step size at its greatest, over the number of steps of a grid; Adam's decays; steps until the greatest."""

Losses = dict[str, float]


class BlockParameters:
    """What is tuned in a block.

    Args:
        block: The block, with quantized weights in place.
        matrices: Its quantized matrices.
        layers: Their codes and scales.
    """

    def __init__(self, block: nn.Module, matrices: Sequence[Matrix], layers: Mapping[str, QuantizedLayer]) -> None:
        self.block, self.layers = block, layers
        self.members: dict[str, list[Matrix]] = {}  # by parameter
        for matrix in matrices:
            self.members.setdefault(matrix.parameter, []).append(matrix)
        device = next(block.parameters()).device
        sizes = {m.name: m.weight(block).shape[0] for m in matrices}
        self.rows = {name: torch.zeros(q, device=device, requires_grad=True) for name, q in sizes.items()}  # u
        norms = norm_weights(block)
        self.norms = {name: torch.zeros_like(w, dtype=torch.float32, requires_grad=True) for name, w in norms.items()}
        self.outliers = {
            name: layer.outliers.to_dense(layer.codes.shape[1]).to(device)
            for name, layer in layers.items()
            if layer.outliers is not None
        }
        # What a linear module returns can be multiplied instead of its weights, which then need no gradients.
        self.linear = {
            matrix.parameter: matrix.name
            for matrix in matrices
            if matrix.expert is None and not matrix.transposed and matrix.name not in self.outliers
            if type(block.get_submodule(matrix.name)).forward is nn.Linear.forward
        }

    @property
    def leaves(self) -> list[Tensor]:
        """Every u and v."""
        return [*self.rows.values(), *self.norms.values()]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The leaves as Adam takes them: those of a matrix of b bits move by up to RATE / (2^b - 1) a step."""
        rates = {name: RATE / layer.grid.max_code for name, layer in self.layers.items()}
        rows = [{"params": [leaf], "rate": rates[name]} for name, leaf in self.rows.items()]
        norms = list(self.norms.values())
        return rows + ([{"params": norms, "rate": max(rates.values())}] if norms else [])

    def overrides(self, besides: Collection[str] = ()) -> dict[str, Tensor]:
        """Parameters of the block as they are now, by name, but for some; gradients flow to the leaves."""
        found: dict[str, Tensor] = {}
        for name, members in self.members.items():
            if name in besides:
                continue
            values = self.block.get_parameter(name).detach()
            new = values.float() if values.dtype != torch.float32 else values.clone()
            for matrix in members:
                on_grid = matrix.part(values).float()
                if matrix.name in self.outliers:
                    on_grid = on_grid - self.outliers[matrix.name]
                matrix.part(new).addcmul_(on_grid, self.rows[matrix.name][:, None])
            found[name] = new.to(values.dtype)
        for name in self.norms:
            found[name] = self._norm(name).to(self.block.get_parameter(name).dtype)
        return found

    def _norm(self, name: str) -> Tensor:
        weight = self.block.get_parameter(name).detach().float()
        size = weight.square().mean().sqrt()
        return weight + self.norms[name] * torch.where(size > 0, size, 1.0)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Run the block with these parameters."""
        handles = [
            self.block.get_submodule(name).register_forward_hook(_multiplied(self.rows[name]))
            for name in self.linear.values()
        ]
        try:
            out: Tensor = functional_call(self.block, self.overrides(self.linear), args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return out

    @torch.no_grad()
    def round(self) -> Tuned:
        """Scales and norms as they are stored; the leaves are left alone."""
        scales = {}
        for name, layer in self.layers.items():
            scale = layer.scales.float() * (1 + self.rows[name].cpu())[:, None]
            most = torch.finfo(layer.scales.dtype).max
            scales[name] = store_scale(scale.clamp_max(most), layer.scales.dtype).to(layer.scales.dtype)
        norms = {name: self._norm(name).to(self.block.get_parameter(name).dtype) for name in self.norms}
        return Tuned(scales, norms)

    def untouched(self) -> Tuned:
        """Scales and norms from before."""
        norms = {name: self.block.get_parameter(name).detach().clone() for name in self.norms}
        return Tuned({name: layer.scales for name, layer in self.layers.items()}, norms)

    def put(self, tuned: Tuned) -> None:
        """Write rounded values into the block."""
        for members in self.members.values():
            for matrix in members:
                layer = replace(self.layers[matrix.name], scales=tuned.scales[matrix.name])
                matrix.assign(self.block, layer.dequantize())
        put_norms(self.block, tuned)


def _multiplied(rows: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A hook that gives a linear module's output what it would be with row i of the weights times 1 + u_i."""

    def hook(module: nn.Module, _: object, y: Tensor) -> Tensor:
        bias = module._parameters.get("bias")
        product = y if bias is None else y - bias
        return torch.addcmul(y.float(), product.float(), rows).to(y.dtype)

    return hook


def put_norms(block: nn.Module, tuned: Tuned | None) -> None:
    """Write tuned norms into a block.

    Args:
        block: The block, in memory.
        tuned: What was tuned; None leaves the block as it is.

    Raises:
        ValueError: If a norm does not fit the block.
    """
    for name, value in ({} if tuned is None else tuned.norms).items():
        own = dict(block.named_parameters()).get(name)
        if own is None:
            raise ValueError(f"tuned norms: expected weights of the block's norms, got {name}")
        check_tensor(f"tuned norm {name}", value, shape=tuple(own.shape), dtype=own.dtype, finite=True)
        own.detach().copy_(value)


def norm_weights(block: nn.Module) -> dict[str, Tensor]:
    """Weights of the norms of a block.

    Args:
        block: The block.

    Returns:
        Parameters of one dimension named `weight` of modules whose class is called a norm, by name.
    """
    found = {}
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and "norm" in type(module).__name__.lower():
            found[f"{name}.weight" if name else "weight"] = weight.detach()
    return found


@dataclass(frozen=True)
class Windows:
    """The calibration windows of a run and who holds them.

    Attributes:
        ranks: The processes that share the run.
        count: Windows of all ranks.
        first: Windows of the ranks before this one.
        own: Windows of this rank.
    """

    ranks: Ranks
    count: int
    first: int
    own: int

    def local(self, window: int) -> int | None:
        """This rank's number of a window; None where another rank holds it."""
        return window - self.first if self.first <= window < self.first + self.own else None

    def mean(self, loss: Callable[[int], float], device: torch.device) -> float:
        """Mean of a loss over the windows of all ranks, the same for any number of ranks."""
        losses = torch.zeros(self.count, dtype=torch.float64, device=device)
        for window in range(self.own):
            losses[self.first + window] = loss(window)
        return float(self.ranks.sum(losses).mean())

    def order(self, steps: int) -> list[int]:
        """A window for every step: all of them in turn, shuffled anew each time."""
        generator = torch.Generator().manual_seed(0)
        rounds = -(-steps // self.count)
        return torch.cat([torch.randperm(self.count, generator=generator) for _ in range(rounds)]).tolist()[:steps]


def tune_block(
    index: int,
    parameters: BlockParameters,
    stream: BlockStream,
    exact: BlockStream,
    windows: Windows,
    steps: int,
) -> tuple[Tuned, Losses, list[Tensor] | None]:
    """Tune a block whose codes are fixed; its weights end as they were.

    Args:
        index: Number of the block.
        parameters: The block's.
        stream: Hidden states before the block, behind quantized blocks.
        exact: Hidden states behind the block at full precision.
        windows: The windows of both streams.
        steps: Windows to learn from, one after the other.

    Returns:
        Scales and norms, the mean loss before and after, and the hidden states behind the block with these scales and
        norms, as `stream.hidden` holds them; None where nothing was changed.
    """
    device = stream.lm.device
    behind = list(stream.hidden)

    def run(window: int, block: Callable[..., object]) -> Tensor:
        return stream.apply(block, stream.hidden[window].to(device), index, window)

    def loss(window: int, states: Tensor) -> Tensor:
        out = states.float()
        wanted = exact.hidden[window].to(out)
        return (out - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(out.dtype).tiny)

    def learn(window: int) -> None:
        loss(window, run(window, parameters)).backward()

    def judge(window: int) -> float:
        with torch.no_grad():
            out = run(window, parameters.block)
            behind[window] = out.cpu()
            return float(loss(window, out))

    found, losses = _tune({index: parameters}, learn, judge, windows, steps, device)
    return found[index], losses, behind if losses["after"] < losses["before"] else None


def tune_model(
    parameters: Mapping[int, BlockParameters],
    blocks: Sequence[nn.Module],
    stream: BlockStream,
    exact: BlockStream,
    windows: Windows,
    steps: int,
) -> tuple[dict[int, Tuned], Losses]:
    """Tune all quantized blocks together on the divergence of the model's predictions; gradients go block by block.

    Args:
        parameters: Of the quantized blocks, by number.
        blocks: All blocks, in memory.
        stream: Hidden states before the first block.
        exact: Hidden states behind the last block at full precision.
        windows: The windows of both streams.
        steps: Windows to learn from, one after the other.

    Returns:
        Scales and norms by block, and the mean divergence before and after.
    """
    device = stream.lm.device
    tunable: list[Callable[..., object]] = [parameters.get(i, block) for i, block in enumerate(blocks)]

    @torch.no_grad()
    def forward(window: int, parts: Sequence[Callable[..., object]]) -> list[Tensor]:
        states = [stream.hidden[window].to(device)]
        for index, part in enumerate(parts):
            states.append(stream.apply(part, states[-1], index, window))
        return states

    def divergence(window: int, final: Tensor) -> Tensor:
        with torch.no_grad():
            p = exact.logits(window).float().log_softmax(-1)
        q = stream.head(final, window).float().log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()

    def learn(window: int) -> None:
        *states, final = forward(window, tunable)
        final.requires_grad_()
        divergence(window, final).backward()
        gradient = final.grad
        for index in range(min(parameters), len(blocks))[::-1]:
            entering = states[index].requires_grad_()
            stream.apply(tunable[index], entering, index, window).backward(gradient)
            gradient = entering.grad

    def judge(window: int) -> float:
        with torch.no_grad():
            return float(divergence(window, forward(window, blocks)[-1]))

    return _tune(parameters, learn, judge, windows, steps, device)


def _tune(
    parameters: Mapping[int, BlockParameters],
    learn: Callable[[int], None],
    judge: Callable[[int], float],
    windows: Windows,
    steps: int,
    device: torch.device,
) -> tuple[dict[int, Tuned], Losses]:
    """Adam on the leaves of some blocks; what it found, rounded, or what was there, whichever has the lower loss."""
    leaves = [leaf for found in parameters.values() for leaf in found.leaves]
    optimizer = torch.optim.Adam([group for found in parameters.values() for group in found.groups], betas=BETAS)
    untouched = {index: found.untouched() for index, found in parameters.items()}
    before = windows.mean(judge, device)
    with torch.enable_grad():
        for step, window in enumerate(windows.order(steps)):
            optimizer.zero_grad(set_to_none=False)
            here = windows.local(window)
            if here is not None:
                learn(here)
            _same_everywhere(leaves, windows.ranks)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * _fraction(step, steps)
            optimizer.step()
    rounded = {index: found.round() for index, found in parameters.items()}
    for index, found in parameters.items():
        found.put(rounded[index])
    after = windows.mean(judge, device)
    for index, found in parameters.items():
        found.put(untouched[index])
    kept = rounded if after < before else untouched  # a loss that is no number is not below another
    return kept, {"before": before, "after": min(after, before)}


def _fraction(step: int, steps: int) -> float:
    """Of the greatest step size: a short warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _same_everywhere(leaves: Sequence[Tensor], ranks: Ranks) -> None:
    """Give every rank the gradients of the one that held the window: the others add zeros."""
    for leaf in leaves:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    if ranks.size == 1:
        return
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
