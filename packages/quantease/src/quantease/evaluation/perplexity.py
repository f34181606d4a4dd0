r"""Perplexity of a causal language model on token windows, with one decoder block in memory at a time.

$$ \mathrm{PPL} = \exp\Bigl(-\frac1T \sum_t \log p(x_t \mid x_{<t} \text{ in its window})\Bigr) $$
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor

from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import CausalLM

Step = Callable[[int, int], None]
_ROWS = 64


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
    return window_scores(Predictions(streamed(lm, tokens, progress), room=0)).losses


@dataclass(frozen=True)
class Scores:
    r"""How a model does on every window.

    Attributes:
        losses: Mean negative log-likelihood, nats per predicted token, shape (windows,), float64.
        divergences: Mean over the positions of $\mathrm{KL}(p_\text{fp} \,\|\, p)$ from the full-precision model's
            prediction, nats, shape (windows,), float64; None where no such model was given.
    """

    losses: Tensor
    divergences: Tensor | None = None

    def to_dict(self) -> dict[str, float]:
        """Means and their standard errors over the windows.

        Returns:
            `perplexity` and its error, `kl` and its error; the errors are 0 for a single window.
        """
        perplexity = math.exp(float(self.losses.mean()))
        found = {"perplexity": perplexity, "perplexity_standard_error": perplexity * standard_error(self.losses)}
        if self.divergences is not None:
            found |= {"kl": float(self.divergences.mean()), "kl_standard_error": standard_error(self.divergences)}
        return found


def standard_error(values: Tensor) -> float:
    """Standard error of a mean over windows.

    Args:
        values: One value per window, shape (windows,).

    Returns:
        The error; 0 for a single window.
    """
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def streamed(lm: CausalLM, tokens: Tensor, progress: Step | None = None) -> BlockStream:
    """Windows behind the last block of a model.

    Args:
        lm: The model.
        tokens: Token ids, shape (windows, length), int64.
        progress: Called with blocks done and their number.

    Returns:
        Hidden states, of which `Predictions` makes predictions.
    """
    check_tensor("tokens", tokens, ndim=2, dtype=torch.int64, nonempty=True)
    stream = BlockStream(lm, tokens)
    for index in range(len(lm.blocks)):
        with lm.loaded(index) as block:
            stream.advance(index, block)
        if progress is not None:
            progress(index + 1, len(lm.blocks))
    return stream


class Predictions:
    """Log-probabilities of a model on windows, kept where they fit.

    Args:
        stream: The windows behind the model's last block.
        room: Bytes that may be kept.
    """

    def __init__(self, stream: BlockStream, room: int = 1 << 30) -> None:
        self.stream, self.room = stream, room
        self._kept: dict[int, Tensor] = {}

    def __call__(self, window: int) -> Tensor:
        """Log-probabilities of every next token.

        Args:
            window: Number of the window.

        Returns:
            Shape (length, vocabulary), float32, on the model's device.
        """
        if window in self._kept:
            return self._kept[window]
        found = self.stream.logits(window).float().log_softmax(-1)
        if found.nbytes * len(self.stream.tokens) <= self.room:
            self._kept[window] = found
        return found


def window_scores(predictions: Predictions, exact: Predictions | None = None) -> Scores:
    """Judge a model's predictions on windows.

    Args:
        predictions: The predictions.
        exact: The full-precision model's predictions on the same windows.

    Returns:
        The scores.
    """
    losses, divergences = [], []
    for number, window in enumerate(predictions.stream.tokens):
        found = predictions(number)
        taken = found[:-1].gather(1, window[1:, None].to(found.device))
        losses.append(-taken.double().mean())
        if exact is not None:
            divergences.append(_divergence(exact(number), found))
    return Scores(torch.stack(losses).cpu(), torch.stack(divergences).cpu() if divergences else None)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean over the positions of KL(p || q) for log-probabilities, by pieces that stay in the cache."""
    rows = zip(p.split(_ROWS), q.split(_ROWS), strict=True)
    return torch.cat([torch.linalg.vecdot(a.exp(), a - b).double() for a, b in rows]).mean()


def divergence(
    model: Any,
    exact: Any,
    tokens: Tensor | Sequence[int],
    *,
    length: int = 512,
    first: int | None = None,
    progress: Step | None = None,
) -> tuple[float, float]:
    r"""Mean KL divergence $\mathrm{KL}(p_\text{exact} \,\|\, p)$ of a model's predictions from another's.

    Args:
        model: A transformers causal language model.
        exact: The model to compare with, such as the one that was quantized.
        tokens: Token ids, shape (T,), cut into disjoint windows.
        length: Tokens per window.
        first: Token before every window, or None.
        progress: Called with windows done and their number.

    Returns:
        The mean over all positions, in nats, and its standard error over the windows.

    Raises:
        ValueError: If there are no tokens.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    check_tensor("tokens", ids, ndim=1, nonempty=True)
    check_number("length", length, low=2, integer=True)
    lead = ids.new_tensor([] if first is None else [first])
    parts = ids.split(length - len(lead))
    parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < len(parts[0]) else parts
    found = []
    for number, part in enumerate(parts):
        window = torch.cat([lead, part])[None]
        with torch.no_grad():
            expected, got = (m(input_ids=window.to(m.device), use_cache=False).logits[0] for m in (exact, model))
        found.append(_divergence(*(x.to(expected.device).float().log_softmax(-1) for x in (expected, got))))
        if progress is not None:
            progress(number + 1, len(parts))
    values = torch.stack(found).cpu()
    return float(values.mean()), standard_error(values)


def perplexity(
    model: Any,
    tokens: Tensor | Sequence[int],
    *,
    length: int = 512,
    stride: int | None = None,
    first: int | None = None,
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
        first: Token put before every window (beginning of text), which then holds one token less; None for none.
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
    lead = ids.new_tensor([] if first is None else [first])
    body = length - len(lead)
    stride = min(stride, body)
    starts = range(0, max(len(ids) - body, 0) + 1, stride)
    total, count, scored = 0.0, 0, 0  # `scored` tokens from the left have been predicted (or lead a window)
    for number, start in enumerate(starts):
        window = torch.cat([lead, ids[start : start + body]]).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0]
        new = max(scored - start + len(lead), 1)
        losses = _negative_log_likelihood(logits[new - 1 : -1], window[new:])
        total, count, scored = total + float(losses.sum()), count + len(losses), start + len(window) - len(lead)
        if progress is not None:
            progress(number + 1, len(starts))
    return math.exp(total / count)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double()
