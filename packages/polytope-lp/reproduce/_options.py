"""What the scripts of this folder have in common: `--quick`, `-o`, and modules of the benchmarks and tests."""

import argparse
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that prints the script's docstring as its help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def options(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options of a script, make its folder, and set one thread."""
    arguments.add_argument("--quick", action="store_true", help="little of everything, under two minutes")
    arguments.add_argument("-o", "--out", type=Path, help="folder of JSON and pictures [results/; out/ with --quick]")
    found = arguments.parse_args()
    found.out = found.out or (Path("out/polytope-lp-quick") if found.quick else RESULTS)
    found.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return found
