import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_embed.store.address import check_writable, create_store, open_store, parse
from meta_embed.store.codec import Records, StoreInfo, decode_key, decode_records, encode_key, encode_records
from meta_embed.store.redis import escape
from meta_embed.store.version import check_version, freshness

KINDS = ["lmdb", "sqlite", "parquet", "redis"]


@pytest.fixture
def address(request, tmp_path):
    def make(kind, name="a"):
        if kind == "redis":
            return f"{request.getfixturevalue('redis_server')}?prefix={tmp_path.name}*{name}:"
        return f"{kind}:{tmp_path / name}"

    return make


def _info(**changes):
    options = {"version": "v1", "width": 5, "key": "int", "cold": (0.5,) * 5, "as_of": 100.0, "history": 8}
    return StoreInfo(**(options | changes))


def _records(n, info, seed=0):
    rng = np.random.default_rng(seed)
    precisions = rng.random((n, info.precision_floats)).astype(np.float32)
    return Records(
        rng.standard_normal((n, info.width)).astype(np.float32), rng.random(n) * 100, rng.integers(0, 33, n), precisions
    )


def _items(keys, info, seed=0):
    values = encode_records(_records(len(keys), info, seed), info)
    return sorted((encode_key(k, info.key), v, f"history {k}".encode()) for k, v in zip(keys, values, strict=True))


@pytest.mark.parametrize("codec", ["int8", "float32"])
@pytest.mark.parametrize("precision", ["none", "diagonal", "full"])
def test_all_stores_agree(address, codec, precision):
    info = _info(codec=codec, precision=precision)
    keys = [-(2**63), -5, 0, 7, 2**63 - 1]
    items = _items(keys, info)
    found = {}
    for kind in KINDS:
        create_store(address(kind), info, items)
        with open_store(address(kind)) as store:
            assert store.info == info
            assert len(store) == 5
            assert list(store.items()) == items
            assert [k for k, _ in store.members()] == keys
            assert store.fetch_history(store.keys_of([7, 8])) == [b"history 7", None]
            found[kind] = store.get([7, 99, -5, 7])
    for hits, records in found.values():
        assert hits == [True, False, True, True]
        for name in ("vectors", "times", "counts", "precisions"):
            assert np.array_equal(getattr(records, name), getattr(found["lmdb"][1], name))


@pytest.mark.parametrize("kind", KINDS)
def test_updates_survive_reopening(address, kind):
    info = _info(key="str", codec="float32")
    create_store(address(kind), info, _items(["a", "b"], info))
    with open_store(address(kind), writer=True) as store:
        store.put(["b", "Zoë"], _records(2, info, 1), [b"new", b"newer"])
    with open_store(address(kind)) as store:
        hits, records = store.get(["a", "b", "Zoë"])
        assert hits == [True] * 3
        assert np.array_equal(records.vectors[1:], _records(2, info, 1).vectors)
        assert store.fetch_history(store.keys_of(["a", "b"])) == [b"history a", b"new"]
        assert [k for k, _ in store.members()] == ["Zoë", "a", "b"]


def _elsewhere(where, keys):
    """What another process finds: LMDB opens a file once per process."""
    code = "import sys; from meta_embed.store.address import open_store; s = open_store(sys.argv[1])\n"
    code += "print([bool(x) for x in s.get(eval(sys.argv[2]))[0]])"
    command = [sys.executable, "-c", code, str(where), keys]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_held_by_another_writer(address, kind):
    info = _info()
    create_store(address(kind), info, _items([1], info))
    with open_store(address(kind), writer=True):
        with pytest.raises(ValueError, match="held by another writer"):
            open_store(address(kind), writer=True)
        with pytest.raises(ValueError, match="held by another writer"):
            create_store(address(kind), info, [])
        with pytest.raises(ValueError, match="held by another writer"):
            check_writable(address(kind))
        assert _elsewhere(address(kind), "[1]") == "[True]"  # readers are welcome
    open_store(address(kind), writer=True).close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_as_string_and_integer(address, kind):
    for key, other in (("int", "7"), ("str", 7)):
        info = _info(key=key)
        create_store(address(kind, key), info, _items([7 if key == "int" else "7"], info))
        with (
            open_store(address(kind, key)) as store,
            pytest.raises(
                TypeError, match=f"entity: this store has {'integer' if key == 'int' else 'string'} keys, got"
            ),
        ):
            store.get([other])


