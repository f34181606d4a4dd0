import concurrent.futures
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time

import httpx
import numpy as np
import pyarrow as pa
import pytest
from core_tensor.app.serving import ARROW, Endpoint, Limits, application, serve

SCHEMA = pa.schema([("user", pa.string()), ("price", pa.float32()), ("history", pa.list_(pa.int64()))])
LIMITS = Limits(body_bytes=20_000, rows=50, body_seconds=0.5, answer_seconds=0.5, waiting=8)


def _compute(rows, options):
    if options.get("sleep"):
        time.sleep(options["sleep"])
    if options.get("bug"):
        raise KeyError("bug")
    price = rows["price"].to_numpy(zero_copy_only=False)
    if np.isnan(price).any() and options.get("strict"):
        raise ValueError("price: expected a number in every row, got null")
    return {"score": 2 * price, "user": rows["user"]}


def _build(limits=LIMITS):
    endpoints = [Endpoint("/score", _compute, SCHEMA), Endpoint("/free", lambda rows, _: {"n": [rows.num_rows]})]
    return application("core-tensor", endpoints, limits=limits, information=lambda: {"model": 3})


def _serve(pipe, workers):
    serve(functools.partial(_build), port=0, workers=workers, started=pipe.send)


def _started(workers):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, workers))
    process.start()
    address = ours.recv()
    for _ in range(200):
        try:
            httpx.get(f"{address}/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    return process, address


@pytest.fixture(scope="module")
def address():
    process, address = _started(1)
    yield address
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 0


def _rows(n):
    return [{"user": f"u{i}", "price": i / 2, "history": [i]} for i in range(n)]


def _post(address, content, path="/score", **headers):
    return httpx.post(f"{address}{path}", content=content, headers={"content-type": "application/json", **headers})


def _stream(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_json_and_arrow_agree(address):
    body = json.dumps({"rows": _rows(3)})
    plain = _post(address, body)
    assert plain.status_code == 200
    unsaid = {"content-type": "application/x-www-form-urlencoded"}  # as `curl -d` sends it
    assert _post(address, body, **unsaid).json() == plain.json()
    assert plain.json() == {"score": [0.0, 1.0, 2.0], "user": ["u0", "u1", "u2"]}
    arrow = pa.ipc.open_stream(_post(address, body, accept=ARROW).content).read_all()
    assert arrow.to_pydict() == plain.json()
    # other types of the same values are cast
    table = pa.table(
        {"price": pa.array([0.0, 0.5, 1.0], pa.float64()), "user": pa.array(["u0", "u1", "u2"]).dictionary_encode()}
    )
    assert _post(address, _stream(table), **{"content-type": ARROW}).json() == plain.json()
    assert _post(address, json.dumps({"rows": []})).json() == {"score": [], "user": []}
    assert _post(address, json.dumps({"rows": [{"a": 1}, {"b": "x"}]}), "/free").json() == {"n": [2]}


def test_absent_values_are_null_and_the_model_decides(address):
    rows = [{"user": "a"}, {"user": "b", "price": None}]
    assert _post(address, json.dumps({"rows": rows})).json()["score"] == [None, None]
    refused = _post(address, json.dumps({"rows": rows, "options": {"strict": True}}))
    assert (refused.status_code, refused.json()) == (400, {"error": "price: expected a number in every row, got null"})


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", {}, 400, "body"),
        (b"{", {}, 400, "body"),
        (b"[]", {}, 400, "body"),
        (b'{"rows": [{"price": NaN}]}', {}, 400, "body"),
        (b'{"rows": ' + b"[" * 5000, {}, 400, "body"),
        (b'{"rows": [], "row": []}', {}, 400, "row"),
        (b'{"rows": [{"prise": 1}]}', {}, 400, "unknown column prise; expected user, price, history"),
        (b'{"rows": [{"price": "dear"}]}', {}, 400, "column price"),
        (b'{"rows": [{"user": 7}]}', {}, 400, "column user"),
        (b'{"rows": [{"history": "12"}]}', {}, 400, "column history: expected lists, got text"),
        (b'{"rows": [{"history": [1, 2.5]}]}', {}, 400, "column history: expected integers, got 2.5"),
        (b'{"rows": [{"history": 5}]}', {}, 400, "column history"),
        (b'{"rows": [{"user": ["a"]}]}', {}, 400, "column user"),
        (b'{"rows": [{"history": [123456789012345678901234567890]}]}', {}, 400, "column history"),
        (json.dumps({"rows": _rows(51)}).encode(), {}, 413, "rows: expected at most 50, got 51"),
        (b"x" * 20_001, {}, 413, "at most 20000 bytes"),
        (b"x", {"content-type": "text/csv"}, 415, "expected application/json"),
        (b"x" * 100, {"content-type": ARROW}, 400, "Arrow IPC stream"),
        (_stream(pa.table({"price": [1.0]}))[:-40], {"content-type": ARROW}, 400, "Arrow IPC stream"),
        (_stream(pa.table({"price": ["dear"]})), {"content-type": ARROW}, 400, "Arrow IPC stream"),
        (_stream(pa.table({"prise": [1.0]})), {"content-type": ARROW}, 400, "unknown column prise"),
        (_stream(pa.table({"price": [1.0] * 51})), {"content-type": ARROW}, 413, "at most 50"),
        (b'{"rows": [], "options": {"bug": 1}}', {}, 500, "internal error"),
        (b'{"rows": [], "options": {"sleep": 0.8}}', {}, 504, "longer than 0.5 s"),
    ],
)
def test_bad_requests_get_their_status_and_the_reason(address, content, headers, status, message):
    answer = _post(address, content, **headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    time.sleep(0.4 if status == 504 else 0)  # its thread is busy for that long
    assert _post(address, b'{"rows": [{"price": 1}]}').json()["score"] == [2.0]


def test_mutated_arrow_bodies_never_break_the_service(address):
    generator = random.Random(0)
    valid = _stream(pa.table({"user": ["a", "b"], "price": [1.0, 2.0], "history": [[1], [2, 3]]}))
    for _ in range(150):
        body = bytearray(valid)
        for _ in range(generator.randint(1, 4)):
            body[generator.randrange(len(body))] = generator.randrange(256)
        assert _post(address, bytes(body), **{"content-type": ARROW}).status_code in {200, 400, 413}
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "name": "core-tensor", "model": 3}


