"""Long commands of sgd-stability for `tools/faults.py`."""

from pathlib import Path

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

def dataset():
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
"""
JOBS = {
    "map": {"command": "sgd-stability map net.py:build net.py:dataset --threads 1 -o OUT/map.png"},
    "analyze": {
        "command": "sgd-stability analyze net.py:build net.py:dataset --lr 0.1 --batch-size 8 --threads 1 -o OUT"
    },
}


def prepare(folder: Path) -> None:
    (folder / "net.py").write_text(NET)
