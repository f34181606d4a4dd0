r"""Losses that are sums over samples, and the factors of their curvature in the network's outputs.

Symbols: z_i = f(x_i; w) the outputs of sample i, flattened to O numbers; J_i its Jacobian (O, d); Lambda_i the Hessian
of the loss in z_i, Lambda_i = W_i diag(signs_i) W_i' with W_i (O, R). The Gauss-Newton Hessian of sample i is then
H_i = Z_i' diag(signs_i) Z_i with Z_i = W_i' J_i (R, d). Training minimizes the mean over samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from core_tensor.checks import check_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_stability.curvature.factors import (
    OutputFactor,
    ScaledIdentity,
    SoftmaxFactor,
    dense_factor,
    elementwise_factor,
)

LossValues = Callable[[Tensor, Tensor], Tensor]
_NO_CURVATURE = "loss: expected one with curvature in the outputs, got {}, which is piecewise linear"


@dataclass(frozen=True)
class SampleLoss:
    """A loss that is a sum over samples.

    Attributes:
        name: For messages and reports.
        values: `(outputs (n, ...), targets) -> losses (n,)`.
        factor: `(outputs, targets) -> OutputFactor`.
        convex: Whether every Lambda_i is known to be positive semidefinite.
        fit: `(outputs of some samples, all targets) -> SampleLoss`: checks the targets and fixes what torch would
            divide a batch by to its mean over all samples; None where there is nothing to fix.
    """

    name: str
    values: LossValues
    factor: Callable[[Tensor, Tensor], OutputFactor]
    convex: bool = False
    fit: "Callable[[Tensor, Tensor], SampleLoss] | None" = None


def resolve_loss(loss: str | nn.Module | LossValues) -> SampleLoss:
    """Understand what the caller trains with.

    Where torch divides by a batch's number of tokens or sum of weights (`ignore_index`, class weights), the mean over
    all samples replaces it: exact for the full batch, and for every batch if all samples have the same.

    Args:
        loss: `"squared_error"`, that is ||z - y||^2 / 2 per sample; `"mse"`, torch's mean of squares over the outputs;
            `"cross_entropy"` in torch's layout (n, V, ...); `"token_cross_entropy"`, the same in the layout of
            language models (n, positions, V); `"causal_lm"`, that with labels not yet shifted, as transformers take
            them; targets of -100 are left out. Or one of torch's loss modules or functions: MSE, cross-entropy, NLL,
            BCE (with logits or without), Huber, smooth L1, Poisson NLL, with all of their options but
            `reduction="sum"`; or a function `(outputs, targets) -> per-sample losses (n,)`.

    Returns:
        The loss.

    Raises:
        ValueError: If the loss is unknown, has no curvature, or its reduction over the batch is not the mean.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(loss, str):
        if loss not in _KNOWN:
            raise ValueError(f"loss: expected one of {', '.join(map(repr, _KNOWN))} or a function, got {loss!r}")
        return _KNOWN[loss]
    if isinstance(loss, nn.modules.loss._Loss):
        return _resolve_module(loss)
    if not callable(loss):
        raise TypeError(f"loss: expected a name, a torch loss or a function, got {type(loss).__name__}")
    for function, module in _FUNCTIONS.items():
        if loss is function:
            return _resolve_module(module())
    values: LossValues = loss
    name = getattr(loss, "__name__", type(loss).__name__)
    return SampleLoss(name, lambda z, y: _checked(values, z, y), lambda z, y: dense_factor(values, z, y))


