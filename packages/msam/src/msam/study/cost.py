"""What a step costs: engines against plain steps, over the number of micro-batches."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from core_tensor.checks import check_choice
from torch import Tensor, nn

from msam.optimizer.optim import MSAM
from msam.study.data import TextTransformer, mlp, small_cnn
from msam.study.names import MODELS, MODES
from msam.study.training import mean_loss

TURN = 0.1
"""Seconds of plain steps that an engine's turn is made of; single small steps would run on other engines' caches."""


def model_and_batch(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model and a batch of random examples.

    Args:
        name: `"mlp"` (256-512-512-10, batch 128), `"large-mlp"` (512-1024-1024-1024-10, batch 256), `"transformer"`
            (two layers of width 128 over 32 tokens, batch 64) or `"cnn"` (three convolutions with group norm, 32 x 32
            images, batch 64).

    Returns:
        The model, without dropout, and inputs with labels.
    """
    check_choice("model", name, MODELS)
    torch.manual_seed(0)
    if name == "mlp":
        return mlp(256, 512, 512, 10), (torch.randn(128, 256), torch.randint(10, (128,)))
    if name == "large-mlp":
        return mlp(512, 1024, 1024, 1024, 10), (torch.randn(256, 512), torch.randint(10, (256,)))
    if name == "cnn":
        return small_cnn(), (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    model = TextTransformer(1000, width=128, depth=2, classes=10, dropout=0.0)
    return model, (torch.randint(1, 1000, (64, 32)), torch.randint(10, (64,)))


def stepper(model: nn.Module, batch: tuple[Tensor, Tensor], mode: str, num_micro_batches: int) -> Callable[[], None]:
    """A training step with SGD inside.

    Args:
        model: The model.
        batch: Inputs and labels.
        mode: `"plain"`, an engine, or `"chained"`: ghost mode with a chained ascent.
        num_micro_batches: Micro-batches m.

    Returns:
        The step.
    """
    if mode == "plain":
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)

        def plain() -> None:
            sgd.zero_grad()
            mean_loss(model, batch).backward()
            sgd.step()

        return plain
    chained = mode == "chained"
    optimizer = MSAM(
        model, torch.optim.SGD, lr=1e-4, num_micro_batches=num_micro_batches,
        mode="ghost" if chained else mode, ascent="chained" if chained else "full",  # type: ignore[arg-type]
    )  # fmt: skip

    def step() -> None:
        optimizer.step(lambda part: mean_loss(model, part), batch)

    return step


def ratios(name: str, counts: Sequence[int], modes: Iterable[str] = MODES, repeats: int = 5) -> list[dict[str, Any]]:
    """CPU time of mSAM steps over that of plain ones; all of them run in turn, round by round.

    Args:
        name: One of `MODELS`.
        counts: Numbers m of micro-batches.
        modes: Engines.
        repeats: Rounds; in each every engine takes one uncounted step, then as many as plain ones fill `TURN`.

    Returns:
        Rows with model, mode, m and ratio (the median over the rounds).
    """
    model, batch = model_and_batch(name)
    steps = {("plain", 0): stepper(model, batch, "plain", 0)}
    for mode in modes:
        for m in counts:
            steps[mode, m] = stepper(copy.deepcopy(model), batch, mode, m)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step()
    start = time.process_time()
    steps["plain", 0]()
    turn = max(1, round(TURN / (time.process_time() - start)))
    for _ in range(repeats):
        for key, step in steps.items():
            step()  # not counted: it finds in the caches what another engine has left there
            start = time.process_time()
            for _ in range(turn):
                step()
            seconds[key].append(time.process_time() - start)
    rows = []
    for (mode, m), own in seconds.items():
        if mode != "plain":
            pairs = zip(own, seconds["plain", 0], strict=True)
            rows.append({"model": name, "mode": mode, "m": m, "ratio": statistics.median(a / b for a, b in pairs)})
    return rows
