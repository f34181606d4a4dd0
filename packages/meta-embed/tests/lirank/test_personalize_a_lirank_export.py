"""A ranker of the package lirank, personalized through its files alone: its exported program gives the logits, its
table the item vectors, and neither package imports the other."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from core_tensor.ops.stable_hash import stable_hash
from meta_embed.cli import main
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lirank") is None, reason="lirank is not installed")

ITEMS, MEMBERS, EVENTS, ROWS = 24, 240, 40, 64
UNSEEN = 1  # lirank's row of ids that training never met

SCHEMA = f"""
time: {{column: time}}
labels: [{{name: clicked}}]
features:
- {{kind: id, name: item, vocabulary: static, rows: {ROWS}}}
- {{kind: id, name: member, vocabulary: static, rows: 256}}
"""
CONFIG = """
columns: {entity: member, time: time, label: clicked, base: base, vector: vector, vector_width: 8, event: number}
model: {width: 9, precision: 2.0}
train: {epochs: 15, warm_epochs: 0, lr: 0.02, held_back: 0.2, tested: 0.3}
episodes: {support: 16, query: 16}
"""
LIRANK = """
import sys
from lirank.cli import main
folder = sys.argv[1]
train = ["train", f"{folder}/log.parquet", "--schema", f"{folder}/schema.yaml", "--model", f"{folder}/model.yaml",
         "--epochs", "12", "--batch-size", "256", "--row-lr", "0.05", "--lr", "0.01", "-o", f"{folder}/ranker"]
main(train, standalone_mode=False)
main(["export", f"{folder}/ranker", "-o", f"{folder}/ranker.pt2", "--table", "float32"], standalone_mode=False)
"""


def _log():
    """Members who differ in taste; time runs over all of them together."""
    rng = np.random.default_rng(0)
    member = np.repeat(np.arange(MEMBERS), EVENTS)
    item = rng.integers(ITEMS, size=len(member))
    taste, kind = rng.standard_normal((MEMBERS, 2)), 1.5 * rng.standard_normal((ITEMS, 2))
    z = (taste[member] * kind[item]).sum(1) + 0.5 * rng.standard_normal(ITEMS)[item]
    order = rng.permutation(len(member))
    clicked = (rng.random(len(member)) < 1 / (1 + np.exp(-z))).astype(np.int64)
    return pa.table({"member": member[order], "item": item[order], "clicked": clicked[order]}).append_column(
        "time", pa.array(np.arange(len(member)))
    )


def _rows_of_items(folder):
    """The table row of every item, from the files of the run."""
    encoder = load_file(folder / "ranker" / "encoder.safetensors")
    row = dict(zip(encoder["vocabulary.item.keys"].tolist(), encoder["vocabulary.item.row"].tolist(), strict=True))
    return torch.tensor([row.get(key, UNSEEN) for key in stable_hash(torch.arange(ITEMS))[:, 0].tolist()])


@pytest.mark.slow
def test_members_whom_the_ranker_never_saw_get_a_vector_on_top_of_it(tmp_path, capsys):
    before, log = _loaded(), _log()
    known = pa.compute.less(log["member"], MEMBERS // 2)
    pq.write_table(log.filter(known), tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    (tmp_path / "model.yaml").write_text("{dim: 8, widths: [16], cross_rank: 4}")
    subprocess.run([sys.executable, "-c", LIRANK, str(tmp_path)], check=True, capture_output=True)

    # the ranker's logit of every item for a member whom it does not know, and its item vectors
    row = _rows_of_items(tmp_path)
    program = torch.export.load(tmp_path / "ranker.pt2").module()
    ids = torch.stack([row, torch.full_like(row, ROWS + UNSEEN)], 1)
    with torch.no_grad():
        base = program(ids, torch.zeros(ITEMS, 0))[:, 0].logit()
    vector = load_file(tmp_path / "ranker" / "model.safetensors")["table.weight"][row]

    new = log.filter(pa.compute.invert(known))
    item = torch.from_numpy(new["item"].to_numpy().copy())
    events = new.drop_columns(["item"]).append_column("base", pa.array(base[item].numpy()))
    events = events.append_column(
        "vector", pa.FixedSizeListArray.from_arrays(pa.array(vector[item].numpy().ravel()), 8)
    )
    events = events.append_column("number", events["time"])
    pq.write_table(events, tmp_path / "events.parquet")
    (tmp_path / "c.yaml").write_text(CONFIG)
    main(["train", str(tmp_path / "events.parquet"), "-c", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "run")],
         standalone_mode=False)  # fmt: skip
    capsys.readouterr()
    arguments = ["--baselines", "none", "--query", "16", "--start", "16", "--json"]
    main(["evaluate", str(tmp_path / "run"), *arguments], standalone_mode=False)
    rows = {row["support"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows[16]["ours_auc"] > rows[16]["none_auc"] + 0.05
    assert _loaded() == before


def _loaded():
    return [name for name in sys.modules if name.split(".")[0] == "lirank"]
