"""`quantease demo`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, quick_option, threads_option

from quantease.cli.options import quiet, stages


@click.command()
@quick_option
@click.option("--bits", type=click.IntRange(2, 8), default=3, help="Bits per weight.")
@click.option("--text", multiple=True, help="Files to use instead of the Python reference of pydoc.")
@out_option("Folder.  [default: out/quantease-demo[-quick]]", folder=True)
@threads_option
@overwrite_option
@json_option
def demo(quick: bool, bits: int, text: tuple[str, ...], out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Quantize a real language model, SmolLM2-135M, and see how well the methods do.

    The full run takes an hour or so on two cores, --quick (two of thirty blocks) one to two minutes, and more the first
    time, when Python compiles torch and transformers. The same command continues after a kill.
    """
    from dataclasses import replace

    from quantease.demo import DemoConfig, run_demo

    quiet()
    config = replace(DemoConfig.quick() if quick else DemoConfig(), bits=bits)
    folder = out or Path("out") / ("quantease-demo-quick" if quick else "quantease-demo")
    with stages() as stage:
        result = run_demo(config, folder, text, overwrite=overwrite, stage=stage)
    emit(result.to_dict(), as_json, result.render)
