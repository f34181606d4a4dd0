"""Plain torch: every coordinate is visited in order, all rows at once."""

import torch
from torch import Tensor

from core_tensor.checks import check_indices


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
    check_indices("group", group, scale.shape[1])
    code = codes.to(gradient.dtype, memory_format=torch.contiguous_format, copy=True)
    g = gradient.clone(memory_format=torch.contiguous_format)
    moves = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
    converged = torch.zeros(codes.shape[0], dtype=torch.bool, device=codes.device)
    for _ in range(max_sweeps):
        if bool(converged.all()):
            break
        before = moves.clone()
        for j in range(codes.shape[1]):
            if sigma[j, j] == 0:
                continue  # a dead feature has no gradient
            s = scale[:, group[j]]
            step = g[:, j] / (sigma[j, j] * s)
            wanted = torch.where(step.abs() > 0.5, (code[:, j] + step).clamp(0, max_code).round(), code[:, j])
            if frozen is not None:
                wanted = torch.where(frozen[:, j], code[:, j], wanted)
            change = wanted - code[:, j]
            g -= torch.outer(change * s, sigma[j])
            moves += (change != 0).long()
            code[:, j] = wanted
        converged = moves == before
    return code.to(torch.uint8), g, moves, converged
