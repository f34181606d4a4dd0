"""Which torch function has a rule, for speed: what has none runs on replicas of the parameters, as exactly."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.tape import Rule, Tape
from msam.engines.ghost.uses import attention as attention_module
from msam.engines.ghost.uses.conv import Geometry
from msam.engines.ghost.uses.matrices import convolution, embedding, product
from msam.engines.ghost.uses.recurrent import RECURRENT


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Arguments of a call by name.

    Args:
        names: Positional names in order.
        args: Positional arguments.
        kwargs: The others.
        defaults: Values of absent ones.

    Returns:
        A dictionary.
    """
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _linear(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    del func
    if not kwargs:  # the usual call, at half the cost
        return product(tape, *args)
    a = bind(("input", "weight", "bias"), args, kwargs, {"bias": None})
    return product(tape, a["input"], a["weight"], a["bias"])


def _matmul(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    del func
    a = bind(("input", "other"), args, kwargs, {})
    right = a.get("other", a.get("mat2"))
    return product(tape, a["input"], right, None, flipped=True)


def _addmm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    del func
    a = bind(("input", "mat1", "mat2"), args, kwargs, {})
    if len(a) > 3 or a["input"].ndim != 1:
        return NotImplemented
    return product(tape, a["mat1"], a["mat2"], a["input"], flipped=True)


def _embedding(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    del func
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    a = bind(names, args, kwargs, {"padding_idx": None})
    if a.get("max_norm") is not None or a.get("scale_grad_by_freq") or a.get("sparse"):
        return NotImplemented
    return embedding(tape, a["input"], a["weight"], a["padding_idx"])


def _convolution(dims: int, transposed: bool) -> Rule:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

    def wide(value: Any) -> tuple[int, ...]:
        found = (value,) * dims if isinstance(value, int) else tuple(value)
        return found * dims if len(found) == 1 else found

    def rule(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        del func
        a = bind(
            names,
            args,
            kwargs,
            {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0},
        )
        padding = a["padding"]
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(wide(a["dilation"]), a["weight"].shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return NotImplemented
            padding = [r // 2 for r in reach] if padding == "same" else 0
        shape = Geometry(
            wide(a["stride"]), wide(padding), wide(a["dilation"]), transposed, wide(a["output_padding"]), a["groups"]
        )
        return convolution(tape, a["input"], a["weight"], a["bias"], shape)

    return rule


def _batch_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Each micro-batch has its own statistics, and moves the running ones, as when they come one by one."""
    del func
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    a = bind(names, args, kwargs, {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5})
    if not a["training"] or tape.nested or not tape.is_apart(a["input"]):
        return NotImplemented
    rest = (a["running_mean"], a["running_var"], None, None, True, a["momentum"], a["eps"])
    below = tape.below(a["input"])
    with tape.outside():
        y = torch.stack([F.batch_norm(x, *rest) for x in below])
    y = tape.above(y)
    shape = (-1, *[1] * (y.ndim - 2))
    weight, bias = tape.replaced(a["weight"]), tape.replaced(a["bias"])
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _attention(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    del func
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if attention_module.unsupported(a) is not None:
        return NotImplemented

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = product(tape, x, weight, bias)
        return F.linear(x, tape.replaced(weight), tape.replaced(bias)) if y is NotImplemented else y

    return attention_module.attention(a, linear, lambda *args: _scaled_attention(tape, None, args, {}))


def _scaled_attention(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """All micro-batches in one call: `vmap` has no rule for the fused kernels."""
    del func
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    a = bind(names, args, kwargs, {"attn_mask": None, "dropout_p": 0.0, "is_causal": False})
    q, k, v, mask = (a.pop(name) for name in names[:4])
    if tape.nested or not any(map(tape.is_apart, (q, k, v))):
        return F.scaled_dot_product_attention(q, k, v, mask, **a)
    below = [tape.below(tape.replaced(x)) for x in (q, k, v)]
    own: Any = tape.replaced(mask)
    apart = tape.is_apart(own)
    own = tape.below(own) if apart else own
    with tape.outside():
        lead = below[0].shape[1:-2]
        if own is not None and apart:  # (m, ..., L, S) with as many dimensions between as the queries
            own = own.reshape(tape.count, *[1] * (len(lead) + 3 - own.ndim), *own.shape[1:])
        flat = [x.flatten(0, 1) if len(lead) > 1 else x for x in below]
        if own is not None and len(lead) > 1:
            if apart:
                own = own.expand(tape.count, lead[0], *own.shape[2:]).flatten(0, 1)
            elif own.ndim == len(lead) + 2 and own.shape[0] > 1:
                own = own.repeat(tape.count, *[1] * (own.ndim - 1))
        y = F.scaled_dot_product_attention(flat[0], flat[1], flat[2], own, **a)
        y = y.unflatten(0, (tape.count, -1)) if len(lead) > 1 else y
    return tape.above(y)


def _class_loss(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The usual class loss, whose decomposition under `vmap` takes ten times as long."""
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    a = bind(names, args, kwargs, {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0})
    x, target = a["input"], a["target"]
    usual = a["reduction"] == "mean" and a["weight"] is None and a["label_smoothing"] == 0.0
    usual = usual and a.get("size_average") is None and a.get("reduce") is None  # deprecated spellings of the reduction
    if not usual or tape.nested or not tape.is_apart(x) or x.ndim != 2 or target.is_floating_point():
        return NotImplemented
    scores, classes = tape.below(x), tape.below(target)
    with tape.outside():
        flat, index = scores.flatten(0, 1), classes.flatten()
        kind = F.cross_entropy if func is F.cross_entropy else F.nll_loss
        losses = kind(flat, index, ignore_index=a["ignore_index"], reduction="none").view(tape.count, -1)
        if a["ignore_index"] >= 0 or index.min().item() < 0:  # one small reduction settles the usual case
            valid = (classes != a["ignore_index"]).sum(1)
            tape.uneven |= bool((valid != valid[0]).any())
            return tape.above(losses.sum(1) / valid)
        mean = losses.mean(1)
    return tape.above(mean)


_TENSOR = torch.Tensor
RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul, _TENSOR.matmul: _matmul, _TENSOR.__matmul__: _matmul, torch.mm: _matmul, _TENSOR.mm: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.conv1d: _convolution(1, False), torch.conv2d: _convolution(2, False), torch.conv3d: _convolution(3, False),
    torch.conv_transpose1d: _convolution(1, True), torch.conv_transpose2d: _convolution(2, True),
    torch.conv_transpose3d: _convolution(3, True),
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _attention,
    F.scaled_dot_product_attention: _scaled_attention,
    F.cross_entropy: _class_loss, F.nll_loss: _class_loss,
    **RECURRENT,
}  # fmt: skip
