"""`torch.nn.functional.multi_head_attention_forward` in linear maps and attention, for the tape's product rule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def unsupported(a: dict[str, Any]) -> str | None:
    """Why an attention call has no ghost form.

    Args:
        a: Arguments of `multi_head_attention_forward` by name.

    Returns:
        The reason, or None.
    """
    if a["bias_k"] is not None or a["bias_v"] is not None or a["add_zero_attn"]:
        return "attention with bias_k, bias_v or add_zero_attn"
    if a["use_separate_proj_weight"] and a["in_proj_bias"] is not None:
        return "attention with separate projections and a packed bias"
    if a["static_k"] is not None or a["static_v"] is not None or a["query"].ndim != 3:
        return "attention with static keys or without a batch dimension"
    return None


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add to the scores.

    Args:
        mask: Boolean (True is masked out) or floating.
        dtype: Of the scores.

    Returns:
        Floating mask, or None.
    """
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def projections(a: dict[str, Any], linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values.

    Args:
        a: Arguments by name.
        linear: How to multiply by weights.

    Returns:
        Three tensors of shape (N, L or S, d).
    """
    shared = a["query"] is a["key"] is a["value"]
    # Batches come as (L, N, d), mostly as views of (N, L, d), which is what micro-batches can be cut from.
    q, k, v = (a[name].transpose(0, 1) for name in ("query", "key", "value"))
    d = q.shape[-1]
    if a["use_separate_proj_weight"]:
        weights = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
        return linear(q, weights[0], None), linear(k, weights[1], None), linear(v, weights[2], None)
    weight, bias = a["in_proj_weight"], a["in_proj_bias"]
    if shared:
        first, second, third = linear(q, weight, bias).split(d, -1)
        return first, second, third
    # The packed weight cannot be cut without losing its identity, so cross attention computes unused columns too.
    mixed = linear(k, weight, bias)
    values = mixed if a["key"] is a["value"] else linear(v, weight, bias)
    return linear(q, weight, bias)[..., :d], mixed[..., d : 2 * d], values[..., 2 * d :]


def attention(a: dict[str, Any], linear: Linear, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention.

    Args:
        a: Arguments of `multi_head_attention_forward` by name.
        linear: How to multiply by weights.
        attend: Scaled dot-product attention.

    Returns:
        Result, shape (L, N, d), and attention weights or None.
    """
    heads = a["num_heads"]
    q, k, v = projections(a, linear)
    (n, length, d), source = q.shape, k.shape[1]

    def split(x: Tensor) -> Tensor:  # (N, L, d) -> (N, heads, L, d / heads)
        return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)

    mask = additive(a["attn_mask"], q.dtype)
    if mask is not None and mask.ndim == 3:
        mask = mask.view(n, heads, length, source)
    padding = additive(a["key_padding_mask"], q.dtype)
    if padding is not None:
        padding = padding.view(n, 1, 1, source)
        mask = padding if mask is None else mask + padding
    dropout = a["dropout_p"] if a["training"] else 0.0
    weights = None
    if a["need_weights"]:
        scores = split(q) @ split(k).mT / math.sqrt(d // heads)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        mixed = weights @ split(v)
        weights = weights.mean(1) if a["average_attn_weights"] else weights
    else:
        mixed = attend(split(q), split(k), split(v), mask, dropout)
    result = linear(mixed.transpose(1, 2).flatten(2), a["out_proj_weight"], a["out_proj_bias"]).transpose(0, 1)
    return result.contiguous() if a["query"].is_contiguous() else result, weights
