"""Install core-tensor's source distribution where there is no C++ compiler, and see the references serve.

    python tools/without_compiler.py dist/core_tensor-0.1.0.tar.gz

The environment is a throw-away one that sees the packages of the running Python, torch among them.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SEE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import core_tensor
    served = {device["cpu"] for device in core_tensor.backends().values()}
warned = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert served == {"reference"}, served
assert len(warned) == 1 and "library is missing" in warned[0], warned
import torch
codes = torch.randint(0, 8, (5, 33), dtype=torch.uint8)
assert torch.equal(core_tensor.unpack_bits(core_tensor.pack_bits(codes, 3), 3, 33), codes)
print(f"{core_tensor.__file__}: the references serve")
"""


def main() -> None:
    """Install what the command line names, and look."""
    (distribution,) = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="without-compiler-") as name:
        folder = Path(name)
        empty = folder / "empty"  # a PATH without compilers
        empty.mkdir()
        target = folder / "target"
        install = [uv_binary(), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(target)]
        blind = {**os.environ, "PATH": str(empty), "CXX": str(empty / "c++"), "CC": str(empty / "cc")}
        subprocess.run([*install, "--no-deps", "--no-cache", distribution], env=blind, check=True)
        # The packages beside the running Python, but none of its editable installs: those come by .pth files.
        seen = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        subprocess.run(
            [sys.executable, "-S", "-c", SEE], env={**os.environ, "PYTHONPATH": seen}, check=True, cwd=folder
        )


def uv_binary() -> str:
    """The uv on the PATH, behind any shim, which would need a PATH itself."""
    code = "import os; print(os.environ['UV'])"  # uv sets it for what it runs
    command = ["uv", "run", "--no-project", "--quiet", "--python", sys.executable, "python", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
