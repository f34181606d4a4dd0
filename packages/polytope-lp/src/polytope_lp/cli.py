"""The command `polytope-lp`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import (
    command_line,
    emit,
    json_option,
    out_option,
    overwrite_option,
    progress,
    quick_option,
    seed_option,
    table,
    threads_option,
)

from polytope_lp.matching.choices import KINDS, SOURCES_PER_BATCH

EXISTING = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
COLUMN_HELP = (
    "What a column is called: --column source=user --column cost=bid; several budgets per destination as "
    "--column budget=money,views --column cost=bid,ones. Names as in polytope_lp.Columns."
)
budgets_option = click.option("--budgets", type=EXISTING, help="Table of budgets, if PROBLEM is a table of edges.")
unused_option = click.option("--allow-unused-budgets", is_flag=True, help="Let budgets without any edge pass.")
column_option = click.option("--column", "named", multiple=True, metavar="NAME=COLUMN", help=COLUMN_HELP)
tol_option = click.option("--tol", type=float, default=1e-4, help="Certified relative gap at which to stop.")


@command_line("polytope-lp")
def main() -> None:
    """Web-scale matching LPs: dual decomposition and projection onto any polytope.

    Start with `polytope-lp demo`. Your own data: one table of edges (source, destination, value, cost), one of budgets
    (destination, budget), as Parquet or CSV, then `polytope-lp solve edges.parquet --budgets budgets.parquet -o out/`.
    """


@main.command()
@click.option("--sources", type=int, default=1_000_000, help="Number of sources.")
@click.option("--destinations", type=int, default=1000, help="Number of destinations.")
@click.option("--degree", type=float, default=10.0, help="Mean edges per source.")
@click.option(
    "--kind", type=click.Choice([k for k in KINDS if k != "pacing"]), default="uncorrelated", help="Law of costs."
)
@seed_option
@out_option("Problem folder to write.", folder=True, required=True)
@overwrite_option
@json_option
def generate(out: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Generate a marketplace: edges/*.parquet, budgets.parquet and problem.json."""
    from core_tensor.app.runs import RunFolder

    from polytope_lp.matching.generate import Marketplace
    from polytope_lp.runs.folders import write_marketplace

    market = Marketplace(**given)
    batches = -(-market.sources // SOURCES_PER_BATCH)
    with RunFolder.claim(out, "polytope-lp generate", given, overwrite=overwrite) as run:
        if run.result is None:
            edges = write_marketplace(
                market, out, lambda items: progress(items, "generate", batches, "batch"), resume=run.resumed
            )
            run.finish({"out": str(out), "edges": edges, **given})
        result = run.result or {}
    emit(result, as_json, f"{out}: {result['edges']:,} edges of {market.sources:,} sources")


@main.command()
@click.argument("problem", type=EXISTING)
@budgets_option
@click.option("--sources", type=EXISTING, help="File of caps by source (source, cap), where they differ.")
@click.option("--cap", type=float, help="Most that one source may be matched; the problem's own (else 1) if absent.")
@click.option("--upper", type=float, help="Most of one edge; the problem's own if absent.")
@column_option
@tol_option
@click.option("--time-limit", type=float, help="Seconds after which the best point so far is written.")
@threads_option
@unused_option
@click.option("--warm-start", type=EXISTING, help="Solution folder of a like problem whose prices to start from.")
@click.option("--resume", is_flag=True, hidden=True, help="What happens anyway.")
@click.option("--relax", is_flag=True, help="Take integer variables of an MPS model as continuous.")
@click.option("--plot", is_flag=True, help="Also draw convergence.png (needs polytope-lp[plot]).")
@out_option("Solution folder to write.", folder=True, required=True)
@overwrite_option
@json_option
def solve(
    problem: Path,
    budgets: Path | None,
    sources: Path | None,
    cap: float | None,
    upper: float | None,
    named: tuple[str, ...],
    allow_unused_budgets: bool,
    relax: bool,
    plot: bool,
    out: Path,
    as_json: bool,
    **rest: Any,
) -> None:
    """Solve a problem folder, a table of edges, or an MPS model, to a certified gap.

    Tables are Parquet or CSV files, or folders of Parquet as Spark writes them.

    Writes primal.arrow (source, destination, x), prices.parquet, certificate.json, history.parquet, policy.npz and
    input.json. The same command resumes where a killed run, or one that reached its time limit, stopped. Under
    torchrun (torchrun --nproc-per-node 2 -m polytope_lp solve ...) the ranks share the blocks.

    Of a model (.mps, .mps.gz) HiGHS finds the point and this command its proof: variables.parquet, rows.parquet,
    certificate.json and input.json, in the names and the sense of the file.
    """
    from core_tensor.app import figures

    from polytope_lp.plots import EXTRA, picture
    from polytope_lp.runs.folders import Source, read_history, read_prices
    from polytope_lp.runs.models import is_model
    from polytope_lp.tables.tables import overridden

    if is_model(problem):
        foreign = {"budgets": budgets, "sources": sources, "cap": cap, "upper": upper, "column": named, "plot": plot}
        foreign |= {"allow-unused-budgets": allow_unused_budgets, "warm-start": rest["warm_start"]}
        _refuse(foreign, "none for an MPS model, which says it all")
        found = _solve_model(problem, out, relax, rest["tol"], rest["time_limit"], rest["overwrite"])
        emit(found, as_json, lambda: _describe(found))
        return
    _refuse({"relax": relax}, "an MPS model, .mps or .mps.gz")
    if plot:
        figures.check(out / "convergence.png", EXTRA)
    described = None if cap is None and upper is None else overridden(problem, budgets, cap, upper)
    read = {"polytope": described, "columns": _columns(named) or None, "allow_unused": allow_unused_budgets}
    result = _solve(Source.of(problem, budgets, sources, read), out, **rest)
    if result is None:
        return
    if plot:
        title = f"{result['edges']:,} edges, {result['status']}"
        drawn = picture(read_history(out), read_prices(out), out / "convergence.png", title)
        result = result | {"picture": str(drawn)}
    emit(result, as_json, lambda: _describe(result))


def _refuse(options: dict[str, Any], expected: str) -> None:
    given = next((name for name, value in options.items() if value not in (None, (), False)), None)
    if given is not None:
        raise ValueError(f"--{given}: expected {expected}")


def _solve_model(
    path: Path, out: Path, relax: bool, tol: float, time_limit: float | None, overwrite: bool
) -> dict[str, Any]:
    """Solve an MPS model into a run folder."""
    from core_tensor.app.runs import RunFolder

    from polytope_lp.general.block_solution import solve_blocks
    from polytope_lp.general.mps import read_mps
    from polytope_lp.runs.models import model_certificate, model_source, write_model_solution

    model = read_mps(path, relax=relax)
    source = model_source(path, relax=relax)
    inputs = {"model": source["sha256"], "relax": relax, "tol": tol}
    with RunFolder.claim(out, "polytope-lp solve", inputs, overwrite=overwrite) as run:
        if run.result is not None:
            return run.result
        solution = solve_blocks(model.lp, tol, time_limit)
        write_model_solution(model, solution, out, source)
        size = {"name": model.name, "variables": model.lp.c.size, "rows": model.lp.b.size}
        result = {"out": str(out), **size, **model_certificate(model, solution)}
        if solution.status != "time_limit":
            run.finish(result)
        return result


def _solve(
    source: Any,
    out: Path,
    tol: float,
    time_limit: float | None,
    warm_start: Path | None,
    overwrite: bool,
    resume: bool,
) -> dict[str, Any] | None:
    """Solve into a run folder; the result, or None on ranks that do not report."""
    import torch
    from core_tensor.app import ranks
    from core_tensor.app.files import sha256
    from core_tensor.app.runs import RunFolder

    from polytope_lp.matching.options import Options
    from polytope_lp.runs.folders import write_solution
    from polytope_lp.runs.ranks import solution_of_all
    from polytope_lp.solve import solve as run_solver

    del resume
    state = out / "checkpoint.npz"
    options = Options(tol=tol, time_limit=time_limit, checkpoint=state)
    loaded = source.problem()
    start = None if warm_start is None else _prices(warm_start, loaded.rows) * loaded.row_sign.numpy()
    inputs = {
        "files": sorted(source.sha256.values()),
        "read": source.read,
        "tol": tol,
        "warm_start": None if warm_start is None else sha256(warm_start / "prices.parquet"),
    }
    nothing: list[int] = []
    with ranks.join() as all_ranks:
        first, group = all_ranks.first, torch.distributed.group.WORLD if all_ranks.size > 1 else None
        with (
            RunFolder.claim(out, "polytope-lp solve", inputs, overwrite=overwrite, ranks=all_ranks) as run,
            progress(nothing, "solve", unit="eval") as bar,
        ):
            if all_ranks.share(run.result) is not None:
                return run.result if first else None
            shard = loaded if group is None else loaded.shard(all_ranks.rank, all_ranks.size)

            def report(entry: dict[str, Any]) -> None:
                if first:
                    bar.update()
                    gap = "-" if entry["gap"] is None else f"{entry['gap']:.2e}"
                    bar.set_postfix(gap=gap, violation=f"{entry['violation']:.1e}", gamma=f"{entry['gamma']:.1e}")

            own = run_solver(shard, group=group, options=options, report=report, warm_start=start)
            solution = solution_of_all(own, loaded, all_ranks)
            if not first:
                return None
            write_solution(solution, out, source)
            result = {"out": str(out), **solution.certificate()}
            if solution.status not in {"time_limit", "evaluation_limit"}:
                run.finish(result)
                for file in out.glob("checkpoint*.npz"):
                    file.unlink(missing_ok=True)
            return result


@main.command()
@click.argument("problem", type=EXISTING)
@budgets_option
@unused_option
@out_option("Folder to write.", folder=True, required=True)
@overwrite_option
@json_option
def pack(
    problem: Path, budgets: Path | None, allow_unused_budgets: bool, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Turn Parquet into arrays that solve maps from disk, for problems larger than memory.

    Edges sorted by source stream from file to file. Every command that takes a problem folder takes the result.
    """
    from polytope_lp.tables.pack import pack as run

    packed = run(problem, out, budgets, overwrite=overwrite, allow_unused=allow_unused_budgets)
    result = {"out": str(out), "sources": packed.data.blocks, "edges": packed.data.variables}
    emit(result, as_json, lambda: f"{out}: {packed.data.variables:,} edges of {packed.data.blocks:,} sources")


@main.command()
@click.argument("out", type=EXISTING)
@json_option
@click.pass_context
def verify(ctx: click.Context, out: Path, as_json: bool) -> None:
    """Recompute the claims of a solution folder from its input; exit code 1 if one does not hold."""
    from polytope_lp.runs.folders import verify_folder

    result = verify_folder(out)

    def text() -> str:
        lines = ["every claim holds" if result["ok"] else "NOT verified", *result["problems"]]
        figures = ("objective", "lower_bound", "gap", "max_violation", "block_violation")
        return "\n".join([*lines, *(f"{name:16s} {result[name]}" for name in figures if name in result)])

    emit(result, as_json, text)
    if not result["ok"]:
        ctx.exit(1)


@main.command("export-policy")
@click.argument("out", type=EXISTING)
@click.option("-o", "--policy", type=FILE, required=True, help="File to write: .npz or .json.")
@click.option("--gamma", type=float, help="Sharpness; smaller is sharper. The solution's own if absent.")
@click.option("--scorer", type=FILE, help="Also write the scoring code as one Python file that needs numpy only.")
@json_option
def export_policy(out: Path, policy: Path, gamma: float | None, scorer: Path | None, as_json: bool) -> None:
    """Export the prices of a solution as a rule that allocates unseen sources at request time."""
    import dataclasses

    from core_tensor.app.files import write_text

    from polytope_lp.serving import policy as serving

    rule = serving.Policy.load(out / "policy.npz")
    if gamma is not None:
        rule = dataclasses.replace(rule, gamma=gamma)
    rule.save(policy)
    if scorer is not None:
        write_text(scorer, Path(serving.__file__).read_text(encoding="utf-8"))
    result = {
        "policy": str(policy),
        "scorer": scorer and str(scorer),
        "destinations": rule.lam.size // rule.resources,
        "gamma": rule.gamma,
        "needs": list(rule.needs),
    }
    emit(result, as_json, lambda: _describe(result))


@main.command()
@click.argument("policy", type=FILE)
@click.argument("edges", type=EXISTING)
@column_option
@out_option("Parquet file to write: source, destination, x.", required=True)
@json_option
def score(policy: Path, edges: Path, named: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Allocate the sources of a table of EDGES by an exported POLICY (or a solution's policy.npz)."""
    from polytope_lp.serving.policy import Policy
    from polytope_lp.tables.columns import columns_of
    from polytope_lp.tables.scoring import score_file

    result = score_file(Policy.load(policy), edges, columns_of(_columns(named)), out)
    emit(result, as_json, lambda: _describe(result))


@main.command()
@click.argument("out", type=EXISTING)
@click.option("--spent", type=EXISTING, required=True, help="Table: destination, spent (and resource).")
@click.option("--elapsed", type=float, required=True, help="Part of the period that has passed, in (0, 1].")
@click.option("-o", "--report", type=FILE, help="Parquet file for the whole report; the ten worst are printed.")
@json_option
def pacing(out: Path, spent: Path, elapsed: float, report: Path | None, as_json: bool) -> None:
    """Compare what the budgets have spent with the plan of a solution folder."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from core_tensor.app.files import atomic_path

    from polytope_lp.runs.folders import read_prices
    from polytope_lp.serving.pacing import pacing_report, spent_by_row
    from polytope_lp.tables.files import read_table

    plan = read_prices(out)
    found = pacing_report(plan, spent_by_row(read_table(spent), plan), elapsed)
    if report is not None:
        with atomic_path(report) as temporary:
            pq.write_table(found, temporary)
    states = {row["values"]: row["counts"] for row in pc.value_counts(found["state"]).to_pylist()}
    off = pc.abs(pc.subtract(found["projected"], found["planned"]))
    worst = found.take(pc.sort_indices(off, sort_keys=[("", "descending")])[:10])
    result = {"budgets": found.num_rows, "states": states, "report": report and str(report)}
    emit(result, as_json, lambda: f"{states}\n" + table(worst.to_pylist()))


@main.command()
@click.option("--sources", type=int, default=100_000, help="Number of sources.")
@click.option("--destinations", type=int, default=1000, help="Number of destinations.")
@tol_option
@threads_option
@json_option
def bench(sources: int, destinations: int, tol: float, as_json: bool) -> None:
    """Time this machine: one evaluation of the dual at several ridges, and a solve to a certified gap.

    Comparisons with other solvers are in the repository: `uvx nox -s bench -- polytope-lp`.
    """
    from polytope_lp.matching.generate import Marketplace
    from polytope_lp.timing import time_machine

    result = time_machine(Marketplace(sources=sources, destinations=destinations), tol)
    emit(result, as_json, lambda: f"{_describe(result)}\n\n{table(result['ridges'])}")


@main.command()
@click.option("--sources", type=int, default=200_000, help="Number of sources; --quick takes a tenth.")
@tol_option
@seed_option
@threads_option
@quick_option
@out_option("Folder to write.", folder=True, default="polytope-lp-demo")
@overwrite_option
@json_option
def demo(sources: int, tol: float, seed: int, quick: bool, out: Path, overwrite: bool, as_json: bool) -> None:
    """Generate a marketplace, solve it to a certified gap, and write allocation, prices and a convergence picture."""
    from polytope_lp.demo import run

    result = run(max(1, sources // 10) if quick else sources, tol, seed, out, overwrite=overwrite)
    emit(result, as_json, lambda: _describe(result))


def _columns(named: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for pair in named:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise ValueError(f"--column: expected NAME=COLUMN, got {pair!r}")
        result[name] = column.split(",") if "," in column else column
    return result


def _prices(out: Path, rows: int) -> Any:
    import numpy as np

    from polytope_lp.runs.folders import read_prices

    lam = np.asarray(read_prices(out).column("price"), dtype=np.float64).copy()
    if lam.shape[0] != rows:
        raise ValueError(f"--warm-start: {out} has {lam.shape[0]} prices, but this problem has {rows} rows")
    return lam


def _describe(result: dict[str, Any]) -> str:
    shown = {key: value for key, value in result.items() if not isinstance(value, (dict, list))}
    return table([{"figure": key, "value": value} for key, value in shown.items()], digits=8)
