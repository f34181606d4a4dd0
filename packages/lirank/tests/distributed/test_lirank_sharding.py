import json
from pathlib import Path

import pytest
import torch
from core_tensor.app import ranks
from core_tensor.dev.testing import run_ranks
from lirank.distributed.exchange import owned
from lirank.distributed.reshard import INDEX, load_shards, save_shards
from lirank.distributed.tables import ShardedTable
from lirank.layers.table import FusedTable
from lirank.train.row_optimizers import RowOptimizer

ROWS, DIM, BATCH = 4091, 8, 24


@pytest.mark.parametrize(("rows", "size"), [(1, 3), (4091, 2), (4091, 3), (6, 3), (7, 4), (3, 8)])
def test_every_row_has_one_owner(rows, size):
    runs = [owned(rank, size, rows) for rank in range(size)]
    assert [row for start, stop in runs for row in range(start, stop)] == list(range(rows))


def _ids(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ROWS, (BATCH, 5), generator=generator)
    ids[:, 0] = 17  # a popular row, wanted by all
    ids[0] = torch.tensor([0, ROWS - 1, ROWS // 2, ROWS // 3, 1])
    return ids


def _loss(vectors):
    return (vectors.sum(1).tanh().square().sum(1) - vectors.prod(1).sum(1)).sum()


def _train(table, us, steps, optimizer, first=0):
    for step in range(first, first + steps):
        ids = _ids(step)
        start, stop = us.range(len(ids))
        _loss(table(ids[start:stop])).backward()
        optimizer.step(table.take_touched())


def _sharded(rank, world_size, folder, resume):
    us = ranks.current()
    table = ShardedTable(ROWS, DIM, us, seed=0)
    optimizer = RowOptimizer(table, lr=0.05)
    uneven = None if resume else _uneven(rank)
    if resume:
        state = load_shards(folder, ROWS, us)
        table.weight.data.copy_(state["weight"])
        optimizer.state = (state["first"], state["second"])
        optimizer.steps = resume
    _train(table, us, 4, optimizer, first=resume)
    tensors = {"weight": table.weight, "first": optimizer.state[0], "second": optimizer.state[1]}
    save_shards(folder, tensors, ROWS, us)
    table.eval()
    return table(torch.arange(ROWS)), len(table.weight), uneven


def _uneven(rank):
    """An empty batch, and an id outside the table, on one rank."""
    table = ShardedTable(5, 2, ranks.current(), seed=0)
    empty = table(torch.zeros(0, 3, dtype=torch.int64) if rank else torch.tensor([[4, 4, 0]]))
    if not rank:
        empty.sum().backward()
    touched = table.take_touched()
    gradients = {int(i): float(g[0]) for t in touched for i, g in zip(t.ids + table.start, t.vectors.grad, strict=True)}
    try:
        table(torch.tensor([5 if rank else 0]))
        message = ""
    except ValueError as error:
        message = str(error)
    return tuple(empty.shape), gradients, message


@pytest.mark.distributed
def test_two_ranks_equal_one_and_three_go_on_where_two_stopped(tmp_path):  # torchrec#2534
    alone = FusedTable(ROWS, DIM)
    alone.weight.data.copy_(ShardedTable(ROWS, DIM, ranks.ALONE, seed=0).weight.data)
    optimizer = RowOptimizer(alone, lr=0.05)
    _train(alone, ranks.ALONE, 4, optimizer)
    two = run_ranks(_sharded, 2, str(tmp_path), 0)
    assert [n for _, n, _ in two] == [2046, 2045]
    first, second = (uneven for _, _, uneven in two)
    assert (first[0], second[0]) == ((1, 3, 2), (0, 3, 2))
    assert first[1] | second[1] == {0: 1.0, 4: 2.0}
    assert first[2] == second[2] == "ids: expected rows in [0, 5) on every rank"
    for found, _, _ in two:
        torch.testing.assert_close(found, alone.weight.data, rtol=1e-5, atol=1e-6)
    _train(alone, ranks.ALONE, 4, optimizer, first=4)
    three = run_ranks(_sharded, 3, str(tmp_path), 4)
    for found, _, _ in three:
        torch.testing.assert_close(found, alone.weight.data, rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the shards of two ranks are gone
    whole = load_shards(tmp_path, ROWS, ranks.ALONE)
    torch.testing.assert_close(whole["second"], optimizer.state[1], rtol=1e-4, atol=1e-9)


def _save(tmp_path):
    save_shards(tmp_path, {"weight": torch.arange(6.0).view(3, 2)}, 3, ranks.ALONE)
    return tmp_path / json.loads((tmp_path / INDEX).read_text())["files"][0]


def test_broken_shards_are_named(tmp_path):
    file = _save(tmp_path)
    with pytest.raises(ValueError, match=r"shards\.json: .*holds 3 rows, the table has 4"):
        load_shards(tmp_path, 4, ranks.ALONE)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"safetensors: expected a shard of a table"):
        load_shards(tmp_path, 3, ranks.ALONE)
    for text in ("", "[]", '{"rows": 3, "files": ["../x"]}', '{"rows": 3, "files": []}', '{"files": 3, "rows": 3}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=Path(tmp_path).name):
            load_shards(tmp_path, 3, ranks.ALONE)


def test_rows_of_another_rank_are_refused(tmp_path):
    with pytest.raises(ValueError, match="weight: expected the rows 0 to 4"):
        save_shards(tmp_path, {"weight": torch.zeros(3, 2)}, 4, ranks.ALONE)
