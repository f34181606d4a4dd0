import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from lirank.features.causal import CausalFeatures
from lirank.serve import deploy
from lirank.serve.checks import check_feeds, input_names
from lirank.serve.export import OnnxModel, ServedModel, TorchModel, export_program, feeds_of
from lirank.serve.monitor import DriftMonitor
from lirank.serve.scorer import Scorer, build, request_schema


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    trained.save(folder)
    return folder


@pytest.fixture(scope="module")
def batch(prepared, trained):
    return trained.encoder.encode(next(prepared.log("test").read(rows=100)))


@pytest.fixture(scope="module")
def onnx(trained, batch, run):
    path = run / "model.onnx"
    deploy.export(trained, batch, path)
    return path


def test_exports_score_like_the_model(trained, batch, onnx, run):
    served = ServedModel(trained.model)
    expected = TorchModel(served)(feeds_of(served, batch))
    program = export_program(served, batch.take(torch.arange(2)))
    for rows in (1, 2, 33, 100):
        feeds = feeds_of(served, batch.take(torch.arange(rows)))
        found = OnnxModel(onnx)(feeds)
        assert np.abs(found - expected[:rows]).max() < 1e-5
        traced = program.module()(*(torch.from_numpy(a) for a in feeds.values())).detach().numpy()
        assert np.abs(traced - expected[:rows]).max() < 1e-5
    assert deploy.export(trained, batch, run / "model.pt2")["max_difference"] < 1e-5
    assert np.abs(expected - trained.model.predict(batch).numpy()).max() < 0.02


def test_an_example_of_one_row_is_refused(trained, batch, tmp_path):  # pytorch#151582
    with pytest.raises(ValueError, match="at least 2 rows"):
        export_program(ServedModel(trained.model), batch.take(torch.arange(1)))
    with pytest.raises(ValueError, match=r"\.onnx or \.pt2"):
        deploy.export(trained, batch, tmp_path / "model.txt")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids", lambda a: np.where(a == a[0, 0], -1, a), "ids: row 0, column 0: .*got -1"),
        ("ids", lambda a: a + 10**6, "ids: "),
        ("ids", lambda a: a[:, [1, 0, 2, 3]], "ids: "),  # in the table, but another feature's rows
        ("ids", lambda a: a[:, :2], "ids: expected shape"),
        ("dense", lambda a: np.full_like(a, np.nan), "dense: row 0, price: .*nan"),
        ("dense", lambda a: np.full_like(a, np.inf), "dense: "),
        ("seen", lambda a: np.full_like(a, -1), "seen: "),
        ("seen.lengths", lambda a: a + 99, r"seen\.lengths: "),
        ("seen.action", lambda a: a + 5, r"seen\.action: "),
        ("tags.lengths", lambda a: a[:-1], r"tags\.lengths: expected 100 rows"),
    ],
)
def test_nothing_bad_reaches_the_runtime(trained, batch, name, change, message):
    served = ServedModel(trained.model)
    feeds = feeds_of(served, batch)
    check_feeds(served.layout, feeds)
    with pytest.raises(ValueError, match=message):
        check_feeds(served.layout, feeds | {name: change(feeds[name])})
    with pytest.raises(ValueError, match="missing"):
        check_feeds(served.layout, {k: v for k, v in feeds.items() if k != name})


def test_onnxruntime_would_not_have_noticed(trained, batch, onnx):
    """Why the checks exist: the runtime takes id -1 for the last row."""
    served = ServedModel(trained.model)
    feeds = feeds_of(served, batch)
    found = OnnxModel(onnx)(feeds | {"ids": np.where(feeds["ids"] == feeds["ids"][0, 0], -1, feeds["ids"])})
    assert np.isfinite(found).all()


def test_a_log_replayed_gets_the_scores_it_gets_offline(prepared, trained, onnx):
    log = pa.concat_tables([prepared.log(part).read().__next__() for part in ("train", "valid")]).slice(0, 400)
    raw = log.select([n for n in log.column_names if n.split(".")[0] not in {"seen", "item_rate", "pair_rate"}])
    offline_memory = CausalFeatures(trained.encoder.schema, 1.0)
    served = ServedModel(trained.model)
    offline = TorchModel(served)(feeds_of(served, trained.encoder.encode(offline_memory.extend(raw))))
    scorer = Scorer(trained, OnnxModel(onnx), CausalFeatures(trained.encoder.schema, 1.0))
    requests = request_schema(trained.encoder.schema)
    online = []
    for row in range(raw.num_rows):
        online.append(scorer.score(raw.slice(row, 1).select(requests.names)))
        scorer.observe(raw.slice(row, 1))
    assert np.abs(np.concatenate(online) - offline).max() <= 1e-6
    assert scorer.monitor.report()["rows"] > 300


