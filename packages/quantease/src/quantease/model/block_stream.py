"""Runs token windows through a model block by block, with one block in memory at a time."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantease.model.causal_lm import CausalLM


class EnoughSeen(Exception):  # noqa: N818  # no error
    """Ends a forward early, once what it was run for has been observed."""


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden states that a decoder block is called with (masks, position embeddings, ...)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockStream:
    """Hidden states of token windows on their way through the decoder blocks.

    The model's own forward is run once per window with blocks that pass their input on, which yields the first
    block's input and the arguments of every block, whatever the architecture computes for them.

    Args:
        lm: The model.
        tokens: Token ids, shape (windows, length), int64.
    """

    def __init__(self, lm: CausalLM, tokens: Tensor) -> None:
        self.lm = lm
        self.tokens = tokens
        self.hidden: list[Tensor] = []  # per window (1, length, d), on the CPU
        self._calls: list[list[BlockCall]] = []  # per window and block
        self._tuple_size = _tuple_size(lm, tokens[:1])
        for window in tokens:
            hidden, calls = self._enter(window[None])
            known = self._calls[0] if self._calls else calls
            self._calls.append([k if _same(k, c) else c for k, c in zip(known, calls, strict=True)])
            self.hidden.append(hidden.cpu())

    def _enter(self, window: Tensor) -> tuple[Tensor, list[BlockCall]]:
        inputs: list[Tensor] = []
        calls: list[BlockCall] = []

        def record(_: int, hidden: Tensor, call: BlockCall) -> Tensor:
            inputs.append(hidden)
            calls.append(call)
            return hidden

        with _blocks_replaced(self.lm, record, self._tuple_size):
            self.lm.skeleton.base_model(input_ids=window.to(self.lm.device), use_cache=False)
        return inputs[0], calls

    def run(self, index: int, block: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Outputs of a block for every window, without moving on.

        Args:
            index: Number of the block.
            block: The block, in memory.

        Yields:
            Number of the window and the block's output, shape (1, length, d), on the model's device. A window whose
            run an observer ended with `EnoughSeen` yields nothing.
        """
        for window in range(len(self.hidden)):
            try:
                out = self.window(index, block, window)
            except EnoughSeen:
                continue
            yield window, out

    @torch.no_grad()
    def window(self, index: int, block: nn.Module, window: int) -> Tensor:
        """Output of a block for one window, without moving on.

        Args:
            index: Number of the block.
            block: The block, in memory.
            window: Number of the window.

        Returns:
            The block's output, shape (1, length, d), on the model's device.
        """
        return self.apply(block, self.hidden[window].to(self.lm.device), index, window)

    def apply(self, block: Callable[..., Any], hidden: Tensor, index: int, window: int) -> Tensor:
        """Output of a block for given hidden states, with gradients where they are enabled.

        Args:
            block: The block, or a function equivalent to it.
            hidden: Its input, shape (1, length, d), on the model's device.
            index: Number of the block, whose masks, position embeddings and the like it gets.
            window: Number of the window.

        Returns:
            Shape (1, length, d).
        """
        call = self._calls[window][index]
        out = block(hidden, *call.args, **call.kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states

    def fork(self) -> "BlockStream":
        """A second stream that continues from here independently.

        Returns:
            A stream that shares the windows and the blocks' arguments with this one.
        """
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the block's outputs.

        Args:
            index: Number of the block.
            block: The block, in memory.
        """
        for window, out in self.run(index, block):
            self.hidden[window] = out.cpu()

    @torch.no_grad()
    def logits(self, window: int) -> Tensor:
        """What the model's head makes of a window's hidden states; meaningful after the last block.

        Args:
            window: Number of the window.

        Returns:
            Logits, shape (length, vocabulary), on the model's device.
        """
        return self.head(self.hidden[window].to(self.lm.device), window)

    def head(self, final: Tensor, window: int) -> Tensor:
        """Logits of given hidden states behind the last block, with gradients where they are enabled.

        Args:
            final: Hidden states, shape (1, length, d), on the model's device.
            window: Number of the window.

        Returns:
            Logits, shape (length, vocabulary), on the model's device.
        """
        last, gradients = len(self.lm.blocks) - 1, torch.is_grad_enabled()

        def inject(index: int, hidden: Tensor, _: BlockCall) -> Tensor:
            return final if index == last else hidden

        with _blocks_replaced(self.lm, inject, self._tuple_size), torch.set_grad_enabled(gradients):
            tokens = self.tokens[window][None].to(self.lm.device)
            logits: Tensor = self.lm.skeleton(input_ids=tokens, use_cache=False).logits
        return logits[0]


@contextmanager
def _blocks_replaced(lm: CausalLM, step: Any, tuple_size: int | None) -> Iterator[None]:
    def forward_of(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_call(args, kwargs)
            out = step(index, hidden, call)
            return out if tuple_size is None else (out,) + (None,) * (tuple_size - 1)

        return forward

    with ExitStack() as stack, torch.no_grad():
        for index in range(len(lm.blocks)):
            block = lm.block(index)
            stack.callback(block.__dict__.pop, "forward")
            block.__dict__["forward"] = forward_of(index)
        yield


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
    return kwargs["hidden_states"], BlockCall((), rest)


def _tuple_size(lm: CausalLM, window: Tensor) -> int | None:
    # Length of the tuple that blocks return, or None when they return a tensor: found by running the first one.
    seen: list[tuple[Tensor, BlockCall]] = []

    def stop(_: int, hidden: Tensor, call: BlockCall) -> Tensor:
        seen.append((hidden, call))
        raise EnoughSeen

    try:
        with _blocks_replaced(lm, stop, None):
            lm.skeleton.base_model(input_ids=window[:, :2].to(lm.device), use_cache=False)
    except EnoughSeen:
        hidden, call = seen[0]
    with lm.loaded(0) as block, torch.no_grad():
        out = block(hidden, *call.args, **call.kwargs)
    return len(out) if isinstance(out, tuple) else None


def _same(a: Any, b: Any) -> bool:
    # Whether two call arguments are equal, so that one copy can serve all windows.
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, BlockCall):
        return isinstance(b, BlockCall) and _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return isinstance(b, Sequence) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)
