"""What a package costs a stranger: import all of it and ask its command for help, in the environment that runs this.

    PYTHON tools/footprint.py quantease dist/quantease-0.1.0-py3-none-any.whl

Needs nothing but the interpreter, since it runs where one wheel is installed alone. Prints one JSON object: the wheel
in kB, everything installed in GB, the version of torch, and the CPU seconds of the import and of `--help`, each the
best of three processes (the first also compiles bytecode). Fails where either does.
"""

import importlib.metadata
import json
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def main() -> None:
    """Measure one package."""
    package, wheel = sys.argv[1], Path(sys.argv[2])
    module = package.replace("-", "_")
    points = importlib.metadata.distribution(package).entry_points
    scripts = [point for point in points if point.group == "console_scripts"]
    folder = Path(sysconfig.get_path("purelib"))
    installed = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    commands = [Path(sys.executable).parent / script.name for script in scripts]
    row = {
        "package": package,
        "python": sys.version.split()[0],
        "torch": importlib.metadata.version("torch"),
        "wheel_kb": wheel.stat().st_size / 1e3,
        "installed_gb": installed / 1e9,
        "import_s": seconds([sys.executable, "-c", f"from {module} import *"]),
        "help_s": max((seconds([command, "--help"]) for command in commands), default=None),
    }
    print(json.dumps(row))


def seconds(command: Sequence[str | Path]) -> float:
    """CPU time of a command, user and system: the best of three runs."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


if __name__ == "__main__":
    main()
