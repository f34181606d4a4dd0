"""Parameter groups: what in them is mSAM's own, and the base optimizer that takes the rest."""

import inspect
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class Together(Optimizer):
    """Several optimizers over disjoint parameters as one, such as Muon for matrices and AdamW for the rest.

    Args:
        parts: The optimizers; their parameter groups stay theirs, so that schedulers reach them.

    Raises:
        ValueError: If there are none, or two of them share a parameter.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self.state: Any = ChainMap(*(part.state for part in parts))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure reaches it
        """Let all of them step.

        Args:
            closure: Ignored.
        """
        del closure
        for part in self.parts:
            part.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at the start; later nobody says which optimizer it is for.

        Args:
            param_group: A group of one of the optimizers.

        Raises:
            ValueError: If it comes later.
        """
        if hasattr(self, "parts"):
            raise ValueError("param_group: several optimizers are at work; add it to one of them, and make MSAM anew")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """States of all.

        Returns:
            Under the key `"parts"`, in order.
        """
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the states of all.

        Args:
            state_dict: What `state_dict` returned.
        """
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = ChainMap(*(part.state for part in self.parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copying takes the optimizers along.

        Returns:
            A function and its arguments, as in Python's copy protocol.
        """
        return type(self), (self.parts,)


def make_base(
    model: nn.Module,
    optimizer: Callable[..., Optimizer] | Optimizer | Sequence[Optimizer],
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | None,
    base: Mapping[str, Any],
) -> tuple[Optimizer, list[Own]]:
    """Make the base optimizer, or take the one that was given.

    Args:
        model: Whose parameters are taken if there are no `params`.
        optimizer: Class or function called as `optimizer(params, **base)`, an instance, or several of them.
        params: Parameters or parameter groups, or None.
        base: Arguments of the base optimizer.

    Returns:
        The optimizer, and what mSAM keeps about each of its groups.

    Raises:
        ValueError: If arguments contradict an instance, there are no parameters, or `step()` needs a closure (LBFGS).
        TypeError: If it makes no optimizer.
    """
    if isinstance(optimizer, list | tuple) and all(isinstance(part, Optimizer) for part in optimizer):
        optimizer = Together(optimizer)
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
        if not callable(optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        made = optimizer(groups, **base)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(made).__name__}")
    for part in made.parts if isinstance(made, Together) else [made]:
        needed = [p for p in inspect.signature(part.step).parameters.values() if p.default is p.empty]
        if any(p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD} for p in needed):
            raise ValueError(
                f"optimizer: expected one whose step() needs no closure, since mSAM gives it a gradient, got "
                f"{type(part).__name__}"
            )
    return made, own
