"""Two gloo ranks against one process with twice the micro-batches: DDP (both modes) and FSDP2 (ghost)."""

import warnings

import pytest
import torch
from core_tensor.dev.testing import run_ranks
from msam import MSAM
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.distributed


def small_transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Embedding(20, 16), layer, nn.Flatten(), nn.Linear(64, 5)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(20, (12, 4), generator=generator), torch.randint(5, (12,), generator=generator)


def train(model, module, batches, **options):
    """Three steps; whole parameters afterwards."""
    opt = MSAM(module, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.2, **options)
    for batch in batches:
        opt.step(lambda part: F.cross_entropy(module(part[0]), part[1]), batch)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]), opt.record.mode, opt.record.gradient_norms


CASES = (
    ("ddp", "sequential", 1, "full"),
    ("ddp", "sequential", 3, "full"),
    ("ddp", "sequential", 3, "chained"),
    ("ddp", "ghost", 3, "full"),
    ("ddp", "ghost", 3, "chained"),
    ("fsdp", "ghost", 1, "full"),
    ("fsdp", "ghost", 3, "full"),
    ("fsdp", "ghost", 3, "chained"),
)


def one_rank(rank, world_size, kind, mode, micro_batches, ascent):
    x, y = data()
    size = 12 // world_size
    mine = (x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size])
    model = small_transformer()
    if kind == "ddp":
        module = DistributedDataParallel(model)
    else:
        for part in (model[1], model[3]):
            fully_shard(part)
        module = fully_shard(model)
    return train(model, module, [mine] * 3, num_micro_batches=micro_batches, mode=mode, ascent=ascent)


def refused(model):
    for options in ({"mode": "sequential"}, {"adaptive": True}):
        with pytest.raises(ValueError, match="FSDP2"):
            MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2, **options)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=2)
    with pytest.raises(ValueError, match="FSDP2"), opt.ascent():
        pass
    with pytest.raises(ValueError, match="sharded"):
        opt.explain(lambda part: model(part[0]).sum(), data())
    return True


def automatic_radius():
    opt = MSAM(DistributedDataParallel(nn.Linear(4, 2)), torch.optim.SGD, lr=0.1, num_micro_batches=2, rho="auto")
    opt.step(lambda part: opt.model(part).square().mean(), torch.ones(4, 4) * torch.arange(4.0)[:, None])
    return opt.record.rho


def every_case(rank, world_size):
    """All cases in one pair of processes, because starting them takes longer than they do."""
    warnings.simplefilter("ignore")
    results = {case: one_rank(rank, world_size, *case) for case in CASES}
    return results, refused(fully_shard(small_transformer())), automatic_radius()


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_two_ranks_equal_one_process_with_twice_the_micro_batches(ranks, case):
    model = small_transformer()
    truth, _, norms = train(
        model, model, [data()] * 3, num_micro_batches=2 * case[2], mode="sequential", ascent=case[3]
    )
    found = [results[case] for results, _, _ in ranks]
    for weights, used, _ in found:
        assert used == case[1]
        assert float((weights - truth).norm() / truth.norm()) < 1e-12
    torch.testing.assert_close(torch.cat([n for _, _, n in found]), norms, rtol=1e-9, atol=0)


def test_weight_space_modes_refuse_sharded_models(ranks):
    assert all(done for _, done, _ in ranks)


def test_automatic_radius_counts_the_micro_batches_of_all_ranks(ranks):
    assert [rho for _, _, rho in ranks] == [pytest.approx(0.05 / 2)] * 2
