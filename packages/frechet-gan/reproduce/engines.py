"""Engines of the matrix root: error of value and gradient against CPU time, and where they end on a collapsed sample.

    python packages/frechet-gan/reproduce/engines.py [--quick] [-o FOLDER]

The truth is the SVD engine's on the same samples, which the tests check against 60 digits. Power-law spectra make the
cross matrix as ill-conditioned as features are. Writes `results/engines.json` and `.png`.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _options import options, parser
from core_tensor.app.figures import pyplot, save
from core_tensor.app.files import write_json
from core_tensor.dev.benchmarking import seconds
from frechet_gan import frechet_distance
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from forms import fd_loss, principal_root

Solved = tuple[Tensor, Tensor]


def by_method(method: str) -> Callable[[Tensor, Tensor], Solved]:
    """One of `frechet_distance`'s engines."""

    def solve(x: Tensor, y: Tensor) -> Solved:
        leaf = y.detach().requires_grad_()
        value = frechet_distance(x, leaf, method=method)  # type: ignore[arg-type]
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return solve


def by_eigvalsh(x: Tensor, y: Tensor, root: Tensor) -> Solved:
    """FD-loss's form, with the root of the reference at hand."""
    leaf = y.detach().requires_grad_()
    value = fd_loss(leaf, x.mean(0), torch.cov(x.T), root)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def rows_of(n: int, d: int) -> list[dict[str, object]]:
    """One row per engine at one size."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) * spectrum
    y = torch.randn(n, d, dtype=torch.float64, generator=generator) * spectrum * 1.1 + 0.05
    root = principal_root(torch.cov(x.T))
    engines: dict[str, Callable[[Tensor, Tensor], Solved]] = {
        "svd": by_method("svd"),
        "auto": by_method("auto"),
        "eigh": by_method("eigh"),
        "polar": by_method("polar"),
        "eigvalsh autograd": lambda a, b: by_eigvalsh(a, b, root),
        "newton_schulz": by_method("newton_schulz"),
    }
    truth = engines["svd"](x, y)
    collapsed = x.mean(0).expand(n, d).clone()
    rows: list[dict[str, object]] = []
    for name, solve in engines.items():
        value, gradient = solve(x, y)
        pull = float(solve(x, collapsed)[1].norm())
        rows.append(
            {
                "n": n,
                "d": d,
                "engine": name,
                "value error": float((value / truth[0] - 1).abs()),
                "gradient error": float((gradient - truth[1]).norm() / truth[1].norm()),
                "CPU ms": 1e3 * statistics.median(seconds(lambda f=solve: f(x, y)) for _ in range(5)),
                "gradient when collapsed": pull if pull == pull else None,
            }
        )
    return rows


def main() -> None:
    """Measure and draw."""
    found = options(parser(__doc__))
    shapes = ((64, 128), (1000, 64)) if found.quick else ((64, 128), (256, 512), (1000, 64))
    rows = [row for size in shapes for row in rows_of(*size)]
    write_json(found.out / "engines.json", {"rows": rows})
    plt = pyplot("frechet-gan[plot]")
    sizes = sorted({(row["n"], row["d"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4.2 * len(sizes), 3.6), sharex=True, sharey=True, layout="constrained"
    )
    for panel, size in zip(panels, sizes, strict=True):
        for row in rows:
            if (row["n"], row["d"]) == size:
                error = max(float(row["gradient error"]), 1e-16)  # type: ignore[arg-type]
                panel.loglog(
                    row["CPU ms"],
                    error,
                    "o",
                    markersize=8,
                    label="svd (the truth)" if row["engine"] == "svd" else row["engine"],
                )
        panel.set(title=f"n = {size[0]}, d = {size[1]}", xlabel="CPU time of value and gradient (ms)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the gradient")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save(figure, found.out / "engines.png")


if __name__ == "__main__":
    main()
