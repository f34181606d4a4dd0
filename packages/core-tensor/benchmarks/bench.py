"""Benchmarks of core-tensor's operators against torch and against the machine; CPU time of one thread."""

import statistics

import core_tensor
import torch
from core_tensor.dev.benchmarking import Comparison, compare, run_bars
from torch import Tensor


def cd_block(quick: bool) -> dict[str, object]:
    """Rate of the in-block sweep (B^2 q flops) over torch.matmul's rate at 2048 x 2048."""
    size, columns = 512, 2048 if quick else 4096
    weight, correction = torch.randn(size, columns), torch.randn(size, columns)
    residual, sigma = torch.zeros(size, columns), 0.01 * torch.randn(size, size)
    scale, zero = torch.full((1, columns), 0.5), torch.full((1, columns), 4.0)
    group = torch.zeros(size, dtype=torch.int64)
    square = torch.randn(2048, 2048)
    pair = compare(
        lambda: core_tensor.cd_block(correction, weight, residual, sigma, scale, zero, group, None, 7),
        lambda: square @ square,
    )
    fraction = pair.speedup * (size * size * columns) / (2 * 2048**3)
    return {"cd_block_gemm_fraction": round(fraction, 3), "cd_block_detail": pair.spread()}


def bit_packing(quick: bool) -> dict[str, object]:
    """Codes packed and unpacked per second, 3 bits, over the rate at which this machine copies bytes."""
    codes = torch.randint(0, 8, (1024 if quick else 8192, 4096), dtype=torch.uint8)
    words, target = core_tensor.pack_bits(codes, 3), torch.empty_like(codes)
    pack = compare(lambda: core_tensor.pack_bits(codes, 3), lambda: target.copy_(codes))
    unpack = compare(lambda: core_tensor.unpack_bits(words, 3, 4096), lambda: target.copy_(codes))
    return {
        "pack_copy_fraction": round(pack.speedup, 3),
        "pack_detail": pack.spread(),
        "unpack_copy_fraction": round(unpack.speedup, 3),
        "unpack_detail": unpack.spread(),
    }


def quantized_linear(quick: bool) -> dict[str, object]:
    """Packed layers against torch's float32 product (one token reads every weight once) and against memory.

    For one token also the packed bytes per second over the rate at which this machine reads (a sum over as many bytes
    of float32): the limit of a layer that is larger than the caches.
    """
    size = 2048 if quick else 4096
    weight = torch.randn(size, size)
    scale, zero = torch.rand(size, 1), torch.full((size, 1), 2, dtype=torch.uint8)
    results: dict[str, object] = {}
    for bits, tokens, fraction in ((3, 1, 0.0), (3, 8, 0.0), (3, 256, 0.0), (3, 1, 0.01), (2, 1, 0.0), (4, 1, 0.0)):
        words = core_tensor.pack_bits(torch.randint(0, 2**bits, (size, size), dtype=torch.uint8), bits)
        sparse = _outliers(size, fraction) if fraction else None
        x = torch.randn(tokens, size)

        def ours(x: Tensor = x, words: Tensor = words, bits: int = bits, sparse: Sparse | None = sparse) -> Tensor:
            return core_tensor.quantized_linear(x, words, scale, zero, bits, -1, sparse)

        name = f"quantized_linear_{bits}b_{tokens}" + ("_outliers" if fraction else "")
        pair = compare(ours, lambda x=x: x @ weight.T, pairs=11)
        results |= {f"{name}_vs_float32": round(pair.speedup, 2), f"{name}_detail": pair.spread()}
        if tokens == 1 and not fraction:
            block = weight.flatten()[: words.numel()]  # as many bytes
            results[f"{name}_of_read_rate"] = round(compare(ours, block.sum, pairs=11).speedup, 3)
    return results


Sparse = tuple[Tensor, Tensor, Tensor]


def _outliers(size: int, fraction: float) -> Sparse:
    count = round(fraction * size)
    columns = torch.stack([torch.randperm(size)[:count].sort().values for _ in range(size)]).flatten().to(torch.int32)
    return torch.arange(size + 1) * count, columns, torch.randn(len(columns)).half()


