"""`meta-embed refresh`."""

from pathlib import Path

import click
from core_tensor.app.cli import device_option, emit, json_option, threads_option

from meta_embed.cli.generate import events_option, store_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@events_option
@store_option
@device_option
@threads_option
@json_option
def refresh(run: Path, events: Path, store: str, device: str, as_json: bool) -> None:
    """Bring new EVENTS into a store: only their members get a new vector. Delivering events twice changes nothing."""
    from meta_embed.generate.refresh import refresh_from_files
    from meta_embed.model.build import load_model
    from meta_embed.store.address import open_store

    model, config, vocabulary, version = load_model(run)
    with open_store(store, writer=True) as target:
        result = refresh_from_files(model.to(device), config, vocabulary, version, events, target, device)
    text = f"{result['members']} members changed, {result['new']} of them new, by {result['events']} events"
    emit(result, as_json, text)
