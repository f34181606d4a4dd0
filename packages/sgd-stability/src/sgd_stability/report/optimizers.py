"""Read learning rate, update rule and preconditioner off a torch optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgd_stability.theory.dynamics import Update


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer does next, as far as linear stability is concerned.

    Attributes:
        lr: Learning rate; the largest of the parameter groups.
        update: Update rule. The weight decay is the least of the groups'.
        preconditioner: Diagonal P of the step eta P^(-1) g, shape (d,), or None for P = I. Groups with a smaller rate
            than the largest enter here too.
    """

    lr: float
    update: Update
    preconditioner: Tensor | None


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Understand `torch.optim.SGD`, `Adam` and `AdamW`.

    Args:
        optimizer: The optimizer. Adam must have taken a step, for its second moments to exist.
        parameters: The parameters curvature is taken over, in order.

    Returns:
        Its state.

    Raises:
        TypeError: If it is another optimizer.
        ValueError: If its groups differ in momentum, it does not train all of the parameters, or Adam has coupled
            weight decay (use AdamW) or has not stepped.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in groups]
    if missing:
        raise ValueError(f"optimizer: expected it to train {missing[0]!r}, but none of its groups holds it")
    rates = [float(groups[id(p)]["lr"]) for p in parameters.values()]
    lr = max(rates)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        update, precondition = _adam_update(optimizer, groups, parameters), True
    elif type(optimizer) is torch.optim.SGD:
        update, precondition = _sgd_update(groups, parameters), False
    else:
        raise TypeError(f"optimizer: expected SGD, Adam or AdamW, got {type(optimizer).__name__}")
    if not precondition and len(set(rates)) == 1:
        return OptimizerState(lr, update, None)
    pieces = []
    for p, rate in zip(parameters.values(), rates, strict=True):
        P = adam_preconditioner(optimizer, p) if precondition else torch.ones_like(p).reshape(-1)
        pieces.append(P * (lr / rate if rate > 0 else torch.inf))
    return OptimizerState(lr, update, torch.cat(pieces))


def adam_preconditioner(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Adam's diagonal P = sqrt(v / (1 - beta2^t)) + eps for one parameter.

    Args:
        optimizer: Adam or AdamW.
        parameter: A parameter it has stepped.

    Returns:
        P, shape (number of elements,).

    Raises:
        ValueError: If there is no state for the parameter yet.
    """
    state = optimizer.state.get(parameter, {})
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if "exp_avg_sq" not in state:
        raise ValueError("optimizer: expected Adam to have taken a step, its second moments do not exist yet")
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    P: Tensor = (second / correction).sqrt().add_(group["eps"]).reshape(-1)
    return P


def _sgd_update(groups: Mapping[int, dict[str, Any]], parameters: Mapping[str, Tensor]) -> Update:
    used = [groups[id(p)] for p in parameters.values()]
    if any(group["maximize"] for group in used):
        raise ValueError("optimizer: expected it to minimise, got maximize=True")
    return Update(
        momentum=_same(used, "momentum"),
        dampening=_same(used, "dampening"),
        nesterov=bool(_same(used, "nesterov")),
        weight_decay=min(float(group["weight_decay"]) for group in used),
    )


def _adam_update(
    optimizer: torch.optim.Optimizer, groups: Mapping[int, dict[str, Any]], parameters: Mapping[str, Tensor]
) -> Update:
    used = [groups[id(p)] for p in parameters.values()]
    decay = min(float(group["weight_decay"]) for group in used)
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(used[0].get("decoupled_weight_decay"))
    if decay > 0 and not decoupled:
        raise ValueError("optimizer: expected AdamW for weight decay, Adam's runs through the preconditioner")
    if len({group["betas"] for group in used}) > 1:
        raise ValueError("optimizer: expected parameter groups with the same betas")
    beta1 = float(used[0]["betas"][0])
    return Update(momentum=beta1, dampening=beta1, weight_decay=decay, decoupled=True)


def _same(groups: list[dict[str, Any]], key: str) -> float:
    values = {float(group[key]) for group in groups}
    if len(values) > 1:
        raise ValueError(f"optimizer: expected parameter groups with the same {key}, got {sorted(values)}")
    return values.pop()
