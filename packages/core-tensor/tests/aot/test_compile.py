"""Every row of every kernel's compile table compiles for sm_80 and sm_90 without spilling registers."""

import importlib
import os
from pathlib import Path

import core_tensor
import pytest
from core_tensor.dev.aot import compile_row

pytestmark = pytest.mark.skipif(
    os.environ.get("CORE_TENSOR_AOT") != "1", reason="nox -s kernels runs these with CORE_TENSOR_AOT=1"
)
OPERATORS = sorted(path.parent.name for path in Path(core_tensor.__file__).parent.glob("ops/*/triton.py"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_spills(operator, capability):
    rows = importlib.import_module(f"core_tensor.ops.{operator}.triton").COMPILE
    assert rows
    for row in rows:
        # A launch passes a Python float as fp32, whatever the table says; the interpreter keeps all of its digits.
        assert "fp64" not in row.signature.values(), f"{row.kernel.__name__}: a double goes in as a tensor"
        used = compile_row(row, capability)
        assert used.stack == 0, f"{row.kernel.__name__} {row.constants} spills {used.stack} bytes"
