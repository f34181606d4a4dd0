"""What each component brings on the generator: on its own knob and on the null, over seeds; table and picture."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from core_tensor.app import figures
from core_tensor.app.cli import progress
from core_tensor.app.files import read_json, write_json
from lirank.evidence.ablation import COMPONENTS, ablate, summary
from lirank.evidence.generator import Market

RESULTS = Path(__file__).parent / "results" / "ablation.json"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences by AUC, in thousandths, with two standard errors; on the knob and on the null."""
    plt = figures.pyplot("lirank[plot]")
    shown = [row for row in rows if row["judge"] == "auc"]
    figure, axis = plt.subplots(figsize=(7.0, 0.5 * len(shown) + 1.2))
    for offset, name, color in ((0.15, "difference", "tab:blue"), (-0.15, "null", "tab:gray")):
        places = [len(shown) - 1 - i + offset for i in range(len(shown))]
        values = [1000 * row[name] for row in shown]
        errors = [2000 * (row[f"{name}_se"] or 0.0) for row in shown]
        label = "on its knob" if name == "difference" else "where it has nothing to win"
        axis.errorbar(values, places, xerr=errors, fmt="o", color=color, label=label, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [row["component"] for row in reversed(shown)])
    axis.set_xscale("symlog", linthresh=2)
    axis.set_xlabel("AUC with minus AUC without, in thousandths (two standard errors)")
    axis.legend(loc="lower right")
    figures.save(figure, path)


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="one seed of a tenth of the events, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, events = (1, options.events // 10) if options.quick else (options.seeds, options.events)
    rows = read_json(RESULTS)["rows"] if RESULTS.exists() and not options.quick else []
    done = {(row["component"], row["seed"], row["null"], row["events"]) for row in rows}
    todo = [(c, seed, null) for seed in range(seeds) for c in COMPONENTS for null in (False, True)]
    todo = [job for job in todo if (job[0].name, job[1], job[2], events) not in done]
    for component, seed, null in progress(todo, "ablation", unit="pair"):
        with tempfile.TemporaryDirectory() as folder:
            row = ablate(component, seed, Path(folder), market=Market(ids=0.5, events=events), null=null)
        rows.append({**row, "events": events})
        if not options.quick:
            write_json(RESULTS, {"rows": rows, "summary": summary(rows)})
    table = summary(rows)
    if options.quick:
        print(table)
    else:
        write_json(RESULTS, {"rows": rows, "summary": table})
        draw(table, RESULTS.with_name("ablation.png"))


if __name__ == "__main__":
    main()