@pytest.mark.parametrize("key", [True, 1.0, None, b"x"])
def test_keys_of_other_types(key):
    for kind in ("int", "str"):
        with pytest.raises(TypeError, match="entity: this store has"):
            encode_key(key, kind)
    with pytest.raises(ValueError, match="64 bits"):
        encode_key(2**63, "int")
    for long in ("", "x" * 512):
        with pytest.raises(ValueError, match="1 to 511 bytes"):
            encode_key(long, "str")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True), st.lists(st.text(min_size=1, max_size=50), unique=True))
def test_key_bytes_sort_as_keys_and_come_back(numbers, texts):
    assert [decode_key(b, "int") for b in sorted(encode_key(k, "int") for k in numbers)] == sorted(numbers)
    assert [decode_key(encode_key(k, "str"), "str") for k in texts] == texts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 32), st.floats(1e-4, 1e3), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_int8_is_within_half_a_step(n, width, scale, shift, seed):
    info = _info(width=width, cold=())
    vectors = (scale * np.random.default_rng(seed).standard_normal((n, width)) + shift).astype(np.float32)
    records = Records(vectors, np.zeros(n), np.zeros(n, np.int64), np.zeros((n, 0), np.float32))
    got = decode_records(encode_records(records, info), info).vectors
    reach = vectors.max(1, initial=-np.inf) - vectors.min(1, initial=np.inf)
    bound = (
        0.51 * (reach + np.abs(vectors).max(1, initial=0) * 2e-3 + 1e-6) / 127
        + np.abs(vectors).max(1, initial=0) * 1e-6
        + 0.5 * 2.0**-24  # a step is a float16, and so at least that
    )
    assert (np.abs(got - vectors).max(1, initial=0) <= bound).all()
    assert info.vector_bytes == width + 4


def test_descriptions_that_no_store_has():
    for changes in ({"width": 0}, {"width": 6}, {"history": -1}):  # the cold vector has five numbers
        with pytest.raises(ValueError, match="expected"):
            _info(**changes)


def test_a_parquet_file_with_other_columns_or_order_is_refused(address, tmp_path):
    info = _info()
    create_store(address("parquet"), info, _items([1, 2], info))
    path = tmp_path / "a" / "store.parquet"
    table = pq.read_table(path)
    for bad in (
        table.take([1, 0]),
        table.set_column(1, "value", pa.array([b"x", None])),
        table.drop_columns(["value"]),
    ):
        pq.write_table(bad.replace_schema_metadata(table.schema.metadata), path)
        with pytest.raises(ValueError, match=r"store\.parquet: expected a Parquet store of meta-embed"):
            open_store(address("parquet"))


def test_int8_takes_less_than_a_third_of_float32():
    at_32 = {codec: _info(width=32, codec=codec, cold=()).vector_bytes for codec in ("int8", "float32")}
    assert at_32["float32"] / at_32["int8"] >= 3.2


def test_values_that_int8_cannot_hold_are_refused():
    records = Records(np.full((1, 5), 1e6, np.float32), np.zeros(1), np.zeros(1), np.zeros((1, 0)))
    with pytest.raises(ValueError, match="expected values below 3e4 for int8"):
        encode_records(records, _info())


def test_vectors_of_another_width_or_version(address):
    info = _info()
    create_store(address("lmdb"), info, _items([1], info))
    with open_store(address("lmdb"), writer=True) as store:
        with pytest.raises(ValueError, match="holds vectors of width 5, got width 6"):
            store.put([1], _records(1, _info(width=6, cold=())))
        with pytest.raises(ValueError, match="model version v1, but the global block is v2"):
            check_version(store.info, "v2", store.where)
        check_version(store.info, "v2", store.where, allow_stale=True)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite", "parquet"])
