"""The command `demo`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option, quick_option, table


@click.command()
@click.argument("what", default="digits", type=click.Choice(["digits", "hacking"]))
@out_option("Picture to write. [default: frechet-gan-WHAT.png]")
@click.option("--seconds", default=8.0, type=click.FloatRange(0.1), help="CPU seconds per training run (digits).")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Training runs per method (digits).")
@click.option("--steps", default=600, type=click.IntRange(1), help="Generator steps (hacking).")
@quick_option
@json_option
def demo(what: str, out: Path | None, seconds: float, seeds: int, steps: int, quick: bool, as_json: bool) -> None:
    """Train on scikit-learn's real digits: Frechet loss against the baseline, or an encoder being gamed."""
    import torch
    from core_tensor.app import figures
    from core_tensor.app.extras import require

    from frechet_gan.demo import compare_demo, hacking_demo
    from frechet_gan.plots import EXTRA

    path = out or Path(f"frechet-gan-{what}.png")
    figures.check(path, EXTRA)
    require("sklearn", "frechet-gan[demo]")
    torch.set_num_threads(1)  # networks this small only lose by a second thread
    if quick:
        seconds, seeds, steps = min(seconds, 2.0), 1, min(steps, 150)
    if what == "hacking":
        result = hacking_demo(str(path), steps)
        rows = [
            {
                "generator": n,
                "own or seen encoder": result[f"{n}_seen_fd"],
                "held-out encoder": result[f"{n}_heldout_fd"],
            }
            for n in ("gamed", "honest")
        ]
        emit(result, as_json, "\n".join([table(rows), *(f"gamed: {a}" for a in result["gamed_alarms"]), str(path)]))
        return
    result = compare_demo(str(path), seconds, seeds)
    text = (
        f"held-out Frechet distance after {seconds:g} CPU seconds, mean of {seeds} seeds:\n"
        f"  Frechet loss        {result['frechet_fd']:.3f}\n"
        f"  non-saturating loss {result['ns_fd']:.3f}   (ratio {result['ratio']:.2f})\n"
        f"  real against real   {result['real_halves_fd']:.3f}\n{path}"
    )
    emit(result, as_json, text)
