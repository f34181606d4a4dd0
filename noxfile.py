"""Every gate of the repository: `uvx nox --list` names them, `uvx nox -s test` is the one to know.

The gates share one environment, `.nox/workspace`, installed from the tracked lock: one per session would install torch
a dozen times to learn nothing new. What needs its own environment makes it: `matrix` one per Python, `bench` one
per package with its peers, `wheels` a throw-away one outside the tree.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["test"]

ROOT = Path(__file__).parent.resolve()
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
PYTHONS = ("3.11", "3.12", "3.13")
LOCK = ROOT / "tools" / "requirements.lock"
UV = os.environ.get("UV", "uv")  # uvx sets this, even if uv is not on the PATH
PYTEST = ("-m", "pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for each of these processes
BY_PACKAGE = nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
BY_PACKAGE_AND_TOOLS = nox.parametrize("package", [nox.param(name, id=name) for name in [*PACKAGES, "tools"]])


# ----------------------------------------------------------------------------------------------------------------------
# Environments and arguments


def environment(session: nox.Session, name: str, python: str = ">=3.11") -> Path:
    """Make `.nox/<name>` from the tracked lock, with every package in editable form, and return its commands.

    It records what it was made from, so that a second call costs nothing.
    """
    folder = ROOT / ".nox" / name
    stamp = folder / "made-from"
    wanted = fingerprint()
    if not stamp.is_file() or stamp.read_text() != wanted:
        target = ("--python", str(folder / "bin" / "python"))
        editable = [argument for package in PACKAGES for argument in ("--editable", f"packages/{package}")]
        stamp.unlink(missing_ok=True)
        session.run(UV, "venv", "--quiet", "--allow-existing", "--python", python, str(folder), external=True)
        sync = (UV, "pip", "sync", "--quiet", "--require-hashes", "--compile-bytecode")
        session.run(*sync, *target, str(LOCK), external=True)
        install = (UV, "pip", "install", "--quiet", "--no-deps", "--reinstall-package", "core-tensor")
        session.run(*install, *target, *editable, external=True)
        stamp.write_text(wanted)
    return folder / "bin"


def fingerprint() -> str:
    """Digest of what an environment is made from: the lock, every package's metadata, and what is compiled.

    Of core-tensor's Python files only the names count: its editable install maps them one by one.
    """
    core = ROOT / "packages" / "core-tensor"
    contents = [LOCK, *ROOT.glob("packages/*/pyproject.toml"), core / "CMakeLists.txt", *core.glob("csrc/*")]
    total = hashlib.sha256()
    for path in sorted(contents):
        total.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    total.update(" ".join(sorted(str(path.relative_to(core)) for path in core.glob("src/**/*.py"))).encode())
    return total.hexdigest()


def workspace(session: nox.Session) -> Path:
    """The environment that the gates share: every package with every extra, every dependency group."""
    return environment(session, "workspace")


def run(session: nox.Session, program: Path, *arguments: str, **options: object) -> None:
    """Run a program of an environment."""
    session.run(str(program), *arguments, external=True, **options)


def parse(
    session: nox.Session, *, affected: bool = False, package: bool = False, wheels: bool = False
) -> argparse.Namespace:
    """Split what follows `--` into our own arguments and `rest`, which the tool behind the session gets."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --", allow_abbrev=False)
    if package:
        parser.add_argument("package", choices=PACKAGES)
    if affected:
        parser.add_argument("--affected", metavar="REF", help="only what the diff to REF touches, and dependants")
    if wheels:
        parser.add_argument("--quick", action="store_true", help="of the tests, those of commands and examples alone")
        parser.add_argument("--python", metavar="VERSION", choices=PYTHONS, help="another Python than the workspace's")
        parser.add_argument("--report", metavar="FILE", type=Path, help="write sizes and import times there, as JSON")
    options, rest = parser.parse_known_args(session.posargs)
    options.rest = rest
    return options


