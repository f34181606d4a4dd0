"""Packed problems: mapped from disk, solved without being loaded, refused when damaged."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from polytope_lp import Marketplace, open_packed, pack, read_problem, solve
from polytope_lp.runs.folders import write_marketplace


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    write_marketplace(Marketplace(sources=20_000, destinations=50, seed=4), root / "problem")
    pack(root / "problem", root / "packed")
    return root


def test_packed_and_read_problems_are_equal(folders):
    read, mapped = read_problem(folders / "problem"), read_problem(folders / "packed")
    for name in ("offsets", "index", "cost", "coefficient", "cap"):
        assert torch.equal(getattr(read.data, name), getattr(mapped.data, name))
    assert torch.equal(read.budgets, mapped.budgets)
    assert torch.equal(read.bounds, mapped.bounds)
    ours, theirs = solve(mapped, 1e-4), solve(read, 1e-4)
    assert torch.equal(ours.lam, theirs.lam)
    assert ours.verify()["ok"]


def _anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _solve_and_watch(folder, queue):
    torch.set_num_threads(1)
    solve(read_problem(folder), 1e-1)  # first calls allocate what stays
    before, most = _anonymous(), []
    solution = solve(read_problem(folder), 1e-4, report=lambda _: most.append(_anonymous()))
    queue.put((solution.status, max(most) - before))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory figures of Linux")
def test_a_solve_holds_no_copy_of_the_problem(tmp_path):
    write_marketplace(Marketplace(sources=150_000, destinations=50, seed=4), tmp_path / "problem")
    pack(tmp_path / "problem", tmp_path / "packed")
    size = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.npy"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_solve_and_watch, args=(tmp_path / "packed", queue))
    child.start()
    status, grown = queue.get(timeout=120)
    child.join()
    assert status == "optimal"
    assert size > 15e6
    assert grown < 0.4 * size  # the run of blocks at hand, not the problem


def test_unsorted_edges_and_names_survive_packing(tmp_path):
    random = np.random.default_rng(0)
    source, destination = np.nonzero(random.random((60, 7)) < 0.4)
    order = random.permutation(source.size)
    edges = pa.table(
        {
            "source": [f"u{s}" for s in source[order]],
            "destination": [f"c{d}" for d in destination[order]],
            "value": random.random(source.size),
        }
    )
    pq.write_table(edges, tmp_path / "edges.parquet")
    budgets = pa.table({"destination": [f"c{d}" for d in range(7)], "budget": np.full(7, 3.0)})
    pq.write_table(budgets, tmp_path / "b.parquet")
    read = read_problem(tmp_path / "edges.parquet", tmp_path / "b.parquet")
    mapped = pack(tmp_path / "edges.parquet", tmp_path / "packed", tmp_path / "b.parquet")
    assert mapped.source_keys.equals(read.source_keys)
    assert mapped.destination_keys.equals(read.destination_keys)
    assert solve(mapped, 1e-6).objective == solve(read, 1e-6).objective
    assert not (tmp_path / "packed.partial").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "out of range"])
def test_damaged_folders_are_refused(tmp_path, damage):
    write_marketplace(Marketplace(sources=500, destinations=20), tmp_path / "problem")
    pack(tmp_path / "problem", tmp_path / "packed")
    index = tmp_path / "packed" / "index.npy"
    if damage == "truncated":
        index.write_bytes(index.read_bytes()[:-100])
    elif damage == "foreign":
        index.write_text("source,destination")
    elif damage == "missing":
        index.unlink()
    else:
        np.save(index, np.load(index) + 1000)
    with pytest.raises((ValueError, FileNotFoundError), match=r"packed|index"):
        open_packed(tmp_path / "packed")
    pack(tmp_path / "problem", tmp_path / "packed", overwrite=True)


def test_a_folder_of_another_problem_is_not_packed_over(tmp_path):
    for name, sources in (("one", 500), ("other", 400)):
        write_marketplace(Marketplace(sources=sources, destinations=20), tmp_path / name)
    packed = pack(tmp_path / "one", tmp_path / "packed")
    assert pack(tmp_path / "one", tmp_path / "packed").data.variables == packed.data.variables
    with pytest.raises(ValueError, match="holds a run with other inputs"):
        pack(tmp_path / "other", tmp_path / "packed")
    with pytest.raises(ValueError, match="found other files"):
        pack(tmp_path / "one", tmp_path / "other")


def test_a_failed_pack_leaves_nothing(tmp_path):
    write_marketplace(Marketplace(sources=500, destinations=20), tmp_path / "problem")
    budgets = pq.read_table(tmp_path / "problem" / "budgets.parquet").slice(1)
    pq.write_table(budgets, tmp_path / "problem" / "budgets.parquet")
    with pytest.raises(ValueError, match="has no budget"):
        pack(tmp_path / "problem", tmp_path / "packed")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["problem"]'
