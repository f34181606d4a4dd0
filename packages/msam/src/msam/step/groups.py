"""Parameter groups: what in them is mSAM's own, and the base optimizer that takes the rest."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from core_tensor.checks import check_number
from torch import Tensor, nn
from torch.optim import Optimizer


class Own(NamedTuple):
    """What mSAM keeps about one parameter group.

    Attributes:
        perturb: Whether its parameters are perturbed.
        rho: The group's radius, or None.
    """

    perturb: bool = True
    rho: float | None = None


def take_own(group: dict[str, Any]) -> Own:
    """Take mSAM's keys out of a parameter group, which the base optimizer would not know.

    Args:
        group: The group; `perturb` and `rho` are removed.

    Returns:
        What they said.

    Raises:
        TypeError: If `perturb` is no bool.
    """
    perturb, rho = group.pop("perturb", True), group.pop("rho", None)
    if not isinstance(perturb, bool):
        raise TypeError(f"perturb: expected True or False, got {perturb!r}")
    if rho is not None:
        check_number("rho", rho, low=0.0, high=float("inf"), open_high=True)
    return Own(perturb, None if rho is None else float(rho))


def make_base(
    model: nn.Module,
    optimizer: Callable[..., Optimizer] | Optimizer,
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | None,
    base: Mapping[str, Any],
) -> tuple[Optimizer, list[Own]]:
    """Make the base optimizer, or take the one that was given.

    Args:
        model: Whose parameters are taken if there are no `params`.
        optimizer: Class or function called as `optimizer(params, **base)`, or an instance.
        params: Parameters or parameter groups, or None.
        base: Arguments of the base optimizer.

    Returns:
        The optimizer, and what mSAM keeps about each of its groups.

    Raises:
        ValueError: If arguments contradict an instance, there are no parameters, or `step()` needs a closure (LBFGS).
        TypeError: If it makes no optimizer.
    """
    if isinstance(optimizer, Optimizer):
        if params is not None or base:
            raise ValueError("optimizer: an instance brings its own params and arguments; give neither beside it")
        own, made = [take_own(group) for group in optimizer.param_groups], optimizer
    else:
        groups: list[Any] = list(model.parameters() if params is None else params)
        if not groups:
            raise ValueError("params: expected at least one parameter, got none")
        if isinstance(groups[0], dict):
            groups = [dict(group) for group in groups]
            own = [take_own(group) for group in groups]
        else:
            own = [Own()]
        made = optimizer(groups, **base)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(made).__name__}")
    needed = [p for p in inspect.signature(made.step).parameters.values() if p.default is p.empty]
    if any(p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD} for p in needed):
        raise ValueError(
            f"optimizer: expected one whose step() needs no closure, since mSAM gives it a gradient, got "
            f"{type(made).__name__}"
        )
    return made, own
