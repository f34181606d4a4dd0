"""The command `polytope-lp`."""

from core_tensor.cli import command_line


@command_line("polytope-lp")
def main() -> None:
    """Web-scale matching LPs: dual decomposition and projection onto any polytope."""
