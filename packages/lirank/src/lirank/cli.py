"""The command `lirank`."""

from core_tensor.app.cli import command_line


@command_line("lirank")
def main() -> None:
    """LiRank: train, calibrate, compress, export and serve ranking models from Parquet logs."""
