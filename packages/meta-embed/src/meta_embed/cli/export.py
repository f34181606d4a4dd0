"""`meta-embed export`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@out_option("File to write.", default="global_block.pt2")
@json_option
def export(run: Path, out: Path, as_json: bool) -> None:
    """Write RUN's global block as a torch.export program (ids, dense, vector) -> probability, checked on the way."""
    from meta_embed.model.build import load_model
    from meta_embed.serve.export import export_global_block

    model, config, _, version = load_model(run)
    ids = sum(f.kind == "id" for f in config.columns.row)
    dense = sum(f.width for f in config.columns.dense_row)
    worst = export_global_block(model, ids, dense, out)
    result = {"file": str(out), "version": version, "max_diff": worst}
    emit(result, as_json, f"global block {version}, largest difference from the model {worst:g}\nfile: {out}")
