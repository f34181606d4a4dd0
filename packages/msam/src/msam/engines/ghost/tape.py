"""Records and perturbs every use of a tracked parameter while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from msam.engines.ghost.errors import ChangedError, UnsupportedError
from msam.engines.ghost.layout import Examples, Layout
from msam.engines.ghost.table import Table, harmless
from msam.step.batches import Shards

if TYPE_CHECKING:
    from msam.engines.ghost.directions import Plan
    from msam.engines.ghost.factors import Kept


Contribution = Callable[["Plan", Tensor], None]
"""Adds what a use's gradient says about the direction to a plan."""


_FIRST = Layout()

Call = tuple[str, tuple[int | None, ...], tuple[int, ...]]
"""One use of parameters in a forward pass: the rule's name, the indices of the tracked parameters (None where one is
absent or not tracked), and the form of the shape, by which a layout may be told."""


@lru_cache(maxsize=4096)
def _form(shape: torch.Size, examples: int, exact: bool) -> tuple[int, ...]:
    """Which dimensions have the length 1 (1), or that of the batch (2); unless `exact`, only how many there are.

    Returns:
        One number per dimension.
    """
    return tuple((1 if n == 1 else 2 if n == examples else 0) if exact else 0 for n in shape)


@dataclass(frozen=True)
class Path:
    """A proved way through the model.

    Attributes:
        calls: Its calls with their layouts.
        silent: Calls whose gradient was zero in the proof, which then says nothing of them.
        unsure: Calls whose results fit several layouts, as those of a constant batch do.
        masked: Whether a loss ignored targets.
        compiled: Whether any of it is code of `torch.compile`, which would keep its calls out of sight.
    """

    calls: list[tuple[Call, Layout]]
    silent: frozenset[int]
    unsure: frozenset[int]
    masked: bool
    compiled: bool

    def passes(self, call: Call, position: int) -> bool:
        """Whether a call belongs to the path.

        Args:
            call: The call.
            position: Its number in the forward pass.

        Returns:
            True if so.
        """
        return position < len(self.calls) and self.calls[position][0] == call

    def follows(self, other: Path) -> bool:
        """Whether this is the same way, proved for another batch.

        Args:
            other: A path.

        Returns:
            True if the calls are the same.
        """
        return [call for call, _ in self.calls] == [call for call, _ in other.calls]

    def after(self, earlier: Path) -> Path:
        """What both proofs of the same way say together.

        Args:
            earlier: The path as proved before.

        Returns:
            A path whose silent calls were so in both proofs, and whose unsure ones too.

        Raises:
            UnsupportedError: If they say different things, so that the calls do not tell one way from the other.
        """
        silent, unsure = self.silent & earlier.silent, self.unsure & earlier.unsure
        both = enumerate(zip(self.calls, earlier.calls, strict=True))
        calls = [new if i in earlier.open else old for i, (new, old) in both]
        if any(calls[i] != new for i, new in enumerate(self.calls) if i not in self.open):
            raise UnsupportedError("the same calls lay out the examples of two batches in two ways")
        return Path(calls, silent, unsure, self.masked or earlier.masked, self.compiled)

    @property
    def open(self) -> frozenset[int]:
        """Calls that the proof has not placed for good."""
        return self.silent | self.unsure


class Use(NamedTuple):
    """One recorded use: where its gradient is read off, and how that gradient enters the plan.

    Attributes:
        target: Edge of the result, or the leaf with one replica of the parameter per micro-batch.
        contribute: Takes the plan and the gradient at the target.
        call: Position of the call.
    """

    target: GradientEdge | Tensor
    contribute: Contribution
    call: int


def _ignore(plan: Plan, gradient: Tensor) -> None:
    del plan, gradient


Phase = Literal["probe", "capture", "apply"]


