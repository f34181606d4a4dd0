r"""Perplexity of a causal language model on token windows, with one decoder block in memory at a time.

$$ \mathrm{PPL} = \exp\Bigl(-\frac1T \sum_t \log p(x_t \mid x_{<t} \text{ in its window})\Bigr) $$
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor

from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import CausalLM

Step = Callable[[int, int], None]


def streamed_perplexity(lm: CausalLM, tokens: Tensor, progress: Step | None = None) -> float:
    """Perplexity on disjoint windows; every token but the first of its window is predicted.

    Args:
        lm: The model.
        tokens: Token ids, shape (windows, length), int64.
        progress: Called with blocks done and their number.

    Returns:
        The perplexity.
    """
    return math.exp(float(window_losses(lm, tokens, progress).mean()))


def window_losses(lm: CausalLM, tokens: Tensor, progress: Step | None = None) -> Tensor:
    """Mean negative log-likelihood of every window, for comparisons of models on the same windows.

    Args:
        lm: The model.
        tokens: Token ids, shape (windows, length), int64.
        progress: Called with blocks done and their number.

    Returns:
        Nats per predicted token, shape (windows,), float64; the exponential of their mean is the perplexity.
    """
    check_tensor("tokens", tokens, ndim=2, dtype=torch.int64, nonempty=True)
    stream = BlockStream(lm, tokens)
    for index in range(len(lm.blocks)):
        with lm.loaded(index) as block:
            stream.advance(index, block)
        if progress is not None:
            progress(index + 1, len(lm.blocks))
    losses = [_negative_log_likelihood(stream.logits(w)[:-1], window[1:]).mean() for w, window in enumerate(tokens)]
    return torch.stack(losses).cpu()


def perplexity(
    model: Any,
    tokens: Tensor | Sequence[int],
    *,
    length: int = 512,
    stride: int | None = None,
    progress: Step | None = None,
) -> float:
    """Perplexity of a model in memory by a sliding window over one token stream.

    With `stride` = `length` the windows are disjoint. With a smaller stride every token is predicted once, with at
    least `length - stride` tokens before it (but for the first window), which is slower and lower.

    Args:
        model: A transformers causal language model.
        tokens: Token ids, shape (T,).
        length: Tokens per window.
        stride: Tokens by which the window moves, at most `length`; None is `length`.
        progress: Called with windows done and their number.

    Returns:
        The perplexity.

    Raises:
        ValueError: If there are fewer than two tokens.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    check_tensor("tokens", ids, ndim=1)
    check_number("length", length, low=2, integer=True)
    stride = length if stride is None else stride
    check_number("stride", stride, low=1, high=length, integer=True)
    if len(ids) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(ids)}")
    starts = range(0, max(len(ids) - length, 0) + 1, stride)
    total, count, scored = 0.0, 0, 0  # `scored` tokens from the left have been predicted (or lead a window)
    for number, start in enumerate(starts):
        window = ids[start : start + length].to(model.device)
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0]
        first = max(scored - start, 1)
        losses = _negative_log_likelihood(logits[first - 1 : -1], window[first:])
        total, count, scored = total + float(losses.sum()), count + len(losses), start + len(window)
        if progress is not None:
            progress(number + 1, len(starts))
    return math.exp(total / count)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double()
