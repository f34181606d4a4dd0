"""Calibration text that a language model writes itself, for models whose training text nobody has."""

from collections.abc import Callable
from typing import Any

import torch
from core_tensor.checks import check_number
from torch import Tensor

Step = Callable[[int, int], None]


def own_samples(
    model: Any, windows: int, length: int, *, seed: int = 0, batch: int = 8, progress: Step | None = None
) -> Tensor:
    """Token windows sampled from a model at temperature 1, each from its beginning-of-text token.

    Where the tokenizer has none, a window starts from the end-of-text token, else from token 0.

    Args:
        model: A transformers causal language model, whole in memory.
        windows: Number of windows.
        length: Tokens per window, at least 2.
        seed: Of the random numbers; torch's global generator is left as it was.
        batch: Windows sampled at a time.
        progress: Called with windows done and their number.

    Returns:
        Token ids, shape (windows, length), int64.
    """
    check_number("windows", windows, low=1, integer=True)
    check_number("length", length, low=2, integer=True)
    check_number("batch", batch, low=1, integer=True)
    config = model.config
    first = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
    parts: list[Tensor] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for done in range(0, windows, batch):
            start = torch.full((min(batch, windows - done), 1), first, device=model.device)
            written = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,  # a window is full; what follows an end of text starts anew
                pad_token_id=0,
            )
            parts.append(written.cpu())
            if progress is not None:
                progress(done + len(start), windows)
    return torch.cat(parts)
