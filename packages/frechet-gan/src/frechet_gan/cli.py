"""The command `frechet-gan`."""

from core_tensor.cli import command_line


@command_line("frechet-gan")
def main() -> None:
    """Generators trained by Frechet distance or optimal transport in feature space."""
