import pytest
import torch
from core_tensor.app import ranks
from core_tensor.dev.testing import run_ranks


def _collectives(rank, world_size):
    us = ranks.current()
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, float(rank + 1))
    us.broadcast_module(model)
    model(torch.full((1, 2), float(rank))).sum().backward()
    us.average_gradients(model.parameters())
    rows, start = us.gather_rows(torch.full((rank, 2), float(rank)))
    try:
        us.agree("x", torch.tensor([float(rank)]))
        agreed = True
    except ValueError:
        agreed = False
    us.agree("y", torch.ones(2))
    us.barrier()
    return {
        "who": (us.rank, us.size, us.first),
        "range": us.range(7),
        "sum": us.sum(torch.tensor([1.0 + rank])),
        "rows": us.rows(1, lambda a, b: torch.arange(a, b, dtype=torch.float64)[:, None]),
        "gathered": (rows, start),
        "weight": model.weight.detach().clone(),
        "gradient": model.weight.grad,
        "shared": us.share(f"from {rank}"),
        "agreed": agreed,
    }


@pytest.mark.distributed
def test_collectives_of_two_processes():
    first, second = run_ranks(_collectives, 2)
    assert first["who"] == (0, 2, True)
    assert second["who"] == (1, 2, False)
    assert (first["range"], second["range"]) == ((0, 3), (3, 7))
    for found in (first, second):
        assert found["sum"].tolist() == [3.0]
        assert found["rows"].tolist() == [[0.0]]
        assert found["gathered"][0].tolist() == [[1.0, 1.0]]
        assert found["weight"].tolist() == [[1.0, 1.0]]
        assert found["gradient"].tolist() == [[0.5, 0.5]]
        assert found["shared"] == "from 0"
        assert not found["agreed"]
    assert (first["gathered"][1], second["gathered"][1]) == (0, 0)


def test_alone_everything_is_the_identity():
    us = ranks.current()
    assert us == ranks.ALONE
    x = torch.ones(3)
    assert us.sum(x) is x
    assert us.range(5) == (0, 5)
    assert us.gather("a") == ["a"]
    assert us.gather_rows(x)[1] == 0
    us.barrier()
    with ranks.join() as joined:
        assert joined.first
