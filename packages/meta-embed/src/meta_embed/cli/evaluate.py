"""`meta-embed evaluate`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app import figures
from core_tensor.app.cli import emit, json_option, table, threads_option

LABELS = {
    "none": "no personalization",
    "id": "ID embedding, retrained",
    "deep": "ID embedding and MLP, retrained",
    "wide": "wide-and-deep ID, retrained",
    "hybrid": "ID embedding and meta-embed, mixed",
    "ours": "meta-embed",
}


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--by-activity", is_flag=True, help="By events before each member's last ones, not by support size.")
@click.option("--events", type=click.Path(path_type=Path), help="Events. [default: those of the training]")
@click.option(
    "--baselines",
    default="none,id",
    help="Comma-separated, out of none, id, deep, wide; each tuned on held-back members. And hybrid: the retrained ID"
    " embedding and meta-embed, with weights by number of events.",
)
@click.option("--query", default=40, type=click.IntRange(1), help="Events each member is asked about.")
@click.option("--start", default=32, type=click.IntRange(0), help="Events before the query, without --by-activity.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Picture to write.")
@threads_option
@json_option
def evaluate(
    run: Path, by_activity: bool, events: Path | None, baselines: str, query: int, start: int, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Gain of RUN's model on its test members over tuned baselines, by activity."""
    names = [name.strip() for name in baselines.split(",") if name.strip()]
    unknown = [name for name in names if name not in LABELS or name == "ours"]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"baselines: expected different ones out of none, id, deep, wide, hybrid, got {baselines!r}")
    if plot is not None:
        figures.check(plot, "meta-embed[plot]")
    from meta_embed.evaluate.buckets import finite
    from meta_embed.evaluate.compare import compare_run

    rows = finite(compare_run(run, events, names, by_activity=by_activity, query=query, start=start))
    by = "activity" if by_activity else "support"
    labels = {name: LABELS[name] for name in [*names, "ours"]}
    if plot is not None:
        from meta_embed.evaluate.plots import bucket_plot

        bucket_plot(rows, by, labels, plot, "members that training never saw")
    shown: list[dict[str, Any]] = [
        {by: row[by], "members": row["members"]}
        | {label: row[f"{name}_auc"] for name, label in labels.items()}
        | {f"over {LABELS[name]}": _gain(row, name) for name in names}
        for row in rows
    ]
    text = "AUC; gains of meta-embed with 95 % intervals of a bootstrap over members"
    emit({"run": str(run), "rows": rows}, as_json, lambda: f"{text}\n\n{table(shown)}")


def _gain(row: dict[str, Any], name: str) -> str:
    """Gain over a baseline with its interval."""
    value, low, high = (row[f"ours_over_{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value is None or low is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
