"""Which torch functions see a tracked parameter, and which of them read its values."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from msam.step.passes import is_sharded

_CONTAINERS = frozenset({tuple, list})


class Table:
    """Finds a parameter's index among the tracked ones.

    FSDP2 swaps whole parameters in for the time of a layer's forward; these are found by name.

    Args:
        model: The model.
        parameters: Tracked parameters.
        exact: Whether calls whose dimensions come to be 1, or as long as the batch, are other calls. Not under FSDP2,
            where all processes have to prove together.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], exact: bool = True) -> None:
        self._index: dict[int, int] = {id(p): i for i, p in enumerate(parameters)}
        self._parameters = tuple(parameters)  # keeps the ids alive, as does the next one
        self._held: list[Tensor] = []
        self.sharded = any(is_sharded(m) for m in model.modules())
        self.exact = exact and not self.sharded
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

    def among(self, values: Sequence[Any]) -> bool:
        """Whether arguments are, or hold, a tracked parameter.

        Args:
            values: Arguments of a torch function.

        Returns:
            True if so.
        """
        if self.sharded:
            found = any(self.find(value) is not None for value in values)
        else:  # the same for a whole call at once: most calls have no parameter, and this is what they pay
            found = not self._index.keys().isdisjoint(map(id, values))
        if found or _CONTAINERS.isdisjoint(map(type, values)):
            return found
        return any(self.among(value) for value in values if type(value) in _CONTAINERS)

    def owners(self, *values: Any) -> list[int | None]:
        """Indices of several arguments.

        Args:
            values: Arguments of a torch function.

        Returns:
            `find` of each.
        """
        if self.sharded:
            return [self.find(value) for value in values]
        return list(map(self._index.get, map(id, values)))

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
