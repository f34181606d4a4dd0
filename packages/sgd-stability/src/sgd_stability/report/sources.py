"""A user's own model and data, named on a command line; nothing is ever unpickled."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from core_tensor.app.devices import check_device
from core_tensor.app.extras import require
from core_tensor.app.files import read_npz, reading


def load_model(target: str, weights: str | None = None, device: str = "cpu") -> torch.nn.Module:
    """Build a model.

    Args:
        target: `package.module:function` (the current folder is importable) or `file.py:function`; the function takes
            no arguments and returns an nn.Module.
        weights: Safetensors file to load into it.
        device: Where to put it.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is no such function, it returns something else, or the weights do not fit.
    """
    model = _call("MODEL", target)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"MODEL: expected {target} to return an nn.Module, got {type(model).__name__}")
    if weights is not None:
        load = require("safetensors.torch", "sgd-stability[files]").load_file
        with reading(weights, "safetensors"):
            state = load(weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # names or shapes of another model
            raise ValueError(f"{weights}: expected the weights of MODEL ({' '.join(str(error).split())})") from error
    return model.eval().to(check_device("--device", device))


def load_data(source: str) -> Any:
    """Load data.

    Args:
        source: An npz file with arrays x (inputs) and y (targets), or a function as in `load_model` that returns a
            dataset, a loader, or (inputs, targets).

    Returns:
        What `analyze` takes.

    Raises:
        ValueError: If the file is no such archive.
    """
    if ":" in source and not Path(source).exists():
        return _call("DATA", source)
    arrays = read_npz(source, "x", "y")
    with reading(source, "arrays x and y of numbers"):
        return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


def _call(argument: str, target: str) -> Any:
    where, colon, name = target.rpartition(":")
    if not colon:
        raise ValueError(f"{argument}: expected package.module:function or file.py:function, got {target!r}")
    try:
        module = _file(where) if where.endswith(".py") else _module(where)
        function = getattr(module, name)
    except (ModuleNotFoundError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"{argument}: {error}") from error
    return function()


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data classes and pickling of loaders' workers look the module up
    spec.loader.exec_module(module)
    return module
