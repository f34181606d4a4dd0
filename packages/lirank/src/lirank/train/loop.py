"""The training loop: what it does in one step, when it stops, and how it resumes after a kill to the same bytes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from core_tensor.app.ranks import ALONE, Ranks
from msgspec import Meta, Struct
from torch import Tensor
from torch.nn import functional as F

from lirank.data.batch import Batch, Encoder
from lirank.data.parquet import ParquetLog
from lirank.data.shuffle import windows
from lirank.evaluate.metrics import report as metrics_report
from lirank.model.ranker import Ranker, cold_rows
from lirank.schema.features import Id
from lirank.train import checkpoint
from lirank.train.prior import TABLE, CurvaturePrior, Pull, rows_of
from lirank.train.row_optimizers import RowOptimizer

_APART = 1_000_003
"""Between the seeds of ranks and steps."""
CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


class TrainConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How a model is trained.

    Attributes:
        epochs: Most passes over the training rows.
        batch_size: Rows of a step, over all processes.
        lr: Learning rate of the network (Adam).
        row_lr: Learning rate of the table.
        row_optimizer: Optimizer of the table.
        weight_decay: Decoupled decay of the network.
        row_weight_decay: Decay of touched rows.
        cold_share: Share of ids replaced by the unseen row in training, so that it is trained.
        schedule: `constant`, or `cosine` to 0; the isotonic layer always follows the cosine.
        clip: Largest norm of the network's gradient.
        patience: Epochs without a better validation logloss after which training stops.
        checkpoint_every: Steps between checkpoints; 0 for one per epoch.
        seed: Seed of everything random.
    """

    epochs: Annotated[int, Meta(ge=1)] = 4
    batch_size: Annotated[int, Meta(ge=2)] = 1024
    lr: Annotated[float, Meta(gt=0)] = 1e-3
    row_lr: Annotated[float, Meta(gt=0)] = 1e-2
    row_optimizer: Literal["adam", "adagrad"] = "adam"
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    row_weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    cold_share: Annotated[float, Meta(ge=0, lt=1)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    clip: Annotated[float, Meta(gt=0)] = 10.0
    patience: Annotated[int, Meta(ge=1)] = 1
    checkpoint_every: Annotated[int, Meta(ge=0)] = 0
    seed: Annotated[int, Meta(ge=0)] = 0

    def to_dict(self) -> dict[str, Any]:
        """All settings.

        Returns:
            Plain values by name.
        """
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.__struct_fields__}


