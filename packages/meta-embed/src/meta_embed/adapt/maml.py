r"""LiMAML's own algorithm: K gradient steps on a part of the parameters, for many tasks at once.

$$ \theta_t^{(0)} = \theta, \qquad \theta_t^{(k+1)} = \theta_t^{(k)} - \alpha \circ \nabla_\theta L(\text{support}_t;
\theta_t^{(k)}, \phi), $$

where $\phi$, the global block, stays as it is in the steps but receives the outer gradient through them (second order).
One `vmap` runs all tasks of a chunk; supports of different lengths are padded and masked by their weights. A task with
an empty support has the gradient zero, so it keeps $\theta$.

Source: arXiv 2403.00803, Alg. 1; MAML, arXiv 1703.03400.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = Mapping[str, Tensor]
Loss = Callable[..., Tensor]
"""`(adapted parameters, *tensors of one task) -> scalar`."""


class InnerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inner loop.

    Attributes:
        steps: Gradient steps K.
        lr: Inner rate, or its starting value where rates are learned.
        order: 2 differentiates through the steps, 1 takes their gradients as constants (FOMAML).
        adapt: `all` parameters of the meta block; `last`, those of its last layer (ANIL); `embedding`, the vector.
        rates: `fixed`; `scalar`, one learned rate; `tensor`, one per tensor (Meta-SGD).
        chunk: Tasks that run at the same time; memory grows with steps times chunk.
    """

    steps: int = 3
    lr: float = 0.1
    order: Literal[1, 2] = 2
    adapt: Literal["all", "last", "embedding"] = "all"
    rates: Literal["fixed", "scalar", "tensor"] = "scalar"
    chunk: int = 512

    def __post_init__(self) -> None:
        """Refuse settings that do nothing."""
        if self.steps < 0 or not self.lr > 0 or self.chunk < 1:
            raise ValueError("inner: expected steps >= 0, lr > 0 and chunk >= 1")


class Rates(nn.Module):
    """Inner rates, learned on a log scale.

    Args:
        names: Parameters that are adapted.
        options: Kind and starting value.
    """

    def __init__(self, names: list[str], options: InnerOptions) -> None:
        super().__init__()
        self.names = names
        count = len(names) if options.rates == "tensor" else 1
        start = torch.full((count,), options.lr).log()
        if options.rates == "fixed":
            self.register_buffer("log_rate", start)
        else:
            self.log_rate = nn.Parameter(start)

    def forward(self) -> dict[str, Tensor]:
        """The rate of every parameter, each a scalar."""
        rates = self.log_rate.exp()
        return {name: rates[i if len(rates) > 1 else 0] for i, name in enumerate(self.names)}


def inner_loop(
    loss: Loss, parameters: Parameters, rates: Parameters, steps: int, order: int, *task: Tensor
) -> dict[str, Tensor]:
    """K steps of one task.

    Args:
        loss: Support loss.
        parameters: Where to start.
        rates: Rate of every parameter.
        steps: K.
        order: 1 or 2.
        *task: Tensors of the task, handed to `loss`.

    Returns:
        The adapted parameters; one that the loss does not use keeps its value.
    """
    adapted = dict(parameters)
    for _ in range(steps):
        gradients = grad(loss)(adapted, *task)
        for name, value in adapted.items():
            step = gradients[name].detach() if order == 1 else gradients[name]
            adapted[name] = value - rates[name] * step
    return adapted


def adapt(
    loss: Loss,
    parameters: Parameters,
    rates: Parameters,
    task: tuple[Tensor, ...],
    options: InnerOptions,
    *,
    per_task: bool = False,
) -> dict[str, Tensor]:
    """Adapt the parameters to T tasks at once.

    Args:
        loss: Support loss of one task, a function of torch operations that `vmap` can follow.
        parameters: Where all tasks start, or with `per_task` each its own, with a leading dimension T.
        rates: Rate of every parameter.
        task: Tensors with a leading dimension T.
        options: The inner loop.
        per_task: Whether `parameters` have a leading dimension T.

    Returns:
        Adapted parameters with a leading dimension T.

    Raises:
        ValueError: If tensors disagree about T.
    """
    sizes = {len(t) for t in task} | ({len(p) for p in parameters.values()} if per_task else set())
    if len(sizes) != 1:
        raise ValueError(f"task: expected tensors of one leading size, got {sorted(sizes)}")
    count = sizes.pop()

    def one(start: Parameters, *tensors: Tensor) -> dict[str, Tensor]:
        return inner_loop(loss, start, rates, options.steps, options.order, *tensors)

    run = vmap(one, in_dims=(0 if per_task else None, *[0] * len(task)), randomness="different")
    if count == 0:
        return {n: p if per_task else p.new_zeros(0, *p.shape) for n, p in parameters.items()}
    parts = []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative, and no batching rule
        for first in range(0, count, options.chunk):
            piece = slice(first, first + options.chunk)
            start = {n: p[piece] for n, p in parameters.items()} if per_task else parameters
            parts.append(run(start, *(t[piece] for t in task)))
    if len(parts) == 1:
        return dict(parts[0])
    return {name: torch.cat([part[name] for part in parts]) for name in parameters}


def check_adaptable(module: nn.Module) -> None:
    """Refuse modules whose state one task would change for the others, and those that torch.func cannot follow.

    Args:
        module: The meta or the global block.

    Raises:
        ValueError: If there is one, with what to take instead.
    """
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or not part.track_running_stats):
            raise ValueError(
                f"{where}: batch norm would mix a task's rows and update statistics inside vmap; call .eval() on it,"
                " or use LayerNorm or GroupNorm"
            )
        if isinstance(part, nn.EmbeddingBag):
            raise ValueError(
                f"{where}: torch.func cannot follow EmbeddingBag; sum or average the rows of an Embedding, which has"
                " the same weight"
            )
        if isinstance(part, nn.Embedding) and part.max_norm is not None:
            raise ValueError(f"{where}: max_norm changes the table while a task reads it; normalize what it returns")
        if isinstance(part, nn.RNNBase):
            raise ValueError(
                f"{where}: vmap cannot follow recurrent layers; use attention or convolutions, or encode sequences"
                " before they enter MetaModel"
            )
