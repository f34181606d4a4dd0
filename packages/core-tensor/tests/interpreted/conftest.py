"""Values of the Triton kernels on a CPU: run as `TRITON_INTERPRET=1 pytest tests/interpreted`, a process of its own."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if "interpreted" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="nox -s kernels runs these under TRITON_INTERPRET=1"))
