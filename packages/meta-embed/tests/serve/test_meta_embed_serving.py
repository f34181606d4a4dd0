"""Lookup, the HTTP scorer under load and under a store that changes, and the exported global block."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from core_tensor.app.serving import ARROW, Limits
from meta_embed.generate.job import GenerateOptions, generate
from meta_embed.generate.refresh import refresh
from meta_embed.model.build import build_model, save_model
from meta_embed.serve import scorer as scorer_module
from meta_embed.serve.export import export_global_block
from meta_embed.serve.lookup import Lookup
from meta_embed.serve.scorer import Scorer, build
from meta_embed.store.address import create_store, open_store
from meta_embed.store.codec import encode_key, encode_records

LIMITS = Limits(body_bytes=1 << 16, rows=200)


def _generate(trained, store, folder, version=None, events=None, precision="full"):
    model, config, vocabulary, own = trained.job()
    options = GenerateOptions(codec="float32", precision=precision, buckets=2)
    path = trained.parquet
    if events is not None:
        path = folder / "some.parquet"
        pa.parquet.write_table(events, path)
    generate(model, config, vocabulary, version or own, path, store, folder / "w", options)


@pytest.fixture(scope="module")
def store(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    _generate(trained, f"sqlite:{folder / 'v'}", folder)
    return f"sqlite:{folder / 'v'}"


@pytest.fixture
def client(trained, store):
    from fastapi.testclient import TestClient

    with TestClient(build(str(trained.run), store, float("inf"), False, LIMITS)) as found:
        yield found


def post(client, rows, path="/score", **options):
    return client.post(path, content=json.dumps({"rows": rows} | ({"options": options} if options else {})))


def _expected(trained, member, item):
    """Score of a member's stored vector by the definition."""
    model = trained.model()
    log = trained.events.latest(trained.config.episodes.support)
    place = log.keys.tolist().index(member)
    from meta_embed.tasks.ragged import task_batch

    chosen, none = np.asarray([place]), (np.zeros(1, np.int64),) * 2
    batch = task_batch(log, chosen, (log.offsets[:-1][chosen], log.counts[chosen]), none)
    e, _ = model.adapt(batch.member_ids, batch.member_dense, batch.support)
    row = trained.vocabulary["item"].index(item) + 1
    base, h = model.global_block(torch.tensor([[row]]), torch.zeros(1, 0))
    return float((base + (h * e).sum(-1)).sigmoid().detach())


# ----------------------------------------------------------------------------------------------------------- requests


def test_scores_are_those_of_the_stored_vectors(client, trained):
    answer = post(client, [{"member": 3, "item": 5}, {"member": 8, "item": 5}])
    assert answer.status_code == 200, answer.text
    assert answer.json()["known"] == [True, True]
    assert answer.json()["score"] == pytest.approx([_expected(trained, 3, 5), _expected(trained, 8, 5)], abs=1e-6)


def test_unknown_members_start_from_their_features_and_unknown_items_from_the_default(client, trained):
    features = [0.5, -1.0, 2.0, 0.0]
    rows = [{"member": 10**9, "item": 5, "profile": features}, {"member": 10**9, "item": 5}]
    found = post(client, [*rows, {"member": 3, "item": 10**9}]).json()
    assert found["known"] == [False, False, True]
    model = trained.model()
    vectors = post(client, [{"member": 10**9, "profile": features}], "/vectors").json()
    with torch.no_grad():
        prior = model.prior(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([features]))[0]
    assert vectors["vector"][0] == pytest.approx(prior.tolist(), abs=1e-6)
    assert vectors["events"] == [0]
    assert found["score"][0] != found["score"][1]


def test_exploration_repeats_with_a_seed_and_draws_once_per_member(client):
    rows = [{"member": 3, "item": 5}, {"member": 3, "item": 5}, {"member": 4, "item": 5}, {"member": 10**9, "item": 5}]
    one, again, other = (post(client, rows, explore=True, seed=s).json()["score"] for s in (1, 1, 2))
    assert one == again != other
    assert one[0] == one[1]
    assert post(client, rows).json()["score"] != one


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"member": None}, "expected a key in every row"),
        ({"member": "x"}, "member"),
        ({"member": 2**70}, "member"),
        ({"item": [1]}, "item"),
        ({"profile": [1.0]}, "profile: expected lists of 4 numbers"),
        ({"profile": [1.0, 2.0, 3.0, None]}, "profile"),
        ({"colour": 1}, "colour"),
    ],
)
def test_malformed_rows_are_refused_with_a_reason(client, row, message):
    good = {"member": 3, "item": 5, "profile": [0.0] * 4}
    answer = post(client, [good | row])
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]
    assert post(client, [good]).status_code == 200