def affected_packages(reference: str) -> list[str]:
    """The packages that the diff to a git reference touches, and those that depend on them."""
    command = [sys.executable, str(ROOT / "tools" / "workspace.py"), "affected", reference]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def run_all(session: nox.Session, names: list[str], step: object) -> None:
    """Call `step(name)` for every name, also after one has failed, and fail at the end with the names that did."""
    failed = []
    for name in names:
        try:
            step(name)
        except CommandFailed:
            failed.append(name)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def project(package: str) -> dict[str, Any]:
    """The table `[project]` of a package."""
    metadata: dict[str, Any] = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())
    return metadata["project"]


def import_name(package: str) -> str:
    """Name of a distribution's module."""
    return package.replace("-", "_")


# ----------------------------------------------------------------------------------------------------------------------
# Tests


@nox.session
@BY_PACKAGE_AND_TOOLS
def test(session: nox.Session, package: str) -> None:
    """Tests of each package: `-- [--affected REF] [pytest arguments]`."""
    options = parse(session, affected=True)
    if options.affected and package in PACKAGES and package not in affected_packages(options.affected):
        session.skip(f"{package} is not affected by the changes since {options.affected}")
    folder = "tools/tests" if package == "tools" else f"packages/{package}/tests"
    run(session, workspace(session) / "python", *PYTEST, folder, *options.rest, env=ONE_THREAD)


@nox.session
def matrix(session: nox.Session) -> None:
    """Fast tests of every package on every supported Python that this machine has: `-- [pytest arguments]`."""
    found = {version: interpreter(version) for version in PYTHONS}
    for version in (version for version, path in found.items() if path is None):
        session.warn(f"SKIPPED: no working Python {version} on this machine")

    def step(version: str) -> None:
        commands = environment(session, f"matrix-{version}", str(found[version]))
        for package in PACKAGES:
            folder = f"packages/{package}/tests"
            run(session, commands / "python", *PYTEST, "-m", "not slow", folder, *session.posargs, env=ONE_THREAD)

    run_all(session, [version for version, path in found.items() if path is not None], step)


@nox.session
def lowest(session: nox.Session) -> None:
    """Fast tests with the oldest dependencies that the packages allow, on the oldest Python: `-- [PACKAGE ...]`."""
    python = interpreter(PYTHONS[0])
    if python is None:
        session.skip(f"no working Python {PYTHONS[0]} on this machine")
    folder = ROOT / ".nox" / "lowest"
    session.run(UV, "venv", "--quiet", "--allow-existing", "--python", str(python), str(folder), external=True)
    editable = "".join(f"--editable ./packages/{package}[all]\n" for package in PACKAGES)
    asked, pinned = folder / "asked.txt", folder / "pins.txt"
    asked.write_text(editable)
    compiled = (UV, "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--no-header", "--no-annotate")
    session.run(*compiled, "--python", str(python), str(asked), "--output-file", str(pinned), external=True)
    install = (UV, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"))
    session.run(*install, "--requirement", str(pinned), external=True)
    # what only the tests need may be new, as long as it lets the rest be old
    held = "".join(line for line in pinned.read_text().splitlines(keepends=True) if "==" in line)
    (folder / "held.txt").write_text(held)
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]
    session.run(*install, "--constraint", str(folder / "held.txt"), *tests, external=True)

    def step(package: str) -> None:
        folder_of_tests, old = f"packages/{package}/tests", ("-W", "default")  # old libraries warn of themselves
        run(session, folder / "bin" / "python", *PYTEST, "-m", "not slow", *old, folder_of_tests, env=ONE_THREAD)

    run_all(session, session.posargs or PACKAGES, step)


def interpreter(version: str) -> str | None:
    """A Python of this version that runs; a name on the PATH proves nothing, since pyenv's shims exist without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        try:
            code = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            continue
        if answer[1] == version:
            return answer[0]
    return None


@nox.session
def kernels(session: nox.Session) -> None:
    """Triton kernels without a GPU: values in the interpreter, then compilation for sm_80 and sm_90 (no spills)."""
    python = workspace(session) / "python"
    tests = ROOT / "packages" / "core-tensor" / "tests"
    run(session, python, "-m", "pytest", str(tests / "interpreted"), *session.posargs, env={"TRITON_INTERPRET": "1"})
    run(session, python, "-m", "pytest", str(tests / "aot"), *session.posargs, env={"CORE_TENSOR_AOT": "1"})


# ----------------------------------------------------------------------------------------------------------------------
# Static gates


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and format, and deptry: every package declares what it imports and imports what it declares."""
    commands = workspace(session)
    run(session, commands / "ruff", "check", ".")
    run(session, commands / "ruff", "format", "--check", ".")

    def step(package: str) -> None:
        with session.chdir(ROOT / "packages" / package):
            # Extras are imported by name (`core_tensor.app.extras.require`), which no static reader can follow: they
            # count as declared wherever they are imported. What is required must be declared and used.
            extras = ",".join(project(package).get("optional-dependencies", {}))
            run(session, commands / "deptry", "src", "--optional-dependencies-dev-groups", extras, "--ignore", "DEP004")

    run_all(session, PACKAGES, step)


