"""Call every operator with spoiled arguments and every reader with spoiled files: only clear errors may come of it.

    python tools/hostile.py operators [NAME ...]   kernels built with the address and undefined-behavior sanitizers
    python tools/hostile.py files [PACKAGE ...]    what packages/<name>/tests/hostile_readers.py lists
    python tools/hostile.py all                    both

`--rounds` sets how many cases each operator and reader gets, `--seed` the first of them; a failure names the seed that
repeats it (`--seed N --rounds 1`). Every package and the operators run in their own processes: one that does not
survive its input is a failure like any other.
"""

import argparse
import ctypes
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".nox" / "hostile"
SPARE_BYTES = 6 << 30
"""What a process may take beyond what it has at the start; a length of 2**40 in a file must not fill the machine."""

out: TextIO = sys.stdout


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("operators", "files", "all"))
    parser.add_argument("names", nargs="*", help="operators, or packages; all by default")
    parser.add_argument("--rounds", type=int, default=60, help="cases of each operator and reader (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="first case (default: 0)")
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        try:
            sys.exit(inside(options))
        except Exception:
            traceback.print_exc(file=out)  # standard error may be silenced
            sys.exit(1)
    failed = False
    if options.what != "files":
        failed |= start("operators", options.names if options.what == "operators" else [], options, sanitized())
    if options.what != "operators":
        chosen = options.names if options.what == "files" else []
        for package in chosen or sorted(
            path.parents[1].name for path in ROOT.glob("packages/*/tests/hostile_readers.py")
        ):
            failed |= start("files", [package], options, {})
    sys.exit(failed)


def start(what: str, names: list[str], options: argparse.Namespace, environment: dict[str, str]) -> bool:
    """Run one part in its own process; whether it failed."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        note = Path(folder) / "case"
        note.touch()
        command = [sys.executable, __file__, what, *names, "--rounds", str(options.rounds)]
        command += ["--seed", str(options.seed), "--inside", str(note)]
        # one thread: what counts is memory, and a failure repeats
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        code = subprocess.run(command, env=variables).returncode
        if code not in {0, 1}:
            print(f"FAILED {what} {' '.join(names)}: the process died ({code}) at {note.read_text()}")
    return code != 0


def sanitized() -> dict[str, str]:
    """Build the kernels with sanitizers (nothing is done where they are built); the environment to load them in."""
    package = ROOT / "packages" / "core-tensor"
    configure = ["cmake", "-S", str(package), "-B", str(BUILD), "-DCORE_TENSOR_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (configure, ["cmake", "--build", str(BUILD), "--parallel"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    asan = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
    return {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": asan,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HOSTILE_LIBRARY": str(BUILD / "libcore_tensor_native.so"),
    }


def inside(options: argparse.Namespace) -> int:
    """What the process of one part does."""
    from core_tensor.dev import hostile

    warnings.simplefilter("ignore")
    case = Path(options.inside).open("r+")  # noqa: SIM115 - open until the process ends, however it ends

    def note(text: str) -> None:
        case.seek(0)
        case.truncate()
        case.write(text)
        case.flush()

    global out
    if options.what == "files":
        out = quiet()
    count, failures = 0, []
    if options.what == "operators":
        load_library(os.environ["HOSTILE_LIBRARY"])
        module = load(ROOT / "packages" / "core-tensor" / "tests" / "hostile" / "operators.py")
        for name in options.names or module.OPERATORS:
            count += 1
            failures += report(hostile.hostile_calls(name, module.OPERATORS[name], options.rounds, options.seed, note))
    else:
        (package,) = options.names
        limit_memory()
        module = load(ROOT / "packages" / package / "tests" / "hostile_readers.py")
        for reader in module.READERS:
            count += 1
            with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
                given = hostile.Reader(*reader)
                failures += report(hostile.hostile_files(given, Path(folder), options.rounds, options.seed, note))
    kind = "operators" if options.what == "operators" else f"readers of {options.names[0]}"
    print(f"{count} {kind}, {count * options.rounds} cases: {len(failures)} failed", file=out, flush=True)
    return 1 if failures else 0


def quiet() -> TextIO:
    """Silence what the readers print, progress bars and all; the old standard output is left for reports."""
    kept = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return kept


def report(failures: Iterator[object]) -> list[object]:
    """Print failures as they come."""
    found = []
    for failure in failures:
        print(f"FAILED {failure}", file=out, flush=True)
        found.append(failure)
    return found


def load(path: Path) -> ModuleType:
    """Import a file that is not in a package."""
    spec = importlib.util.spec_from_file_location(f"hostile_{path.parts[-3].replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def load_library(path: str) -> None:
    """Let the operators call the sanitized library; before any of them is imported."""
    import core_tensor.ops._library as library

    sanitized = ctypes.CDLL(path)
    native: Callable[[], ctypes.CDLL] = lambda: sanitized  # noqa: E731
    library.native = native  # type: ignore[assignment]


def limit_memory() -> None:
    """Let an absurd allocation fail instead of filling the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
