"""The command `quantease`."""

from core_tensor.app.cli import command_line

from quantease.cli.demo import demo
from quantease.cli.evaluate import compare, evaluate, inspect
from quantease.cli.quantize import export_command, quantize

__all__ = ["main"]


@command_line("quantease")
def main() -> None:
    """QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""


for command in (quantize, export_command, evaluate, compare, inspect, demo):
    main.add_command(command)
