r"""One feature space from several layers: random projections of each, in units of the real batch's spread.

For layers $a_1, \dots, a_L$ of a network (the first are the pixels) the features of an image are
$f = (P_1 a_1 / s_1, \dots, P_L a_L / s_L)$, where $P_l$ has Gaussian entries, drawn anew at every step, and $s_l$ is
the root mean variance of the real batch's projections. Over the steps every direction of every layer is compared, at
the cost of a narrow sample; one fixed layer leaves most directions of an image unseen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Projection:
    """The projections of one step.

    Args:
        layers: Activations of any images, one tensor per layer, shape (n, ...); only their sizes matter.
        columns: Features per layer; a narrower layer is left as it is.
        generator: Draws the projections: the same on every rank if it is.
    """

    def __init__(self, layers: Sequence[Tensor], columns: int, generator: torch.Generator) -> None:
        sizes = [layer[0].numel() for layer in layers]
        self.widths = [min(size, columns) for size in sizes]
        # one draw for all layers; the entries' scale cancels against the spread
        drawn = torch.randn(sum(size for size in sizes if size > columns), columns, generator=generator)
        pieces = iter(drawn.to(layers[0]).split([size for size in sizes if size > columns]))
        self.matrices = [next(pieces) if size > columns else None for size in sizes]

    def __call__(self, layers: Sequence[Tensor]) -> Tensor:
        """Project.

        Args:
            layers: Activations, one tensor per layer, shape (n, ...).

        Returns:
            Features, shape (n, sum of the widths), float32 at least.
        """
        rows = [layer.flatten(1) for layer in layers]
        return torch.cat([r if m is None else r @ m for r, m in zip(rows, self.matrices, strict=True)], 1).float()

    def spread(self, real: Tensor) -> Tensor:
        """The unit of every feature: its layer's root mean variance over the real images.

        Args:
            real: Projected real images of all ranks, shape (n, d).

        Returns:
            Positive numbers, shape (d,).
        """
        centered = real.double()
        centered = centered - centered.mean(0)
        variances = centered.square().mean(0).split(self.widths)  # a quarter of the time of var(0)
        tiny = torch.finfo(torch.float32).tiny  # a dead layer stays zero
        units = torch.stack([v.mean() for v in variances]).sqrt().clamp_min(tiny)
        return units.to(real).repeat_interleave(torch.tensor(self.widths, device=real.device))
