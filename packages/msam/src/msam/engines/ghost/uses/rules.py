"""Which torch function is perturbed by which rule."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.errors import ChangedError, UnsupportedError
from msam.engines.ghost.tape import Tape
from msam.engines.ghost.uses import attention as attention_module
from msam.engines.ghost.uses.affine import broadcast, elementwise, normalized
from msam.engines.ghost.uses.conv import Geometry
from msam.engines.ghost.uses.matrices import convolution, embedding, product

Rule = Callable[[Tape, Any, Sequence[Any], Mapping[str, Any]], Any]


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
    a = bind(("input", "other"), args, kwargs, {})
    left, right = a["input"], a.get("other", a.get("mat2"))
    if tape.touches(left):
        raise UnsupportedError(f"{func.__name__} with a perturbed parameter on the left")
    if not tape.touches(right):
        return func(*args, **kwargs)
    return product(tape, left, right, None, flipped=True)


def _addmm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a = bind(("input", "mat1", "mat2"), args, kwargs, {})
    if not tape.touches(a["input"], a["mat1"], a["mat2"]):
        return func(*args, **kwargs)
    if len(a) > 3 or a["input"].ndim != 1 or tape.touches(a["mat1"]):
        raise UnsupportedError("addmm other than bias + x @ weight")
    return product(tape, a["mat1"], a["mat2"], a["input"], flipped=True)


def _embedding(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    a = bind(names, args, kwargs, {"padding_idx": None})
    if not tape.touches(a["weight"]):
        return func(*args, **kwargs)
    if a.get("max_norm") is not None or a.get("scale_grad_by_freq") or a.get("sparse"):
        raise UnsupportedError("an embedding with max_norm, scale_grad_by_freq or sparse gradients")
    return embedding(tape, a["input"], a["weight"], a["padding_idx"])


def _convolution(dims: int, transposed: bool) -> Rule:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

    def wide(value: Any) -> tuple[int, ...]:
        found = (value,) * dims if isinstance(value, int) else tuple(value)
        return found * dims if len(found) == 1 else found

    def rule(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        a = bind(
            names,
            args,
            kwargs,
            {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0},
        )
        if not tape.touches(a["weight"], a["bias"]):
            return func(*args, **kwargs)
        padding = a["padding"]
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(wide(a["dilation"]), a["weight"].shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                raise UnsupportedError("a convolution padded 'same' by an uneven amount")
            padding = [r // 2 for r in reach] if padding == "same" else 0
        if a["input"].ndim != dims + 2:
            raise UnsupportedError("a convolution without a batch dimension")
        shape = Geometry(
            wide(a["stride"]), wide(padding), wide(a["dilation"]), transposed, wide(a["output_padding"]), a["groups"]
        )
        return convolution(tape, a["input"], a["weight"], a["bias"], shape)

    return rule


def _layer_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a = bind(
        ("input", "normalized_shape", "weight", "bias", "eps"),
        args,
        kwargs,
        {"weight": None, "bias": None, "eps": 1e-5},
    )
    return normalized(
        tape, lambda: func(*args, **kwargs), lambda x: F.layer_norm(x, a["normalized_shape"], None, None, a["eps"]),
        a["input"], a["weight"], a["bias"], channels=False,
    )  # fmt: skip


def _rms_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a = bind(("input", "normalized_shape", "weight", "eps"), args, kwargs, {"weight": None, "eps": None})
    return normalized(
        tape, lambda: func(*args, **kwargs), lambda x: F.rms_norm(x, a["normalized_shape"], None, a["eps"]),
        a["input"], a["weight"], None, channels=False,
    )  # fmt: skip


def _group_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a = bind(
        ("input", "num_groups", "weight", "bias", "eps"), args, kwargs, {"weight": None, "bias": None, "eps": 1e-5}
    )
    return normalized(
        tape, lambda: func(*args, **kwargs), lambda x: F.group_norm(x, a["num_groups"], None, None, a["eps"]),
        a["input"], a["weight"], a["bias"], channels=True,
    )  # fmt: skip


def _instance_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    a = bind(
        names,
        args,
        kwargs,
        {
            "running_mean": None,
            "running_var": None,
            "weight": None,
            "bias": None,
            "use_input_stats": True,
            "momentum": 0.1,
            "eps": 1e-5,
        },
    )
    if a["running_mean"] is not None and a["use_input_stats"] and tape.shards.count > 1:
        raise UnsupportedError("an instance norm that averages statistics over the batch")
    return normalized(
        tape, lambda: func(*args, **kwargs),
        lambda x: F.instance_norm(
            x, a["running_mean"], a["running_var"], None, None, a["use_input_stats"], a["momentum"], a["eps"]
        ),
        a["input"], a["weight"], a["bias"], channels=True,
    )  # fmt: skip


def _batch_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    a = bind(names, args, kwargs, {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5})

    def statistics(x: Tensor) -> Tensor:
        tail = (None, None, a["training"], a["momentum"], a["eps"])
        if not a["training"]:
            return F.batch_norm(x, a["running_mean"], a["running_var"], *tail)
        # Each micro-batch has its own statistics, as in sequential mode ("ghost batch norm").
        starts, sizes = tape.shards.starts, tape.shards.sizes
        parts = zip(starts, sizes, strict=True) if tape.shards.count > 1 else [(0, x.shape[0])]
        return torch.cat([F.batch_norm(x[s : s + n], a["running_mean"], a["running_var"], *tail) for s, n in parts])

    plain = lambda: func(*args, **kwargs)  # noqa: E731
    return normalized(tape, plain, statistics, a["input"], a["weight"], a["bias"], channels=True, coupled=a["training"])


def _attention(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if not tape.touches(*a.values()):
        return func(*args, **kwargs)
    reason = attention_module.unsupported(a)
    if reason is not None:
        raise UnsupportedError(reason)

    return attention_module.attention(a, partial(product, tape))


def _class_loss(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A mean over valid targets, whose number may change from batch to batch, so that no proof holds for the next.

    Returns:
        The loss.

    Raises:
        UnsupportedError: If micro-batches have unequal shares of the valid targets and no weights that say so.
    """
    if tape.touches(*args, *kwargs.values()):
        raise UnsupportedError(f"{func.__name__} of a perturbed parameter")
    if tape.phase != "probe" and tape.equal and tape.shards.count > 1:
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
        a = bind(names, args, kwargs, {"weight": None, "ignore_index": -100, "reduction": "mean"})
        target, index = a["target"], a["ignore_index"]
        # One small reduction settles the usual case, in which nothing is ignored.
        if not target.is_floating_point() and (a["weight"] is not None or index >= 0 or target.min().item() < 0):
            _check_targets(tape, target, target != index, a["weight"], a["reduction"])
    return func(*args, **kwargs)


