"""Plain torch: center twice in float64, because one mean of rows around 1e8 leaves 1e-8 behind."""

from torch import Tensor


def centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `core_tensor.centred_moments`."""
    rows = x.double()
    mean = rows.mean(0)
    centred = rows - mean
    rest = centred.mean(0)
    centred = centred - rest
    scatter = centred.mT @ centred
    return mean + rest, (scatter + scatter.mT) / 2