class Trainer:
    """Trains a model.

    Args:
        model: The model.
        encoder: What turns the log into batches.
        config: How to train.
        ranks: The processes that share every batch.
        prior: What an earlier training knows of the weights; None for nothing. A weight of 0 is nothing too.
    """

    def __init__(
        self,
        model: Ranker,
        encoder: Encoder,
        config: TrainConfig,
        ranks: Ranks = ALONE,
        prior: CurvaturePrior | None = None,
    ) -> None:
        self.model, self.encoder, self.config, self.ranks = model, encoder, config, ranks
        calibration = [p for p in model.network.calibration.parameters() if p.requires_grad]
        chosen = {id(p) for p in calibration}
        network = [p for p in model.network.parameters() if p.requires_grad and id(p) not in chosen]
        self.parameters = network + calibration
        groups = [{"params": network, "weight_decay": config.weight_decay}]
        groups += [{"params": calibration, "weight_decay": 0.0}] if calibration else []
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, foreach=True)
        self.rows = RowOptimizer(
            model.table, config.row_optimizer, lr=config.row_lr, weight_decay=config.row_weight_decay
        )
        named = {f"network.{name}": p for name, p in model.network.named_parameters() if p.requires_grad}
        self.pull = Pull(prior, named, self.optimizer, self.rows) if prior and prior.weight else None
        self.shape = checkpoint.Shape(model.table.rows, model.table.start, len(model.table.weight), ranks)
        self.sharded = self.shape.sharded
        if self.sharded and self.pull is not None:
            raise ValueError("prior: expected a table that every process has whole, not one that is shared out")
        self.epoch, self.batch, self.step = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.best, self.waited = math.inf, 0
        self._losses: list[float] = []  # of the epoch under way
        self._total = 1

    # ------------------------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: ParquetLog,
        valid: ParquetLog | None,
        folder: Path,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train until the last epoch, or until validation stops getting better; leaves the model at its best.

        Args:
            train: Training rows, with causal columns.
            valid: Rows that choose the epoch; without them the last one is kept.
            folder: Where checkpoints go; an existing one is continued.
            progress: Called after every step with the step, the steps of an epoch and the loss.

        Returns:
            One entry per epoch: training loss and validation metrics.

        Raises:
            ValueError: If a number is not finite, naming step and column; no weight has changed then.
        """
        config, ranks = self.config, self.ranks
        per_epoch = -(-train.rows // config.batch_size)
        self._total = per_epoch * config.epochs
        if (folder / CHECKPOINT).exists():
            self._load(folder / CHECKPOINT)
        else:
            torch.manual_seed(config.seed + _APART * ranks.rank)  # ranks drop out different units
        while self.epoch < config.epochs and self.waited < config.patience:
            for batch, total in self._batches(train):
                self._losses.append(self.train_step(batch, total))
                self.batch += 1
                if progress is not None:
                    progress({"epoch": self.epoch, "step": self.batch, "steps": per_epoch, "loss": self._losses[-1]})
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save(folder / CHECKPOINT)
            self._end_of_epoch(valid, folder)
        self._load_best(folder / BEST)
        return self.history

    def _batches(self, log: ParquetLog) -> Iterator[tuple[Batch, int]]:
        """This process's share of every batch, and the rows of all processes."""
        config, ranks = self.config, self.ranks
        for window in windows(log, None, config.batch_size, self.epoch, config.seed, self.batch):
            encoded = self.encoder.encode(window.table)
            for start in range(window.start * config.batch_size, len(encoded), config.batch_size):
                rows = window.order[start : start + config.batch_size]
                first, last = ranks.range(len(rows))
                yield encoded.take(torch.from_numpy(rows[first:last])), len(rows)

    def _in_order(self, log: ParquetLog) -> Iterator[Batch]:
        """All rows in batches, read and encoded many batches at a time."""
        size = self.config.batch_size
        for window in windows(log, None, size, 0, None):
            encoded = self.encoder.encode(window.table)
            for rows in torch.from_numpy(window.order).split(size):
                yield encoded.take(rows)

    def train_step(self, batch: Batch, total: int | None = None) -> float:
        """One step.

        Args:
            batch: This process's share of the rows.
            total: Rows of all processes; by default those of the batch.

        Returns:
            The loss over the rows of all processes.

        Raises:
            ValueError: If the loss or a gradient is not finite; no weight has changed then.
        """
        self.step += 1
        self.model.train()
        self._set_rates()
        if self.config.cold_share:
            batch = replace(batch, ids=self._cold(batch, len(batch) if total is None else total))
        if self.pull is not None:  # a table that every process has is pulled in the same rows everywhere
            rows = self.ranks.gather_rows(rows_of(batch))[0]
            self.pull.before_lookup(rows)
        self.optimizer.zero_grad()
        self.model.table.take_touched()
        logits = self.model(batch)
        summed, weight = self._loss(logits, batch)
        everything = self.ranks.sum(torch.stack([summed.detach().double(), weight.double()]))
        loss = summed / everything[1].clamp_min(1e-12)  # mean over all processes
        value = float(everything[0] / everything[1].clamp_min(1e-12))
        if not math.isfinite(value):
            raise ValueError(f"step {self.step}: the loss is {value}; no weight was changed. Lower the learning rate")
        loss.backward()
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.ranks.sum(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not bool(torch.isfinite(norm)):
            raise ValueError(f"step {self.step}: a gradient is not finite; no weight was changed")
        # gradients of a sharded table are summed where its rows are
        self.rows.step(self.model.table.take_touched(), ALONE if self.sharded else self.ranks)
        self.optimizer.step()
        if self.pull is not None:
            self.pull.after_step(rows)
        return value

    def _cold(self, batch: Batch, total: int) -> Tensor:
        """Ids with some made unseen: the same ones however many processes share the rows."""
        generator = torch.Generator().manual_seed(self.config.seed * _APART + self.step)
        draws = torch.rand(total, len(self.model.layout.schema.of(Id)), generator=generator)
        first = self.ranks.range(total)[0]
        return cold_rows(batch.ids, self.model.layout, self.config.cold_share, draws[first : first + len(batch)])

    def curvature(self, log: ParquetLog) -> dict[str, Tensor]:
        """Diagonal of the Fisher information of the loss at the present weights.

        Args:
            log: Rows to average over.

        Returns:
            B times the mean squared gradient of batches of B rows, by name of the model's state: of every parameter
            that is trained and of the table, per row.
        """
        model, count = self.model.eval(), 0
        table = torch.zeros_like(model.table.weight)
        found = [torch.zeros_like(parameter) for parameter in self.parameters]
        for batch in self._in_order(log):
            model.table.train()  # so that it notes what is looked up; the rest drops nothing out
            self.optimizer.zero_grad()
            model.table.take_touched()
            total, weight = self._loss(model(batch), batch)
            (total / weight.clamp_min(1e-12)).backward()
            for sum_, parameter in zip(found, self.parameters, strict=True):
                if parameter.grad is not None:
                    sum_ += len(batch) * parameter.grad.square()
            touched = model.table.take_touched()
            if touched:
                ids, place = torch.cat([entry.ids for entry in touched]).unique(return_inverse=True)
                gradients = torch.cat([entry.vectors.grad for entry in touched])  # type: ignore[misc]
                summed = gradients.new_zeros(len(ids), table.shape[1]).index_add_(0, place, gradients)
                table[ids] += len(batch) * summed.square()
            count += 1
        self.optimizer.zero_grad()
        model.table.eval()
        names = {id(parameter): f"network.{name}" for name, parameter in model.network.named_parameters()}
        scaled = {names[id(p)]: sum_ / count for p, sum_ in zip(self.parameters, found, strict=True)}
        return scaled | {TABLE: table / count}

    def _loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses and of the weights; labels that are missing count nothing."""
        assert batch.labels is not None
        share = torch.tensor([label.weight for label in self.encoder.schema.labels])
        weight = (~batch.labels.isnan()).float() * share  # (B, T)
        if batch.weight is not None:
            weight = weight * batch.weight[:, None]
        losses = F.binary_cross_entropy_with_logits(logits, batch.labels.nan_to_num(), reduction="none")
        return (losses * weight).sum(), weight.sum()

    def _set_rates(self) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.step / max(self._total, 1), 1.0)))
        factor = cosine if self.config.schedule == "cosine" else 1.0
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.config.lr * (10 * cosine if number == 1 else factor)
        self.rows.lr = self.config.row_lr * factor

    def _end_of_epoch(self, valid: ParquetLog | None, folder: Path) -> None:
        entry: dict[str, Any] = {"epoch": self.epoch, "train_loss": float(np.mean(self._losses))}
        better = True
        if self.pull is not None:
            self.pull.everything()
        if valid is not None:
            found = evaluate(self.model, self.encoder, valid, self.ranks)
            entry["valid"] = found
            measured = [r["logloss"] for r in found.values() if r["logloss"] is not None]
            value = float(np.mean(measured)) if measured else -float(self.epoch)
            better = value < self.best
            self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        self.history.append(entry)
        if better:
            self._save_best(folder / BEST)
        self.epoch, self.batch = self.epoch + 1, 0
        self._losses = []
        self._save(folder / CHECKPOINT)

    # ------------------------------------------------------------------------------------------------------------------

    def _save_best(self, path: Path) -> None:
        state, record = self.model.state_dict(), {"epoch": self.epoch}
        checkpoint.save_shared(path, state, {TABLE: state[TABLE]} if self.sharded else {}, record, self.shape)

    def _load_best(self, path: Path) -> None:
        tensors, _ = checkpoint.load_shared(path, self.shape)
        self.model.load_state_dict(tensors)

    def _save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"rows.{i}": tensor for i, tensor in enumerate(self.rows.state)}
        rows = {k: v for k, v in tensors.items() if k.startswith("rows.") or k == f"model.{TABLE}"}
        tensors |= {f"pull.{k}": v for k, v in self.pull.state().items()} if self.pull is not None else {}
        adam = self.optimizer.state_dict()["state"]
        tensors |= {f"adam.{i}.{key}": tensor for i, state in adam.items() for key, tensor in state.items()}
        tensors |= {f"random.{rank}": state for rank, state in enumerate(self.ranks.gather(torch.get_rng_state()))}
        record = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "row_steps": self.rows.steps,
            "history": self.history,
            "best": self.best if math.isfinite(self.best) else None,
            "waited": self.waited,
            "losses": self._losses,
        }
        checkpoint.save_shared(path, tensors, rows if self.sharded else {}, record, self.shape)

    def _load(self, path: Path) -> None:
        tensors, record = checkpoint.load_shared(path, self.shape)
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        checkpoint.check_names(path, model, self.model.state_dict())
        self.model.load_state_dict(model)
        for i, tensor in enumerate(self.rows.state):
            tensor.copy_(tensors[f"rows.{i}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.pull is not None:
            self.pull.load_state({k.removeprefix("pull."): v for k, v in tensors.items() if k.startswith("pull.")})
        # a rank that was not there when it was saved takes up the first one's random numbers
        torch.set_rng_state(tensors.get(f"random.{self.ranks.rank}", tensors["random.0"]))
        self.epoch, self.batch, self.step = record["epoch"], record["batch"], record["step"]
        self.rows.steps, self.history, self.waited = record["row_steps"], record["history"], record["waited"]
        self.best = math.inf if record["best"] is None else record["best"]
        self._losses = record["losses"]


def score(
    model: Ranker,
    encoder: Encoder,
    log: ParquetLog,
    *,
    calibrate: bool = True,
    rows: int = 4096,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Score a log.

    Args:
        model: The model.
        encoder: What turns the log into batches.
        log: Rows with causal columns and labels.
        calibrate: Whether the isotonic layers are applied.
        rows: Rows scored at once.
        ranks: Processes that share the rows; each gets all scores.

    Returns:
        `p` (n, T), `labels` (n, T), and `group` (n,), `weight` (n,) or None, as numpy arrays.
    """
    found: dict[str, list[np.ndarray]] = {"p": [], "labels": [], "group": [], "weight": []}
    for table in log.read(rows=rows):
        batch = encoder.encode(table)
        first, last = ranks.range(len(batch))
        own = batch.take(torch.arange(first, last)) if ranks.size > 1 else batch
        found["p"].append(ranks.gather_rows(model.predict(own, calibrate=calibrate))[0].numpy())
        for name in ("labels", "group", "weight"):
            value = getattr(batch, name)
            if value is not None:
                found[name].append(value.numpy())
    return {name: np.concatenate(pieces) if pieces else None for name, pieces in found.items()}


def evaluate(model: Ranker, encoder: Encoder, log: ParquetLog, ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
    """Metrics of every label on a log.

    Args:
        model: The model.
        encoder: What turns the log into batches.
        log: Rows with causal columns and labels.
        ranks: Processes that share the rows; each gets all metrics.

    Returns:
        `lirank.evaluate.metrics.report` by label.
    """
    found = score(model, encoder, log, ranks=ranks)
    return {
        label.name: metrics_report(found["p"][:, t], found["labels"][:, t], found["group"], found["weight"])
        for t, label in enumerate(encoder.schema.labels)
    }
