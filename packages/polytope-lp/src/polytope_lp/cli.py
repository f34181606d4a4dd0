"""The command `polytope-lp`."""

import time
from pathlib import Path
from typing import Any

import click
from core_tensor.cli import command_line, emit, json_option, progress, table

from polytope_lp.generate import KINDS, Marketplace

OUT = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path)


@command_line("polytope-lp")
def main() -> None:
    """Web-scale matching LPs: dual decomposition and projection onto any polytope."""


@main.command()
@click.option("--sources", type=int, default=1_000_000, help="Number of sources.")
@click.option("--destinations", type=int, default=1000, help="Number of destinations.")
@click.option("--degree", type=float, default=10.0, help="Mean edges per source.")
@click.option(
    "--kind", type=click.Choice([k for k in KINDS if k != "pacing"]), default="uncorrelated", help="Law of costs."
)
@click.option("--seed", type=int, default=0, help="Seed of everything.")
@click.option("-o", "--out", type=OUT, required=True, help="Problem folder to write.")
@json_option
def generate(out: Path, as_json: bool, **given: Any) -> None:
    """Generate a marketplace: edges/*.parquet, budgets.parquet and problem.json."""
    from polytope_lp.folders import write_marketplace
    from polytope_lp.generate import SOURCES_PER_BATCH

    market = Marketplace(**given)
    batches = -(-market.sources // SOURCES_PER_BATCH)
    edges = write_marketplace(market, out, lambda items: progress(items, "generate", batches, "batch"))
    emit({"out": str(out), "edges": edges, **given}, as_json, f"{out}: {edges:,} edges of {market.sources:,} sources")


@main.command()
@click.argument("problem", type=EXISTING)
@click.option("--budgets", type=EXISTING, help="Parquet file of budgets, if PROBLEM is a file of edges.")
@click.option("--cap", type=float, help="Most that one source may be matched; the problem's own (else 1) if absent.")
@click.option("--upper", type=float, help="Most of one edge; the problem's own if absent.")
@click.option("--tol", type=float, default=1e-4, help="Certified relative gap at which to stop.")
@click.option("--time-limit", type=float, help="Seconds after which the best point so far is written.")
@click.option("--threads", type=int, help="CPU threads; all that torch finds if absent.", show_default="all")
@click.option("--allow-unused-budgets", is_flag=True, help="Let budgets without any edge pass.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output folder.")
@click.option("-o", "--out", type=OUT, required=True, help="Solution folder to write.")
@json_option
def solve(
    problem: Path,
    budgets: Path | None,
    cap: float | None,
    upper: float | None,
    tol: float,
    time_limit: float | None,
    threads: int | None,
    allow_unused_budgets: bool,
    resume: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Solve a problem folder, or a Parquet file of edges, to a certified gap."""
    import torch

    from polytope_lp.folders import write_solution
    from polytope_lp.options import Options
    from polytope_lp.solve import solve as run
    from polytope_lp.tables import polytope_of, read_problem

    if threads is not None:
        torch.set_num_threads(threads)
    described = None if cap is None and upper is None else {"cap": cap, "upper": upper}
    loaded = read_problem(
        problem, budgets, None if described is None else polytope_of(described), allow_unused=allow_unused_budgets
    )
    state = out / "checkpoint.npz"
    if not resume:
        state.unlink(missing_ok=True)
    options = Options(tol=tol, time_limit=time_limit, checkpoint=state)
    nothing: list[int] = []
    with progress(nothing, "solve", unit="eval") as bar:

        def report(entry: dict[str, Any]) -> None:
            bar.update()
            gap = "-" if entry["gap"] is None else f"{entry['gap']:.2e}"
            bar.set_postfix(gap=gap, violation=f"{entry['violation']:.1e}", gamma=f"{entry['gamma']:.1e}")

        solution = run(loaded, options=options, report=report)
    write_solution(solution, out, problem, budgets, {"polytope": described, "allow_unused": allow_unused_budgets})
    state.unlink(missing_ok=True)
    result = {"out": str(out), **solution.certificate()}
    emit(result, as_json, lambda: _describe(result))


@main.command()
@click.argument("out", type=EXISTING)
@json_option
@click.pass_context
def verify(ctx: click.Context, out: Path, as_json: bool) -> None:
    """Recompute the claims of a solution folder from its input; exit code 1 if one does not hold."""
    from polytope_lp.folders import verify_folder

    result = verify_folder(out)

    def text() -> str:
        lines = ["every claim holds" if result["ok"] else "NOT verified", *result["problems"]]
        figures = ("objective", "lower_bound", "gap", "max_violation", "block_violation")
        return "\n".join([*lines, *(f"{name:16s} {result[name]}" for name in figures)])

    emit(result, as_json, text)
    if not result["ok"]:
        ctx.exit(1)


@main.command()
@click.option("--sources", type=int, default=200_000, help="Number of sources.")
@click.option("--tol", type=float, default=1e-4, help="Certified relative gap at which to stop.")
@click.option("-o", "--out", type=OUT, default=Path("polytope-lp-demo"), help="Folder to write.")
@json_option
def demo(sources: int, tol: float, out: Path, as_json: bool) -> None:
    """Generate a marketplace, solve it to a certified gap, and write allocation, prices and a convergence picture."""
    from polytope_lp.demo import run

    started = time.monotonic()
    result = run(sources, tol, out)
    result["seconds_total"] = round(time.monotonic() - started, 2)
    emit(result, as_json, lambda: _describe(result))


def _describe(result: dict[str, Any]) -> str:
    shown = {key: value for key, value in result.items() if not isinstance(value, (dict, list))}
    return table([{"figure": key, "value": value} for key, value in shown.items()], digits=8)
