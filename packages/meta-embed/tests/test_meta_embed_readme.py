"""The README's Python runs as it stands, its options are read, and its commands exist."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from meta_embed.cli import main
from meta_embed.config import parse_config
from meta_embed.tasks.encode import build_vocabulary
from meta_embed.tasks.events import build_events

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "sh", "yaml")}


@pytest.mark.parametrize("number", range(2))
def test_python(number, tmp_path, monkeypatch):
    assert len(BLOCKS["python"]) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS["python"][number], "README.md", "exec"), {})
    if number == 0:  # its events fit the options
        (options,) = BLOCKS["yaml"]
        columns = parse_config(yaml.safe_load(options)).columns
        for folder in ("events", "new"):
            table = pq.read_table(tmp_path / folder)
            assert len(build_events(table, columns, build_vocabulary(table, columns))) > 100


def test_commands_and_their_options():
    lines = [line.split("#")[0].split() for block in BLOCKS["sh"] for line in block.splitlines()]
    commands = [line[1:] for line in lines if line[:1] == ["meta-embed"]]
    assert len(commands) == 6
    for name, *arguments in commands:
        known = {option for p in main.commands[name].params for option in p.opts}
        assert {a for a in arguments if a.startswith("-")} <= known
