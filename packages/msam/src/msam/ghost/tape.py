"""Records and perturbs every use of a tracked parameter while a model runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from msam.batches import Shards

if TYPE_CHECKING:
    from msam.ghost.directions import Kept, Plan


Contribution = Callable[["Plan", Tensor], None]
"""Adds what a use's gradient says about the direction to a plan."""


class UnsupportedError(RuntimeError):
    """The model uses a perturbed parameter in a way that ghost mode has no exact rule for."""


class ChangedError(RuntimeError):
    """The model took another path than the ones that were proved before."""


@dataclass(frozen=True)
class Layout:
    """How one use of a parameter lays out the examples of the batch.

    Attributes:
        dim: Dimension of the result that counts examples (each may own several consecutive rows).
        shared: Whether the input is the same for all examples (positions, say); it is then repeated for each.
    """

    dim: int = 0
    shared: bool = False


_FIRST = Layout()


class Call(NamedTuple):
    """What identifies one use of parameters in a forward pass.

    Attributes:
        kind: Name of the rule.
        owners: Indices of the tracked parameters, None where one is absent or not tracked.
        ndim: Dimensions of the result.
    """

    kind: str
    owners: tuple[int | None, ...]
    ndim: int


@dataclass
class Use:
    """One recorded use: where its gradient is read off, and how that gradient enters the plan.

    Attributes:
        target: Edge of the result, or the leaf with one replica of the parameter per micro-batch.
        contribute: Takes the plan and the gradient at the target.
    """

    target: GradientEdge | Tensor
    contribute: Contribution


def _ignore(plan: Plan, gradient: Tensor) -> None:
    del plan, gradient


class Table:
    """Finds a parameter's index among the tracked ones.

    FSDP2 swaps whole parameters in for the time of a layer's forward; these are found by name.

    Args:
        model: The model.
        parameters: Tracked parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._index: dict[int, int] = {id(p): i for i, p in enumerate(parameters)}
        self._parameters = tuple(parameters)  # keeps the ids alive, as does the next one
        self._held: list[Tensor] = []
        self.sharded = any(isinstance(m, FSDPModule) for m in model.modules())
        self._model = model
        self._names: dict[str, int] = {}
        if self.sharded:
            self._names = {n: self._index[id(p)] for n, p in model.named_parameters() if id(p) in self._index}

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these, in this order, are the tracked parameters.

        Args:
            parameters: Parameters.

        Returns:
            True if so.
        """
        return len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))

    def find(self, value: Any) -> int | None:
        """Index of a tracked parameter.

        Args:
            value: Any argument of a torch function.

        Returns:
            The index, or None.
        """
        found = self._index.get(id(value))
        if found is None and self.sharded and value.__class__ is nn.Parameter:
            for name, p in self._model.named_parameters():
                if p is value and name in self._names:
                    found = self._index[id(p)] = self._names[name]
                    self._held.append(p)
                    return found
        return found


_UNSAFE_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_HARMLESS = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "element_size", "data_ptr",
    "storage_offset", "get_device", "__len__", "__hash__", "__repr__", "is_same_size", "nelement", "ndimension",
    "__bool__", "register_hook", "untyped_storage", "is_signed", "__set__",
}  # fmt: skip


