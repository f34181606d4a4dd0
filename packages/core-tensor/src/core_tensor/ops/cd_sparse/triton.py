"""Triton kernel: one program sweeps one row, a chunk of codes in registers, the gradient in (cached) memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.checks import check_indices
from core_tensor.ops._compile import CompileRow
from core_tensor.ops._triton_math import nearest

CHUNK = 1024


@triton.jit
def _sparse_kernel(
    codes, gradient, sigma, inverse, scale, group, frozen, moves, converged, p, groups, max_code, max_sweeps,
    FROZEN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sweep = 0
    count = 0
    settled = 0
    while (sweep < max_sweeps) & (settled == 0):
        before = count
        for start in range(0, p, CHUNK):
            j = start + tl.arange(0, CHUNK)
            inside = j < p
            code = tl.load(codes + row * p + j, mask=inside, other=0).to(gradient.dtype.element_ty)
            s = tl.load(scale + row * groups + tl.load(group + j, mask=inside, other=0), mask=inside, other=1.0)
            h = tl.load(inverse + j, mask=inside, other=0.0) / s
            if FROZEN:
                h = tl.where(tl.load(frozen + row * p + j, mask=inside, other=1) != 0, 0.0, h)
            first = start - 1
            while first < start + CHUNK:  # the next coordinate behind `first` that wants to move
                step = tl.load(gradient + row * p + j, mask=inside, other=0.0) * h
                wanted = nearest(tl.minimum(tl.maximum(code + step, 0.0), max_code))
                active = (tl.abs(step) > 0.5) & (wanted != code) & (j > first)
                first = tl.min(tl.where(active, j, start + CHUNK), axis=0)
                if first < start + CHUNK:
                    change = tl.sum(tl.where(j == first, (wanted - code) * s, 0.0), axis=0)
                    code = tl.where(j == first, wanted, code)
                    count += 1
                    for start_k in range(0, p, CHUNK):
                        k = start_k + tl.arange(0, CHUNK)
                        at = gradient + row * p + k
                        coupling = tl.load(sigma + first.to(tl.int64) * p + k, mask=k < p, other=0.0)
                        tl.store(at, tl.load(at, mask=k < p, other=0.0) - change * coupling, mask=k < p)
                    tl.debug_barrier()
            tl.store(codes + row * p + j, code.to(tl.uint8), mask=inside)
        sweep += 1
        settled = (count == before).to(tl.int32)
    tl.store(moves + row, count)
    tl.store(converged + row, settled)


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
    out = codes.clone(memory_format=torch.contiguous_format)
    g = gradient.detach().clone(memory_format=torch.contiguous_format)
    diagonal = sigma.diagonal()
    inverse = torch.where(diagonal == 0, torch.zeros_like(diagonal), 1 / diagonal)
    rows, p = out.shape
    moves = torch.zeros(rows, dtype=torch.int64, device=out.device)
    converged = torch.zeros(rows, dtype=torch.int8, device=out.device)
    if rows:
        flags = out if frozen is None else frozen.contiguous().view(torch.uint8)
        _sparse_kernel[(rows,)](
            out, g, sigma.contiguous(), inverse, scale.contiguous(), group.contiguous(), flags, moves, converged,
            p, scale.shape[1], float(max_code), max_sweeps, frozen is not None, CHUNK,
        )  # fmt: skip
    return out, g, moves, converged.bool()


COMPILE = [
    CompileRow(
        _sparse_kernel,
        {
            "codes": "*u8",
            **dict.fromkeys(("gradient", "sigma", "inverse", "scale"), "*fp32"),
            "group": "*i64",
            "frozen": "*u8",
            "moves": "*i64",
            "converged": "*i8",
            **dict.fromkeys(("p", "groups", "max_sweeps"), "i32"),
            "max_code": "fp32",
        },
        {"FROZEN": frozen, "CHUNK": CHUNK},
    )
    for frozen in (False, True)
]