def test_a_slow_body_is_given_up(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        client.settimeout(5)
        assert b" 408 " in client.recv(1000)


def test_too_many_at_once_are_sent_away_and_the_others_answered(address):
    body = json.dumps({"rows": [{"price": 1}], "options": {"sleep": 0.04}})
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: _post(address, body), range(24)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503}
    assert all(answer.json()["score"] == [2.0] for answer in answers if answer.status_code == 200)


def test_thousands_of_concurrent_requests_and_no_wrong_answer(address):
    with (
        httpx.Client(limits=httpx.Limits(max_connections=6)) as client,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):

        def ask(i):
            answer = client.post(f"{address}/score", json={"rows": [{"user": str(i), "price": i}]})
            return answer.json() == {"score": [2.0 * i], "user": [str(i)]}

        assert all(pool.map(ask, range(2000)))
    text = httpx.get(f"{address}/metrics").text
    assert 'core_tensor_requests_total{path="/score",status="200"}' in text
    assert 'core_tensor_rows_total{path="/score"}' in text


def test_workers_share_a_port_and_their_metrics():
    process, address = _started(2)
    try:
        for _ in range(40):
            assert _post(address, b'{"rows": [{"price": 1}]}').status_code == 200
        assert 'core_tensor_rows_total{path="/score"} 40.0' in httpx.get(f"{address}/metrics").text
        # one is killed; another takes its place
        victim = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, check=True, text=True
        )
        os.kill(int(victim.stdout.split()[0]), signal.SIGKILL)
        time.sleep(1)
        assert process.is_alive()
        assert all(_post(address, b'{"rows": [{"price": 1}]}').status_code == 200 for _ in range(20))
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)
    assert process.exitcode == 0


def _no_model():
    raise ValueError("model.onnx: no such file")


def test_workers_that_cannot_start_end_the_service():
    with pytest.raises(RuntimeError, match="a worker cannot start"):
        serve(_no_model, port=0, workers=2)


def test_limits_that_accept_nothing_are_refused():
    with pytest.raises(ValueError, match="rows: expected a positive number, got 0"):
        Limits(rows=0)


def test_a_taken_port_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(_build, port=taken.getsockname()[1])