def _check_targets(tape: Tape, target: Tensor, valid: Tensor, weight: Tensor | None, reduction: str) -> None:
    ignored = not bool(valid.all())
    tape.masked |= ignored
    if weight is None and not ignored:
        return
    weights = valid if weight is None else weight[target.where(valid, 0)].double() * valid
    if reduction == "mean" and not tape.examples.even(weights):
        raise UnsupportedError(
            "micro-batches with unequal shares of the valid targets; give shard_weight (such as their number)"
        )
    if tape.phase == "capture" and ignored and not tape.paths[0].masked:
        raise ChangedError("targets are ignored, as in no proof before")  # whose order may not be the examples'


def _gradient(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A penalty on a gradient needs second derivatives, which the perturbed products do not have.

    Returns:
        The gradients.

    Raises:
        UnsupportedError: If they are to be differentiated.
    """
    del tape
    a = bind(("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph"), args, kwargs, {})
    if a.get("create_graph"):
        raise UnsupportedError("a gradient inside the loss that is differentiated once more")
    return func(*args, **kwargs)


_TENSOR = torch.Tensor
RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul, _TENSOR.matmul: _matmul, _TENSOR.__matmul__: _matmul, torch.mm: _matmul, _TENSOR.mm: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.conv1d: _convolution(1, False), torch.conv2d: _convolution(2, False), torch.conv3d: _convolution(3, False),
    torch.conv_transpose1d: _convolution(1, True), torch.conv_transpose2d: _convolution(2, True),
    torch.conv_transpose3d: _convolution(3, True),
    F.layer_norm: _layer_norm, F.group_norm: _group_norm, F.instance_norm: _instance_norm, F.batch_norm: _batch_norm,
    F.rms_norm: _rms_norm, torch.rms_norm: _rms_norm,
    F.multi_head_attention_forward: _attention,
    F.cross_entropy: _class_loss, F.nll_loss: _class_loss,
    torch.autograd.grad: _gradient,
    **dict.fromkeys(
        (torch.add, _TENSOR.add, _TENSOR.__add__, _TENSOR.__radd__, _TENSOR.add_, _TENSOR.__iadd__,
         torch.sub, _TENSOR.sub, _TENSOR.__sub__, _TENSOR.__isub__, torch.mul, _TENSOR.mul, _TENSOR.__mul__,
         _TENSOR.__rmul__, _TENSOR.mul_, _TENSOR.__imul__, torch.div, _TENSOR.div, _TENSOR.__truediv__),
        elementwise,
    ),
    **dict.fromkeys(
        (_TENSOR.__getitem__, _TENSOR.expand, _TENSOR.expand_as, _TENSOR.unsqueeze, torch.unsqueeze, _TENSOR.repeat),
        broadcast,
    ),
}  # fmt: skip
