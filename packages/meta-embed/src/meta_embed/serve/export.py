"""The global block as one file, with the member's vector as an input: what a serving system loads."""

from pathlib import Path

import torch
from core_tensor.app.files import write_buffered
from torch import Tensor, nn

from meta_embed.model.personalizer import Personalizer

_TOLERANCE = 1e-6


class _Score(nn.Module):
    """`(ids, dense, e) -> probability`."""

    def __init__(self, model: Personalizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, dense: Tensor, e: Tensor) -> Tensor:
        return self.model.logits(ids, dense, e).sigmoid()


def export_global_block(model: Personalizer, ids: int, dense: int, path: Path) -> float:
    """Write the global block as a torch.export program with a dynamic batch, and check it against the model.

    Args:
        model: The model.
        ids: Number of categories of a row.
        dense: Number of its dense features.
        path: File to write, `.pt2` by custom.

    Returns:
        Largest difference from the model on batches of several sizes.

    Raises:
        ValueError: If the program differs by more than 1e-6.
    """
    module = _Score(model).eval()
    batch = torch.export.Dim("batch", min=1)
    example = _inputs(model, ids, dense, 3)
    program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    worst = 0.0
    with torch.no_grad():
        for size in (1, 2, 7, 64):
            rows = _inputs(model, ids, dense, size)
            worst = max(worst, float((program.module()(*rows) - module(*rows)).abs().max()))
    if not worst <= _TOLERANCE:
        raise ValueError(f"{path}: the exported program differs from the model by {worst:g}")
    write_buffered(path, lambda file: torch.export.save(program, file))
    return worst


def _inputs(model: Personalizer, ids: int, dense: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    one = torch.zeros(rows, ids, dtype=torch.int64)
    return one, torch.randn(rows, dense, generator=generator), torch.randn(rows, model.width, generator=generator)
