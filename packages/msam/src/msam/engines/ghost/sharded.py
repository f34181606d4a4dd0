"""FSDP2 under `vmap`: its hooks see plain tensors, and the tape the whole parameters that they bring."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from msam.engines.ghost.tape import Tape
from msam.step.passes import is_sharded


@contextmanager
def sharded(model: nn.Module, tape: Tape, names: dict[str, int]) -> Iterator[None]:
    """Let a model with modules sharded by FSDP2 run in a pass; without any this does nothing.

    Before and after each of these modules FSDP2's hooks swap whole parameters in and out and put their own functions
    into the graph, which `vmap` cannot follow. So further hooks around them take `vmap`'s level away for their time.

    Args:
        model: The model.
        tape: The running pass.
        names: Index of every tracked parameter, by name.

    Yields:
        Nothing.
    """
    handles = []
    for prefix, module in model.named_modules():
        if is_sharded(module):
            crossing = _Crossing(tape)
            note = partial(_note_parameters, module, prefix, tape, names)
            handles += [
                module.register_forward_pre_hook(crossing.before_hooks, prepend=True, with_kwargs=True),
                module.register_forward_pre_hook(partial(crossing.after_hooks, note), with_kwargs=True),
                module.register_forward_hook(crossing.before_results, prepend=True),
                module.register_forward_hook(crossing.after_results),
            ]
    try:
        yield
    finally:
        tape.resume()
        for handle in handles:
            handle.remove()


def _note_parameters(module: nn.Module, prefix: str, tape: Tape, names: dict[str, int]) -> None:
    """Tell the tape of the whole parameters that a module has just been given."""
    for name, p in module.named_parameters(prefix=prefix):
        if name in names:
            tape.know(p, names[name])


class _Crossing:
    """Takes tensors below `vmap` before the hooks of one module, and above it again after them."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._apart: list[bool] = []

    def _below(self, tree: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        self._apart = [self._tape.is_apart(leaf) for leaf in leaves]
        leaves = [self._tape.below(v) if apart else v for v, apart in zip(leaves, self._apart, strict=True)]
        self._tape.pause()
        return tree_unflatten(leaves, spec)

    def _above(self, tree: Any) -> Any:
        self._tape.resume()
        leaves, spec = tree_flatten(tree)
        leaves = [self._tape.above(v) if apart else v for v, apart in zip(leaves, self._apart, strict=True)]
        return tree_unflatten(leaves, spec)

    def before_hooks(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The first hook before a module."""
        del module
        return self._below((args, kwargs))

    def after_hooks(self, note: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The last hook before a module."""
        del module
        found = self._above((args, kwargs))
        note()
        return found

    def before_results(self, module: nn.Module, args: Any, result: Tensor) -> Any:
        """The first hook after a module."""
        del module, args
        return self._below(result)

    def after_results(self, module: nn.Module, args: Any, result: Tensor) -> Any:
        """The last hook after a module."""
        del module, args
        return self._above(result)
