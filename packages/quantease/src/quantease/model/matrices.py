"""The weight matrices of a decoder block: which there are, what they read while it runs, what their outputs add up to.

Three kinds occur in transformers: `nn.Linear` and its subclasses, GPT-2's `Conv1D` (which stores the transpose), and
parameters that hold the matrices of all experts of a mixture, stored as (out, in) or as (in, out).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantease.choices import DEFAULT_SKIP

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block.

    Attributes:
        name: Name within the block, such as `self_attn.q_proj`; an expert's is `mlp.experts.gate_up_proj.3`.
        parameter: Name of the parameter that holds it within the block.
        expert: Index into the parameter's first dimension, or None.
        transposed: Whether the parameter stores (in, out).
        experts: Number of experts whose matrices lie one below the other in a parameter of two dimensions, or None.
    """

    name: str
    parameter: str
    expert: int | None = None
    transposed: bool = False
    experts: int | None = None

    def weight(self, block: nn.Module) -> Tensor:
        """The matrix itself, a view of the parameter.

        Args:
            block: The decoder block.

        Returns:
            W, shape (q, p) = (out, in).
        """
        return self.part(block.get_parameter(self.parameter).detach())

    def part(self, values: Tensor) -> Tensor:
        """The matrix within a tensor of the parameter's shape.

        Args:
            values: The parameter, or another tensor in its layout.

        Returns:
            A view of it, shape (q, p).
        """
        if self.experts is not None:
            values = values.view(self.experts, -1, values.shape[-1])
        values = values if self.expert is None else values[self.expert]
        return values.T if self.transposed else values

    def assign(self, block: nn.Module, weight: Tensor) -> None:
        """Write new values into the parameter.

        Args:
            block: The decoder block.
            weight: Shape (q, p).
        """
        self.weight(block).copy_(weight)


def find_matrices(block: nn.Module, skip: Sequence[str] = DEFAULT_SKIP) -> list[Matrix]:
    """All weight matrices of a block, in the order of its parameters.

    Args:
        block: A decoder block; it may be on the meta device.
        skip: Regular expressions; a matrix whose name one of them finds is left alone.

    Returns:
        The matrices.
    """
    found: list[Matrix] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found.append(Matrix(name, f"{name}.weight"))
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            found.append(Matrix(name, f"{name}.weight", transposed=True))
        else:
            found += _fused_experts(name, module)
    return [m for m in found if not any(re.search(pattern, m.name) for pattern in skip)]


def _fused_experts(name: str, module: nn.Module) -> list[Matrix]:
    """Matrices of a module that holds many experts in one parameter, of the kinds whose use is known."""
    parameters = dict(module.named_parameters(recurse=False))
    stacked = {key: value for key, value in parameters.items() if value.ndim == 3}
    if hasattr(module, "is_transposed"):  # transformers' own mark: it says how the slices are applied
        transposed = dict.fromkeys(stacked, bool(module.is_transposed))
    elif type(module).__name__ == "Llama4TextExperts":  # x @ parameter, for all experts at once
        transposed = dict.fromkeys(stacked, True)
    elif type(module).__name__ == "DbrxExpertGLU":  # (experts * ffn, d), of which w2 is applied as it is stored
        experts = int(module.moe_num_experts)  # type: ignore[arg-type]
        return [
            Matrix(f"{name}.{key}.{e}", f"{name}.{key}", expert=e, transposed=key == "w2", experts=experts)
            for key in ("w1", "v1", "w2")
            for e in range(experts)
        ]
    else:
        return []
    return [
        Matrix(f"{name}.{key}.{e}", f"{name}.{key}", expert=e, transposed=transposed[key])
        for key, value in stacked.items()
        for e in range(value.shape[0])
    ]


@dataclass(frozen=True)
class Group:
    """Matrices that are quantized from one pass over the calibration tokens.

    Attributes:
        names: The matrices, in the order in which they are used.
        leader: For every one of them the matrix whose Gram matrix it shares, because both see the same input.
    """

    names: tuple[str, ...]
    leader: Mapping[str, str]


def group_by_input(calls: Sequence[tuple[str, Tensor]], matrices: Sequence[Matrix], merged: bool) -> list[Group]:
    """Put matrices that read the same tensor, and the experts of one kind, into groups in order of use.

    Args:
        calls: Names and inputs in the order in which one run of the block used them.
        matrices: All matrices of the block; those that were never called (experts without tokens) join their kind.
        merged: Put everything into one group, so that a block takes a single pass.

    Returns:
        The groups.
    """
    leader: dict[str, str] = {}
    kind_of: dict[str, str] = {}  # kind -> kind it was merged with
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, x in calls:
        reader = first.setdefault((x.data_ptr(), tuple(x.shape)), name)
        leader.setdefault(name, reader)
        kind_of.setdefault(_kind(name), kind_of.get(_kind(reader), _kind(reader)))
    members: dict[str, list[str]] = {}
    called = list(leader)
    for name in called + [m.name for m in matrices if m.name not in leader]:
        kind = "" if merged else kind_of.get(_kind(name), _kind(name))
        members.setdefault(kind, []).append(name)
        leader.setdefault(name, name)
    return [Group(tuple(names), {n: leader[n] for n in names}) for names in members.values()]


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


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
