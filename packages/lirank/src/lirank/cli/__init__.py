"""The command `lirank`, one module per command."""

from core_tensor.app.cli import command_line

from lirank.cli.baseline import baseline
from lirank.cli.evaluate import evaluate
from lirank.cli.schema import schema
from lirank.cli.train import train


@command_line("lirank")
def main() -> None:
    """LiRank: train, calibrate, compress, export and serve ranking models from Parquet logs."""


for command in (schema, train, evaluate, baseline):
    main.add_command(command)