def test_corrupt_and_foreign_files(address, kind, tmp_path):
    with pytest.raises(FileNotFoundError):
        open_store(address(kind))
    info = _info()
    create_store(address(kind), info, _items(range(200), info))
    path = tmp_path / "a" / f"store.{kind}"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for content in (b"", b"nothing", good[: len(good) // 3], b"\xff" * len(good)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"store.{kind}"):
            open_store(address(kind)).get(list(range(200)))
    if kind == "lmdb":
        return  # LMDB trusts its pages: it has no checksums, only its header and our record sizes can be checked
    for _ in range(30):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 5):
            bad[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            with open_store(address(kind)) as store:
                store.get(list(range(200)))
        except ValueError as error:
            assert f"store.{kind}" in str(error)  # noqa: PT017


def test_a_record_of_another_size_is_corrupt(address):
    info = _info()
    create_store(address("lmdb"), info, [(encode_key(1, "int"), b"short", b"")])
    with open_store(address("lmdb")) as store, pytest.raises(ValueError, match=r"store\.lmdb: corrupt record"):
        store.get([1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keys", "what"), [([1, 1], "comes twice"), ([2, 1], "comes after a larger one")])
def test_keys_that_do_not_ascend_are_refused_and_the_old_store_stays(address, kind, keys, what):
    info = _info()
    items = [_items([key], info)[0] for key in keys]
    with pytest.raises(ValueError, match=rf"entity: the key .* {what}"):
        create_store(address(kind), info, items)
    with pytest.raises((FileNotFoundError, ValueError), match=r"No such store|found no description"):
        open_store(address(kind))
    create_store(address(kind), info, _items([7], info))
    with pytest.raises(ValueError, match=what):
        create_store(address(kind), info, items)
    with open_store(address(kind)) as store:
        assert store.get([7, 1])[0] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_without_history_keeps_the_one_that_is_there(address, kind):
    info = _info()
    create_store(address(kind), info, _items([1, 2], info))
    with open_store(address(kind), writer=True) as store:
        store.put([2, 3], _records(2, info, 1))
        assert store.fetch_history(store.keys_of([1, 2])) == [b"history 1", b"history 2"]
        assert len(store) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_was_generated_anew(address, kind):
    info = _info()
    create_store(address(kind), info, _items([1], info))
    store = open_store(address(kind))
    assert not store.replaced()
    create_store(address(kind), _info(version="v2"), _items([2], info))
    assert store.replaced()
    if kind == "redis":  # the old vectors are gone; those of another model are not taken for them
        with pytest.raises(ValueError, match="was generated anew since it was opened; open it again"):
            store.get([1, 2])
        with open_store(address(kind)) as other:
            assert len(other.server.names(escape(other.server.prefix) + b"*:[vh]:*")) == 2  # the first one is removed
    else:
        assert store.get([1, 2])[0] == [True, False]  # its readers keep it
    store.close()
    with open_store(address(kind)) as store:
        assert store.info.version == "v2"
        assert store.get([1, 2])[0] == [False, True]


@pytest.mark.parametrize("kind", ["sqlite", "parquet", "redis"])
def test_an_update_is_seen_by_open_readers(address, kind):
    """LMDB's readers are other processes: see the map that grows."""
    info = _info()
    create_store(address(kind), info, _items([1], info))
    with open_store(address(kind)) as store:
        with open_store(address(kind), writer=True) as writer:
            writer.upsert([(writer.keys_of([2])[0], *_items([2], info)[0][1:])], _info(as_of=200.0))
        if kind == "parquet":
            assert store.replaced()  # holds the whole file
        else:
            assert store.get([2])[0] == [True]
            assert not store.replaced()
        if kind == "redis":
            assert store.info.as_of == 200.0


def test_a_redis_writer_that_lost_its_lock_writes_nothing(address):
    info = _info()
    create_store(address("redis"), info, _items([1], info))
    with open_store(address("redis"), writer=True) as slow:
        slow.server.client.delete(slow.server.prefix + b"writer")  # as if ten minutes had passed
        with pytest.raises(ValueError, match="the writer's lock expired; nothing was written"):
            slow.put([2], _records(1, info))
        with open_store(address("redis"), writer=True) as next_one:
            next_one.put([3], _records(1, info))
            slow.lock.release()  # not its own any more: the next writer keeps it
            with pytest.raises(ValueError, match="held by another writer"):
                check_writable(address("redis"))
        assert slow.get([1, 2, 3])[0] == [True, False, True]
    check_writable(address("redis"))


def test_the_map_grows_while_others_read(address):
    """py-lmdb #269: the map must grow, and a reader must follow."""
    info = _info(codec="float32")
    create_store(address("lmdb"), info, _items([1], info))
    code = "import sys; from meta_embed.store.address import open_store; s = open_store(sys.argv[1])\n"
    code += "print([bool(x) for x in s.get([1])[0]], flush=True); input()\n"
    code += "print([bool(x) for x in s.get([1, 1999])[0]], len(s), flush=True)"
    command = [sys.executable, "-c", code, str(address("lmdb"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "[True]\n"
        with open_store(address("lmdb"), writer=True) as writer:
            before = writer.env.info()["map_size"]
            big = [
                (encode_key(k, "int"), encode_records(_records(1, info), info)[0], bytes(60_000)) for k in range(2000)
            ]
            writer.upsert(big, info)
            assert writer.env.info()["map_size"] > before
            reader.stdin.write("go\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "[True, True] 2000\n"


def test_the_same_file_twice_in_one_process(address):
    info = _info()
    create_store(address("lmdb"), info, _items([1], info))
    with open_store(address("lmdb")), pytest.raises(ValueError, match="already open in this process"):
        open_store(address("lmdb"))


def test_hundreds_of_readers(address):
    """py-lmdb #114: the 127th reader of LMDB's default table fails."""
    info = _info()
    create_store(address("lmdb"), info, _items([1], info))
    script = (
        "import sys, threading\n"
        "from meta_embed.store.address import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "barrier, found = threading.Barrier(200), []\n"
        "def read():\n"
        "    with store.env.begin() as txn:\n"
        "        barrier.wait(60)\n"
        "        found.append(txn.get(store.keys_of([1])[0], db=store.vectors) is not None)\n"
        "threads = [threading.Thread(target=read) for _ in range(200)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert found == [True] * 200\n"
    )
    subprocess.run([sys.executable, "-c", script, address("lmdb")], check=True)


def test_freshness(address):
    info = _info(codec="float32")
    times = np.asarray([10.0, 50.0, 100.0])
    records = Records(np.zeros((3, 5), np.float32), times, np.ones(3), np.zeros((3, 0), np.float32))
    items = [(encode_key(k, "int"), v, b"") for k, v in enumerate(encode_records(records, info))]
    create_store(address("lmdb"), info, items)
    with open_store(address("lmdb")) as store:
        report = freshness(store, 100.0, 60.0)
    assert (report.members, report.stale, report.oldest, report.median) == (3, 1, 90.0, 50.0)


def test_addresses():
    assert parse("vectors/")[0] == "lmdb"
    assert parse("sqlite:v")[0] == "sqlite"
    with pytest.raises(ValueError, match="got kind feast"):
        parse("feast:v")
    with pytest.raises(ValueError, match=r"redis://127\.0\.0\.1:1/0: "):
        open_store("redis://127.0.0.1:1/0")
    with pytest.raises(ValueError, match="expected the option prefix"):
        open_store("redis://127.0.0.1:1/0?prefx=a")


def test_redis_holds_no_other_store(redis_server):
    with pytest.raises(ValueError, match="expected a store of meta-embed"):
        open_store(f"{redis_server}?prefix=absent:")
