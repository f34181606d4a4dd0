"""The command `meta-embed`; one file per command."""

from core_tensor.app.cli import command_line

from meta_embed.cli.demo import demo


@command_line("meta-embed")
def main() -> None:
    """LiMAML: learn, generate, refresh, store and serve per-member vectors."""


for _command in (demo,):
    main.add_command(_command)
