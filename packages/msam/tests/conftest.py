"""Models, batches, and brute force: mSAM by copying the model for every micro-batch."""

import copy
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from msam.engines import choice
from torch import Tensor, nn
from torch.nn import functional as F

LossOf = Callable[[nn.Module], Callable[[Any], Tensor]]


class Transformer(nn.Module):
    """Embedding, positions as slice and as table, attention, optional tied head."""

    def __init__(self, length: int = 6, tied: bool = False, batch_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(1, length + 2, 16) * 0.1)
        self.table = nn.Embedding(length, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, dropout=dropout)
        self.head = nn.Linear(16, 20, bias=False)
        self.batch_first = batch_first
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]] + self.table(torch.arange(ids.shape[1]))
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x).flatten(0, 1)


class Vision(nn.Module):
    """Patches, class token and cross attention with a scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale = nn.Parameter(torch.rand(16))
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), -1, -1)
        y, _ = self.attention(token, x, x, need_weights=True)
        return self.head(self.norm(token + self.scale * y).squeeze(1))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 5)
    )


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 32, 3, padding="same"), nn.ConvTranspose2d(32, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def deep_convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.Flatten(), nn.Linear(512, 5)
    )


def batch_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64),
        nn.BatchNorm1d(64), nn.Linear(64, 5),
    )  # fmt: skip


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1].flatten())


def images(size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(12, channels, size, size), torch.randint(5, (12,))


def tokens(length: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(20, (12, length)), torch.randint(20, (12, length))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (perceptron, lambda: (torch.randn(12, 20), torch.randint(5, (12,)))),
    "cnn": (convolutions, images),
    "deep cnn": (deep_convolutions, lambda: images(2, 64)),
    "batch norm": (batch_norms, images),
    "vision": (Vision, images),
    "transformer": (Transformer, tokens),
    "tied transformer": (lambda: Transformer(tied=True), tokens),
    "as many positions as examples": (lambda: Transformer(12), lambda: tokens(12)),
    "sequence first": (lambda: Transformer(batch_first=False), tokens),
}


def brute_force(
    model: nn.Module, batch: tuple[Tensor, ...], sizes: list[int], rho: float, half: bool = False
) -> list[Tensor]:
    """The definition: a copy of the model for every micro-batch, moved by rho g/||g|| and differentiated there."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    start = 0
    for size in sizes:
        part = tuple(t[start : start + size] for t in batch)
        climb = tuple(t[: -(-size // 2)] for t in part) if half else part
        start += size
        twin = copy.deepcopy(model)
        gradient = torch.autograd.grad(loss_of(twin)(climb), list(twin.parameters()))
        norm = torch.sqrt(sum((g.square().sum() for g in gradient), torch.zeros(())))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(twin.parameters(), gradient, strict=True):
                p.add_(g, alpha=float(rho / norm) if norm > 0 else 0.0)
        moved = torch.autograd.grad(loss_of(twin)(part), list(twin.parameters()))
        total = [t + size / len(batch[0]) * g for t, g in zip(total, moved, strict=True)]
    return total


def relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().flatten().double() for t in side]) for side in (got, truth))
    return float((a - b).norm() / b.norm())


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.fixture(autouse=True)
def ghost_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mode="auto"` takes ghost mode wherever it runs, whatever the clock says: two runs of a test do the same."""
    monkeypatch.setattr(choice, "GAIN", math.inf)


@pytest.fixture
def double():
    """float64 as the default for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def oracle() -> ModuleType:
    """This module: models, batches, brute force."""
    return sys.modules[__name__]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `case` run once for each model."""
    if "case" in metafunc.fixturenames and "oracle" in metafunc.fixturenames:
        metafunc.parametrize("case", list(CASES))
