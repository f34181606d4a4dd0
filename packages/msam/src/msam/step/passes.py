"""What must hold around the two passes: batch norm statistics, dropout masks, gradient synchronisation."""

import ctypes
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel


def norm_layers(model: nn.Module) -> list[_NormBase]:
    """The layers of a model that may keep running statistics.

    Args:
        model: The model.

    Returns:
        Its batch and instance norms.
    """
    return [m for m in model.modules() if isinstance(m, _NormBase)]


def norm_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that belong to normalization layers.

    Args:
        model: The model.

    Returns:
        `id` of each parameter of a module whose class name holds "Norm".
    """
    return {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}


@contextmanager
def kept_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Put the running statistics of batch and instance norms back when the block ends, whatever happens in it.

    Batch statistics still normalize inside the block; only the running averages do not move.

    Args:
        norms: Layers whose buffers are kept, as `norm_layers` finds them.

    Yields:
        Nothing.
    """
    restore = remembered(norms)
    try:
        yield
    finally:
        restore()


def remembered(norms: Sequence[_NormBase]) -> Callable[[], None]:
    """Keep the running statistics as they are now.

    Args:
        norms: Layers with running statistics.

    Returns:
        A function that puts them back.
    """
    buffers = [b for m in norms for b in m.buffers(recurse=False)]
    before = [b.clone() for b in buffers]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    return restore


def statistics(norms: Sequence[_NormBase], policy: str, first: bool) -> AbstractContextManager[None]:
    """The context of one pass under a policy for running statistics.

    Args:
        norms: Layers with running statistics.
        policy: `"first"`, `"both"` or `"frozen"`.
        first: Whether this is the ascent pass.

    Returns:
        A context that keeps the running statistics where the policy says so.
    """
    frozen = policy == "frozen" or (policy == "first" and not first)
    return kept_statistics(norms) if frozen and norms else nullcontext()


class Generators:
    """States of the random generators that a loss may draw from: torch's, Python's and numpy's global ones.

    Args:
        devices: Devices of the model's parameters.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._modules = [(torch.get_device_module(d), d) for d in devices if d.type not in {"cpu", "meta"}]
        self._states: list[Tensor] = [torch.get_rng_state()]
        self._states += [module.get_rng_state(device) for module, device in self._modules]
        self._python = random.getstate()
        self._numpy = NumpyState()

    def rewind(self) -> None:
        """Set every generator back to the state it had when this was made."""
        torch.set_rng_state(self._states[0])
        for (module, device), state in zip(self._modules, self._states[1:], strict=True):
            module.set_rng_state(state, device)
        random.setstate(self._python)
        self._numpy.rewind()


class NumpyState:
    """State of numpy's global generator, if numpy is loaded.

    numpy takes as long to read or set it as a small layer takes to run. So it is read anew only after the words of the
    generator have changed, and set only where they have since. A second normal number that waits, drawn along with the
    first, is in none of these words: such a state is always read and set.
    """

    _last: ClassVar[tuple[bytes | None, Any]] = (
        None,
        None,
    )  # words and state of the last one that was read, without such a number

    def __init__(self) -> None:
        self._random: Any = getattr(sys.modules.get("numpy"), "random", None)
        self._state: Any = None
        if self._random is None:
            return
        self._words = self._read_words()
        known, state = NumpyState._last
        if self._words is None or self._words != known:
            state = self._random.get_state(legacy=False)
            if state["has_gauss"]:
                self._words = None
            elif self._words is not None:
                NumpyState._last = self._words, state
        self._state = state

    def _read_words(self) -> bytes | None:
        """The Mersenne twister's 624 words and its position; None of another generator."""
        generator = self._random.get_bit_generator()
        if type(generator) is not self._random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4)

    def rewind(self) -> None:
        """Set the generator back, if it has drawn."""
        if self._random is not None and (self._words is None or self._read_words() != self._words):
            self._random.set_state(self._state)


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """No gradient reduction across processes inside the block (DDP's `no_sync`, FSDP2's switch).

    Args:
        model: The model, wrapped or not.

    Returns:
        A context.
    """
    if isinstance(model, DistributedDataParallel):
        return cast(AbstractContextManager[None], model.no_sync())
    return _unsynchronised(model) if is_sharded(model) else nullcontext()


@contextmanager
def _unsynchronised(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def is_sharded(module: object) -> bool:
    """Whether FSDP2 shards a module. Nothing can be before its code was imported, which takes most of a second.

    Args:
        module: A module.

    Returns:
        True if so.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def world_size(model: Any) -> int:
    """Processes that share the mini-batch of one step.

    Args:
        model: The model, wrapped or not.

    Returns:
        The size of the process group for DDP and FSDP2 models, otherwise 1.
    """
    if isinstance(model, DistributedDataParallel) or is_sharded(model):
        group = model.process_group if isinstance(model, DistributedDataParallel) else None
        return torch.distributed.get_world_size(group)
    return 1
