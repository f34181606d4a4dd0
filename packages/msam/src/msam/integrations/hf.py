"""mSAM in the Hugging Face Trainer: `MSAMTrainer` is a Trainer whose training step runs both passes.

Needs the extra `msam[hf]`. Accumulation, clipping, schedules, logging and checkpoints stay the Trainer's: only the
gradient of a batch is another one. With plain accelerate no class is needed; the model is prepared first, so that
MSAM sees the wrapper of several processes:

    model = accelerator.prepare(model)
    opt = MSAM(model, torch.optim.AdamW, lr=1e-4, num_micro_batches=8)
    opt, loader = accelerator.prepare(opt, loader)
    for batch in loader:
        opt.optimizer.backward(lambda part: model(**part).loss, batch, scaler=accelerator.scaler)
        opt.step(); opt.zero_grad()
"""

from collections.abc import Callable
from typing import Any

from core_tensor.app.extras import require
from torch import Tensor, nn

from msam.optimizer.optim import MSAM
from msam.step.options import Options

_trainer: Any = require("transformers", "msam[hf]").Trainer


def valid_tokens(batch: Any) -> float:
    """Number of labels that are not -100: the `shard_weight` of masked language models.

    Args:
        batch: Mapping with `labels`, shape (B, T).

    Returns:
        The count.
    """
    return float((batch["labels"] != -100).sum())


def causal_tokens(batch: Any) -> float:
    """Number of labels after the first position that are not -100: the `shard_weight` of causal language models.

    These predict every token from those before it, so the first label of a row has no part in their loss.

    Args:
        batch: Mapping with `labels`, shape (B, T).

    Returns:
        The count.
    """
    return valid_tokens({"labels": batch["labels"][..., 1:]})


class MSAMTrainer(_trainer):  # type: ignore[misc]
    """A Trainer that feeds its optimizer with mSAM's gradient.

    Args:
        args: As the Trainer's.
        num_micro_batches: Micro-batches m of a device batch.
        rho: Radius.
        msam: Further options of `MSAM`, such as `mode`; see `msam.Options`.
        kwargs: Everything else the Trainer takes.
    """

    def __init__(
        self,
        *args: Any,
        num_micro_batches: int = 4,
        rho: float | Callable[[int], float] = 0.05,
        msam: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._msam: dict[str, Any] = {"num_micro_batches": num_micro_batches, "rho": rho, **(msam or {})}
        Options(**self._msam)  # refuse bad options before anything is loaded
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the mean over a micro-batch, not a share of the accumulated batch

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the Trainer's own optimizer.

        Args:
            args: As the Trainer's.
            kwargs: As the Trainer's.

        Returns:
            An `MSAM` around the optimizer that the training arguments ask for.
        """
        optimizer: Any = self.__dict__.get("optimizer")
        if not isinstance(optimizer, MSAM):
            base = super().create_optimizer(*args, **kwargs)
            optimizer = self.__dict__["optimizer"] = MSAM(self.model, base, **self._msam)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """Both passes over one device batch; gradients accumulate until the Trainer updates.

        Args:
            model: The model, as wrapped.
            inputs: One device batch.
            num_items_in_batch: Ignored: every device batch weighs the same.
            kwargs: Ignored.

        Returns:
            The mean loss, divided by the number of accumulated batches as the Trainer expects.
        """
        del num_items_in_batch, kwargs
        model.train()
        batch = self._prepare_inputs(inputs)
        optimizer: Any = self.__dict__["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        optimizer.follow(model)  # the Trainer wraps the model after it has made the optimizer

        def loss_fn(part: Any) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, dict(part))
            return loss

        # older transformers divide by what was asked for, also where an epoch ends with fewer batches
        batches = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        share = 1.0 / batches
        loss: Tensor = optimizer.backward(loss_fn, dict(batch), weight=share, scaler=self.accelerator.scaler)
        told: Tensor = loss.detach() * share
        return told
