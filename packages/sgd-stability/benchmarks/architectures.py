"""Modules that people train: every route against a dense float64 matrix. The zoo is that of the tests."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMED = ("encoder", "gpt2", "llama", "bert", "vit", "lstm", "gru", "bag", "weight norm", "tied")
TESTS = Path(__file__).resolve().parents[1] / "tests" / "curvature" / "test_real_modules.py"


def architectures(_: bool) -> Mapping[str, Any]:
    """The largest relative error of any route on any of the modules."""
    spec = importlib.util.spec_from_file_location("real_modules", TESTS)
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = {name: zoo.route_errors(name) for name in NAMED}
    worst = max(error for routes in errors.values() for error in routes.values())
    detail = {
        name: {route: float(f"{error:.1e}") for route, error in routes.items()} for name, routes in errors.items()
    }
    return {"architectures_exact": worst, "architectures_exact_detail": detail}
