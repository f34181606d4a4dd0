"""mSAM in Lightning: mix `MSAMMixin` into a LightningModule and return an `MSAM` from `configure_optimizers`.

Needs the extra `msam[lightning]`. Two passes do not fit automatic optimization, so the mixin turns to the manual one
and takes the training step over; the module gives the loss of a batch in `msam_loss`.

    class Classifier(MSAMMixin, L.LightningModule):
        def msam_loss(self, batch): ...
        def configure_optimizers(self):
            return MSAM(self, torch.optim.AdamW, lr=1e-3, num_micro_batches=8)
"""

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from msam.optimizer.optim import MSAM


class MSAMMixin:
    """Runs both passes, clipping and the update of an `MSAM`; put it before `LightningModule` among the bases.

    Schedulers returned by `configure_optimizers` step after every `frequency`-th batch or epoch, by their `interval`.
    Lightning drops the key `monitor` in manual optimization, so a ReduceLROnPlateau reads the metric `plateau_metric`.
    The loss runs in the precision plugin's forward context. The recipe serves one process and the precisions without
    a GradScaler (32, bf16-mixed, 64); "16-mixed" is refused.

    Attributes:
        plateau_metric: Name of the logged metric that a ReduceLROnPlateau goes by.
    """

    automatic_optimization = False
    plateau_metric: str | None = None

    def msam_loss(self, batch: Any) -> Tensor:
        """Mean loss of a (micro-)batch; to be written by the module.

        Args:
            batch: A (micro-)batch.

        Returns:
            Scalar tensor.

        Raises:
            NotImplementedError: If the module does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define msam_loss(batch)")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One mSAM step.

        Args:
            batch: The batch.
            batch_idx: Its number in the epoch.

        Returns:
            The mean loss at the weights before the update.

        Raises:
            TypeError: If `configure_optimizers` returned no `MSAM`.
            ValueError: If the trainer runs several processes or scales gradients, or a scheduler lacks its metric.
        """
        module: Any = self
        wrapped = module.optimizers()
        optimizer = wrapped.optimizer
        if not isinstance(optimizer, MSAM):
            raise TypeError(f"configure_optimizers: expected an MSAM, got {type(optimizer).__name__}")
        precision = module.trainer.precision_plugin
        self._check_trainer()

        def loss_fn(part: Any) -> Tensor:
            with precision.forward_context():
                return self.msam_loss(part)

        optimizer.zero_grad()
        loss = optimizer.backward(loss_fn, batch)
        if optimizer.options.clip_norm is not None:
            module.clip_gradients(wrapped, optimizer.options.clip_norm, "norm")
        wrapped.step()
        if optimizer.record is not None:
            module.log("sharpness_gap", optimizer.record.perturbed_loss - optimizer.record.loss)
        self._step_schedules("step", batch_idx + 1)
        return loss

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that count epochs, which manual optimization leaves alone."""
        module: Any = self
        self._step_schedules("epoch", module.current_epoch + 1)

    def _check_trainer(self) -> None:
        module: Any = self
        trainer = module.trainer
        if trainer.world_size > 1 or getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "trainer: expected one process and a precision without gradient scaling, got "
                f"{trainer.world_size} and {trainer.precision!r}"
            )
        if self.plateau_metric is None and any(_waits(c.scheduler) for c in trainer.lr_scheduler_configs):
            raise ValueError("plateau_metric: expected the name of a logged metric for ReduceLROnPlateau, got None")

    def _step_schedules(self, interval: str, done: int) -> None:
        module: Any = self
        logged = module.trainer.callback_metrics
        for config in module.trainer.lr_scheduler_configs:
            if config.interval != interval or done % config.frequency:
                continue
            waits = _waits(config.scheduler)
            if waits and self.plateau_metric not in logged:
                raise ValueError(f"plateau_metric: expected one of {sorted(logged)}, got {self.plateau_metric!r}")
            module.lr_scheduler_step(config.scheduler, logged[self.plateau_metric] if waits else None)


def _waits(scheduler: Any) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)
