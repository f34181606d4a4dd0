"""The command `lirank`, a module per command or two."""

from core_tensor.app.cli import command_line

from lirank.cli.baseline import baseline
from lirank.cli.calibrate import calibrate
from lirank.cli.demo import demo, recipe
from lirank.cli.evaluate import evaluate
from lirank.cli.evict import evict
from lirank.cli.explore import explore
from lirank.cli.export import bench, compress, export
from lirank.cli.schema import schema
from lirank.cli.serve import serve
from lirank.cli.train import train


@command_line("lirank")
def main() -> None:
    """LiRank: train, calibrate, compress, export and serve ranking models from Parquet logs."""


_MODELS = (train, evaluate, baseline, calibrate, evict, explore)
_SERVING = (compress, export, serve, bench)
for command in (schema, *_MODELS, *_SERVING, recipe, demo):
    main.add_command(command)
