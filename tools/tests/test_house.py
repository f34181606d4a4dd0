"""What holds for the structure of every package."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
import tomllib

import click
import pytest
from workspace import ROOT, packages

PACKAGES = list(packages())
MOST_MODULES = 12
MOST_LINES = 600


def _source(package):
    return ROOT / "packages" / package / "src"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_and_no_file_is_too_large_to_read(package):
    folders = {path.parent for path in _source(package).rglob("*.py")}
    modules = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in modules.items() if count > MOST_MODULES} == {}
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in _source(package).rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_a_sibling_inside_a_function(package):
    """Only command lines may, so that `--help` starts at once; a function-local import elsewhere hides a circle."""
    name = package.replace("-", "_")
    found = []
    for path in _source(package).rglob("*.py"):
        place = path.relative_to(_source(package) / name)
        if place.parts[0] in {"cli", "cli.py", "demo.py"}:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            imported = [i.module or "" for i in ast.walk(function) if isinstance(i, ast.ImportFrom)]
            imported += [a.name for i in ast.walk(function) if isinstance(i, ast.Import) for a in i.names]
            found += [f"{place}:{function.name}: {m}" for m in imported if m.split(".")[0] == name]
    assert found == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "core-tensor"])
def test_the_command_line_starts_without_torch(package):
    name = package.replace("-", "_")
    code = f"import sys, {name}.cli; heavy = {{'torch', 'scipy', 'transformers', 'pyarrow'}} & set(sys.modules)\n"
    code += f"assert not heavy, heavy\n{name}.cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "core-tensor"])
def test_every_demo_has_the_options_of_all_demos(package):
    name = package.replace("-", "_")
    done = subprocess.run([sys.executable, "-m", name, "demo", "--help"], capture_output=True, text=True, check=True)
    for option in ("--quick", "--json", "-o, --out"):
        assert option in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_layers_and_circles_are_checked(package):
    metadata = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())
    contracts = metadata["tool"]["importlinter"]["contracts"]
    assert {"layers", "acyclic_siblings"} <= {contract["type"] for contract in contracts}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_an_index_shows_of_a_package(package):
    metadata = importlib.metadata.metadata(package)
    assert metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_unpickled(package):
    """A pickle is a program: no module loads one. `core_tensor.dev` passes values between a test's own processes."""
    found = []
    for path in _source(package).rglob("*.py"):
        if "dev" in path.relative_to(_source(package)).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                if {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & {n.split(".")[0] for n in names}:
                    found.append(f"{path.name}:{node.lineno}: import")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if called == "torch.load" and options.get("weights_only") is not True:
                found.append(f"{path.name}:{node.lineno}: torch.load")
            if called == "yaml.load" or options.get("allow_pickle"):
                found.append(f"{path.name}:{node.lineno}: {called}")
    assert found == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "core-tensor"])
def test_help_is_whole_on_every_level(package):
    """No sentence of a list of commands is cut, and no default is shown that says nothing."""
    name = package.replace("-", "_")
    main = importlib.import_module(f"{name}.cli").main
    waiting, seen = [(main, click.Context(main, info_name=package))], 0
    while waiting:
        command, context = waiting.pop()
        told = command.get_help(context)
        assert '[default: ""]' not in told, context.command_path
        if isinstance(command, click.Group):
            assert "..." not in told.partition("Commands:")[2], context.command_path
            for part in command.commands.values():
                waiting.append((part, click.Context(part, context, part.name)))
        seen += 1
    assert seen > 3
