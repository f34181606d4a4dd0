"""Treat every long command as the world does: kill it, fill its disk, take away its permission, start it twice.

    python tools/faults.py [PACKAGE ...] [--rounds N] [--only FAULT] [--job PATTERN]

Each `packages/<name>/tests/fault_jobs.py` has `prepare(folder)`, which writes small inputs, and `JOBS`, the fields of a
`Job` by name; `content(path)`, if it has one, gives the bytes of an output file that must not vary. A job runs once
undisturbed; under every fault it must end in one clear line and exit code 2 (130 for Ctrl-C), leave nothing that keeps
the same command from continuing, and reach the same files in the end.

    kill        SIGKILL at random moments, then the same command again
    interrupt   SIGINT: one line that names the command, which continues
    full        a disk with less room than the result needs, then one with enough
    readonly    a file system that cannot be written
    twice       the same command at the same time in the same folder: one is refused, the result is right
    full-pipe   standard output on a full disk
    locale      another locale, time zone and encoding: the same files

Needs Linux; `full` and `readonly` need a mount namespace (root, or unprivileged user namespaces) and are skipped with a
line where there is none.
"""

import argparse
import hashlib
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INSIDE = "FAULTS_INSIDE_NAMESPACE"
CONTINUES = "The same command continues"


@dataclass(frozen=True)
class Job:
    """A command that takes long on real data.

    Attributes:
        command: The command line, run in the folder of the inputs, with `OUT` where its output goes.
        varies: Patterns of output files that hold times, so that they may differ from run to run.
    """

    command: str
    varies: Sequence[str] = ()


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    errors: str
    seconds: float

    def complaint(self, expected: int) -> str | None:
        """What is wrong with how it ended, or None."""
        if "Traceback (most recent call last)" in self.errors:
            return f"a traceback: {self.errors[-600:]}"
        if self.code != expected:
            return f"exit code {self.code} where {expected} was expected: {self.errors[-300:]}"
        said = [
            line for line in re.split(r"[\r\n]+", self.errors) if line.startswith(("Error:", "Interrupted", "Usage:"))
        ]
        if expected in {2, 130} and len(said) != 1:
            return f"expected one line that says what happened, found {len(said)}: {self.errors[-300:]}"
        return None


class Bench:
    """One job with its inputs, its undisturbed result, and a folder to disturb it in."""

    def __init__(self, package: str, name: str, module: ModuleType, folder: Path, seed: int) -> None:
        self.label, self.job = f"{package} {name}", Job(**module.JOBS[name])
        self.content: Callable[[Path], bytes] = getattr(module, "content", Path.read_bytes)
        self.inputs, self.scratch = folder / "inputs", folder / "scratch"
        self.dice = random.Random(f"{seed} {self.label}")
        self.reference: dict[str, str] = {}
        self.seconds = 0.0
        self.bytes = 0

    def start(self, out: Path, **options: Any) -> subprocess.Popen[str]:
        """Start the command with its output in `out`."""
        words = self.job.command.replace("OUT", str(out)).split()
        program = str(Path(sys.executable).parent / words[0])
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        settings: dict[str, Any] = {"env": variables, "stdout": subprocess.DEVNULL, **options}
        return subprocess.Popen([program, *words[1:]], cwd=self.inputs, stderr=subprocess.PIPE, text=True, **settings)

    def run(self, out: Path, **options: Any) -> Ended:
        """Run the command to its end."""
        begin = time.monotonic()
        process = self.start(out, **options)
        _, errors = process.communicate()
        return Ended(process.returncode, errors, time.monotonic() - begin)

    def prepare(self) -> str | None:
        """Make the undisturbed result; what is wrong with it, or None."""
        out = self.scratch / "reference"
        ended = self.run(out)
        self.reference, self.seconds = self.files(out), ended.seconds
        self.bytes = sum(p.stat().st_size for p in _all_files(out))
        return ended.complaint(0) or (None if self.reference else "wrote no files")

    def files(self, out: Path) -> dict[str, str]:
        """Digest of every output file that must be the same in every run."""
        base = out if out.is_dir() else out.parent
        digests = {}
        for path in _all_files(out):
            name = str(path.relative_to(base)) if out.is_dir() else "file"
            if not any(fnmatch(name, pattern) for pattern in self.job.varies):
                digests[name] = hashlib.sha256(self.content(path).replace(str(out).encode(), b"OUT")).hexdigest()
        return digests

    def same(self, out: Path) -> str | None:
        """How the files differ from the undisturbed result, or None."""
        found = self.files(out)
        differ = sorted(name for name in {*found, *self.reference} if found.get(name) != self.reference.get(name))
        return f"other files than in an undisturbed run: {', '.join(differ[:8])}" if differ else None

    def finish(self, out: Path) -> str | None:
        """Call the same command again, to the end; what is wrong with it, or None."""
        ended = self.run(out)
        return ended.complaint(0) or self.same(out)


