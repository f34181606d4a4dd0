"""Readers for the hostile harness: (name, make a small valid file in a folder, read it and take the next step)."""

from pathlib import Path

MODEL = """
import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
"""


def _data(folder: Path) -> Path:
    import numpy as np

    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.normal(size=(6, 4)), y=rng.integers(0, 3, 6))
    return folder / "data.npz"


def _read_data(path: Path) -> None:
    import torch
    from sgd_stability import analyze
    from sgd_stability.report.sources import load_data

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    analyze(model, "cross_entropy", load_data(str(path)), max_samples=6).lr_threshold(1)


def _weights(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    (folder / "net.py").write_text(MODEL)
    save_file(model.state_dict(), folder / "net.safetensors")
    return folder / "net.safetensors"


def _read_weights(path: Path) -> None:
    import torch
    from sgd_stability import analyze
    from sgd_stability.report.sources import load_model

    source = path.parent / "net.py"
    source.write_text(MODEL)  # a program, which is trusted
    model = load_model(f"{source}:build", str(path))
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    analyze(model, "cross_entropy", (x, torch.arange(5) % 3))


READERS = [("data", _data, _read_data), ("weights", _weights, _read_weights)]
