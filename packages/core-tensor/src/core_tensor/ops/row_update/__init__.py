r"""One optimizer step on the rows of an embedding table that a batch has touched, at a cost that ignores all others.

With $g_u = \sum_{i: id_i = u} grad_i$ for every distinct id u of the batch, lazy Adam does at step t

$$ m_u \leftarrow \beta_1 m_u + (1 - \beta_1) g_u, \quad v_u \leftarrow \beta_2 v_u + (1 - \beta_2) g_u^2, \quad
w_u \leftarrow (1 - \eta \lambda) w_u - \eta \frac{m_u / (1 - \beta_1^t)}{\sqrt{v_u / (1 - \beta_2^t)} + \epsilon}, $$

and row-wise Adagrad, with one accumulator per row of width D,

$$ a_u \leftarrow a_u + \tfrac1D \lVert g_u \rVert^2, \quad
w_u \leftarrow (1 - \eta \lambda) w_u - \eta \, g_u / (\sqrt{a_u} + \epsilon) . $$

Rows that no id names keep weight, moments and decay exactly: lazy Adam is not dense Adam, which moves them by their old
momentum. The gradients of one row are added in the order of the batch, whatever the number of threads.

Sources: Kingma and Ba, arXiv 1412.6980; `torch.optim.SparseAdam`; row-wise Adagrad as in Gupta, Bekkerman et al. 2014
and fbgemm.
"""

import torch
from torch import Tensor

from core_tensor.checks import check_choice, check_indices, check_number, check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.row_update import cpu, reference

KINDS = ("adam", "adagrad")


def _fake(
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
    return None


_row_update = operator(
    "row_update(Tensor(a!) weight, Tensor(b!)? first, Tensor(c!) second, Tensor ids, Tensor grad, str kind, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    reference=reference.row_update,
    fake=_fake,
    cpu=cpu.row_update,
)


def row_update(
    weight: Tensor,
    state: tuple[Tensor, ...],
    ids: Tensor,
    grad: Tensor,
    *,
    kind: str = "adam",
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
) -> None:
    """Update the rows that `ids` names, and their optimizer state, in place.

    Args:
        weight: The table, shape (N, D), float32 or float64.
        state: Adam: first and second moment, shape (N, D) each. Adagrad: the accumulator, shape (N,). Of the table's
            dtype.
        ids: Row of every gradient, shape (n,), int64, repeats allowed.
        grad: Gradients, shape (n, D), of the table's dtype.
        kind: `"adam"` or `"adagrad"`.
        lr: Learning rate.
        beta1: Decay of the first moment (Adam).
        beta2: Decay of the second moment (Adam).
        eps: Added to the root.
        weight_decay: Decoupled decay of the touched rows.
        step: Number of this step, from 1, for Adam's bias correction.

    Raises:
        ValueError: If shapes do not fit, an id is outside [0, N), a gradient is not finite, or a number is out of
            range; nothing has been written then.
        TypeError: If a dtype is wrong.
    """
    check_choice("kind", kind, KINDS)
    check_tensor("weight", weight, ndim=2, dtype=(torch.float32, torch.float64))
    n, d = weight.shape
    if not isinstance(state, (list, tuple)):
        raise TypeError(f"state: expected a tuple of tensors, got {type(state).__name__}")
    if len(state) != (2 if kind == "adam" else 1):
        raise ValueError(f"state: expected {2 if kind == 'adam' else 1} tensors for {kind}, got {len(state)}")
    for tensor in state:
        check_tensor(
            "state", tensor, shape=(n, d) if kind == "adam" else (n,), dtype=weight.dtype, device=weight.device
        )
    if has_values(weight) and any(tensor.is_neg() for tensor in (weight, *state)):
        raise ValueError("weight: expected tables that can be written to, got a negated view")
    check_tensor("ids", ids, ndim=1, dtype=torch.int64, device=weight.device)
    check_tensor("grad", grad, shape=(len(ids), d), dtype=weight.dtype, device=weight.device, finite=True)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, value, low=0)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check_number(name, value, low=0, high=1, open_high=True)
    check_number("step", step, low=1, integer=True)
    if len(ids) == 0:
        return
    check_indices("ids", ids, n)
    first = state[0] if kind == "adam" else None
    _row_update(weight, first, state[-1], ids, grad, kind, lr, beta1, beta2, eps, weight_decay, step)
