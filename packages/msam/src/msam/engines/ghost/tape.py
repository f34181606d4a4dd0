"""Runs a loss once for all micro-batches, kept apart by `torch.func.vmap`, and perturbs every use of a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.vmap import lazy_load_decompositions
from torch.autograd.graph import GradientEdge, disable_saved_tensors_hooks, get_gradient_edge
from torch.overrides import TorchFunctionMode

from msam.engines.ghost.errors import DisagreeError, UnsupportedError
from msam.step.batches import tree_map
from msam.step.checks import check_losses
from msam.step.gradients import Gradients

if TYPE_CHECKING:
    from msam.engines.ghost.directions import Plan
    from msam.engines.ghost.factors import Kept

Rule = Callable[..., Any]
"""Takes a tape, a torch function and its arguments; returns its result, or `NotImplemented`: then replicas take the
place of parameters."""

Contribution = Callable[[Gradients, Tensor], None]
"""Adds what the gradient at a use says about its parameters' gradients."""

_NOTHING = nullcontext()
_HOOKS = "activation checkpointing or offloading runs parts of the model again, out of sight"

_CONTAINERS = frozenset({tuple, list, dict})
_READS = frozenset({
    Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.tolist, Tensor.is_nonzero,
    Tensor.__contains__, Tensor.equal, Tensor.allclose, torch.equal, torch.allclose, torch.is_nonzero,
})  # fmt: skip


class Use(NamedTuple):
    """One recorded use: where its gradient is read off, and how that gradient enters the plan.

    Attributes:
        target: Edge of the result, or the leaf with one replica of the parameter per micro-batch.
        contribute: Takes the gradients so far and the one at the target.
    """

    target: GradientEdge | Tensor
    contribute: Contribution