def _resolve_module(loss: nn.modules.loss._Loss) -> SampleLoss:
    """A loss module of torch with its options."""
    name = type(loss).__name__
    if loss.reduction != "mean":
        raise ValueError(
            f"loss: expected reduction='mean' (the step divides by the batch size), got {loss.reduction!r}; for other "
            "reductions pass a function that returns one loss per sample and rescale the learning rate"
        )
    weight = getattr(loss, "weight", None)
    if isinstance(loss, nn.CrossEntropyLoss):
        return cross_entropy(
            CrossEntropy(weight=weight, ignore_index=loss.ignore_index, smoothing=loss.label_smoothing)
        )
    if isinstance(loss, nn.NLLLoss):
        return cross_entropy(CrossEntropy(weight=weight, ignore_index=loss.ignore_index, of_logits=False))
    if isinstance(loss, nn.MSELoss):
        return resolve_loss("mse")
    if isinstance(loss, nn.L1Loss):
        raise ValueError(_NO_CURVATURE.format(name))
    plain = _elementwise_function(loss)
    if plain is None:
        raise ValueError(
            f"loss: {name} is not built in; pass a function (outputs, targets) that returns its loss per sample, "
            "shape (n,)"
        )

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        losses = plain(z, y)
        if weight is None:
            return losses
        if weight.ndim >= z.ndim:
            raise ValueError(f"loss: expected a weight per output, got one per sample, shape {tuple(weight.shape)}")
        scaled: Tensor = losses * weight.to(losses)
        return scaled

    return elementwise(name, weighted)


def _elementwise_function(loss: nn.modules.loss._Loss) -> LossValues | None:
    """The loss of every output by itself, unweighted; None if the module is not known."""
    if isinstance(loss, nn.BCEWithLogitsLoss):
        positive = loss.pos_weight
        return lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=positive, reduction="none")
    if isinstance(loss, nn.BCELoss):
        return _binary_cross_entropy
    if isinstance(loss, nn.HuberLoss):
        return lambda z, y: F.huber_loss(z, y, delta=loss.delta, reduction="none")
    if isinstance(loss, nn.SmoothL1Loss):
        if loss.beta == 0:
            raise ValueError(_NO_CURVATURE.format("SmoothL1Loss(beta=0)"))
        return lambda z, y: F.smooth_l1_loss(z, y, beta=loss.beta, reduction="none")
    if isinstance(loss, nn.PoissonNLLLoss):
        log_input, full, eps = loss.log_input, loss.full, loss.eps
        return lambda z, y: F.poisson_nll_loss(z, y, log_input=log_input, full=full, eps=eps, reduction="none")
    return None


_FUNCTIONS: dict[Callable[..., Tensor], type[nn.modules.loss._Loss]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.huber_loss: nn.HuberLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
}


