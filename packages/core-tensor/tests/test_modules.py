import torch
from core_tensor.modules import unwrap
from torch import nn


def test_wrappers_come_off_in_any_order():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model)
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(compiled)) is model
    assert unwrap(torch.compile(nn.DataParallel(compiled))) is model
    parallel = nn.DataParallel(model)
    assert unwrap(torch.compile(parallel), parallel=False) is parallel
