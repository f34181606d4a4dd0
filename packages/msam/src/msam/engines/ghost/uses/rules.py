"""Which torch function has a rule, for speed: what has none runs on replicas of the parameters, as exactly."""
# ruff: noqa: A002 (rules take their arguments under the names that torch gives them)

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.errors import UnsupportedError
from msam.engines.ghost.tape import Rule, Tape
from msam.engines.ghost.uses import attention as attention_module
from msam.engines.ghost.uses.conv import Geometry
from msam.engines.ghost.uses.matrices import convolution, embedding, product
from msam.engines.ghost.uses.recurrent import RECURRENT


def _linear(tape: Tape, func: Any, /, input: Any, weight: Any, bias: Any = None) -> Any:
    del func
    return product(tape, input, weight, bias)


def _matmul(tape: Tape, func: Any, /, input: Any, other: Any = None, *, mat2: Any = None, out: Any = None) -> Any:
    del func
    right = mat2 if other is None else other
    return product(tape, input, right, flipped=True) if out is None else NotImplemented


def _addmm(tape: Tape, func: Any, /, input: Any, mat1: Any, mat2: Any, **rest: Any) -> Any:
    del func
    if rest or input.ndim != 1:
        return NotImplemented
    return product(tape, mat1, mat2, input, flipped=True)


def _embedding(
    tape: Tape, func: Any, /, input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    del func, norm_type
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    return embedding(tape, input, weight, padding_idx)


def _convolution(dims: int, transposed: bool) -> Rule:
    def wide(value: Any) -> tuple[int, ...]:
        found = (value,) * dims if isinstance(value, int) else tuple(value)
        return found * dims if len(found) == 1 else found

    def plain(
        tape: Tape, func: Any, /, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, output_padding: Any = 0,
    ) -> Any:  # fmt: skip
        del func
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(wide(dilation), weight.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return NotImplemented
            padding = [r // 2 for r in reach] if padding == "same" else 0
        shape = Geometry(wide(stride), wide(padding), wide(dilation), transposed, wide(output_padding), groups)
        return convolution(tape, input, weight, bias, shape)

    def reordered(
        tape: Tape, func: Any, /, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        return plain(tape, func, input, weight, bias, stride, padding, dilation, groups, output_padding)

    return reordered if transposed else plain


def _batch_norm(
    tape: Tape, func: Any, /, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Each micro-batch has its own statistics, and moves the running ones, as when they come one by one."""
    del func
    if not training or tape.nested or not tape.is_apart(input):
        return NotImplemented
    rest = (training, momentum, eps)
    return _one_by_one(
        tape, input, weight, bias, lambda x, w, b: F.batch_norm(x, running_mean, running_var, w, b, *rest)
    )


def _group_norm(
    tape: Tape, func: Any, /, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    del func
    if not _is_large(tape, input):
        return NotImplemented
    return _one_by_one(tape, input, weight, bias, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps))


def _layer_norm(
    tape: Tape, func: Any, /, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    del func
    if not _is_large(tape, input):
        return NotImplemented
    return _one_by_one(tape, input, weight, bias, lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps))


LARGE = 1 << 14
"""Elements of a micro-batch from which its norm takes less time in a call of its own than `vmap` takes to scale and
shift all of them."""


def _is_large(tape: Tape, x: Any) -> bool:
    return not tape.nested and tape.is_apart(x) and x.numel() >= LARGE


def _one_by_one(tape: Tape, x: Any, weight: Any, bias: Any, norm: Callable[[Any, Any, Any], Tensor]) -> Tensor:
    """A norm of each micro-batch with its own scale and shift, which the kernels apply on the way."""
    below = [None if t is None else tape.below(tape.replaced(t)) for t in (x, weight, bias)]
    with tape.outside():
        own = [[None] * tape.count if t is None else t.unbind() for t in below]
        y = torch.stack([norm(*each) for each in zip(*own, strict=True)])
    return tape.above(y)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _attention(tape: Tape, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    del func
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if attention_module.unsupported(a) is not None:
        return NotImplemented

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = product(tape, x, weight, bias)
        return F.linear(x, tape.replaced(weight), tape.replaced(bias)) if y is NotImplemented else y

    return attention_module.attention(a, linear, lambda *args: _scaled_attention(tape, None, *args))


def _scaled_attention(
    tape: Tape, func: Any, /, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, **rest: Any,
) -> Any:  # fmt: skip
    """All micro-batches in one call: `vmap` has no rule for the fused kernels."""
    del func
    rest |= {"dropout_p": dropout_p, "is_causal": is_causal}
    if tape.nested or not any(map(tape.is_apart, (query, key, value))):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **rest)
    below = [tape.below(tape.replaced(x)) for x in (query, key, value)]
    own: Any = tape.replaced(attn_mask)
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
        y = F.scaled_dot_product_attention(flat[0], flat[1], flat[2], own, **rest)
        y = y.unflatten(0, (tape.count, -1)) if len(lead) > 1 else y
    return tape.above(y)


def _class_loss(
    tape: Tape, func: Any, /, input: Any, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """The usual class loss, whose decomposition under `vmap` takes ten times as long."""
    usual = reduction == "mean" and weight is None and label_smoothing == 0.0
    usual = usual and size_average is None and reduce is None  # deprecated spellings of the reduction
    if not usual or tape.nested or not tape.is_apart(input) or input.ndim != 2 or target.is_floating_point():
        return NotImplemented
    scores, classes = tape.below(input), tape.below(target)
    with tape.outside():
        flat, index = scores.flatten(0, 1), classes.flatten()
        kind = F.cross_entropy if func is F.cross_entropy else F.nll_loss
        losses = kind(flat, index, ignore_index=ignore_index, reduction="none").view(tape.count, -1)
        if ignore_index >= 0 or index.min().item() < 0:  # one small reduction settles the usual case
            valid = (classes != ignore_index).sum(1)
            tape.uneven |= bool((valid != valid[0]).any())
            return tape.above(losses.sum(1) / valid)
        mean = losses.mean(1)
    return tape.above(mean)


def _leaf(tape: Tape, func: Any, /, *args: Any) -> Any:
    """A tensor asked to be a leaf, as activation checkpointing and penalties on gradients of inputs do."""
    if not any(map(tape.is_apart, args)):
        return NotImplemented
    raise UnsupportedError(
        f"the loss calls `{func.__name__}` on a tensor, as activation checkpointing and penalties on input gradients do"
    )


_TENSOR = torch.Tensor
RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul, _TENSOR.matmul: _matmul, _TENSOR.__matmul__: _matmul, torch.mm: _matmul, _TENSOR.mm: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.conv1d: _convolution(1, False), torch.conv2d: _convolution(2, False), torch.conv3d: _convolution(3, False),
    torch.conv_transpose1d: _convolution(1, True), torch.conv_transpose2d: _convolution(2, True),
    torch.conv_transpose3d: _convolution(3, True),
    F.batch_norm: _batch_norm, F.group_norm: _group_norm, F.layer_norm: _layer_norm,
    F.multi_head_attention_forward: _attention,
    F.scaled_dot_product_attention: _scaled_attention,
    F.cross_entropy: _class_loss, F.nll_loss: _class_loss,
    _TENSOR.requires_grad_: _leaf,
    **RECURRENT,
}  # fmt: skip