def check_additive(loss: SampleLoss, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss of one sample that depends on which others are in the batch, and one that is not finite.

    Args:
        loss: The loss.
        outputs: Outputs, shape (n, ...).
        targets: Targets, n along the first dimension.

    Raises:
        ValueError: If it is not a sum over samples or not finite.
    """
    together = loss.values(outputs, targets)
    if not bool(together.isfinite().all()):
        raise ValueError(f"loss: expected finite losses, got {int((~together.isfinite()).sum())} NaN or infinite")
    half = (len(outputs) + 1) // 2
    alone = loss.values(outputs[:half], targets[:half])
    slack = 1e-4 * (together.abs().max() + 1e-6)
    if bool(((together[:half] - alone).abs() > slack).any()):
        raise ValueError(f"loss: expected a sum over samples, but {loss.name} of a sample changes with its batch")


def chance(loss: SampleLoss, targets: Tensor, ignore_index: int = -100) -> float:
    """Loss of the best constant output: the entropy of the classes' frequencies, or the targets' variance.

    Args:
        loss: The loss.
        targets: Targets of the samples.
        ignore_index: Class that is left out.

    Returns:
        The loss; NaN for losses it is not known for.
    """
    if loss.name in {"mse", "squared_error"}:
        return float(loss.values(targets.double().mean(0, keepdim=True).expand_as(targets), targets.double()).mean())
    if loss.name in {"cross_entropy", "token_cross_entropy", "causal_lm"} and not targets.is_floating_point():
        counts = targets[targets != ignore_index].clamp_min(0).long().reshape(-1).bincount().double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())
    return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Losses of every output by itself


def elementwise(name: str, losses: LossValues) -> SampleLoss:
    """The mean over the outputs of a loss of every output by itself.

    Args:
        name: Name.
        losses: `(outputs, targets) -> losses`, all of one shape.

    Returns:
        The loss.
    """

    def values(z: Tensor, y: Tensor) -> Tensor:
        _check_same(name, z, y)
        return losses(z, y.to(z.dtype)).reshape(len(z), -1).mean(1)

    return SampleLoss(name, values, lambda z, y: elementwise_factor(losses, z, y.to(z.dtype)))


def _binary_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    if not bool(((z >= 0) & (z <= 1)).all()):
        raise ValueError("outputs: expected probabilities for BCELoss, got others; BCEWithLogitsLoss takes logits")
    return F.binary_cross_entropy(z, y, reduction="none")


def _scaled_identity(z: Tensor, scale: float) -> ScaledIdentity:
    return ScaledIdentity(scale, len(z), z[0].numel())


def _half_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("squared error", z, y)
    return (z - y).square().reshape(len(z), -1).sum(1) / 2


def _mean_squares(z: Tensor, y: Tensor) -> Tensor:
    _check_same("mean squared error", z, y)
    return (z - y).square().reshape(len(z), -1).mean(1)


def _check_same(name: str, z: Tensor, y: Tensor) -> None:
    if z.shape != y.shape:  # broadcasting would silently compare every output with every target
        raise ValueError(f"targets: expected shape {tuple(z.shape)}, the outputs', for {name}, got {tuple(y.shape)}")


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with torch's options.

    Attributes:
        axis: Dimension of the V classes in the outputs: 1 as torch has it, or the last (-1).
        weight: Weight of every class, shape (V,).
        ignore_index: Target that is left out.
        smoothing: Label smoothing.
        of_logits: Whether the outputs are logits; otherwise log probabilities.
        shift: Whether position p predicts target p + 1.
        divisor: What the sum over a sample's positions is divided by; None takes the mean over the samples at hand.
    """

    axis: int = 1
    weight: Tensor | None = None
    ignore_index: int = -100
    smoothing: float = 0.0
    of_logits: bool = True
    shift: bool = False
    divisor: float | None = None

    def values(self, z: Tensor, y: Tensor) -> Tensor:
        """Losses of the samples.

        Args:
            z: Outputs, shape (n, V, ...) or (n, ..., V).
            y: Classes of shape (n, ...), or probabilities of the outputs' shape.

        Returns:
            Shape (n,).
        """
        z, y = self._standard(z, y)
        weight = None if self.weight is None else self.weight.to(z)
        if self.of_logits:
            losses = F.cross_entropy(
                z, y, weight, ignore_index=self.ignore_index, reduction="none", label_smoothing=self.smoothing
            )
        else:
            losses = F.nll_loss(z, y, weight, ignore_index=self.ignore_index, reduction="none")
        return losses.reshape(len(z), -1).sum(1) / self._divisor(z, y)

    def factor(self, z: Tensor, y: Tensor) -> SoftmaxFactor:
        """Lambda = mass (diag(p) - p p') at every position.

        Args:
            z: Outputs.
            y: Targets.

        Returns:
            The factor.
        """
        standard, y = self._standard(z.detach(), y)
        mass = self._mass(standard, y) / self._divisor(standard, y)  # (n, P)
        last = z.ndim > 2 and self.axis == -1
        shape = (len(z), -1, z.shape[-1]) if last else (len(z), z.shape[1], -1)
        axis = 2 if last else 1
        unit = z.detach().reshape(shape).softmax(axis).sqrt()
        return SoftmaxFactor(unit * mass.sqrt().unsqueeze(axis), unit, axis)

    def fitted(self, z: Tensor, y: Tensor) -> "CrossEntropy":
        """Check all targets, and fix the divisor to their mean.

        Args:
            z: Outputs of some samples.
            y: Targets of all.

        Returns:
            The loss for these targets.

        Raises:
            ValueError: If a target is no class, all are ignored, or outputs are no log probabilities.
        """
        if not self.of_logits and bool((z.detach().double().logsumexp(self.axis).abs() > 1e-3).any()):
            raise ValueError("outputs: expected log probabilities (log_softmax) for NLLLoss, got other numbers")
        V = z.shape[self.axis] if z.ndim > 1 else 0
        if not y.is_floating_point():
            wrong = ((y < 0) | (y >= V)) & (y != self.ignore_index)
            if bool(wrong.any()):
                raise ValueError(
                    f"targets: expected classes from 0 to {V - 1}, or {self.ignore_index} to leave one out, got "
                    f"{int(y[wrong][0])}"
                )
        divisor = self._divisor(*self._standard(z[:1].expand(len(y), *z.shape[1:]), y))
        if not divisor > 0:
            raise ValueError("targets: expected at least one that is not ignored, got none")
        return replace(self, divisor=divisor)

    def _standard(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs with the classes along dimension 1, and targets as torch wants them."""
        check_tensor("outputs", z)
        if z.ndim < 2:
            raise ValueError(f"outputs: expected shape (n, classes, ...) for cross-entropy, got {tuple(z.shape)}")
        moved = z.movedim(self.axis, 1)
        if y.is_floating_point():
            y = y.movedim(self.axis, 1) if y.shape == z.shape else y
        else:
            y = y.long()
            if self.shift:
                y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], self.ignore_index)], 1)
        expected = moved.shape if y.is_floating_point() else (len(z), *moved.shape[2:])
        if y.shape != expected:
            raise ValueError(
                f"targets: expected classes of shape {(len(z), *moved.shape[2:])} (integers), or probabilities of the "
                f"outputs' shape, got {tuple(y.shape)} of {y.dtype}"
            )
        return moved, y

    def _divisor(self, z: Tensor, y: Tensor) -> float:
        """What torch divides by: tokens, or their weights, per sample."""
        if self.divisor is not None:
            return self.divisor
        if y.is_floating_point():
            return z[0, 0].numel()
        kept = y != self.ignore_index
        weights = kept.double() if self.weight is None else kept * self.weight.double()[y.clamp(0, z.shape[1] - 1)]
        return float(weights.sum()) / len(y)

    def _mass(self, z: Tensor, y: Tensor) -> Tensor:
        """Sum of the target's weights at every position, shape (n, P)."""
        V = z.shape[1]
        if self.weight is None and not y.is_floating_point():  # smoothed or not, the shares sum to 1
            return (y != self.ignore_index).reshape(len(y), -1).to(z)
        weight = z.new_ones(V) if self.weight is None else self.weight.to(z)
        if y.is_floating_point():
            smooth = y.reshape(len(y), V, -1) * (1 - self.smoothing) + self.smoothing / V
            return (smooth * weight[:, None]).sum(1)
        y = y.reshape(len(y), -1)
        hard = weight[y.clamp(0, V - 1)]
        return ((1 - self.smoothing) * hard + self.smoothing * weight.mean()) * (y != self.ignore_index)


def cross_entropy(options: CrossEntropy, name: str = "cross_entropy") -> SampleLoss:
    """Cross-entropy as a loss.

    Args:
        options: Its options.
        name: Name.

    Returns:
        The loss.
    """

    def fit(z: Tensor, y: Tensor) -> SampleLoss:
        return replace(cross_entropy(options.fitted(z, y), name), fit=None)

    return SampleLoss(name, options.values, options.factor, convex=True, fit=fit)


def _checked(loss: LossValues, z: Tensor, y: Tensor) -> Tensor:
    """A user's losses, if they are one per sample."""
    values = loss(z, y)
    check_tensor("loss", values)
    if values.shape != (len(z),):
        raise ValueError(f"loss: expected one loss per sample, shape ({len(z)},), got {tuple(values.shape)}")
    return values


_KNOWN = {
    "squared_error": SampleLoss("squared_error", _half_squares, lambda z, _: _scaled_identity(z, 1.0), convex=True),
    "mse": SampleLoss("mse", _mean_squares, lambda z, _: _scaled_identity(z, 2.0 / z[0].numel()), convex=True),
    "cross_entropy": cross_entropy(CrossEntropy()),
    "token_cross_entropy": cross_entropy(CrossEntropy(axis=-1), "token_cross_entropy"),
    "causal_lm": cross_entropy(CrossEntropy(axis=-1, shift=True), "causal_lm"),
}
