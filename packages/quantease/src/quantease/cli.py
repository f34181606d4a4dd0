"""The command `quantease`."""

from core_tensor.cli import command_line


@command_line("quantease")
def main() -> None:
    """QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""
