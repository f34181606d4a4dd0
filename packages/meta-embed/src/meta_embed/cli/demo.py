"""`meta-embed demo`."""

from pathlib import Path

import click
from core_tensor.app import figures
from core_tensor.app.cli import emit, json_option, out_option, quick_option, seed_option, table, threads_option

NAMES = {"none": "no personalization", "map": "meta-embed, MAP head", "oracle": "near-oracle"}


@click.command()
@out_option("Picture to write.", default="meta-embed-demo.png")
@seed_option
@threads_option
@quick_option
@json_option
def demo(out: Path, seed: int, quick: bool, as_json: bool) -> None:
    """Members of a generator with a known oracle: train, generate, refresh, look up, score; gain by activity."""
    figures.check(out, "meta-embed[plot]")
    from meta_embed.evaluate.plots import bucket_plot
    from meta_embed.evidence.demo import run_demo

    result = run_demo(1000 if quick else 3000, seed, lambda line: click.echo(line, err=True))
    closed = f"{result['gap_closed_n16']:.0%} of the gap closed at 16 events"
    bucket_plot(result["rows"], "support", NAMES, out, "members that training never saw", closed)
    columns = {"support": "events", "none_auc": "none", "map_auc": "MAP head", "oracle_auc": "near-oracle"}
    shown = [
        {title: row[key] for key, title in columns.items()}
        | {"gap closed": f"{row['gap_closed']:.0%}" if row["support"] else "-"}
        for row in result["rows"]
    ]
    tail = (
        f"refreshed {result['refreshed_members']} members; largest difference from a full generation:"
        f" {result['refresh_vs_full_max_diff']:g}\npicture: {out}"
    )
    emit({"picture": str(out), **result}, as_json, lambda: f"AUC on later events\n\n{table(shown)}\n\n{tail}")
