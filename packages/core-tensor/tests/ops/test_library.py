"""What `backends()` says where the compiled library is older than the code, or missing."""

import ctypes
import json
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, json, sys, warnings
import core_tensor.ops._library as library

stale = ctypes.CDLL(sys.argv[1]) if sys.argv[1] else None
library.native = lambda: stale
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import core_tensor, torch

    backends = core_tensor.backends()
codes = torch.randint(0, 8, (3, 20), dtype=torch.uint8)
words = core_tensor.pack_bits(codes, 3)
assert torch.equal(core_tensor.unpack_bits(words, 3, 20), codes)
x = torch.randn(2, 20)
y = core_tensor.quantized_linear(x, words, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.uint8), 3)
torch.testing.assert_close(y, x @ codes.float().T)
print(json.dumps([backends, [str(w.message) for w in caught if w.category is RuntimeWarning]]))
"""


def _backends(library):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_operator_is_native_only_where_the_library_has_all_its_symbols(tmp_path):
    # `dual_bounds` is there; of `bit_packing` only one of two symbols, of `ghost_norms` only one dtype
    names = ("ct_dual_bounds", "ct_pack_bits", "ct_ghost_norms_float32")
    source, built = tmp_path / "stale.cpp", tmp_path / "libstale.so"
    source.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in names))
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    assert ctypes.CDLL(str(built)).ct_pack_bits() == 0
    backends, warned = _backends(built)
    assert [name for name, device in backends.items() if device["cpu"] == "native"] == ["dual_bounds"]
    assert len(warned) == 1
    assert warned[0].startswith("the compiled library is older than the code")


def test_references_serve_and_one_warning_says_so_where_there_is_no_library():
    backends, warned = _backends("")
    assert {device["cpu"] for device in backends.values()} == {"reference"}
    assert len(warned) == 1
    assert warned[0].startswith("the compiled library is missing")