def assignment(quick: bool) -> dict[str, object]:
    """Exact assignment of n points to n others in 128 dimensions, against scipy's shortest augmenting paths."""
    from scipy.optimize import linear_sum_assignment

    results: dict[str, object] = {}
    for n in (64, 256) if quick else (64, 256, 1024):
        cost = torch.cdist(torch.randn(n, 128).double(), torch.randn(n, 128).double()).square()
        pair = compare(lambda cost=cost: core_tensor.assignment(cost), lambda cost=cost: linear_sum_assignment(cost))
        results |= {f"assignment_{n}_vs_scipy": round(pair.speedup, 2), f"assignment_{n}_detail": pair.spread()}
    return results


def project_assignment(quick: bool) -> dict[str, object]:
    """Projection of blocks of 20 items by 10 slots at a ridge of 1e-3, against two scipy assignments for each block.

    Two are what a corral of one vertex takes at least: one to find it and one to prove it.
    """
    from scipy.optimize import linear_sum_assignment

    blocks, items, slots = (500 if quick else 5000), 20, 10
    gain = torch.rand(blocks, items, 1, dtype=torch.float64) / torch.arange(2, slots + 2).double().log2()
    points = gain * (1 + 0.05 * torch.randn(blocks, items, slots, dtype=torch.float64)) / 1e-3
    offsets, matrices = torch.arange(blocks + 1) * items * slots, points.numpy()

    def twice() -> None:
        for matrix in matrices:
            linear_sum_assignment(matrix, maximize=True)
            linear_sum_assignment(matrix, maximize=True)

    pair = compare(lambda: core_tensor.project_assignment(points.ravel(), offsets, slots), twice)
    return {
        "project_assignment_vs_scipy_assignments": round(pair.speedup, 2),
        "project_assignment_microseconds_per_block": round(1e6 * statistics.median(pair.ours) / blocks, 1),
    }


def centred_moments(quick: bool) -> dict[str, object]:
    """Mean and scatter of float32 rows, against widening, centring and torch's float64 product."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        rows = x.double()
        centred = rows - rows.mean(0)
        return centred.mT @ centred

    results: dict[str, object] = {}
    for n, d in ((1024, 256),) if quick else ((1024, 256), (4096, 2048)):
        x = torch.randn(n, d)
        pair = compare(lambda x=x: core_tensor.centred_moments(x), lambda x=x: plain(x))
        results |= {f"centred_moments_{n}_{d}_vs_torch": round(pair.speedup, 2)}
        results |= {f"centred_moments_{n}_{d}_detail": pair.spread()}
    return results


def low_rank(quick: bool) -> dict[str, object]:
    """Norms of and products with gradient factors of a batch in micro-batches, against torch's batched GEMMs."""
    results: dict[str, object] = {}
    for batch, n, width in ((128, 8, 512), (128, 32, 512), (256, 32, 1024)):
        norms, added = low_rank_pairs(batch, n, width, pairs=9 if quick else 25)
        results |= {
            f"ghost_norms_{batch}_{n}_{width}_vs_torch": round(norms.speedup, 2),
            f"low_rank_add_{batch}_{n}_{width}_vs_torch": round(added.speedup, 2),
        }
    return results


def low_rank_pairs(batch: int, n: int, width: int, pairs: int) -> tuple[Comparison, Comparison]:
    """Twenty calls of `ghost_norms` and of `low_rank_add` with square layers, each against torch."""
    x, inner, outer, y = (torch.randn(n, batch // n, width) for _ in range(4))
    c, calls, (rows, result) = torch.rand(n), range(20), (x.flatten(0, 1), y.flatten(0, 1))

    def grams() -> list[torch.Tensor]:
        return [(torch.bmm(outer, outer.mT) * (torch.bmm(inner, inner.mT) + 1.0)).sum((1, 2)) for _ in calls]

    def products() -> list[torch.Tensor]:
        return [y.baddbmm_((torch.bmm(x, inner.mT) + 1.0) * c[:, None, None], outer) for _ in calls]

    norms = compare(lambda: [core_tensor.ghost_norms([outer], [inner], [1.0]) for _ in calls], grams, pairs=pairs)
    add = core_tensor.low_rank_add
    return norms, compare(
        lambda: [add(result, rows, inner, outer, c, 1.0, out=result) for _ in calls], products, pairs=pairs
    )


if __name__ == "__main__":
    run_bars(
        "core-tensor",
        {
            "assignment": assignment,
            "project_assignment": project_assignment,
            "centred_moments": centred_moments,
            "low_rank": low_rank,
            "cd_block": cd_block,
            "bit_packing": bit_packing,
            "quantized_linear": quantized_linear,
        },
    )
