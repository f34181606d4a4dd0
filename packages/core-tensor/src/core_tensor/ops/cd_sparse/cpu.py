"""Call into `csrc/cd_sparse.cpp`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core_tensor.checks import check_indices
from core_tensor.ops._library import function

_KERNELS = {
    dtype: function(f"ct_cd_sparse_{name}", *[c_void_p] * 9, *[c_int64] * 3, c_int, c_int64, returns=c_int)
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def cd_sparse(
    codes: Tensor,
    gradient: Tensor,
    sigma: Tensor,
    scale: Tensor,
    group: Tensor,
    frozen: Tensor | None,
    max_code: int,
    max_sweeps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `core_tensor.cd_sparse`."""
    out = codes.clone(memory_format=torch.contiguous_format)
    g = gradient.detach().clone(memory_format=torch.contiguous_format)
    diagonal = sigma.diagonal()
    inverse = torch.where(diagonal == 0, torch.zeros_like(diagonal), 1 / diagonal)  # 0: a dead feature never moves
    moves = torch.zeros(out.shape[0], dtype=torch.int64)
    converged = torch.zeros(out.shape[0], dtype=torch.bool)
    rest = [t.contiguous() for t in (sigma, inverse, scale, group)]
    flags = None if frozen is None else frozen.contiguous()
    sizes = (*out.shape, scale.shape[1])
    if not _KERNELS[g.dtype](out, g, *rest, flags, moves, converged, *sizes, max_code, max_sweeps):
        check_indices("group", group, scale.shape[1])
    return out, g, moves, converged