@nox.session
@BY_PACKAGE_AND_TOOLS
def types(session: nox.Session, package: str) -> None:
    """`mypy --strict` of each package."""
    sources = ["tools", "--exclude", "tests/"] if package == "tools" else [f"packages/{package}/src"]
    run(session, workspace(session) / "mypy", *sources, *session.posargs)


@nox.session
def layers(session: nox.Session) -> None:
    """Papers depend on core_tensor and never on one another; the rooms of each package, and no circle of modules."""
    commands = workspace(session)
    run(session, commands / "lint-imports")

    def step(package: str) -> None:
        run(session, commands / "lint-imports", "--no-cache", "--config", f"packages/{package}/pyproject.toml")

    run_all(session, PACKAGES, step)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly; public names documented, paper maps true, tables as reproduce/ wrote them: `-- [--serve]`."""
    commands = workspace(session)
    run(session, commands / "python", "tools/public_docs.py")
    run(session, commands / "python", "tools/paper_map.py")
    run(session, commands / "python", "tools/report.py", "--check")
    run(session, commands / "python", "tools/claims.py", "--check")
    command = ["serve"] if "--serve" in session.posargs else ["build", "--strict"]
    run(session, commands / "mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def site(session: nox.Session) -> None:
    """Versions of the site on the branch `gh-pages`: mike's commands, `-- deploy VERSION`, `-- list`."""
    commands = workspace(session)
    paths = f"{commands}{os.pathsep}{os.environ['PATH']}"  # mike calls mkdocs by name
    run(session, commands / "mike", *(session.posargs or ["list"]), env={"NO_MKDOCS_2_WARNING": "1", "PATH": paths})


# ----------------------------------------------------------------------------------------------------------------------
# Distributions


@nox.session
def wheels(session: nox.Session) -> None:
    """Every wheel and sdist; each wheel alone outside the tree: `-- [--quick] [--python VERSION] [--affected REF]`.

    Each must import and answer `--help` bare (`--report FILE` keeps how large and how fast that was); with its extras
    it runs its demo and its fast tests. `--quick` takes the tests of commands and examples alone. What follows goes to
    pytest.
    """
    options = parse(session, affected=True, wheels=True)
    python = interpreter(options.python) if options.python else python_of_workspace()
    if python is None:
        session.error(f"no working Python {options.python} on this machine")
    commands = workspace(session)
    run(session, commands / "python", "tools/version_windows.py")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run(UV, "build", "--quiet", "--all-packages", "--out-dir", "dist", external=True)
    built = sorted(str(path) for path in (ROOT / "dist").iterdir() if path.name.endswith((".whl", ".tar.gz")))
    run(session, commands / "check-wheel-contents", *(path for path in built if path.endswith(".whl")))
    run(session, commands / "twine", "check", "--strict", *built)
    source = next(path for path in built if Path(path).name.startswith("core_tensor-") and path.endswith(".tar.gz"))
    run(session, commands / "python", "tools/without_compiler.py", source)
    chosen = affected_packages(options.affected) if options.affected else PACKAGES
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        outside = Path(name)
        (outside / "pins.txt").write_text(pins())
        session.run(UV, "venv", "--quiet", "--python", python, str(outside / "venv"), external=True)
        shutil.copy(ROOT / "pyproject.toml", outside)  # pytest's configuration
        footprints: list[dict[str, Any]] = []
        run_all(session, chosen, lambda package: test_wheel(session, package, outside, options, footprints))
    if options.report:
        options.report.write_text(json.dumps(footprints, indent=2) + "\n")


