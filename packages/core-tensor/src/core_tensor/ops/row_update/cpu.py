"""Call into `csrc/row_update.cpp`."""

from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.ops._library import function
from core_tensor.ops.row_update import reference

_row_update = function("ct_row_update", *[c_void_p] * 5, *[c_int64] * 2, c_int, *[c_double] * 7)


def row_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor,
    ids: Tensor,
    grad: Tensor,
    kind: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `core_tensor.row_update`."""
    tables = [weight, second] if first is None else [weight, first, second]
    if weight.dtype != torch.float32 or not all(table.is_contiguous() for table in tables):
        reference.row_update(
            weight, first, second, ids, grad, kind, lr, beta1, beta2, eps, weight_decay, step
        )  # float64, for tests
        return
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    adagrad = int(kind == "adagrad")
    ids, grad = ids.contiguous(), grad.contiguous()
    options = (lr, beta1, beta2, eps, weight_decay, bias1, bias2)
    _row_update(weight, first, second, ids, grad, len(ids), weight.shape[1], adagrad, *options)
