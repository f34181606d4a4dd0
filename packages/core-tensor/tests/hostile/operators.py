"""Valid arguments of every public operator, drawn at random, for `tools/hostile.py` to spoil."""

import random
from collections.abc import Callable
from typing import Any

import core_tensor
import torch
from torch import Tensor

F64 = torch.float64
Case = tuple[Callable[..., object], dict[str, Any]]


def _uniform(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(*shape, dtype=F64).to(dtype)


def _size(rng: random.Random, low: int = 1) -> int:
    return rng.choice((low, 2, 3, 5, 8, 17, 40))


def _dtype(rng: random.Random) -> torch.dtype:
    return rng.choice((torch.float32, F64))


def _seeded(make: Callable[[random.Random], Case]) -> Callable[[random.Random], Case]:
    def seeded(rng: random.Random) -> Case:
        torch.manual_seed(rng.randrange(2**31))
        return make(rng)

    return seeded


def _codes(rng: random.Random) -> tuple[Tensor, int]:
    bits = rng.randint(1, 8)
    return torch.randint(0, 1 << bits, (_size(rng), _size(rng)), dtype=torch.uint8), bits


def pack_bits(rng: random.Random) -> Case:
    codes, bits = _codes(rng)
    return core_tensor.pack_bits, {"codes": codes, "bits": bits}


def unpack_bits(rng: random.Random) -> Case:
    codes, bits = _codes(rng)
    words = core_tensor.pack_bits(codes, bits)
    return core_tensor.unpack_bits, {"words": words, "bits": bits, "columns": codes.shape[1]}


def quantized_linear(rng: random.Random) -> Case:
    codes, bits = _codes(rng)
    rows, features = codes.shape
    group_size = rng.choice((-1, 8, 16))
    groups = 1 if group_size == -1 else -(-features // group_size)
    outliers = None
    if rng.random() < 0.7:
        mask = torch.rand(rows, features) < 0.2
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        outliers = (offsets, mask.nonzero()[:, 1].int(), torch.randn(int(mask.sum())))
    return core_tensor.quantized_linear, {
        "x": torch.randn(rng.choice((1, 2, 5, 12)), features).to(rng.choice((torch.float32, torch.bfloat16))),
        "words": core_tensor.pack_bits(codes, bits),
        "scale": _uniform(rows, groups, dtype=torch.float32),
        "zero": torch.zeros(rows, groups, dtype=torch.uint8),
        "bits": bits,
        "group_size": group_size,
        "outliers": outliers,
        "check": True,
    }


def _grid(rng: random.Random, size: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    groups = rng.randint(1, 3)
    zero = torch.randint(0, 8, (groups, columns)).to(dtype)
    return {"scale": _uniform(groups, columns, dtype=dtype), "zero": zero, "group": torch.randint(0, groups, (size,))}


def cd_block(rng: random.Random) -> Case:
    size, columns, dtype = _size(rng), _size(rng), _dtype(rng)
    weight, correction, residual = (torch.randn(size, columns, dtype=dtype) for _ in range(3))
    return core_tensor.cd_block, {
        "correction": correction,
        "weight": weight,
        "residual": residual,
        "sigma": torch.randn(size, size, dtype=dtype),
        **_grid(rng, size, columns, dtype),
        "mask": torch.rand(size, columns) < 0.2 if rng.random() < 0.5 else None,
        "max_code": 7,
        "quantize": rng.random() < 0.7,
    }


def gptq_block(rng: random.Random) -> Case:
    size, columns, dtype = _size(rng), _size(rng), _dtype(rng)
    weight, factor = torch.randn(size, columns, dtype=dtype), torch.eye(size, dtype=dtype) + 0.1
    return core_tensor.gptq_block, {
        "weight": weight, "factor": factor, **_grid(rng, size, columns, dtype), "max_code": 7,
    }  # fmt: skip


def cd_sparse(rng: random.Random) -> Case:
    q, p, dtype, groups = _size(rng), _size(rng), _dtype(rng), rng.randint(1, 3)
    inputs = torch.randn(p, p + 2, dtype=dtype)
    return core_tensor.cd_sparse, {
        "codes": torch.randint(0, 8, (q, p), dtype=torch.uint8),
        "gradient": torch.randn(q, p, dtype=dtype),
        "sigma": inputs @ inputs.T,
        "scale": _uniform(q, groups, dtype=dtype) + 0.1,
        "group": torch.randint(0, groups, (p,)),
        "frozen": torch.rand(q, p) < 0.2 if rng.random() < 0.5 else None,
        "max_code": 7,
        "max_sweeps": 5,
    }


def _offsets(rng: random.Random, blocks: int) -> Tensor:
    return torch.tensor([0, *(rng.choice((0, 1, 2, 3, 9, 20)) for _ in range(blocks))]).cumsum(0)


def _family(rng: random.Random, n: int, blocks: int, dtype: torch.dtype) -> dict[str, Any]:
    kind = rng.choice(("simplex", "box", "box_cut", "knapsack"))
    upper = None if kind == "simplex" else _uniform(rng.choice((1, n)), dtype=dtype) + 0.1
    cap = torch.full((1,), torch.inf, dtype=F64) if kind == "box" else _uniform(rng.choice((1, blocks)))
    return {
        "cap": cap if upper is None or kind == "box" else cap * 0.1,
        "upper": upper,
        "weight": _uniform(n, dtype=dtype) + 0.5 if kind == "knapsack" else None,
        "equality": kind == "simplex" and rng.random() < 0.5,
    }


def project_blocks(rng: random.Random) -> Case:
    offsets = _offsets(rng, rng.randint(1, 6))
    n = int(offsets[-1])
    family = _family(rng, n, len(offsets) - 1, F64)
    return core_tensor.project_blocks, {"values": torch.randn(n, dtype=F64), "offsets": offsets, **family}


def _data(rng: random.Random) -> tuple[core_tensor.BlockData, int]:
    offsets, dtype, rows = _offsets(rng, rng.randint(1, 6)), _dtype(rng), _size(rng)
    n, k = int(offsets[-1]), rng.choice((1, 1, 2))
    shape = (n,) if k == 1 else (n, k)
    data = core_tensor.BlockData(
        offsets=offsets,
        index=torch.randint(0, rows, shape, dtype=torch.int32),
        cost=torch.randn(n).to(dtype),
        coefficient=_uniform(*shape, dtype=dtype) if rng.random() < 0.7 else None,
        **_family(rng, n, len(offsets) - 1, dtype),
    )
    return data, rows


def dual_pass(rng: random.Random) -> Case:
    data, rows = _data(rng)
    return core_tensor.dual_pass, {
        "data": data,
        "lam": torch.randn(rows, dtype=F64),
        "gamma": 0.1,
        "scale": torch.full((2 * rows + 5,), 2.0**40, dtype=F64),
        "bounds": torch.tensor([0, data.blocks // 2, data.blocks]),
        "anchor": torch.rand(data.variables).to(data.cost.dtype) if rng.random() < 0.5 else None,
        "shrink": _uniform(rows) if rng.random() < 0.5 else None,
        "primal": rng.random() < 0.5,
    }


def block_curvature(rng: random.Random) -> Case:
    data, rows = _data(rng)
    x = _uniform(data.variables) * 0.1
    return core_tensor.block_curvature, {"data": data, "x": x, "rows": rows, "scale": 2.0**40}


def dual_bounds(rng: random.Random) -> Case:
    rows = _size(rng)
    return core_tensor.dual_bounds, {
        "sums": torch.randint(-(2**40), 2**40, (2 * rows + 5,)),
        "scale": torch.full((2 * rows + 5,), 2.0**40, dtype=F64),
        "lam": torch.randn(rows, dtype=F64),
        "budgets": _uniform(rows),
        "free": torch.rand(rows) < 0.5 if rng.random() < 0.5 else None,
        "keep": 1.0,
    }


def assignment(rng: random.Random) -> Case:
    n = _size(rng)
    return core_tensor.assignment, {"cost": torch.randn(*rng.choice(((n, n), (3, n, n))), dtype=_dtype(rng))}


def project_assignment(rng: random.Random) -> Case:
    slots = rng.randint(1, 4)
    offsets = torch.tensor([0, *(rng.choice((0, slots, slots + 3)) * slots for _ in range(3))]).cumsum(0)
    values = torch.randn(int(offsets[-1]), dtype=F64) * rng.choice((1, 1e3))
    return core_tensor.project_assignment, {
        "values": values, "offsets": offsets, "slots": slots, "filled": rng.random() < 0.5, "limit": 8,
    }  # fmt: skip


def centred_moments(rng: random.Random) -> Case:
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32, F64))
    return core_tensor.centred_moments, {"x": torch.randn(_size(rng), _size(rng)).to(dtype)}


def ghost_norms(rng: random.Random) -> Case:
    n, r, dtype, layers = _size(rng), _size(rng), _dtype(rng), rng.randint(1, 3)
    factors = [[torch.randn(n, r, _size(rng), dtype=dtype) for _ in range(layers)] for _ in range(2)]
    return core_tensor.ghost_norms, {"left": factors[0], "right": factors[1], "bias": [1.0] * layers}


def low_rank_add(rng: random.Random) -> Case:
    n, r, rows, d_in, d_out = _size(rng), _size(rng), rng.randint(1, 5), _size(rng), _size(rng)
    dtype = rng.choice((torch.bfloat16, torch.float32, F64))
    base = rng.choice((None, torch.randn(n * rows, d_out).to(dtype), torch.randn(d_out).to(dtype)))
    return core_tensor.low_rank_add, {
        "base": base,
        "x": torch.randn(n * rows, d_in).to(dtype),
        "inner": torch.randn(n, r, d_in).to(dtype),
        "outer": torch.randn(n, r, d_out).to(dtype),
        "coefficient": torch.randn(n).to(dtype),
        "bias": 1.0,
        "out": torch.zeros(n * rows, d_out, dtype=dtype) if rng.random() < 0.5 else None,
    }


def quantize_rows(rng: random.Random) -> Case:
    return core_tensor.quantize_rows, {"weight": torch.randn(_size(rng), _size(rng))}


def dequantize_rows(rng: random.Random) -> Case:
    return core_tensor.dequantize_rows, {"table": core_tensor.quantize_rows(torch.randn(_size(rng), _size(rng)))}


def quantized_gather(rng: random.Random) -> Case:
    n = _size(rng)
    table = core_tensor.quantize_rows(torch.randn(n, _size(rng)))
    if rng.random() < 0.5:
        ids = torch.randint(0, n, (_size(rng), rng.randint(1, 4)))
        return core_tensor.quantized_gather, {"table": table, "ids": ids, "offsets": None}
    offsets = _offsets(rng, 4)
    ids = torch.randint(0, n, (int(offsets[-1]),))
    return core_tensor.quantized_gather, {"table": table, "ids": ids, "offsets": offsets}


def stable_hash(rng: random.Random) -> Case:
    moduli = [rng.choice((0, 1, 100, 2**62)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.5:
        values = torch.randint(-(2**62), 2**62, (_size(rng),))
        return core_tensor.stable_hash, {"values": values, "offsets": None, "seed": 7, "moduli": moduli}
    offsets = _offsets(rng, 5)
    values = torch.randint(0, 256, (int(offsets[-1]),), dtype=torch.uint8)
    return core_tensor.stable_hash, {"values": values, "offsets": offsets, "seed": 7, "moduli": moduli}


def row_update(rng: random.Random) -> Case:
    n, d, dtype, kind = _size(rng), _size(rng), _dtype(rng), rng.choice(("adam", "adagrad"))
    state = [torch.zeros(n, d, dtype=dtype) for _ in range(2)] if kind == "adam" else [torch.zeros(n, dtype=dtype)]
    ids = torch.randint(0, n, (_size(rng),))
    return core_tensor.row_update, {
        "weight": torch.randn(n, d, dtype=dtype),
        "state": tuple(state),
        "ids": ids,
        "grad": torch.randn(len(ids), d, dtype=dtype),
        "kind": kind,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "step": 3,
    }


def map_head(rng: random.Random) -> Case:
    tasks, rows, d, dtype = _size(rng), _size(rng), rng.choice((1, 2, 5, 32)), _dtype(rng)
    return core_tensor.map_head, {
        "h": torch.randn(tasks, rows, d).to(dtype),
        "base": torch.randn(tasks, rows).to(dtype),
        "y": (torch.rand(tasks, rows) < 0.3).to(dtype),
        "w": torch.rand(tasks, rows).to(dtype),
        "lengths": torch.randint(0, rows + 1, (tasks,)),
        "mu": torch.randn(tasks, d).to(dtype),
        "P": torch.eye(d, dtype=dtype),
        "steps": 20,
    }


OPERATORS = {
    function.__name__: _seeded(function)
    for function in (
        assignment, block_curvature, cd_block, cd_sparse, centred_moments, dequantize_rows, dual_bounds, dual_pass,
        ghost_norms, gptq_block, low_rank_add, map_head, pack_bits, project_assignment, project_blocks, quantize_rows,
        quantized_gather, quantized_linear, row_update, stable_hash, unpack_bits,
    )
}  # fmt: skip