class Tape(TorchFunctionMode):
    """A torch function mode for one pass over m micro-batches of one size.

    Inside, every tensor that depends on the batch is one of `vmap`'s, of which the loss function sees one micro-batch:
    no operation can reach another one. Rules work on what is below: all micro-batches, in the first dimension.

    Args:
        index: Index of every tracked parameter, by identity.
        count: Micro-batches m.
        rules: By torch function.
        plan: Directions to apply; None to record the uses at the weights themselves.
        keep: Whether to record them with directions too, for those of the next step.
    """

    def __init__(
        self, index: dict[int, int], count: int, rules: Mapping[Any, Rule], plan: Plan | None = None, keep: bool = False
    ) -> None:
        super().__init__()
        self.count = count
        self.plan = plan
        self.found = Gradients(count) if keep else None  # what the backward pass leaves for the next step
        self.ours: set[Any] = set()  # nodes of the graph through which rules reach parameters
        self.uses: list[Use] = []
        self.kept: dict[int, Kept] = {}
        self.position = -1
        self.watching = self.compiled = False  # for code of `torch.compile`, and whether it was seen
        self.uneven = False  # whether micro-batches have unequal numbers of valid targets
        self._index = index
        self._keys = index.keys()
        self._rules = rules
        self._replicas: dict[int, Tensor] = {}
        self._level = 0
        self._layer: Any = None  # of `vmap`, while hooks of FSDP2 run outside of it
        self._known: list[Tensor] = []  # so that no other tensor gets the identity of one

    # -- running ---

    def run(
        self, loss_fn: Callable[[Any], Any], batch: Any, size: int, around: AbstractContextManager[None] = _NOTHING
    ) -> Tensor:
        """The loss of every micro-batch.

        Args:
            loss_fn: Mean loss of a micro-batch.
            batch: Tree of tensors, examples first.
            size: Examples of each micro-batch.
            around: What the loss function runs in.

        Returns:
            Shape (m,).

        Raises:
            UnsupportedError: If it does not run so, for whatever reason.
        """
        lazy_load_decompositions()
        self._level = _functorch._vmap_increment_nesting(self.count, "different")
        try:
            part = tree_map(
                lambda t: self.above(t.reshape(self.count, size, *t.shape[1:])) if t.ndim else t, batch
            )  # fmt: skip
            with around, self, disable_saved_tensors_hooks(_HOOKS):
                loss = loss_fn(part)
        except UnsupportedError:
            raise
        except Exception as error:  # whatever it is: run one by one, the loss raises it again if it is its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = _HOOKS if "_NoopSaveInputs" in reason else reason  # checkpointing as torch 2.6 has it
            raise UnsupportedError(f"the loss does not run for all micro-batches at once ({reason})") from error
        finally:
            _functorch._vmap_decrement_nesting()
        if self.is_apart(loss):
            loss = self.below(loss)
        elif isinstance(loss, Tensor):
            loss = loss.expand(self.count, *loss.shape)
        return check_losses(loss)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._layer is not None:
            return func(*args, **kwargs)
        if self.watching and not self.compiled:
            self.compiled = _called_by_compiled_code()
        rule = self._rules.get(func)
        if rule is not None:
            result = rule(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _READS and not self.nested:
            return self._read(func, args, kwargs)
        if (self._touched(args) or (kwargs and self._touched(kwargs.values()))) and not harmless(func):
            args = [self.replaced(a) for a in args]
            kwargs = {name: self.replaced(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)

    def _touched(self, values: Any) -> bool:
        if not self._keys.isdisjoint(map(id, values)):
            return True
        if _CONTAINERS.isdisjoint(map(type, values)):
            return False
        return any(self._touched(v.values() if type(v) is dict else v) for v in values if type(v) in _CONTAINERS)

    def replaced(self, value: Any) -> Any:
        """An argument with every tracked parameter replaced by the replicas of the micro-batches."""
        index = self._index.get(id(value))
        if index is not None:
            return self.replica(index, value)
        if type(value) in {tuple, list}:
            return type(value)(self.replaced(v) for v in value)
        if type(value) is dict:
            return {name: self.replaced(v) for name, v in value.items()}
        return value

    def _read(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An answer that the program takes out of tensors: it may have it where all micro-batches give the same."""
        args = [self.replaced(a) for a in args]
        if not any(map(self.is_apart, args)):
            return func(*args, **kwargs)
        below = [(self.below(a), True) if self.is_apart(a) else (a, False) for a in args]
        with self.outside():
            answers = [func(*(a[j] if apart else a for a, apart in below), **kwargs) for j in range(self.count)]
        if any(answer != answers[0] for answer in answers):
            raise DisagreeError(
                f"the loss reads a number (`{func.__name__}`) that differs between micro-batches, as for a branch or a "
                "metric",
                answers,
            )
        return answers[0]

    # -- between the micro-batch and all of them ---

    def find(self, value: Any) -> int | None:
        """Index of a tracked parameter, or None."""
        return self._index.get(id(value))

    def know(self, parameter: Tensor, index: int) -> None:
        """Record the whole parameter that replaces a sharded one."""
        if id(parameter) not in self._index:
            self._index[id(parameter)] = index
            self._known.append(parameter)

    def pause(self) -> None:
        """Leave `vmap` until `resume`."""
        self._layer = _functorch.pop_dynamic_layer_stack()

    def resume(self) -> None:
        """Go back to where `pause` has left, if it has."""
        if self._layer is not None:
            _functorch.push_dynamic_layer_stack(self._layer)
            self._layer = None

    @property
    def nested(self) -> bool:
        """Whether another transform of `torch.func` runs inside the loss."""
        return bool(_functorch.maybe_current_level() != self._level)

    def is_apart(self, x: Any) -> bool:
        """Whether a value differs between micro-batches."""
        return isinstance(x, Tensor) and _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == self._level

    def below(self, x: Tensor) -> Tensor:
        """All micro-batches' values of a tensor, shape (m, ...); repeated where it is the same for all."""
        if not self.is_apart(x):
            return x.expand(self.count, *x.shape)
        value, dim = _functorch._unwrap_batched(x, self._level)
        return value.movedim(dim, 0) if dim else value

    def above(self, x: Tensor) -> Tensor:
        """The tensor that the loss function sees of one with all micro-batches in its first dimension."""
        return _functorch._add_batch_dim(x, 0, self._level)

    def outside(self) -> _Outside:
        """Leave `vmap` for a block."""
        return _Outside()

    # -- recording ---

    def record(self, result: Tensor, contribute: Contribution) -> None:
        """Record a use whose gradient is read off at its result; its edge, since the result may be overwritten."""
        self.uses.append(Use(get_gradient_edge(result), contribute))

    def shared(self, parameter: Any) -> Any:
        """A parameter as rules use it in pass 2: if something else reaches it, the graph shows that."""
        if self.found is None or not isinstance(parameter, Tensor) or not parameter.requires_grad:
            return parameter
        found = parameter.view_as(parameter)
        self.ours.add(found.grad_fn)
        return found

    def listen(self) -> Callable[[], Gradients]:
        """Take down the gradients at all uses in the backward pass to come.

        Returns:
            Gives what the micro-batches' gradients are, once it is over.
        """
        heard: list[Tensor | None] = [None] * len(self.uses)
        found = self.found
        assert found is not None
        for i, use in enumerate(self.uses):
            assert isinstance(use.target, GradientEdge)  # no leaves in pass 2

            def hear(gradients: tuple[Tensor | None, ...], i: int = i, number: int = use.target.output_nr) -> None:
                heard[i] = gradients[number]

            use.target.node.register_prehook(hear)

        def gathered() -> Gradients:
            for use, gradient in zip(self.uses, heard, strict=True):
                if gradient is not None:
                    use.contribute(found, gradient)
            return found

        return gathered

    def replica(self, index: int, parameter: Tensor) -> Tensor:
        """Every micro-batch's own copy of a parameter: leaves in pass 1, perturbed in pass 2.

        Args:
            index: Index of the parameter.
            parameter: The parameter.

        Returns:
            The tensor that the loss function sees.
        """
        found = self._replicas.get(index)
        if found is None:
            with self.outside(), torch.enable_grad():
                own = self._replicas_below(index, parameter)
            found = self._replicas[index] = self.above(own)
        return found

    def _replicas_below(self, index: int, parameter: Tensor) -> Tensor:
        if self.plan is not None:
            own = self.plan.perturbed(index, self.shared(parameter))
            own = own if len(own) == self.count else own.expand(self.count, *parameter.shape)
            if self.found is not None:
                self.record(own, _replica_gradients(index))
            return own
        own = parameter.detach().expand(self.count, *parameter.shape).clone().requires_grad_()
        self.uses.append(Use(own, _replica_gradients(index)))
        return own


def _replica_gradients(index: int) -> Contribution:
    def contribute(found: Gradients, gradient: Tensor) -> None:
        # Of a single micro-batch, autograd hands the same memory on as the parameter's gradient.
        found.add_dense(index, gradient.clone() if found.count == 1 else gradient)

    return contribute


class _Outside:
    """Takes `vmap`'s level off the stack of transforms for a block."""

    def __enter__(self) -> None:
        self._layer = _functorch.pop_dynamic_layer_stack()

    def __exit__(self, *error: object) -> None:
        _functorch.push_dynamic_layer_stack(self._layer)


def _called_by_compiled_code() -> bool:
    """Whether a wrapper of `torch.compile` is on the way from the loss function to here."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Tape.run.__code__:
        wrapper = frame.f_code.co_qualname.startswith("_TorchDynamoContext.__call__.<locals>.")
        if wrapper and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


_UNSAFE_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_HARMLESS = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "element_size", "data_ptr",
    "storage_offset", "get_device", "__len__", "__hash__", "__repr__", "is_same_size", "nelement", "ndimension",
    "register_hook", "untyped_storage", "is_signed", "__set__",
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
