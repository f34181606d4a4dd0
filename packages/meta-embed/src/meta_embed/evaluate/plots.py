"""The bucket plot: what personalization brings, by activity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core_tensor.app import figures

EXTRA = "meta-embed[plot]"
_COLORS = ("#9aa0a6", "#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a")


def bucket_plot(
    rows: Sequence[Mapping[str, Any]], by: str, names: Mapping[str, str], path: Path, title: str, note: str = ""
) -> None:
    """AUC of several predictors over activity, and beside it the gains over the first, with their intervals if given.

    Args:
        rows: From `by_size` or `by_activity`.
        by: Column of the activity.
        names: Prefix of the predictors' columns and their labels; the first is what the others are compared with.
        path: Picture to write.
        title: Title.
        note: A line below the right panel.
    """
    plt = figures.pyplot(EXTRA)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6))
    places = range(len(rows))
    first = next(iter(names))
    for (name, label), color in zip(names.items(), _COLORS, strict=False):
        style = {"color": color, "marker": "o", "markersize": 4, "linestyle": "--" if name == "oracle" else "-"}
        left.plot(places, [row[f"{name}_auc"] for row in rows], label=label, **style)
        if name != first:
            gains = [1000 * (row[f"{name}_auc"] - row[f"{first}_auc"]) for row in rows]
            right.plot(places, gains, label=label, **style)
            ends = [f"{name}_over_{first}_{end}" for end in ("low", "high")]
            known = [i for i, row in enumerate(rows) if all(row.get(end) is not None for end in ends)]
            low, high = ([1000 * rows[i][end] for i in known] for end in ends)
            right.vlines(known, low, high, color=color, linewidth=1.2)
    right.axhline(0.0, color=_COLORS[0], linewidth=1.0)
    for axis in (left, right):
        axis.set_xticks(list(places), [f"{row[by]}" for row in rows])
        axis.set_xlabel("events of the member before the query")
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    left.set_ylabel("AUC on later events")
    right.set_ylabel(f"gain over {names[first]},\nthousandths of AUC")
    left.set_title(title)
    right.set_title(note or "gain by activity")
    left.legend(fontsize=8)
    figures.save(figure, path)
