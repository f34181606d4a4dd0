"""One budget of outliers for a whole model, given to the layers in which they save the most."""

from collections.abc import Mapping, Sequence

import torch
from core_tensor.app.ranks import current
from torch import Tensor

from quantease.algorithms.heldout import make_grid
from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import CausalLM
from quantease.model.matrices import Matrix
from quantease.model.observe import observe
from quantease.problem.config import LayerConfig

Names = tuple[int, str]
"""Number of a block and name of a matrix in it."""

_BINS = torch.arange(-60.0, 20.0, 0.125)  # edges in log2 of a score: steps of 9 %
_MOST = 0.5  # of a layer's weights


def outlier_fractions(
    lm: CausalLM, tokens: Tensor, matrices: Sequence[Sequence[Matrix]], config: LayerConfig
) -> dict[Names, float]:
    r"""Fractions of outliers per layer that together make up `config.outliers` of all weights.

    Rounding weight $W_{ij}$ costs its layer about $\Sigma_{jj} (W_{ij} - q(W_{ij}))^2$ of the output's energy
    $\|W X\|_F^2$. Relative costs of all layers are put in one order, and the weights above the cut become outliers. It
    takes one pass of the tokens through the model as it is, before anything is quantized.

    Args:
        lm: The model.
        tokens: Calibration tokens, shape (windows, length), int64 (of this rank).
        matrices: The matrices to be quantized, by block.
        config: Bits, grid and fraction.

    Returns:
        Fraction by block and name, each at most one half.
    """
    stream = BlockStream(lm, tokens)
    counts: dict[Names, Tensor] = {}
    sizes: dict[Names, int] = {}
    for index, block_matrices in enumerate(matrices):
        with lm.loaded(index) as block:
            seen = _Energies({m.name: m.weight(block) for m in block_matrices})
            with observe(block, block_matrices, seen.add):
                stream.advance(index, block)
            for matrix in block_matrices:
                cost = _relative_cost(matrix.weight(block).float(), *seen.of(matrix.name), config)
                logs = cost.flatten().log2_().nan_to_num_(neginf=-1e9).cpu()
                counts[index, matrix.name] = torch.bincount(torch.bucketize(logs, _BINS), minlength=len(_BINS) + 1)
                sizes[index, matrix.name] = cost.numel()
    return _cut(counts, sizes, config.outliers)


class _Energies:
    """Sums of squares of the inputs and outputs of a block's matrices."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        device = next(iter(weights.values())).device
        self.inputs = {n: torch.zeros(w.shape[1], dtype=torch.float64, device=device) for n, w in weights.items()}
        self.outputs = {n: torch.zeros((), dtype=torch.float64, device=device) for n in weights}

    def add(self, name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.inputs[name] += flat.square().sum(0)
        self.outputs[name] += (flat @ self.weights[name].float().T).square().sum()

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        ranks = current()
        return ranks.sum(self.inputs[name]), ranks.sum(self.outputs[name])


def _relative_cost(W: Tensor, energy: Tensor, output: Tensor, config: LayerConfig) -> Tensor:
    grid = make_grid(W, energy.float(), config, clip=config.clips)
    error = (W - grid.dequantize(grid.quantize(W))).square_().mul_(energy)
    return error.div_(output) if float(output) > 0 else error.zero_()


def _cut(counts: Mapping[Names, Tensor], sizes: Mapping[Names, int], fraction: float) -> dict[Names, float]:
    # The costliest weights of all layers up to the budget; of the bin in which it ends, every layer the same part.
    wanted = fraction * sum(sizes.values())
    above = torch.stack(list(counts.values())).sum(0).flip(0).cumsum(0).flip(0)  # weights in a bin or costlier
    last = int((above >= wanted).nonzero()[-1])
    costlier = float(above[last + 1]) if last + 1 < len(above) else 0.0
    part = (wanted - costlier) / max(float(above[last]) - costlier, 1.0)
    taken = {name: float(count[last + 1 :].sum()) + part * float(count[last]) for name, count in counts.items()}
    return {name: min(taken[name] / sizes[name], _MOST) for name in counts}
