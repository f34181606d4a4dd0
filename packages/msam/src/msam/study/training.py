"""Train one model with one method, and measure what came out."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from core_tensor.checks import check_choice
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from msam.engines.sequential import LossFunction
from msam.optimizer.optim import MSAM
from msam.study.data import Task
from msam.study.flatness import evaluating, flatness
from msam.study.names import METHODS


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: One of `METHODS`.
        rho: Radius (unused by sgd).
        num_micro_batches: Micro-batches m of the mSAM family.
        seed: Of initialisation, batch order and dropout.
        validation: Accuracy on the validation part, percent.
        test: Accuracy on the test part, percent.
        train_loss: Mean loss on the training part.
        step_ms: CPU milliseconds per step, the median.
        lambda_max: Largest eigenvalue of the training loss's Hessian, None if not asked for.
        trace: Its trace, None if not asked for.
        history: Figures of the first step of every epoch, from the optimizer's records.
    """

    method: str
    rho: float
    num_micro_batches: int
    seed: int
    validation: float
    test: float
    train_loss: float
    step_ms: float
    lambda_max: float | None = None
    trace: float | None = None
    history: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


def make_optimizer(
    method: str, model: nn.Module, *, lr: float, rho: float, num_micro_batches: int, base: str = "sgd"
) -> torch.optim.Optimizer:
    """The optimizer of a method: the base optimizer itself for `"sgd"`, inside MSAM for all others.

    Args:
        method: One of `METHODS`.
        model: The model.
        lr: Learning rate.
        rho: Radius.
        num_micro_batches: Micro-batches of the mSAM family; SAM and ASAM have one.
        base: `"sgd"` (momentum 0.9, weight decay 5e-4) or `"adamw"` (weight decay 0.01).

    Returns:
        The optimizer.
    """
    check_choice("method", method, METHODS)
    made: Callable[..., torch.optim.Optimizer] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[base]
    arguments: dict[str, Any] = {"lr": lr} | (
        {"momentum": 0.9, "weight_decay": 5e-4} if base == "sgd" else {"weight_decay": 0.01}
    )
    if method == "sgd":
        return made(model.parameters(), **arguments)
    alone = method in {"sam", "asam"}
    return MSAM(
        model, made, rho=rho, num_micro_batches=1 if alone else num_micro_batches,
        mode="sequential" if method in {"sam", "asam", "msam-sequential"} else "auto",
        ascent="half" if method == "half" else "chained" if method == "chained" else "full",
        adaptive=method == "asam", **arguments,
    )  # fmt: skip


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch.

    Args:
        model: The model.
        batch: Inputs and labels.

    Returns:
        Scalar tensor.
    """
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def evaluate(model: nn.Module, part: tuple[Tensor, Tensor], batch: int = 1000) -> tuple[float, float]:
    """Accuracy and mean loss in evaluation mode.

    Args:
        model: The model; the modes of its modules are put back.
        part: Inputs and labels.
        batch: Examples at a time.

    Returns:
        Accuracy in percent, mean loss.
    """
    with evaluating(model):
        logits = torch.cat([model(x) for x in part[0].split(batch)])
    return 100.0 * float((logits.argmax(1) == part[1]).float().mean()), float(F.cross_entropy(logits, part[1]))


def train(
    task: Task,
    method: str,
    *,
    rho: float = 0.05,
    num_micro_batches: int = 8,
    seed: int = 0,
    epochs: int | None = None,
    sharpness: bool = True,
    examples: int = 4000,
    explain: bool = False,
    keep: dict[str, nn.Module] | None = None,
) -> Run:
    """Train a fresh model on a task with a cosine schedule; same seed, same initialisation and batch order.

    Args:
        task: Data, model and schedule.
        method: One of `METHODS`.
        rho: Radius.
        num_micro_batches: Micro-batches m.
        seed: Of everything random.
        epochs: Instead of the task's.
        sharpness: Whether the Hessian's top eigenvalue and trace are computed at the end.
        examples: At most so many training examples for that.
        explain: Whether the history holds the cosines of micro-batch and mean gradients too (one more look per epoch).
        keep: Receives the trained model under the method's name.

    Returns:
        What came out.
    """
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(
        method, model, lr=task.lr, rho=rho, num_micro_batches=num_micro_batches, base=task.optimizer
    )
    history, seconds = _fit(model, optimizer, task, task.epochs if epochs is None else epochs, seed, explain)
    model.eval()
    curvature = flatness(model, mean_loss, task.train, examples=examples, seed=seed) if sharpness else None
    if keep is not None:
        keep[method] = model
    return Run(
        method, 0.0 if method == "sgd" else rho,
        num_micro_batches if method not in {"sgd", "sam", "asam"} else 1, seed,
        evaluate(model, task.validation)[0] if len(task.validation[0]) else float("nan"), evaluate(model, task.test)[0],
        evaluate(model, task.train)[1], 1e3 * statistics.median(seconds),
        None if curvature is None else curvature.lambda_max, None if curvature is None else curvature.trace,
        tuple(history),
    )  # fmt: skip


def _fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, epochs: int, seed: int, explain: bool
) -> tuple[list[dict[str, Any]], list[float]]:
    """Run all epochs.

    Returns:
        Figures of the first step of every epoch, CPU seconds of every step.
    """

    def loss_fn(part: tuple[Tensor, Tensor]) -> Tensor:
        return mean_loss(model, part)

    batches = len(task.train[0]) // task.batch
    schedule = CosineAnnealingLR(optimizer, epochs * batches)
    order = torch.Generator().manual_seed(seed)
    history, seconds = [], []
    for _ in range(epochs):
        index = torch.randperm(len(task.train[0]), generator=order)[: batches * task.batch]
        for step, chosen in enumerate(index.split(task.batch)):
            batch = (task.train[0][chosen], task.train[1][chosen])
            told = None
            if explain and step == 0 and isinstance(optimizer, MSAM):
                told = optimizer.explain(loss_fn, batch)
            seconds.append(_timed_step(optimizer, loss_fn, batch))
            schedule.step()
            if step == 0 and isinstance(optimizer, MSAM) and optimizer.record is not None:
                history.append(optimizer.record.as_dict() | ({} if told is None else {"cosines": list(told.cosines)}))
    return history, seconds


def _timed_step(optimizer: torch.optim.Optimizer, loss_fn: LossFunction, batch: tuple[Tensor, Tensor]) -> float:
    """One step.

    Returns:
        CPU seconds.
    """
    start = time.process_time()
    if isinstance(optimizer, MSAM):
        optimizer.step(loss_fn, batch)
    else:
        optimizer.zero_grad()
        loss_fn(batch).backward()
        optimizer.step()
    return time.process_time() - start
