"""Spectra of a network's curvature; the code is `sgd_stability.curvature.spectra`."""

from sgd_stability.curvature.spectra import (
    SpectralDensity,
    exact_gauss_newton_trace,
    gauss_newton_operator,
    hutch_plus_plus,
    hutchinson_trace,
    lanczos,
    loss_hessian_operator,
    network_of,
    spectral_density,
)

__all__ = [
    "SpectralDensity",
    "exact_gauss_newton_trace",
    "gauss_newton_operator",
    "hutch_plus_plus",
    "hutchinson_trace",
    "lanczos",
    "loss_hessian_operator",
    "network_of",
    "spectral_density",
]