def test_wheel(
    session: nox.Session, package: str, outside: Path, options: argparse.Namespace, footprints: list[dict[str, Any]]
) -> None:
    """Test one wheel outside the tree, first bare (it must import and answer `--help`), then with its extras.

    `--exact` removes whatever the wheel before it left behind, so that only torch, which all need, is made once.
    """
    wheel, core = (next((ROOT / "dist").glob(f"{import_name(name)}-*.whl")) for name in (package, "core-tensor"))
    extras = ",".join(project(package).get("optional-dependencies", {}))
    scripts = list(project(package).get("scripts", {}))
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]
    commands = outside / "venv" / "bin"
    install = (UV, "pip", "install", "--quiet", "--python", str(commands / "python"), "--exact")
    install = (*install, "--constraint", str(outside / "pins.txt"))
    # The wheels go in by path: an index could hold a stranger under the same name.
    core_requirement = [] if package == "core-tensor" else [f"core-tensor @ {core.as_uri()}"]
    session.run(*install, f"{package} @ {wheel.as_uri()}", *core_requirement, external=True)
    with session.chdir(outside):
        footprint = (str(commands / "python"), str(ROOT / "tools" / "footprint.py"), package, str(wheel))
        printed = session.run(*footprint, external=True, silent=True, stderr=None)
    session.log(printed.strip())
    footprints.append(json.loads(printed))
    session.run(*install, f"{package}[{extras}] @ {wheel.as_uri()}", *core_requirement, *tests, external=True)
    folder = outside / "packages" / package
    without_sources = shutil.ignore_patterns("src", "csrc", "__pycache__")
    shutil.copytree(ROOT / "packages" / package, folder, ignore=without_sources)
    quick = ("-m", "not slow and not distributed", "-k", "cli or command or demo or example")
    chosen = quick if options.quick else ("-m", "not slow")
    with session.chdir(outside):
        for command in [] if options.quick else scripts:
            run(session, commands / command, "demo", "--quick", env=ONE_THREAD)
        tests_of_package = (*PYTEST, *chosen, str(folder / "tests"), *options.rest)
        run(session, commands / "python", *tests_of_package, env=shared_data() | ONE_THREAD)


def python_of_workspace() -> str:
    """The interpreter that `.nox/workspace` was made with."""
    return str((ROOT / ".nox" / "workspace" / "bin" / "python").resolve())


def shared_data() -> dict[str, str]:
    """Where tests outside the tree find the shared data, by the rule of `core_tensor.dev.testing.shared_data`."""
    named = os.environ.get("CORE_TENSOR_SHARED_DATA")
    beside = [folder / "shared" / "data" for folder in ROOT.parents if (folder / "shared" / "data").is_dir()]
    folder = named or next(map(str, beside), None)
    return {"CORE_TENSOR_SHARED_DATA": folder} if folder else {}


def pins() -> str:
    """The lock without its hashes: constraints for environments that hold a part of it."""
    lines = (line.removesuffix(" \\") for line in LOCK.read_text().splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith((" ", "#")))


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve anew, write `tools/requirements.lock`; `-- --check`: it satisfies every pyproject.toml and installs."""
    if "--check" in session.posargs:
        commands = workspace(session)
        run(session, commands / "python", "tools/lock.py", "check")
        session.run(UV, "pip", "check", "--quiet", "--python", str(commands / "python"), external=True)
        return
    (ROOT / "uv.lock").unlink(missing_ok=True)  # an existing lock would keep its versions
    session.run(UV, "lock", external=True)
    export = (UV, "export", "--quiet", "--all-packages", "--all-extras", "--all-groups")
    export = (*export, "--no-emit-workspace", "--no-header", "--no-annotate")
    LOCK.write_text(LOCK_HEADER + session.run(*export, external=True, silent=True))


LOCK_HEADER = """\
# The resolution of this workspace with hashes and without addresses, so that it holds for any mirror of the index.
# Written by `uvx nox -s lock`; the gates install exactly this.
"""


@nox.session
def release(session: nox.Session) -> None:
    """Bump, change log, commit, tag and wheels of every package with something to release: `-- [--dry-run]`."""
    run(session, workspace(session) / "python", "tools/release.py", *session.posargs)


# ----------------------------------------------------------------------------------------------------------------------
# Evidence


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks of one package against its peers: `-- PACKAGE [--quick] [--json] [--only KEY]`."""
    options = parse(session, package=True)
    python = bench_environment(session, options.package)
    folder = ROOT / "packages" / options.package / "benchmarks"
    peers = folder / "peers.txt"
    if peers.exists():
        install_peers(session, python, peers)
    scripts = [folder / "bench.py"] if (folder / "bench.py").exists() else sorted(folder.glob("bench_*.py"))
    for script in scripts:
        run(session, python, str(script), *options.rest)