def _all_files(out: Path) -> list[Path]:
    if out.is_file():
        return [out]
    return sorted(path for path in out.rglob("*") if path.is_file()) if out.exists() else []


# ----------------------------------------------------------------------------------------------------------------------
# The faults: each returns what is wrong, or None


def kill(bench: Bench) -> str | None:
    """Kill up to three times, at moments spread over the run, then let it end."""
    out = bench.scratch / "kill"
    moments: list[str] = []
    for _ in range(bench.dice.randint(1, 3)):
        moment = bench.dice.uniform(0.3, 1.0) * bench.seconds
        process = bench.start(out)
        moments.append(f"{moment:.2f} s")
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    problem = bench.finish(out)
    return problem and f"killed after {', '.join(moments)}: {problem}"


def interrupt(bench: Bench) -> str | None:
    """Press Ctrl-C in the later half of the run, then let it end."""
    out = bench.scratch / "interrupt"
    moment = bench.dice.uniform(0.5, 0.95) * bench.seconds
    process = bench.start(out, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        _, errors = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    # while the interpreter starts or ends, the signal is its own affair
    outside = process.returncode == -signal.SIGINT or ("Traceback" in errors and "core_tensor/app/cli.py" not in errors)
    outside = outside or "libtriton" in errors  # prints what interrupts its import, and goes on as if nothing were
    if process.returncode and not outside:
        problem = Ended(process.returncode, errors, moment).complaint(130)
        if not problem and CONTINUES not in errors:
            problem = f"did not say how to continue: {errors[-300:]}"
        if problem:
            return f"interrupted after {moment:.2f} s: {problem}"
    return bench.finish(out)


def full(bench: Bench) -> str | None:
    """Give the result less room than it needs, then enough."""
    for share in (0.0, bench.dice.uniform(0.05, 0.9)):
        disk = bench.scratch / "disk"
        disk.mkdir()
        _mount(disk, max(4096, int(share * bench.bytes)))
        try:
            out = disk / "out"
            ended = bench.run(out)
            problem = None if not ended.code else ended.complaint(2) or _names_a_path(ended)
            if not problem:
                subprocess.run(["mount", "-o", f"remount,size={64 << 20}", str(disk)], check=True)
                problem = bench.finish(out)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()
        if problem:
            return f"with room for {share:.0%} of the result: {problem}"
    return None


def _names_a_path(ended: Ended) -> str | None:
    line = next(line for line in re.split(r"[\r\n]+", ended.errors) if line.startswith("Error:"))
    return None if "/" in line and "space" in line else f"the line does not say what is full: {line}"


def readonly(bench: Bench) -> str | None:
    """A file system that refuses every write."""
    disk = bench.scratch / "disk"
    disk.mkdir()
    _mount(disk, 1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        return bench.run(disk / "out").complaint(2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def _mount(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)


def twice(bench: Bench) -> str | None:
    """Two processes, one folder."""
    out = bench.scratch / "twice"
    first = bench.start(out)
    time.sleep(bench.dice.uniform(0.0, 0.8) * bench.seconds)
    second = bench.start(out)
    ends = [Ended(p.returncode, errors, 0.0) for p, errors in ((p, p.communicate()[1]) for p in (first, second))]
    for ended in ends:
        problem = ended.complaint(2 if ended.code == 2 else 0)
        if problem:
            return problem
    if all(ended.code for ended in ends):
        return f"both were refused: {ends[0].errors[-200:]} {ends[1].errors[-200:]}"
    return bench.same(out)


def full_pipe(bench: Bench) -> str | None:
    """What is printed has no room; the files are whole nevertheless."""
    out = bench.scratch / "pipe"
    with Path("/dev/full").open("w") as stdout:
        ended = bench.run(out, stdout=stdout)
    return (ended.complaint(2) if ended.code else None) or bench.finish(out)


def locale(bench: Bench) -> str | None:
    """Somewhere else."""
    out = bench.scratch / "locale"
    elsewhere = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "TZ": "Pacific/Apia", "HOME": "/nonexistent"}
    variables = os.environ | elsewhere | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "123"}
    ended = bench.run(out, env=variables)
    return ended.complaint(0) or bench.same(out)


FAULTS: dict[str, Callable[[Bench], str | None]] = {
    "kill": kill,
    "interrupt": interrupt,
    "full": full,
    "readonly": readonly,
    "twice": twice,
    "full-pipe": full_pipe,
    "locale": locale,
}
NEED_MOUNTS = {"full", "readonly"}


# ----------------------------------------------------------------------------------------------------------------------


def load(package: str) -> ModuleType:
    """The file in which a package lists its jobs."""
    path = ROOT / "packages" / package / "tests" / "fault_jobs.py"
    spec = importlib.util.spec_from_file_location(f"fault_jobs_{package.replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inside_namespace() -> bool:
    """Go on in a mount namespace of our own, where mounts end with the process; whether that is possible."""
    if os.environ.get(INSIDE) == "yes":
        return True
    trial = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    if os.environ.get(INSIDE) or not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        return False
    os.environ[INSIDE] = "yes"
    return os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv])


