r"""Read learning rate, update rule and preconditioner off a torch optimizer.

Every optimizer here moves by eta P^-1 times a momentum of gradients, with a diagonal P that changes slowly; linear
stability is that of SGD with the momentum, on the Hessians P^(-1/2) H_i P^(-1/2).

    SGD          P = 1
    Adam, AdamW  P = sqrt(v / (1 - beta2^t)) + eps, momentum beta1 with dampening beta1
    NAdam        the same P over 1 - beta1, Nesterov momentum; while its momentum warms up, P is scaled so that the
                 full-batch edge is right
    RMSprop      P = sqrt(v) + eps (the variance where centered), the momentum applied to the scaled gradient

Weight decay in the gradient of an adaptive optimizer passes through P too: every H_i is then H_i + lambda I.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from sgd_stability.theory.dynamics import Update

_ADAMS = (optim.Adam, optim.AdamW, optim.NAdam)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer does next, as far as linear stability is concerned.

    Attributes:
        lr: Learning rate; the largest of the parameter groups.
        update: Update rule. The weight decay is the least of the groups'.
        preconditioner: Diagonal P of the step eta P^(-1) g, shape (d,), or None for P = I. Groups with a smaller rate
            than the largest enter here too; parameters that do not move have an infinite P.
        decay: lambda, where every H_i becomes H_i + lambda I before P is applied.
    """

    lr: float
    update: Update
    preconditioner: Tensor | None
    decay: float = 0.0


