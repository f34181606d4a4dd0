"""What the scripts of this folder have in common: `--quick` and `-o`."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Options(NamedTuple):
    """The options of a script."""

    quick: bool
    out: Path
    only: list[str]


def options(doc: str | None, parts: tuple[str, ...] = ()) -> Options:
    """Read the options of a script, make its folder, and set one thread.

    Args:
        doc: The script's docstring.
        parts: What `--only` can name.

    Returns:
        The options; `only` holds all parts if none is named.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything, under two minutes")
    parser.add_argument("-o", "--out", type=Path, help="folder of JSON and pictures [results/; out/ with --quick]")
    if parts:
        parser.add_argument("--only", action="append", choices=parts, help="all if not given; may be repeated")
    found = parser.parse_args()
    out = found.out or (Path("out/sgd-stability-quick") if found.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return Options(found.quick, out, getattr(found, "only", None) or list(parts))