def try_job(package: str, name: str, module: ModuleType, options: argparse.Namespace) -> int:
    """Every fault on one job; the number of those that it does not survive."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(package, name, module, Path(folder), options.seed)
        bench.inputs.mkdir()
        bench.scratch.mkdir()
        module.prepare(bench.inputs)
        problem = bench.prepare()
        if problem:
            print(f"FAILED  {bench.label}: undisturbed: {problem}", flush=True)
            return 1
        print(f"        {bench.label}: {bench.seconds:.1f} s, {bench.bytes} bytes undisturbed", flush=True)
        for fault in options.only or FAULTS:
            for _ in range(options.rounds if fault in {"kill", "twice", "interrupt"} else 1):
                problem = FAULTS[fault](bench)
                failures += problem is not None
                print(
                    f"{'FAILED ' if problem else 'passed '} {bench.label} {fault}{f': {problem}' if problem else ''}",
                    flush=True,
                )
                for rest in bench.scratch.iterdir():
                    if rest.name != "reference":
                        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    return failures


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    registered = sorted(path.parents[1].name for path in ROOT.glob("packages/*/tests/fault_jobs.py"))
    parser.add_argument("packages", nargs="*", help=f"out of {', '.join(registered)}; all by default")
    parser.add_argument("--rounds", type=int, default=1, help="kills, interruptions and pairs of each job (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which faults strike (default: 0)")
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="only this fault; may be repeated")
    parser.add_argument("--job", default="*", metavar="PATTERN", help="only jobs of such a name, as export*")
    options = parser.parse_args()
    unknown = sorted(set(options.packages) - set(registered))
    if unknown:
        parser.error(f"no fault_jobs.py in {', '.join(unknown)}")
    if not inside_namespace():
        print("SKIPPED full, readonly: this machine lets nobody mount file systems")
        options.only = [fault for fault in options.only or FAULTS if fault not in NEED_MOUNTS]
    failures = 0
    for package in options.packages or registered:
        module = load(package)
        for name in (name for name in module.JOBS if fnmatch(name, options.job)):
            failures += try_job(package, name, module, options)
    print(f"{failures} faults that a command did not survive")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
