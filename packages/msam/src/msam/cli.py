"""The command `msam`."""

from core_tensor.cli import command_line


@command_line("msam")
def main() -> None:
    """mSAM: micro-batch-averaged sharpness-aware minimization, exact and cheaper than SAM."""
