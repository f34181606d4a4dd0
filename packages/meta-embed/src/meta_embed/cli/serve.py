"""`meta-embed serve`."""

import functools
from pathlib import Path

import click

from meta_embed.cli.generate import store_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@store_option
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8080, type=click.IntRange(0, 65535), help="Port; 0 for any free one.")
@click.option("--workers", default=1, type=click.IntRange(1), help="Processes that share the port.")
@click.option("--ttl", type=float, help="Age beyond which a vector is reported as stale, seconds. [default: none]")
@click.option("--allow-stale", is_flag=True, help="Score vectors of another model version too.")
def serve(run: Path, store: str, host: str, port: int, workers: int, ttl: float | None, allow_stale: bool) -> None:
    """Serve scores of RUN's global block with the store's vectors: POST /score, POST /vectors, /health, /metrics."""
    from core_tensor.app import serving

    from meta_embed.serve.scorer import Scorer, build

    limit = float("inf") if ttl is None else ttl
    Scorer(str(run), store, limit, allow_stale).lookup.store.close()  # what is wrong shows before the port is taken
    make = functools.partial(build, str(run), store, limit, allow_stale, serving.Limits())
    serving.serve(make, host=host, port=port, workers=workers, started=lambda url: click.echo(url))