def test_an_export_of_another_run_is_refused(run, onnx, tmp_path):
    import onnx as format_

    graph = format_.load(onnx)
    (bias,) = [i for i in graph.graph.initializer if i.name == "network.tasks.heads.0.bias"]
    bias.CopyFrom(format_.numpy_helper.from_array(format_.numpy_helper.to_array(bias) + 1, bias.name))
    format_.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="export of this run"):
        Scorer.open(run, tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.onnx: expected an ONNX model"):
        Scorer.open(run, tmp_path / "broken.onnx")


# --- HTTP


@pytest.fixture(scope="module")
def client(run, onnx):
    from fastapi.testclient import TestClient

    with TestClient(build(run, onnx)) as found:
        yield found


ROW = {"time": 10**9, "user": 3, "item": "item-5", "city": 2, "price": 1.5, "age": 40.0, "tags": ["t1"]}


def post(client, rows, **options):
    return client.post("/score", content=json.dumps({"rows": rows} | options))


def test_requests_are_answered(client):
    answer = post(client, [ROW, ROW | {"item": "never seen"}, ROW | {"user": None, "age": None, "tags": None}])
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert set(found) == {"click", "like"}
    assert all(0 < p < 1 for column in found.values() for p in column)
    assert len(found["click"]) == 3
    assert client.get("/health").json()["columns"] == ["user", "item", "city", "price", "age", "tags", "time"]
    assert "lirank_requests" in client.get("/metrics").text
    assert post(client, []).json() == {"click": [], "like": []}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"price": None}, "column 'price': row 0 is null"),
        ({"price": -2.0}, "log1p"),
        ({"price": "cheap"}, "price"),
        ({"user": 2**70}, "user"),
        ({"user": "x"}, "user"),
        ({"colour": 1}, "colour"),
        ({"time": -1}, "earlier than events"),
    ],
)
def test_malformed_rows_are_refused_with_a_reason(client, row, message):
    answer = post(client, [ROW | row])
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]
    assert post(client, [ROW]).status_code == 200


def test_missing_columns_and_broken_bodies(client):
    assert post(client, [{"user": 1}]).status_code == 400
    for body in (b"", b"{", b"[]", b'{"rows": 5}', b'{"rows": [5]}', b"\xff" * 100, b'{"rows": [], "x": 1}'):
        assert client.post("/score", content=body).status_code == 400
    assert client.post("/score", content=b"x" * (9 << 20)).status_code == 413
    assert post(client, [ROW], options={"explore": 1}).status_code == 400


def test_arrow_bodies_score_like_json(client, trained):
    from core_tensor.app.serving import ARROW

    rows = [ROW | {"user": user} for user in range(512)]
    expected = post(client, rows).json()["click"]
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer = client.post(
        "/score", content=sink.getvalue().to_pybytes(), headers={"content-type": ARROW, "accept": ARROW}
    )
    found = pa.ipc.open_stream(answer.content).read_all()["click"].to_pylist()
    assert found == pytest.approx(expected, abs=1e-7)


def test_events_are_remembered(run, onnx):
    from fastapi.testclient import TestClient

    with TestClient(build(run, onnx)) as client:
        before = post(client, [ROW]).json()["click"]
        event = ROW | {"time": 10**9 - 5, "click": 1, "like": None}
        assert client.post("/observe", content=json.dumps({"rows": [event]})).status_code == 200
        assert post(client, [ROW]).json()["click"] != before
        assert client.get("/health").json()["calibration"]["rows"] == 1
        assert post(client, [ROW | {"time": 5}]).status_code == 400
    with TestClient(build(run, onnx, remember=False)) as client:
        assert client.post("/observe", content=b"{}").status_code in {404, 405}


