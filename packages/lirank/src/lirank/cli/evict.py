"""`lirank evict`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, table

from lirank.cli.options import run_argument


@click.command()
@run_argument
@out_option("Folder for the smaller run.", folder=True, required=True)
@click.option("--unseen-for", type=click.FloatRange(0, min_open=True), help="Days: forget ids not met for longer.")
@click.option(
    "--keep",
    "keeps",
    metavar="FEATURE=N",
    multiple=True,
    help="Let only the N most frequent ids of a static vocabulary keep their rows; the others are rare from then on.",
)
@overwrite_option
@json_option
def evict(
    run: Path, out: Path, unseen_for: float | None, keeps: tuple[str, ...], overwrite: bool, as_json: bool
) -> None:
    """Take rows from ids of RUN that are stale or infrequent, and count them; train --from it to give the rows away.

    Forgotten ids score as unseen ones, and histories and popularity of forgotten keys begin anew. All other scores stay
    as they are.
    """
    from core_tensor.app.files import digest
    from core_tensor.app.runs import RunFolder

    from lirank.train.run import MODEL
    from lirank.workflow import evict_run

    kept = _kept(keeps, unseen_for)
    inputs = {"run": digest(run / MODEL), "unseen_for": unseen_for, "keep": kept}
    with RunFolder.claim(out, "lirank evict", inputs, overwrite=overwrite) as claimed:
        if claimed.result is None:
            claimed.finish(evict_run(run, claimed.path, unseen_for, kept))
        found = claimed.result or {}
    rows = [{"feature": name} | entry for name, entry in found["features"].items()]
    emit(found, as_json, lambda: f"{table(rows)}\nkeys forgotten by histories and popularity: {found['causal']}")


def _kept(entries: tuple[str, ...], unseen_for: float | None) -> dict[str, int]:
    if unseen_for is None and not entries:
        raise click.UsageError("expected --unseen-for, --keep, or both")
    found = {}
    for entry in entries:
        name, _, count = entry.rpartition("=")
        if not name or not count.isdecimal():
            raise click.UsageError(f"--keep: expected FEATURE=N, got {entry!r}")
        found[name] = int(count)
    return found