def bench_environment(session: nox.Session, package: str) -> Path:
    """`.nox/bench-<package>`: the package with its extras at the lock's versions; peers of an earlier call stay."""
    folder = ROOT / ".nox" / f"bench-{package}"
    session.run(UV, "venv", "--quiet", "--allow-existing", "--python", ">=3.11", str(folder), external=True)
    constraints = folder / "pins.txt"
    constraints.write_text(pins())
    extras = ",".join(project(package).get("optional-dependencies", {}))
    editable = ("--editable", "packages/core-tensor", "--editable", f"packages/{package}[{extras}]")
    install = (UV, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"))
    session.run(*install, "--constraint", str(constraints), *editable, external=True)
    return folder / "bin" / "python"


def install_peers(session: nox.Session, python: Path, peers: Path) -> None:
    """Add the peers one by one, with what is installed held fixed, so that we are measured as the lock has us.

    A peer that cannot join is left out with the reason; its bars then print null.
    """
    install = [UV, "pip", "install", "--python", str(python), "--quiet"]
    for line in peers.read_text().splitlines():
        peer = line.split(" #")[0].strip()
        if not peer or peer.startswith("#"):
            continue
        freeze = [UV, "pip", "freeze", "--python", str(python)]
        held = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
        pins = "\n".join(pin for pin in held if "==" in pin)
        command = [*install, "--constraint", "-", *peer.split()]  # a line may hold options of the installer
        done = subprocess.run(command, input=pins, capture_output=True, text=True)
        if done.returncode:
            session.warn(f"peer {peer} cannot be installed, its bars will be null:\n{done.stderr}")


@nox.session
def reproduce(session: nox.Session) -> None:
    """The papers' claims from fixed seeds, then the docs' tables and one report: `-- PACKAGE [...]`, or `-- --quick`.

    `-- --quick` runs every script that has a quick form with little data and reports on that alone, in `out/`; a second
    call continues where the first was stopped.
    """
    python = workspace(session) / "python"
    if session.posargs == ["--quick"]:
        run(session, python, "tools/claims.py", "--quick")
        return
    options = parse(session, package=True)
    for script in sorted((ROOT / "packages" / options.package / "reproduce").glob("[!_]*.py")):
        run(session, python, str(script), *options.rest)
    run(session, python, "tools/report.py")
    run(session, python, "tools/claims.py")


@nox.session
def demo(session: nox.Session) -> None:
    """The main job of one package, or of each: `-- [PACKAGE] [--quick] [--json]`."""
    named = [argument for argument in session.posargs if argument in PACKAGES]
    rest = [argument for argument in session.posargs if argument not in PACKAGES]
    commands = workspace(session)
    folder = ROOT / "out" / "demo"
    folder.mkdir(parents=True, exist_ok=True)

    def step(package: str) -> None:
        with session.chdir(folder):  # where their pictures go
            run(session, commands / package, "demo", *rest)

    run_all(session, named or [name for name in PACKAGES if project(name).get("scripts")], step)


@nox.session
def hostile(session: nox.Session) -> None:
    """Mutated calls on sanitized kernels, mutated files on every reader; see `tools/hostile.py --help`."""
    commands = workspace(session)
    tools = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "CMAKE_GENERATOR": "Ninja"}  # both from the lock
    run(session, commands / "python", "tools/hostile.py", *(session.posargs or ["all"]), env=tools)


@nox.session
def faults(session: nox.Session) -> None:
    """Every long command killed, out of disk, without permission, twice at once; see `tools/faults.py --help`."""
    run(session, workspace(session) / "python", "tools/faults.py", *session.posargs)
