"""The command `frechet-gan`; nothing here loads torch before a command runs."""

from core_tensor.app.cli import command_line

from frechet_gan.cli.demo import demo
from frechet_gan.cli.metric import evaluate, fd, stats
from frechet_gan.cli.train import compare, posttrain, sample, train


@command_line("frechet-gan")
def main() -> None:
    """Generators trained by Frechet distance or optimal transport in feature space, and their evaluation."""


for command in (evaluate, fd, stats, train, sample, posttrain, compare, demo):
    main.add_command(command)
