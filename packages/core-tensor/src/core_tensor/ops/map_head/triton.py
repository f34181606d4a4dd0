"""Triton kernels: one program solves one task in float64, its system in registers, its rows read one after the other.

The width is padded to 8 or 32 with a one on the precision's diagonal, so the unknowns behind it stay at zero.
Systems are solved by Gauss-Jordan elimination without pivoting, which is stable for a positive definite matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_tensor.ops._compile import CompileRow

MAP_WARPS = {8: 1, 32: 4}
ADJOINT_WARPS = {8: 1, 32: 8}
"""Warps by padded width. A small system stays in one warp, whose sums need no shared memory; these spill nothing."""


@triton.jit
def _sigmoid(z):
    q = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, q) / (1.0 + q)


@triton.jit
def _precision(P, d, D: tl.constexpr):
    j = tl.arange(0, D)
    inside = (j[:, None] < d) & (j[None, :] < d)
    own = tl.load(P + j[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
    return tl.where(inside, own, tl.where(j[:, None] == j[None, :], 1.0, 0.0))


@triton.jit
def _system(h, base, y, w, P, e, off, n, d, D: tl.constexpr):
    # The Hessian at e, and the gradient there.
    j = tl.arange(0, D)
    H = _precision(P, d, D)
    gradient = tl.sum(H * off[:, None], axis=0)
    for i in range(n):
        row = tl.load(h + i * d + j, mask=j < d, other=0.0).to(tl.float64)
        weight = tl.load(w + i).to(tl.float64)
        p = _sigmoid(tl.load(base + i).to(tl.float64) + tl.sum(row * e, axis=0))
        gradient += weight * (p - tl.load(y + i).to(tl.float64)) * row
        H += (weight * p * (1.0 - p)) * (row[:, None] * row[None, :])
    return H, gradient


@triton.jit
def _solve(H, b, D: tl.constexpr):
    j = tl.arange(0, D)
    diagonal = tl.sum(tl.where(j[:, None] == j[None, :], H, 0.0), axis=0)
    for k in range(D):
        row = tl.sum(tl.where(j[:, None] == k, H, 0.0), axis=0)
        column = tl.sum(tl.where(j[None, :] == k, H, 0.0), axis=1)
        # a pivot that rounding has eaten is replaced, so a direction stays one of descent
        least = 1e-15 * tl.sum(tl.where(j == k, diagonal, 0.0), axis=0)
        pivot = tl.maximum(tl.sum(tl.where(j == k, row, 0.0), axis=0), least)
        factor = tl.where(j == k, 0.0, column * (1.0 / pivot))
        H -= factor[:, None] * row[None, :]
        H = tl.where((j[:, None] == k) & (j[None, :] == k), pivot, H)
        b -= factor * tl.sum(tl.where(j == k, b, 0.0), axis=0)
    return b / tl.sum(tl.where(j[:, None] == j[None, :], H, 0.0), axis=0)


@triton.jit
def _objective(h, base, y, w, P, e, off, x, t, n, d, D: tl.constexpr):
    j = tl.arange(0, D)
    at = off + t * x
    value = 0.5 * tl.sum(tl.sum(_precision(P, d, D) * at[:, None], axis=0) * at, axis=0)
    for i in range(n):
        row = tl.load(h + i * d + j, mask=j < d, other=0.0).to(tl.float64)
        z = tl.load(base + i).to(tl.float64) + tl.sum(row * (e + t * x), axis=0)
        softplus = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
        value += tl.load(w + i).to(tl.float64) * (softplus - tl.load(y + i).to(tl.float64) * z)
    return value


@triton.jit
def _map_kernel(
    h, base, y, w, lengths, mu, P, e_out, H_out, rows, d, steps,
    D: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, D)
    n = tl.load(lengths + task).to(tl.int32)
    first = task * rows
    h, base, y, w = h + first * d, base + first, y + first, w + first
    prior = tl.load(mu + task * d + j, mask=j < d, other=0.0).to(tl.float64)
    e = prior
    H, gradient = _system(h, base, y, w, P, e, e - prior, n, d, D)
    step, going = 0, n > 0
    while going & (step < steps):
        x = -_solve(H, gradient, D)
        reach = tl.sum(tl.zeros((D,), tl.float64), axis=0)  # largest change of a logit
        for i in range(n):
            row = tl.load(h + i * d + j, mask=j < d, other=0.0).to(tl.float64)
            change = tl.abs(tl.sum(row * x, axis=0))
            reach = tl.maximum(reach, tl.where(tl.load(w + i) > 0, change, 0.0))
        t = reach * 0.0 + 1.0
        if reach > 1.0:  # the step size of the reference: see there
            safe = tl.log(1.0 + reach) / reach
            start = _objective(h, base, y, w, P, e, e - prior, x, 0.0, n, d, D)
            slope = tl.sum(gradient * x, axis=0)
            value = _objective(h, base, y, w, P, e, e - prior, x, t, n, d, D)
            while (t > safe) & ((value <= start + 1e-4 * t * slope) == 0):
                t = tl.maximum(t / 2, safe)
                value = _objective(h, base, y, w, P, e, e - prior, x, t, n, d, D)
        e += t * x
        step += 1
        going = reach > 1e-6
        H, gradient = _system(h, base, y, w, P, e, e - prior, n, d, D)
    tl.store(e_out + task * d + j, e, mask=j < d)
    at = H_out + task * d * d + j[:, None] * d + j[None, :]
    tl.store(at, H, mask=(j[:, None] < d) & (j[None, :] < d))


@triton.jit
def _adjoint_kernel(
    v, e, h, base, y, w, lengths, mu, P, to_h, to_base, to_y, to_w, to_mu, solved, rows, d,
    D: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, D)
    n = tl.load(lengths + task).to(tl.int32)
    first = task * rows
    h, base, y, w = h + first * d, base + first, y + first, w + first
    to_h, to_base, to_y, to_w = to_h + first * d, to_base + first, to_y + first, to_w + first
    at = tl.load(e + task * d + j, mask=j < d, other=0.0).to(tl.float64)
    H, _ = _system(h, base, y, w, P, at, at, n, d, D)
    u = _solve(H, tl.load(v + task * d + j, mask=j < d, other=0.0).to(tl.float64), D)
    for i in range(n):
        row = tl.load(h + i * d + j, mask=j < d, other=0.0).to(tl.float64)
        weight = tl.load(w + i).to(tl.float64)
        p = _sigmoid(tl.load(base + i).to(tl.float64) + tl.sum(row * at, axis=0))
        hu, r = tl.sum(row * u, axis=0), p - tl.load(y + i).to(tl.float64)
        down = -weight * p * (1.0 - p) * hu
        tl.store(to_h + i * d + j, -weight * r * u + down * at, mask=j < d)
        tl.store(to_base + i, down)
        tl.store(to_y + i, weight * hu)
        tl.store(to_w + i, -r * hu)
    tl.store(to_mu + task * d + j, tl.sum(_precision(P, d, D) * u[:, None], axis=0), mask=j < d)
    tl.store(solved + task * d + j, u, mask=j < d)


def map_head(
    h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """See `core_tensor.map_head`."""
    tasks, rows, d = h.shape
    e, H = torch.empty_like(mu, memory_format=torch.contiguous_format), h.new_empty(tasks, d, d)
    if tasks:
        inputs = [t.contiguous() for t in (h, base, y, w, lengths, mu, P)]
        D = _width(d)
        _map_kernel[(tasks,)](*inputs, e, H, rows, d, steps, D, num_warps=MAP_WARPS[D])
    return e, H


def map_head_backward(
    v: Tensor, e: Tensor, h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, mu: Tensor, P: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.map_head_backward`."""
    tasks, rows, d = h.shape
    inputs = [t.contiguous() for t in (v, e, h, base, y, w, lengths, mu, P)]
    outputs = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (h, base, y, w, mu)]  # and padding
    solved = torch.zeros(tasks, d, dtype=torch.float64, device=h.device)
    if tasks:
        D = _width(d)
        _adjoint_kernel[(tasks,)](*inputs, *outputs, solved, rows, d, D, num_warps=ADJOINT_WARPS[D])
    to_P = -solved.T @ (e.double() - mu.double())
    return *outputs, ((to_P + to_P.T) / 2).to(P.dtype)  # type: ignore[return-value]


def _width(d: int) -> int:
    return 8 if d <= 8 else 32


def _rows(
    kernel: object, warps: dict[int, int], pointers: tuple[str, ...], integers: tuple[str, ...]
) -> list[CompileRow]:
    return [
        CompileRow(
            kernel,
            {
                **{name: {"lengths": "*i64", "solved": "*fp64"}.get(name, f"*fp{bits}") for name in pointers},
                **dict.fromkeys(integers, "i32"),
            },
            {"D": D},
            num_warps=warps[D],
        )
        for bits in (32, 64)
        for D in warps
    ]


_INPUTS = ("h", "base", "y", "w", "lengths", "mu", "P")
_OUTPUTS = ("to_h", "to_base", "to_y", "to_w", "to_mu", "solved")
COMPILE = [
    *_rows(_map_kernel, MAP_WARPS, (*_INPUTS, "e_out", "H_out"), ("rows", "d", "steps")),
    *_rows(_adjoint_kernel, ADJOINT_WARPS, ("v", "e", *_INPUTS, *_OUTPUTS), ("rows", "d")),
]
