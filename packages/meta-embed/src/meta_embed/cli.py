"""The command `meta-embed`."""

from core_tensor.app.cli import command_line


@command_line("meta-embed")
def main() -> None:
    """LiMAML: learn, generate, refresh, store and serve per-member vectors."""