def harmless(func: Any) -> bool:
    """Whether a torch function reads no values of its arguments.

    Args:
        func: The function.

    Returns:
        True for shapes, types, devices and their kin.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _UNSAFE_ATTRIBUTES
    return name in _HARMLESS


Phase = Literal["probe", "capture", "apply"]


@dataclass
class Tape(TorchFunctionMode):
    """A torch function mode for one forward pass.

    Attributes:
        table: Finds tracked parameters.
        shards: How the batch of this pass is cut.
        phase: `"probe"` only notes the uses, `"capture"` records inputs, `"apply"` perturbs.
        paths: Proved paths, each a list of calls with layouts (not used by a probe).
        rules: Rule of every torch function that has one.
        plan: Directions to apply.
        calls: The calls of this pass so far.
        uses: What was recorded.
        shapes: Shapes of the results, in a probe.
        kept: Products of the batch itself, by call.
    """

    table: Table
    shards: Shards
    phase: Phase
    rules: Mapping[Any, Callable[..., Any]]
    paths: Sequence[Sequence[tuple[Call, Layout]]] = ()
    plan: Plan | None = None
    calls: list[Call] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    kept: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if (self.touches(args) or (kwargs and self.touches(tuple(kwargs.values())))) and not harmless(func):
            raise UnsupportedError(f"no rule for {getattr(func, '__name__', func)} of a perturbed parameter")
        return func(*args, **kwargs)

    def touches(self, value: Any) -> bool:
        """Whether an argument is, or holds, a tracked parameter.

        Args:
            value: Argument of a torch function.

        Returns:
            True if so.
        """
        if value.__class__ is tuple or value.__class__ is list:
            return any(map(self.touches, value))
        return self.table.find(value) is not None

    def enter(self, kind: str, owners: tuple[int | None, ...], ndim: int) -> Layout:
        """Note a use and look up its layout.

        Args:
            kind: Name of the rule.
            owners: Indices of the parameters.
            ndim: Dimensions of the result.

        Returns:
            Its layout; a placeholder in a probe.

        Raises:
            ChangedError: If no proved path goes this way.
        """
        call, position = Call(kind, owners, ndim), len(self.calls)
        self.calls.append(call)
        if self.phase == "probe":
            return _FIRST
        self.paths = [path for path in self.paths if len(path) > position and path[position][0] == call]
        if not self.paths:
            raise ChangedError(f"call {position} ({kind}) is new")
        return self.paths[0][position][1]

    @property
    def position(self) -> int:
        """Number of the use that was entered last."""
        return len(self.calls) - 1

    def finish(self) -> None:
        """Check that the forward pass made all calls of a proved path.

        Raises:
            ChangedError: If it ended early.
        """
        if self.phase != "probe" and not any(len(path) == len(self.calls) for path in self.paths):
            raise ChangedError(f"the forward pass ended after {len(self.calls)} calls")

    def note(self, result: Tensor, constant: bool = False) -> Tensor:
        """In a probe: read the gradient off at a result.

        Args:
            result: What the use returned.
            constant: Whether it may lack a graph, as a norm layer without parameters on the batch itself does.

        Returns:
            The same tensor.
        """
        self.shapes.append(result.shape)
        if constant and not result.requires_grad:
            self.uses.append(Use(torch.zeros((), requires_grad=True), _ignore))  # has no gradient, and keeps the count
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
        self.uses.append(Use(get_gradient_edge(result), contribute))

    # -- the examples of one use ---

    def rows_each(self, size: int) -> int:
        """Consecutive rows that each example owns in a dimension.

        Args:
            size: Length of the dimension.

        Returns:
            size / B.

        Raises:
            UnsupportedError: If B does not divide it.
        """
        each, rest = divmod(size, self.shards.total)
        if rest or not each:
            raise UnsupportedError(
                f"a dimension of {size} does not count the {self.shards.total} examples of the batch"
            )
        return each

    def spread(self, x: Tensor, layout: Layout) -> Tensor:
        """Repeat an input that all examples share, once for each.

        Args:
            x: Input; untouched unless the layout is shared.
            layout: The use's layout.

        Returns:
            x, or x expanded to shape (B, ...).
        """
        if not layout.shared or self.shards.count == 1:
            return x
        return (x if x.shape[0] == 1 else x[None]).expand(
            self.shards.total, *(x.shape[1:] if x.shape[0] == 1 else x.shape)
        )

    def blocks(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """The last dimension's vectors, by micro-batch, one tensor for each stretch of equal micro-batches.

        Args:
            x: Shape (..., d).
            layout: Which dimension counts examples.

        Returns:
            Tensors of shape (micro-batches of the stretch, rows of each, d).
        """
        x = x.movedim(layout.dim, 0) if layout.dim and self.shards.count > 1 else x
        return [x[start:stop].reshape(count, -1, x.shape[-1]) for start, stop, _, count in self.stretches(x.shape[0])]

    def stretches(self, length: int) -> tuple[tuple[int, int, int, int], ...]:
        """Stretches of equal micro-batches in a dimension that counts examples.

        Args:
            length: Length of the dimension.

        Returns:
            First and last row, first micro-batch and number of micro-batches of each.
        """
        return ((0, length, 0, 1),) if self.shards.count == 1 else self.shards.stretches(self.rows_each(length))

    @property
    def splits(self) -> bool:
        """Whether a dimension of examples can be split by micro-batch as a view: several of one size."""
        return self.shards.count > 1 and len(self.shards.runs) == 1

    def sums(self, values: Tensor, layout: Layout, places: range) -> Tensor:
        """Sum over everything but the micro-batches and a parameter's own dimensions.

        Args:
            values: Terms.
            layout: Which dimension counts examples.
            places: The parameter's dimensions.

        Returns:
            Shape (m, *shape of the parameter).
        """
        others = [d for d in range(values.ndim) if d not in places]
        if self.shards.count == 1:
            return values.sum(others)[None] if others else values[None]
        if self.splits and layout.dim < places.start:
            self.rows_each(values.shape[layout.dim])
            rest = [d + (d > layout.dim) for d in others if d != layout.dim]
            sums: Tensor = values.unflatten(layout.dim, (self.shards.count, -1)).sum([layout.dim + 1, *rest])
            return sums
        each = self.rows_each(values.shape[layout.dim])
        cut = [(start * each, size * each) for start, size in zip(self.shards.starts, self.shards.sizes, strict=True)]
        return torch.stack([values.narrow(layout.dim, start, length).sum(others) for start, length in cut])

    def per_example(self, replicas: Tensor, ndim: int, layout: Layout, length: int) -> Tensor:
        """Give every example its micro-batch's replica of a parameter, shaped to broadcast against an activation.

        Args:
            replicas: One replica per micro-batch, shape (m, *shape).
            ndim: Dimensions of the activation; `shape` is aligned to the trailing ones.
            layout: Which dimension counts examples.
            length: Length of that dimension.

        Returns:
            A tensor of `ndim` dimensions.

        Raises:
            UnsupportedError: If the parameter itself extends over the dimension of the examples.
        """
        if self.shards.count == 1:
            return replicas[0]
        shape = (1,) * (ndim + 1 - replicas.ndim) + tuple(replicas.shape[1:])
        if len(shape) != ndim or shape[layout.dim] != 1:
            raise UnsupportedError(f"a parameter of shape {tuple(replicas.shape[1:])} reaches across examples")
        each = self.rows_each(length)
        runs = self.shards.runs
        if len(runs) == 1:
            rows = replicas[:, None].expand(-1, runs[0][2] * each, *replicas.shape[1:]).flatten(0, 1)
        else:
            sizes = torch.tensor([s * each for s in self.shards.sizes], device=replicas.device)
            rows = replicas.repeat_interleave(sizes, dim=0, output_size=length)
        return rows.view(length, *shape).transpose(0, layout.dim + 1).squeeze(0)

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
        self.uses.append(Use(leaf, lambda plan, gradient: plan.add_dense(index, gradient)))
        return leaf
