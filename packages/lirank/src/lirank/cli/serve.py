"""`lirank serve`."""

from pathlib import Path

import click

from lirank.cli.options import run_argument


@click.command()
@run_argument
@click.option("--onnx", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What `export` wrote.")
@click.option(
    "--posterior", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What `explore fit` wrote."
)
@click.option("--host", default="127.0.0.1", help="Address to listen on; the default takes this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port; 0 is any free one.")
@click.option("--workers", type=click.IntRange(1), default=1, help="Processes; with several there is no /observe.")
@click.option("--rows", type=click.IntRange(1), default=10_000, help="Most rows of a request.")
def serve(run: Path, onnx: Path | None, posterior: Path | None, host: str, port: int, workers: int, rows: int) -> None:
    """Serve RUN over HTTP: POST /score and /observe (JSON or Arrow), GET /health and /metrics.

    With --posterior, a request may ask to explore: "options": {"explore": "thompson", "draws": 1000} or "ucb".
    """
    import functools

    from core_tensor.app.extras import require

    from lirank.serve.scorer import EXTRA, Scorer, build

    serving = require("core_tensor.app.serving", EXTRA)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, EXTRA)
    Scorer.open(run, onnx, posterior)  # what is wrong with the files is said here, once
    limits = serving.Limits(rows=rows)
    make = functools.partial(build, run, onnx, remember=workers == 1, limits=limits, posterior=posterior)
    serving.serve(make, host=host, port=port, workers=workers, started=click.echo)
