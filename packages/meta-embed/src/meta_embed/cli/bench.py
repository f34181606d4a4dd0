"""`meta-embed bench`."""

import click
from core_tensor.app.cli import emit, json_option, table

from meta_embed.cli.generate import store_option


@click.command()
@store_option
@click.option("--batches", default="1,64,512", help="Keys per lookup, comma-separated.")
@click.option("--rounds", default=500, type=click.IntRange(10), help="Lookups of each size.")
@json_option
def bench(store: str, batches: str, rounds: int, as_json: bool) -> None:
    """Latency of lookups in a store, on this machine."""
    try:
        sizes = [int(part) for part in batches.split(",")]
    except ValueError as error:
        raise ValueError(f"batches: expected comma-separated integers, got {batches!r}") from error
    if min(sizes) < 1:
        raise ValueError(f"batches: expected positive sizes, got {batches!r}")
    from meta_embed.evaluate.latency import lookup_latency
    from meta_embed.store.address import open_store

    with open_store(store) as opened:
        keys = [key for key, _ in opened.members()]
        if not keys:
            raise ValueError(f"{store}: the store is empty")
        rows = [{"batch": size, **lookup_latency(opened, keys, size, rounds)} for size in sizes]
    emit({"store": store, "members": len(keys), "rows": rows}, as_json, lambda: table(rows))