@pytest.mark.parametrize("count", [400, pytest.param(2400, marks=pytest.mark.slow)])
def test_concurrent_requests_get_their_own_answers(run, onnx, count):  # onnxruntime#3099
    """Requests of 1 to 3 rows, 32 at a time, straight into the application."""
    import asyncio

    import httpx

    application = build(run, onnx)

    async def ask(client, users):
        answer = await client.post("/score", json={"rows": [ROW | {"user": user} for user in users]})
        return answer.json()["click"] if answer.status_code == 200 else answer.status_code

    async def everything():
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://lirank") as client:
            expected = await ask(client, range(40))
            wanted = [[(7 * i + j) % 40 for j in range(1 + i % 3)] for i in range(count)]
            found = []
            for start in range(0, len(wanted), 32):
                found += await asyncio.gather(*(ask(client, users) for users in wanted[start : start + 32]))
        return expected, wanted, found

    expected, wanted, found = asyncio.run(everything())
    assert [answer for answer in found if isinstance(answer, int)] == []
    for users, answer in zip(wanted, found, strict=True):
        assert answer == pytest.approx([expected[user] for user in users], abs=1e-6)


def test_one_thread_inside_a_request(onnx):
    options = OnnxModel(onnx)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


# --- compression, calibration, drift


def test_compression_is_measured(trained, batch, tmp_path):
    found = deploy.compress(trained, batch, tmp_path / "table.safetensors")
    assert found["ratio"] == pytest.approx(32 / 14)
    assert found["relative_error"] < 0.01
    assert found["labels"]["click"]["int8"]["auc"] == pytest.approx(
        found["labels"]["click"]["float32"]["auc"], abs=0.01
    )
    assert (tmp_path / "table.safetensors").stat().st_size > 0


def test_recalibration_fixes_a_shifted_world(trained, prepared):
    import copy

    model = copy.deepcopy(trained)
    batch = trained.encoder.encode(next(prepared.log("train").read()))
    with torch.no_grad():
        logits = model.model.network(model.model.vectors(batch), None, calibrate=False).numpy()
    rng = np.random.default_rng(0)
    labels = (rng.random(logits.shape) < 1 / (1 + np.exp(2.0 - logits))).astype(np.float32)
    context = model.model.vectors(batch).context.numpy()
    found = deploy.recalibrate(model, {"logits": logits, "labels": labels, "context": context})
    for entry in found.values():
        assert entry["after"]["logloss"] < entry["before"]["logloss"]
    assert float(model.model.predict(batch)[:, 0].mean()) == pytest.approx(float(labels[:, 0].mean()), rel=0.05)


def test_contexts_with_enough_labels_have_their_own_curve(trained):
    import copy

    model, rng = copy.deepcopy(trained), np.random.default_rng(0)
    n = 12_000
    logits, context = rng.normal(size=(n, 2)).astype(np.float32), rng.choice([3, 4, 5], size=n, p=(0.49, 0.49, 0.02))
    shift = np.array([0, 0, 0, 1.0, -1.0, 1.0])[context][:, None]
    labels = (rng.random((n, 2)) < 1 / (1 + np.exp(-logits - shift))).astype(np.float32)
    found = deploy.recalibrate(model, {"logits": logits, "labels": labels, "context": context}, "platt")
    for t, entry in enumerate(found.values()):
        assert entry["contexts"] == 2
        assert entry["after"]["logloss"] < entry["before"]["logloss"] - 0.05
        layer = model.model.network.calibration[t]
        z = torch.linspace(-2, 2, 9)
        for number, expected in ((3, 1.0), (4, -1.0), (5, 0.0)):  # too few labels in the last: the shared curve
            curve = layer(z, torch.full((9,), number))
            torch.testing.assert_close(curve.mean(), torch.tensor(expected), rtol=0, atol=0.15)


def test_the_monitor_raises_an_alarm_on_drift_only():
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(memory=20_000)
    assert monitor.report()["alarm"] is False
    p = rng.random(20_000) * 0.2
    monitor.add(p, (rng.random(20_000) < p).astype(float))
    assert monitor.report()["alarm"] is False
    monitor.add(p, (rng.random(20_000) < 1.3 * p).astype(float))
    assert monitor.report()["alarm"] is True
    monitor.add(p[:5], np.full(5, np.nan))


def test_latency_is_reported(trained, batch, onnx):
    found = deploy.latency(OnnxModel(onnx), ServedModel(trained.model), batch, 10)
    assert list(found) == ["1", "64", "512"]


def test_names_of_inputs(trained):
    assert input_names(trained.encoder.layout) == [
        "ids",
        "dense",
        "tags",
        "tags.lengths",
        "seen",
        "seen.lengths",
        "seen.action",
    ]
