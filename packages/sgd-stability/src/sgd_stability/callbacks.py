"""The monitor in other people's training loops; the code is `sgd_stability.monitor.callbacks`."""

from sgd_stability.monitor.callbacks import OutputField, lightning_callback, metrics, trainer_callback

__all__ = ["OutputField", "lightning_callback", "metrics", "trainer_callback"]
