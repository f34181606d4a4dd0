"""Time, memory and convergence from 1M to a billion variables. Writes scale.json and scale.png.

    python packages/polytope-lp/reproduce/scale.py [--sources 100000 --sources 101500000] [--quick]

Every size is generated, packed, and then solved and verified in a process of its own from the mapped files: the memory
is that process's growth over what it had before it opened the problem, mapped pages included. CPU seconds of one
thread, which other work on the machine does not change. Sizes that were run before stay in the file. A billion
variables (101,500,000 sources) take 25 GB of disk, 16 GB of memory and ten minutes.
"""

from pathlib import Path
from typing import Any

from _options import options, parser
from bench import solve_apart, stages
from core_tensor.app.figures import pyplot
from core_tensor.app.files import atomic_path, read_json, write_json

TOL = 1e-4


def measure(sources: int) -> dict[str, Any]:
    """One size to a certified 1e-4, with its convergence."""
    found = solve_apart(sources, TOL, 1)
    return {
        "sources": sources,
        "variables": found["variables"],
        "status": found["status"],
        "gap": found["gap"],
        "evaluations": len(found["history"]),
        "seconds": found["seconds"],
        "cpu_seconds": found["cpu_seconds"],
        "bytes_per_variable": found["bytes"] / found["variables"],
        "peak_gb": found["peak_bytes"] / 1e9,
        "verified": found["verified"],
        "generate_seconds": found["generate_seconds"],
        "pack_seconds": found["pack_seconds"],
        "verify_seconds": found["verify_seconds"],
        **stages(found),
        "curve": [{name: entry[name] for name in ("evaluation", "seconds", "gap")} for entry in found["history"]],
    }


def picture(sizes: list[dict[str, Any]], out: Path) -> None:
    """Certified gap over wall time, one line per size."""
    plt = pyplot("polytope-lp[plot]")
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for size, colour in zip(sizes, ("#92c5de", "#4393c3", "#2166ac", "#053061"), strict=False):
        curve = [point for point in size["curve"] if point["gap"]]
        label = f"{size['variables'] / 1e6:,.0f}M variables, {size['peak_gb']:.1f} GB"
        axes.loglog([p["seconds"] for p in curve], [p["gap"] for p in curve], color=colour, lw=2, label=label)
    axes.axhline(TOL, color="#999999", lw=1, ls="--")
    axes.set(xlabel="seconds, one thread", ylabel="certified relative gap")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(alpha=0.2)
    with atomic_path(out / "scale.png") as temporary:
        figure.savefig(temporary, dpi=150)


def main() -> None:
    """Measure the sizes asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("--sources", type=int, action="append", help="sizes [100000, 1000000; 20000 with --quick]")
    given = options(arguments)
    asked = given.sources or ([20_000] if given.quick else [100_000, 1_000_000])
    file = given.out / "scale.json"
    sizes = {size["sources"]: size for size in (read_json(file)["sizes"] if file.exists() else [])}
    for sources in asked:
        sizes[sources] = measure(sources)
        print({name: value for name, value in sizes[sources].items() if name != "curve"}, flush=True)
        ordered = [sizes[key] for key in sorted(sizes)]
        write_json(file, {"tol": TOL, "sizes": ordered, "largest": ordered[-1]})
        picture(ordered, given.out)


if __name__ == "__main__":
    main()