def trained(optimizer: optim.Optimizer, parameters: Mapping[str, Tensor]) -> list[str]:
    """Refuse an optimizer that this package does not understand, and tell what it trains.

    Args:
        optimizer: The optimizer.
        parameters: Parameters by name.

    Returns:
        Names of those it holds.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it trains none of them, or its groups differ in momentum.
    """
    if type(optimizer) not in {optim.SGD, optim.RMSprop} and not isinstance(optimizer, _ADAMS):
        raise TypeError(
            f"optimizer: expected SGD, Adam, AdamW, NAdam or RMSprop, got {type(optimizer).__name__}; for another one "
            "pass its diagonal to analyze(preconditioner=)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in parameters.items() if id(p) in held]
    if not names:
        raise ValueError("optimizer: expected it to train parameters of the model, but its groups hold none of them")
    _update(optimizer, _groups(optimizer, {name: parameters[name] for name in names}))
    return names


def read_optimizer(optimizer: optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Understand `torch.optim.SGD`, `Adam`, `AdamW`, `NAdam` and `RMSprop`.

    Args:
        optimizer: The optimizer. An adaptive one must have taken a step, for its second moments to exist.
        parameters: The parameters curvature is taken over, in order.

    Returns:
        Its state; a preconditioner that holds NaN where gradients have been NaN.

    Raises:
        TypeError: If it is another optimizer.
        ValueError: If its groups differ in momentum, it does not train all of the parameters, or an adaptive one has
            not taken a step.
    """
    missing = parameters.keys() - set(trained(optimizer, parameters))
    if missing:
        raise ValueError(f"optimizer: expected it to train {min(missing)!r}, but none of its groups holds it")
    groups = _groups(optimizer, parameters)
    rates = [float(group["lr"]) for group in groups]
    lr = max(rates)
    update, decay = _update(optimizer, groups)
    adaptive = type(optimizer) is not optim.SGD
    if not adaptive and len(set(rates)) == 1:
        return OptimizerState(lr, update, None)
    pieces = []
    for p, rate in zip(parameters.values(), rates, strict=True):
        P = _preconditioner(optimizer, p) if adaptive else torch.ones_like(p).reshape(-1)
        ratio = 1.0 if rate == lr else lr / rate if rate > 0 else torch.inf
        pieces.append(P * ratio)
    P = torch.cat(pieces)
    if adaptive and bool(P.isinf().all()):  # NaN, after a gradient that is not finite, is for the caller to judge
        raise ValueError(
            f"optimizer: expected {type(optimizer).__name__} to have taken a step, its second moments do not exist yet"
        )
    return OptimizerState(lr, update, P, decay)


def adam_preconditioner(optimizer: optim.Optimizer, parameter: Tensor) -> Tensor:
    """Adam's diagonal P = sqrt(v / (1 - beta2^t)) + eps for one parameter.

    Args:
        optimizer: Adam, AdamW or NAdam.
        parameter: A parameter it has stepped.

    Returns:
        P, shape (number of elements,).

    Raises:
        ValueError: If there is no state for the parameter yet.
    """
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        raise ValueError("optimizer: expected Adam to have taken a step, its second moments do not exist yet")
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    P: Tensor = (second / correction).sqrt().add_(group["eps"]).reshape(-1)
    if isinstance(optimizer, optim.NAdam):
        beta1 = float(group["betas"][0])
        mu = beta1 * (1 - 0.5 * 0.96 ** (float(state["step"]) * float(group["momentum_decay"])))
        P = P / (1 - beta1) * (_at_the_edge(beta1, beta1) / _at_the_edge(mu, beta1))
    return P


def _at_the_edge(mu: float, beta1: float) -> float:
    """What NAdam's step (1 - mu) g + mu m makes of a gradient that flips its sign at every step."""
    return (1 - mu) + mu * (1 - beta1) / (1 + beta1)


def _groups(optimizer: optim.Optimizer, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The group of every parameter."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return [groups[id(p)] for p in parameters.values()]


def _preconditioner(optimizer: optim.Optimizer, parameter: Tensor) -> Tensor:
    """P of an adaptive optimizer; infinite for what has had no gradient and so has never moved."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, _ADAMS) and "exp_avg_sq" in state:
        return _moving(adam_preconditioner(optimizer, parameter), state["exp_avg_sq"])
    if isinstance(optimizer, optim.RMSprop) and "square_avg" in state:
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        second = state["square_avg"]
        if group["centered"]:
            second = (second - state["grad_avg"].square()).clamp_min(0)
        return _moving(second.sqrt().add_(group["eps"]).reshape(-1), state["square_avg"])
    return torch.full_like(parameter, torch.inf).reshape(-1)


def _moving(P: Tensor, second: Tensor) -> Tensor:
    """P, infinite for entries that have had no gradient yet: a first one would make P as large as itself, not eps."""
    return torch.where(second.reshape(-1) == 0, torch.inf, P)


def _update(optimizer: optim.Optimizer, groups: list[dict[str, Any]]) -> tuple[Update, float]:
    """The update rule, and the weight decay that passes through the preconditioner."""
    if any(group.get("maximize") for group in groups):
        raise ValueError("optimizer: expected it to minimize, got maximize=True")
    decay = min(float(group["weight_decay"]) for group in groups)
    if type(optimizer) is optim.SGD:
        nesterov = bool(_same(groups, "nesterov"))
        return Update(_same(groups, "momentum"), _same(groups, "dampening"), nesterov, decay), 0.0
    if isinstance(optimizer, optim.RMSprop):
        return Update(momentum=_same(groups, "momentum")), decay
    if len({group["betas"] for group in groups}) > 1:
        raise ValueError("optimizer: expected parameter groups with the same betas")
    beta1 = float(groups[0]["betas"][0])
    decoupled = isinstance(optimizer, optim.AdamW) or bool(groups[0].get("decoupled_weight_decay"))
    if isinstance(optimizer, optim.NAdam):
        # decoupled decay beside Nesterov momentum has no kernel here; its share, lr * decay, is far below 1
        return Update(momentum=beta1, nesterov=beta1 > 0), 0.0 if decoupled else decay
    if decoupled:
        return Update(momentum=beta1, dampening=beta1, weight_decay=decay, decoupled=True), 0.0
    return Update(momentum=beta1, dampening=beta1), decay


def _same(groups: list[dict[str, Any]], key: str) -> float:
    values = {float(group[key]) for group in groups}
    if len(values) > 1:
        raise ValueError(f"optimizer: expected parameter groups with the same {key}, got {sorted(values)}")
    return values.pop()
