r"""Losses that are sums over samples, and the factors of their curvature in the network's outputs.

Symbols: z_i = f(x_i; w) the outputs of sample i, flattened to O numbers; J_i its Jacobian (O, d); Lambda_i the Hessian
of the loss in z_i, Lambda_i = W_i diag(signs_i) W_i' with W_i (O, R). The Gauss-Newton Hessian of sample i is then
H_i = Z_i' diag(signs_i) Z_i with Z_i = W_i' J_i (R, d). Training minimises the mean over samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from core_tensor.checks import check_tensor
from torch import Tensor
from torch.nn import functional as F

from sgd_stability.curvature.factors import OutputFactor, ScaledIdentity, dense_factor, softmax_factor, token_factor

LossValues = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampleLoss:
    """A loss that is a sum over samples.

    Attributes:
        name: For messages and reports.
        values: `(outputs (n, ...), targets) -> losses (n,)`.
        factor: `(outputs, targets) -> OutputFactor`.
    """

    name: str
    values: LossValues
    factor: Callable[[Tensor, Tensor], OutputFactor]


def resolve_loss(loss: str | torch.nn.Module | LossValues) -> SampleLoss:
    """Understand what the caller trains with.

    Args:
        loss: `"squared_error"`, that is ||z - y||^2 / 2 per sample; `"mse"`, torch's mean of squares over the outputs;
            `"cross_entropy"` in torch's layout (n, V, ...), the mean over positions; `"token_cross_entropy"`, the same
            in the layout of language models (n, positions, V), where targets of -100 are left out; an `nn.MSELoss` or
            `nn.CrossEntropyLoss`; or a function `(outputs, targets) -> per-sample losses (n,)`.

    Returns:
        The loss.

    Raises:
        ValueError: If the loss is unknown, or its reduction over the batch is not the mean.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(loss, str):
        if loss not in _KNOWN:
            raise ValueError(f"loss: expected one of {', '.join(map(repr, _KNOWN))} or a function, got {loss!r}")
        return _KNOWN[loss]
    if isinstance(loss, torch.nn.MSELoss | torch.nn.CrossEntropyLoss):
        return _resolve_module(loss)
    if not callable(loss):
        raise TypeError(f"loss: expected a name, a torch loss or a function, got {type(loss).__name__}")
    values: LossValues = loss
    name = getattr(loss, "__name__", type(loss).__name__)
    return SampleLoss(name, lambda z, y: _checked(values, z, y), lambda z, y: dense_factor(values, z, y))


def _resolve_module(loss: torch.nn.MSELoss | torch.nn.CrossEntropyLoss) -> SampleLoss:
    if loss.reduction != "mean":
        raise ValueError(
            f"loss: expected reduction='mean' (the step divides by the batch size), got {loss.reduction!r}; for other "
            "reductions pass a function that returns one loss per sample and rescale the learning rate"
        )
    if isinstance(loss, torch.nn.MSELoss):
        return resolve_loss("mse")
    if loss.weight is not None:
        raise ValueError("loss: expected no class weights (torch divides by the batch's sum of weights), got some")
    values = _cross_entropy(loss.label_smoothing)
    return SampleLoss("cross_entropy", values, lambda z, _: softmax_factor(z))


def check_additive(loss: SampleLoss, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss of one sample that depends on which others are in the batch, and one that is not finite.

    Args:
        loss: The loss.
        outputs: Outputs, shape (n, ...).
        targets: Targets, n along the first dimension.

    Raises:
        ValueError: If it is not a sum over samples or not finite.
    """
    if loss.name == "cross_entropy" and not targets.is_floating_point() and bool((targets < 0).any()):
        raise ValueError("targets: expected class indices without ignored ones (negative), got some")
    together = loss.values(outputs, targets)
    if not bool(together.isfinite().all()):
        raise ValueError(f"loss: expected finite losses, got {int((~together.isfinite()).sum())} NaN or infinite")
    half = (len(outputs) + 1) // 2
    alone = loss.values(outputs[:half], targets[:half])
    slack = 1e-4 * (together.abs().max() + 1e-6)
    if bool(((together[:half] - alone).abs() > slack).any()):
        raise ValueError(f"loss: expected a sum over samples, but {loss.name} of a sample changes with its batch")


def _scaled_identity(z: Tensor, scale: float) -> ScaledIdentity:
    return ScaledIdentity(scale, len(z), z[0].numel())


def _half_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("squared error", z, y)
    return (z - y).square().flatten(1).sum(1) / 2


def _mean_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("mean squared error", z, y)
    return (z - y).square().flatten(1).mean(1)


def _check_same(name: str, z: Tensor, y: Tensor) -> None:
    if z.shape != y.shape:  # broadcasting would silently compare every output with every target
        raise ValueError(f"targets: expected shape {tuple(z.shape)}, the outputs', for {name}, got {tuple(y.shape)}")


def _cross_entropy(smoothing: float) -> LossValues:
    def values(z: Tensor, y: Tensor) -> Tensor:
        check_tensor("outputs", z)
        if z.ndim < 2:
            raise ValueError(f"outputs: expected shape (n, classes, ...) for cross-entropy, got {tuple(z.shape)}")
        losses = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
        return losses.reshape(len(z), -1).mean(1)

    return values


def _tokens(z: Tensor, y: Tensor) -> Tensor:
    weights = _token_weights(z, y)
    return (F.cross_entropy(z.transpose(1, 2), y, reduction="none") * weights).sum(1)


def _token_weights(z: Tensor, y: Tensor) -> Tensor:
    if z.ndim != 3 or y.shape != z.shape[:2]:
        raise ValueError(f"targets: expected one per token of logits (n, positions, V), got {tuple(y.shape)}")
    counts = (y != -100).sum(1)
    if bool((counts != counts[0]).any()) or counts[0] == 0:  # then training's loss is no mean over sequences
        raise ValueError("targets: expected the same number of tokens other than -100 in every sequence")
    return (y != -100).to(z.dtype) / counts[0]


def _checked(loss: LossValues, z: Tensor, y: Tensor) -> Tensor:
    values = loss(z, y)
    check_tensor("loss", values)
    if values.shape != (len(z),):
        raise ValueError(f"loss: expected one loss per sample, shape ({len(z)},), got {tuple(values.shape)}")
    return values


_KNOWN = {
    "squared_error": SampleLoss("squared_error", _half_squares, lambda z, _: _scaled_identity(z, 1.0)),
    "mse": SampleLoss("mse", _mean_squares, lambda z, _: _scaled_identity(z, 2.0 / z[0].numel())),
    "cross_entropy": SampleLoss("cross_entropy", _cross_entropy(0.0), lambda z, _: softmax_factor(z)),
    "token_cross_entropy": SampleLoss(
        "token_cross_entropy", _tokens, lambda z, y: token_factor(z, _token_weights(z, y))
    ),
}
