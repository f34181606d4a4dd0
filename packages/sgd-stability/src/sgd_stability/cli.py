"""The command `sgd-stability`."""

from core_tensor.cli import command_line


@command_line("sgd-stability")
def main() -> None:
    """Linear stability of SGD from the geometry of the loss: exact thresholds, coherence, a live monitor."""
