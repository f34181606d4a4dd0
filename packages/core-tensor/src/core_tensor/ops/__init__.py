"""One folder per operator: formula, schema and public function, readable reference, C++ call, Triton kernel."""

import importlib
import pkgutil

from core_tensor.ops._operator import live


def backends() -> dict[str, dict[str, str]]:
    """Which implementation is live for every operator on every device.

    Returns:
        `{operator: {"cpu": "native" | "reference", "cuda": "triton" | "reference"}}`.
    """
    for folder in pkgutil.iter_modules(__path__):
        if folder.ispkg:
            importlib.import_module(f"{__name__}.{folder.name}")
    return live()
