"""Every picture of a report, into one folder."""

from pathlib import Path

import torch

from sgd_stability.curvature.spectra import SpectralDensity
from sgd_stability.report.plots import plot_coherence, plot_map, plot_sample_curvature, plot_spectral_density
from sgd_stability.report.report import StabilityReport


def draw_report(report: StabilityReport, folder: str | Path, density: SpectralDensity | None = None) -> list[Path]:
    """Draw the stability map, the coherence by class, the curvature of single samples and the spectral density.

    Args:
        report: The report.
        folder: Where to write; created if absent.
        density: Spectral density of the same curvature (`sgd_stability.curvature.spectra.spectral_density`).

    Returns:
        The pictures written. Coherence needs an exact analysis of positive semidefinite curvature; samples are sorted
        by target where targets are classes, and keep their order elsewhere.
    """
    folder = Path(folder)
    drawn = [plot_map(report.stability_map(), folder / "map.png", f"{report.curvature}, {report.sampling}")]
    if not report.family.truncated and report.family.signs is None:
        classes = report.targets.ndim == 1 and not report.targets.is_floating_point()
        labels = report.targets.cpu() if classes else torch.zeros(report.family.n, dtype=torch.int64)
        drawn.append(plot_coherence(report.coherence_matrix, labels, folder / "coherence.png"))
    drawn.append(plot_sample_curvature(report.family.sample_curvature, report.lambda_max, folder / "curvature.png"))
    if density is not None:
        low, high = float(density.nodes.min()), float(density.nodes.max())
        width = max(high - low, 1e-12)
        grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, 2000, dtype=torch.float64)
        drawn.append(plot_spectral_density(grid, density.density(grid, 0.005 * width), folder / "density.png"))
    return drawn
