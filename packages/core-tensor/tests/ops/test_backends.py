import importlib.util
import re
from pathlib import Path

import core_tensor
import pytest


def test_the_native_cpu_backend_is_live_for_every_operator():
    live = core_tensor.backends()
    assert live
    assert {name: device["cpu"] for name, device in live.items()} == dict.fromkeys(live, "native")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_triton_serves_all_on_cuda_but_what_the_docs_name():
    without = {
        "assignment",
        "project_assignment",
        "dual_bounds",
        "quantized_gather",
        "row_update",
        "stable_hash",
    }
    live = core_tensor.backends()
    expected = {name: "reference" if name in without else "triton" for name in live}
    assert {name: device["cuda"] for name, device in live.items()} == expected


def test_every_public_operator_stands_in_the_docs():
    page = Path(__file__).parents[4] / "docs" / "packages" / "core-tensor.md"
    if not page.exists():
        pytest.skip("outside the repository there are no docs")
    named = set(re.findall(r"`([a-z_]+)`", page.read_text()))
    assert {name for name in core_tensor.__all__ if name.islower()} - named - {"backends"} == set()
