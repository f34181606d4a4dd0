"""The command `meta-embed`; one file per command."""

from core_tensor.app.cli import command_line

from meta_embed.cli.bench import bench
from meta_embed.cli.demo import demo
from meta_embed.cli.evaluate import evaluate
from meta_embed.cli.export import export
from meta_embed.cli.generate import generate
from meta_embed.cli.refresh import refresh
from meta_embed.cli.serve import serve
from meta_embed.cli.train import train


@command_line("meta-embed")
def main() -> None:
    """LiMAML: learn, generate, refresh, store and serve per-member vectors."""


for _command in (train, generate, refresh, evaluate, export, serve, bench, demo):
    main.add_command(_command)