@dataclass
class Tape(TorchFunctionMode):
    """A torch function mode for one forward pass.

    Attributes:
        table: Finds tracked parameters.
        shards: How the batch of this pass is cut.
        phase: `"probe"` only notes the uses, `"capture"` records inputs, `"apply"` perturbs.
        paths: Proved paths (not used by a probe).
        rules: Rule of every torch function that has one.
        plan: Directions to apply.
        equal: Whether micro-batches weigh by their examples alone, so that ignored targets matter.
        masked: Whether a loss of this pass ignored targets.
        calls: The calls of this pass so far.
        uses: What was recorded.
        results: What the calls returned, without graph, in a probe.
        kept: Products of the batch itself, by call.
        examples: Where the batch lies in the tensors of this pass.
    """

    table: Table
    shards: Shards
    phase: Phase
    rules: Mapping[Any, Callable[..., Any]]
    paths: Sequence[Path] = ()
    plan: Plan | None = None
    equal: bool = True
    masked: bool = False
    calls: list[Call] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    kept: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.examples = Examples(self.shards)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if self.table.among((*args, *kwargs.values())) and not harmless(func):
            raise UnsupportedError(f"no rule for {getattr(func, '__name__', func)} of a perturbed parameter")
        return func(*args, **kwargs)

    def touches(self, *values: Any) -> bool:
        """Whether an argument is, or holds, a tracked parameter.

        Args:
            values: Arguments of a torch function.

        Returns:
            True if so.
        """
        return self.table.among(values)

    def enter(self, kind: str, owners: tuple[int | None, ...], shape: torch.Size) -> Layout:
        """Note a use and look up its layout.

        Args:
            kind: Name of the rule.
            owners: Indices of the parameters.
            shape: Shape of the input.

        Returns:
            Its layout; a placeholder in a probe.

        Raises:
            ChangedError: If no proved path goes this way.
        """
        call = (kind, owners, _form(shape, self.shards.total, self.table.exact))
        position = len(self.calls)
        self.calls.append(call)
        if self.phase == "probe":
            return _FIRST
        if not self.paths[0].passes(call, position):  # go on along one that came the same way, layouts included
            walked = self.paths[0].calls[:position]
            self.paths = [p for p in self.paths if p.passes(call, position) and p.calls[:position] == walked]
        if not self.paths:
            raise ChangedError(f"call {position} ({kind}) is new")
        return self.paths[0].calls[position][1]

    @property
    def position(self) -> int:
        """Number of the use that was entered last."""
        return len(self.calls) - 1

    def finish(self) -> None:
        """Check that the forward pass made all calls of a proved path.

        Raises:
            ChangedError: If it ended early.
        """
        if self.phase == "probe":
            return
        walked = self.paths[0].calls[: len(self.calls)]
        if len(self.paths[0].calls) != len(walked):
            self.paths = [p for p in self.paths if p.calls == walked]
        if not self.paths:
            raise ChangedError(f"the forward pass ended after {len(self.calls)} calls")

    def note(self, result: Tensor, constant: bool = False) -> Tensor:
        """In a probe: read the gradient off at a result.

        Args:
            result: What the use returned.
            constant: Whether it may lack a graph, as a norm layer without parameters on the batch itself does.

        Returns:
            The same tensor.
        """
        self.results.append(result.detach())
        if constant and not result.requires_grad:  # has no gradient; the leaf keeps the count
            self.uses.append(Use(torch.zeros((), requires_grad=True), _ignore, self.position))
        else:
            self.record(result, _ignore)
        return result

    def record(self, result: Tensor, contribute: Contribution) -> None:
        """Record a use whose gradient is read off at its result.

        The edge is taken now, because an activation function may overwrite the result in place.

        Args:
            result: What the use returned.
            contribute: Takes the plan and the gradient.

        Raises:
            UnsupportedError: If the result has no graph.
        """
        if not result.requires_grad:
            raise UnsupportedError("a perturbed parameter is used without gradients (no_grad inside the loss)")
        self.uses.append(Use(get_gradient_edge(result), contribute, self.position))

    def replicas(self, index: int, parameter: Tensor) -> Tensor:
        """One replica of a small parameter per micro-batch: leaves in pass 1, perturbed in pass 2.

        Args:
            index: Index of the parameter.
            parameter: The parameter.

        Returns:
            Shape (m, *shape).
        """
        if self.phase == "apply":
            assert self.plan is not None
            own = self.plan.perturbed(index, parameter)
            return own if len(own) == self.shards.count else own.expand(self.shards.count, *parameter.shape)
        leaf = parameter.detach().expand(self.shards.count, *parameter.shape).clone().requires_grad_()
        self.uses.append(Use(leaf, lambda plan, gradient: plan.add_dense(index, gradient), self.position))
        return leaf
