"""The monitor inside other people's training loops: Lightning, Hugging Face's Trainer, Accelerate.

With Accelerate nothing more is needed: `monitor.attach(optimizer)` takes a prepared optimizer as it is.
"""

import sys
from typing import Any

from core_tensor.app.extras import require
from torch import Tensor, nn

from sgd_stability.monitor.monitor import StabilityMonitor
from sgd_stability.report.check import Check


class OutputField(nn.Module):
    """A model whose output is one field of another model's, such as a Hugging Face classifier's logits.

    For a causal language model, whose logits are (n, positions, V), the loss is `"token_cross_entropy"`, and the
    monitor's targets are the labels already shifted: the model shifts them by itself, the monitor does not.

    Args:
        model: The model, called with keyword arguments.
        field: Name of the field.
    """

    def __init__(self, model: nn.Module, field: str = "logits") -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, **inputs: Tensor) -> Tensor:
        """Evaluate the model.

        Args:
            inputs: Its keyword arguments.

        Returns:
            The field.
        """
        value: Tensor = getattr(self.model(**inputs), self.field)
        return value


def metrics(check: Check) -> dict[str, float]:
    """A check as numbers to log.

    Args:
        check: The check.

    Returns:
        Finite values by name.
    """
    values = {
        "stability/lambda1": check.lambda1,
        "stability/edge": check.edge,
        "stability/lr_lower": check.lower,
        "stability/lr_upper": check.upper,
        "stability/margin": check.margin,
        "stability/max_sample_curvature": check.max_sample_curvature,
    }
    return {name: value for name, value in values.items() if value == value and abs(value) != float("inf")}


def lightning_callback(monitor: StabilityMonitor) -> Any:
    """A Lightning callback that attaches a monitor for the fit, logs its checks and saves its state.

    Args:
        monitor: The monitor.

    Returns:
        A `pytorch_lightning.Callback`, or a `lightning.pytorch.Callback` in a program that has imported that one.
    """
    name = "lightning.pytorch" if "lightning.pytorch" in sys.modules else "pytorch_lightning"
    base = require(name, "sgd-stability[lightning]").Callback

    class StabilityCallback(base):  # type: ignore[misc, valid-type]
        """Attaches the monitor to the trainer's first optimizer."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
            monitor.attach(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # noqa: ARG002
            if monitor.history and monitor.history[-1].step == monitor.steps:
                pl_module.log_dict(metrics(monitor.history[-1]))

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
            monitor.detach()

        def state_dict(self) -> dict[str, Any]:
            return monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            monitor.load_state_dict(state_dict)

    return StabilityCallback()


def trainer_callback(monitor: StabilityMonitor) -> Any:
    """A callback for Hugging Face's Trainer that attaches a monitor for the training and adds its checks to the log.

    Args:
        monitor: The monitor, over a model that returns a tensor (see `OutputField`).

    Returns:
        A `transformers.TrainerCallback`.
    """
    base = require("transformers", "sgd-stability[transformers]").TrainerCallback

    class StabilityCallback(base):  # type: ignore[misc, valid-type]
        """Attaches the monitor to the trainer's optimizer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            monitor.attach(kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if monitor.history and monitor.history[-1].step == monitor.steps:
                state.log_history.append({"step": state.global_step, **metrics(monitor.history[-1])})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            monitor.detach()

    return StabilityCallback()