def test_malformed_and_oversized_requests(client):
    for body in (b"", b"{", b"[]", b'{"rows": 5}', b'{"rows": [5]}', b"\xff" * 100, b'{"rows": [], "x": 1}'):
        assert client.post("/score", content=body).status_code == 400, body
    assert client.post("/score", content=b" " * (1 << 17)).status_code == 413
    assert post(client, [{"member": 1, "item": 1}] * 201).status_code == 413
    assert client.post("/score", content=b"{}", headers={"content-type": "text/csv"}).status_code == 415
    assert post(client, [{"member": 1, "item": 1}], explore=True, seed="x").status_code == 400
    assert post(client, [{"member": 1, "item": 1}], surprise=1).status_code == 400
    assert post(client, [{"member": 1}], "/vectors", explore=True).status_code == 400
    assert post(client, [{}]).status_code == 400
    assert post(client, []).json() == {"score": [], "known": [], "stale": []}
    assert client.get("/health").json()["status"] == "ok"
    assert 'meta_embed_requests_total{path="/score",status="413"} 2.0' in client.get("/metrics").text


def test_arrow_requests(client):
    table = pa.table({"member": [3, 4], "item": [5, 5]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer = client.post(
        "/score", content=sink.getvalue().to_pybytes(), headers={"content-type": ARROW, "accept": ARROW}
    )
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found["score"].to_pylist() == pytest.approx(post(client, table.to_pylist()).json()["score"])


# ----------------------------------------------------------------------------------------- load, and a changing store


@pytest.mark.parametrize("kind", ["lmdb", "sqlite", "parquet"])
def test_concurrent_requests_while_the_store_is_refreshed_and_generated_anew(trained, tmp_path, kind):
    """Every answer is that of one state of the store, whole, and good requests never fail."""
    from fastapi.testclient import TestClient

    where = f"{kind}:{tmp_path / 'v'}"
    early = trained.table.filter(pc.less(trained.table["member"], 60))
    _generate(trained, where, tmp_path, events=early)
    rows = [{"member": m, "item": 5} for m in (3, 70, 10**9)]
    with open_store(where) as opened:
        before = Lookup(opened)([3, 70]).known.tolist()
    assert before == [True, False]
    stop, answers = threading.Event(), []

    def ask(number):
        while not stop.is_set():
            body = rows if number % 3 else [{"member": "x", "item": 5}]
            answers.append((number % 3, post(client, body)))

    with (
        TestClient(build(str(trained.run), where, float("inf"), False, Limits(waiting=1000))) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        first = post(client, rows).json()
        work = [pool.submit(ask, number) for number in range(6)]
        try:
            if kind != "lmdb":  # which one process opens once; its refresh by another process is a test of the store
                with open_store(where, writer=True) as writer:
                    refresh(*trained.job(), iter([trained.table]), writer)
            _generate(trained, where, tmp_path)
            last = post(client, rows).json()
        finally:
            stop.set()
        for one in work:
            one.result()
    assert len(answers) >= 6
    assert first["known"] == [True, False, False]
    assert last["known"] == [True, True, False]
    for good, answer in answers:
        assert answer.status_code == (200 if good else 400), answer.text
        if good:
            assert (answer.json()["score"], answer.json()["known"]) in [(x["score"], x["known"]) for x in (first, last)]


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_a_store_of_another_version_is_refused_and_the_old_vectors_serve_on(trained, tmp_path, monkeypatch, kind):
    from fastapi.testclient import TestClient

    monkeypatch.setattr(scorer_module, "_RETRY", 0.0)
    where, rows = f"{kind}:{tmp_path / 'v'}", [{"member": 3, "item": 5}]
    _generate(trained, where, tmp_path)
    with TestClient(build(str(trained.run), where, float("inf"), False, LIMITS)) as client:
        score = post(client, rows).json()["score"]
        _generate(trained, where, tmp_path, version="another")
        assert post(client, rows).json()["score"] == score
        health = client.get("/health").json()
        assert post(client, rows).json()["score"] == score  # however often it is tried again
        assert "model version another" in health["refused_store"]
        assert health["store_version"] == trained.version
        _generate(trained, where, tmp_path)
        assert post(client, rows).json()["score"] == score
        assert client.get("/health").json()["refused_store"] is None
    _generate(trained, where, tmp_path, version="another")
    with pytest.raises(ValueError, match="generate anew, or allow stale vectors"):
        Scorer(str(trained.run), where)
    assert Scorer(str(trained.run), where, allow_stale=True).information()["store_version"] == "another"


def test_redis_generated_anew_under_a_scorer(trained, tmp_path, monkeypatch, redis_server):
    """Of the same model: served from the next request on. Of another: 503, because the old vectors are gone."""
    from fastapi.testclient import TestClient

    monkeypatch.setattr(scorer_module, "_RETRY", 0.0)
    where, rows = f"{redis_server}?prefix={tmp_path.name}:", [{"member": 3, "item": 5}, {"member": 70, "item": 5}]
    _generate(trained, where, tmp_path, events=trained.table.filter(pc.less(trained.table["member"], 60)))
    with TestClient(build(str(trained.run), where, float("inf"), False, LIMITS)) as client:
        assert post(client, rows).json()["known"] == [True, False]
        _generate(trained, where, tmp_path)
        assert post(client, rows).json()["known"] == [True, True]
        _generate(trained, where, tmp_path, version="another")
        answer = post(client, rows)
        assert answer.status_code == 503
        assert "generated anew" in answer.json()["error"]
        _generate(trained, where, tmp_path)
        assert post(client, rows).json()["known"] == [True, True]


def test_vectors_of_another_width_are_never_scored(trained, tmp_path):
    create_store(f"sqlite:{tmp_path / 'v'}", msgspec.structs.replace(_info(trained), width=7, version="other"), [])
    with pytest.raises(ValueError, match="holds vectors of width 7, not 4"):
        Scorer(str(trained.run), f"sqlite:{tmp_path / 'v'}", allow_stale=True)


def test_a_store_that_cannot_answer_is_not_the_clients_fault(trained, tmp_path):
    from fastapi.testclient import TestClient

    info = msgspec.structs.replace(_info(trained), cold=(0.0,) * 4)
    create_store(f"sqlite:{tmp_path / 'v'}", info, [(encode_key(3, "int"), b"short", b"")])
    with TestClient(build(str(trained.run), f"sqlite:{tmp_path / 'v'}", float("inf"), False, LIMITS)) as client:
        answer = post(client, [{"member": 3, "item": 5}])
        assert answer.status_code == 503
        assert "corrupt record" in answer.json()["error"]
        assert post(client, [{"member": 4, "item": 5}]).status_code == 200


def _info(trained):
    from meta_embed.store.codec import StoreInfo

    return StoreInfo(version=trained.version, width=trained.model().width, key="int", codec="float32")


def test_stale_vectors_are_reported(trained, tmp_path):
    from meta_embed.store.codec import Records

    info = msgspec.structs.replace(_info(trained), as_of=1000.0)
    records = Records(
        np.ones((2, 4), np.float32), np.asarray([100.0, 950.0]), np.asarray([1, 2]), np.zeros((2, 0), np.float32)
    )
    items = [(encode_key(k, "int"), v, b"") for k, v in zip((1, 2), encode_records(records, info), strict=True)]
    create_store(tmp_path / "v", info, items)
    with open_store(tmp_path / "v") as opened:
        found = Lookup(opened, trained.version, ttl=60.0)([1, 2, 3])
    assert found.stale.tolist() == [True, False, False]
    assert found.known.tolist() == [True, True, False]
    assert np.array_equal(found.vectors[2], np.zeros(4))


def test_exploration_without_precisions_is_refused(trained, tmp_path):
    where = f"sqlite:{tmp_path / 'v'}"
    _generate(trained, where, tmp_path, precision="none")
    found = Scorer(str(trained.run), where)
    rows = pa.table({"member": [3], "item": [5], "profile": pa.array([None], pa.list_(pa.float32()))})
    with pytest.raises(ValueError, match="explore needs a store generated with --precision"):
        found.score(rows, {"explore": True})


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(("hidden", "given"), [(0, False), (8, False), (0, True)])
def test_the_exported_global_block_scores_like_the_model(trained, tmp_path, hidden, given):
    columns = trained.config.columns
    if given:
        columns = msgspec.structs.replace(columns, row=(), base="base", vector="vector", vector_width=5)
    options = msgspec.structs.replace(trained.config.model, hidden=hidden)
    model = build_model(msgspec.structs.replace(trained.config, columns=columns, model=options), trained.vocabulary, 4)
    ids, dense = (0, 6) if given else (1, 0)
    worst = export_global_block(model, ids, dense, tmp_path / "g.pt2")
    assert worst <= 1e-6
    program = torch.export.load(tmp_path / "g.pt2").module()
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 50):
        e = torch.randn(rows, 4, generator=generator)
        x = torch.randn(rows, dense, generator=generator)
        which = torch.randint(0, 31, (rows, ids), generator=generator)
        with torch.no_grad():
            assert float((program(which, x, e) - model.logits(which, x, e).sigmoid()).abs().max()) <= 1e-6


def test_an_export_that_differs_is_refused(trained, tmp_path, monkeypatch):
    model = trained.model()
    monkeypatch.setattr("meta_embed.serve.export._TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="the exported program differs from the model"):
        export_global_block(model, 1, 0, tmp_path / "g.pt2")
    assert not (tmp_path / "g.pt2").exists()


def test_weights_and_description_of_two_models_are_refused(trained, tmp_path):
    from meta_embed.model.build import load_model

    model = build_model(trained.config, trained.vocabulary, 9)
    save_model(tmp_path, model, trained.config, trained.vocabulary)
    (tmp_path / "model.safetensors").write_bytes((trained.run / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not of the same version"):
        load_model(tmp_path)
