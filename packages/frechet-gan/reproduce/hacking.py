"""The Frechet distance in one frozen encoder, minimised from scratch: three seeds of `frechet-gan demo hacking`.

    python packages/frechet-gan/reproduce/hacking.py [--quick] [-o FOLDER]

Writes `hacking.json` and `.png`.
"""

from pathlib import Path
from statistics import mean, stdev

from _options import options, parser
from core_tensor.app.files import write_json
from frechet_gan.demo import hacking_demo


def main() -> None:
    """Three seeds; the picture is the first one's."""
    found = options(parser(__doc__))
    steps, seeds = (200, 2) if found.quick else (600, 3)
    runs = [hacking_demo(str(found.out / f"hacking{seed or ''}.png"), steps, seed=seed) for seed in range(seeds)]
    rows = []
    for name in ("gamed", "honest"):
        row = {
            "generator": name,
            "seeds": len(runs),
            "alarms": sum(any(a.startswith("hacking") for a in r[f"{name}_alarms"]) for r in runs),
        }
        for kind in ("seen", "heldout"):
            values = [r[f"{name}_{kind}_fd"] for r in runs]
            row |= {kind: mean(values), f"{kind}_spread": stdev(values)}
        rows.append(row)
    for run in runs:
        picture = Path(run.pop("picture"))
        if picture.name != "hacking.png":
            picture.unlink()
    write_json(found.out / "hacking.json", {"rows": rows, "runs": runs})


if __name__ == "__main__":
    main()
