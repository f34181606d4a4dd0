"""Watching a block run: the inputs of its weight matrices, and the sums that their outputs become part of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantease.model.matrices import Matrix

Observer = Callable[[str, Tensor], None]


@contextmanager
def observe(block: nn.Module, matrices: Sequence[Matrix], observer: Observer) -> Iterator[None]:
    """Call `observer(name, x)` with the input x, shape (..., p), of every product with one of the matrices.

    Args:
        block: The block that is run inside the context.
        matrices: What to watch.
        observer: Gets the matrix's name and its input.

    Yields:
        Nothing.
    """
    modules = {m.name: m for m in matrices if m.expert is None}
    slices = {m.weight(block).data_ptr(): m.name for m in matrices if m.expert is not None}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: observer(name, args[0]))
        for name in modules
    ]
    try:
        if slices:
            with _LinearCalls(slices, observer):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _LinearCalls(TorchFunctionMode):
    """Reports the inputs of products with weights at known addresses, which are slices of experts' parameters."""

    def __init__(self, names: Mapping[int, str], observer: Observer) -> None:
        super().__init__()
        self.names, self.observer = names, observer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in {"linear", "matmul", "mm", "bmm", "__matmul__"}:
            x, weight = (*args, *(kwargs or {}).values())[:2]
            if isinstance(weight, Tensor) and weight.data_ptr() in self.names:
                self._report(x, weight)
        return func(*args, **(kwargs or {}))

    def _report(self, x: Tensor, weight: Tensor) -> None:
        if weight.ndim == 2:
            self.observer(self.names[weight.data_ptr()], x)
            return
        for inputs, part in zip(x, weight, strict=True):  # (experts, tokens, in), zeros where a token goes elsewhere
            self.observer(self.names[part.data_ptr()], inputs[inputs.any(-1)])


class Sums(TorchFunctionMode):
    r"""Follows the outputs of linear modules into the sums they become part of: $h \leftarrow h + y$ in most blocks.

    The sum of a module begins with its output y. Adding a tensor that does not depend on y extends it (the residual, or
    the other branch of a parallel block); any other operation ends it. So the difference between two runs of a module's
    sum is what its output should make up for.

    Args:
        names: Modules to follow.
        extended: Called with a module's name and its sum whenever it begins or grows.
    """

    def __init__(self, names: Sequence[str], extended: Observer) -> None:
        super().__init__()
        self.names, self.extended = names, extended
        self.sums: dict[str, Tensor] = {}
        self._depends: dict[int, tuple[Tensor, frozenset[str]]] = {}  # by id; holding a tensor keeps its id unique

    @contextmanager
    def following(self, block: nn.Module) -> Iterator["Sums"]:
        """Watch one run of a block.

        Args:
            block: The block that is run inside the context.

        Yields:
            This object.
        """
        self.sums.clear()

        def begin(name: str, y: Any) -> None:
            if isinstance(y, Tensor):
                self._mark(y, frozenset({name}))
                self._extend(name, y)

        handles = [
            block.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: begin(name, y))
            for name in self.names
        ]
        try:
            with self:
                yield self
        finally:
            self._depends.clear()
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [a for a in _flat((*args, *(kwargs or {}).values())) if isinstance(a, Tensor)]
        marks = [self._depends.get(id(a), (a, frozenset[str]()))[1] for a in tensors]
        out = func(*args, **(kwargs or {}))
        depends = frozenset[str]().union(*marks)
        if not depends:
            return out
        for value in _flat((out,)):
            if isinstance(value, Tensor):
                self._mark(value, depends)
        name_of = getattr(func, "__name__", "")
        if isinstance(out, Tensor):
            for name in depends:
                head = self.sums.get(name)
                if head is None or all(a is not head for a in tensors):
                    continue
                if name_of in {"add", "add_"} and len(tensors) == 2 and not kwargs and out.shape == head.shape:
                    other = 0 if tensors[1] is head else 1
                    if name not in marks[other]:
                        self._extend(name, out)
                elif name_of in {"dropout", "to", "contiguous"} and out.data_ptr() == head.data_ptr():
                    self.sums[name] = out
        return out

    def _mark(self, value: Tensor, names: frozenset[str]) -> None:
        known = self._depends.get(id(value), (value, frozenset[str]()))[1]
        self._depends[id(value)] = (value, known | names)

    def _extend(self, name: str, value: Tensor) -> None:
        self.sums[name] = value
        self.extended(name, value)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value
