r"""Coordinate descent on quantized rows that touches only the codes that want to change, to a coordinate-wise minimum.

For a row $w$ with quantized $\hat w$ and gradient $g = \Sigma (w - \hat w)$, the minimiser in coordinate $j$ is

$$ c_j \leftarrow \operatorname{clamp}(\operatorname{round}((\hat w_j + g_j / \Sigma_{jj}) / s_j) + z_j, 0, c_{\max}),
\qquad g \leftarrow g - d \, \Sigma_j \ \text{ on a change } d = \hat w_j^{new} - \hat w_j^{old}. $$

A sweep costs a scan of the row plus one update of length p per change; after a GPTQ start one code in a hundred moves.
A tie never moves, so a sweep without a change certifies that no single code can be improved (QuantEase,
arXiv 2309.01885, Lemma 2; the active set is ours).
"""

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor
from core_tensor.ops._operator import operator
from core_tensor.ops.cd_sparse import cpu, reference


def _fake(
    codes: Tensor,
    gradient: Tensor,
    sigma: Tensor,
    scale: Tensor,
    group: Tensor,
    frozen: Tensor | None,
    max_code: int,
    max_sweeps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = codes.shape[0]
    return (
        torch.empty_like(codes, memory_format=torch.contiguous_format),
        torch.empty_like(gradient, memory_format=torch.contiguous_format),
        codes.new_empty(rows, dtype=torch.int64),
        codes.new_empty(rows, dtype=torch.bool),
    )


_cd_sparse = operator(
    "cd_sparse(Tensor codes, Tensor gradient, Tensor sigma, Tensor scale, Tensor group, Tensor? frozen, int max_code,"
    " int max_sweeps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cd_sparse,
    fake=_fake,
    cpu=cpu.cd_sparse,
    cuda="core_tensor.ops.cd_sparse.triton:cd_sparse",
)


def cd_sparse(
    codes: Tensor,
    gradient: Tensor,
    sigma: Tensor,
    scale: Tensor,
    group: Tensor,
    frozen: Tensor | None,
    max_code: int,
    max_sweeps: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep every row until no code changes.

    The zero points do not enter: a code moves by a difference.

    Args:
        codes: Codes to start from, row-major, shape (q, p), uint8.
        gradient: `(weight - quantized) @ sigma` at the start, shape (q, p), float32 or float64.
        sigma: Gram matrix, symmetric, shape (p, p).
        scale: Grid steps, shape (q, G), positive.
        group: Column of `scale` for every feature, shape (p,), int64.
        frozen: Coordinates that never move, shape (q, p), bool; None for none.
        max_code: Largest code, `2**bits - 1`.
        max_sweeps: Sweeps per row at most.

    Returns:
        Codes (q, p); gradient at the end (q, p); number of changes per row (q,), int64; and whether the row's last
        sweep changed nothing (q,), bool.

    Raises:
        ValueError: If shapes or devices do not fit, or a group is out of range.
        TypeError: If dtypes differ or are not supported.
    """
    check_tensor("codes", codes, ndim=2, dtype=torch.uint8)
    q, p = codes.shape
    device = codes.device
    check_tensor("gradient", gradient, shape=(q, p), dtype=(torch.float32, torch.float64), device=device)
    check_tensor("sigma", sigma, shape=(p, p), dtype=gradient.dtype, device=device)
    check_tensor("scale", scale, shape=(q, None), dtype=gradient.dtype, device=device)
    check_tensor("group", group, shape=(p,), dtype=torch.int64, device=device)
    if frozen is not None:
        check_tensor("frozen", frozen, shape=(q, p), dtype=torch.bool, device=device)
    check_number("max_code", max_code, low=1, high=255, integer=True)
    check_number("max_sweeps", max_sweeps, low=0, integer=True)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _cd_sparse(
        codes, gradient, sigma, scale, group, frozen, max_code, max_sweeps
    )
    return result
