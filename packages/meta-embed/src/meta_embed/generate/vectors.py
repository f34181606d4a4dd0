"""Vectors of many members: adapted in chunks of similar length, so that little is padded."""

import numpy as np
import torch

from meta_embed.model.personalizer import Personalizer, no_grad_vectors
from meta_embed.store.codec import Records
from meta_embed.tasks.encode import Array
from meta_embed.tasks.events import Events
from meta_embed.tasks.ragged import task_batch

CHUNK = 4096


def make_vectors(
    model: Personalizer, events: Events, precision: str = "none", device: str = "cpu", chunk: int = CHUNK
) -> Records:
    """Adapt to every member's events.

    Args:
        model: The model.
        events: The events of each support.
        precision: What to return of the posterior precisions: `none`, `diagonal` or `full`.
        device: Where to compute.
        chunk: Members of a batch.

    Returns:
        Records, one per member, in the order of `events`.

    Raises:
        ValueError: If a precision is asked of a model that has none, or a vector is not finite.
    """
    d, members = model.width, len(events)
    floats = {"none": 0, "diagonal": d, "full": d * (d + 1) // 2}[precision]
    vectors, precisions = np.zeros((members, d), np.float32), np.zeros((members, floats), np.float32)
    upper = np.triu_indices(d)
    order = np.argsort(events.counts, kind="stable")
    for first in range(0, members, chunk):
        part = order[first : first + chunk]
        support = (events.offsets[:-1][part], events.counts[part])
        none = (np.zeros(len(part), np.int64), np.zeros(len(part), np.int64))
        batch = task_batch(events, part, support, none).to(device)
        e, H = no_grad_vectors(model, batch)
        vectors[part] = e.cpu().numpy()
        if floats and H is None:
            raise ValueError(f"precision: expected none, because this model gives no posterior, got {precision}")
        if H is not None and floats:
            full = H.cpu().numpy()
            precisions[part] = np.diagonal(full, axis1=1, axis2=2) if precision == "diagonal" else full[:, *upper]
    if not np.isfinite(vectors).all():
        raise ValueError(f"vectors: {int((~np.isfinite(vectors)).any(1).sum())} members got one that is not finite")
    last = np.maximum(events.offsets[1:] - 1, 0)
    times = np.where(events.counts > 0, events.time[last] if len(events.time) else 0.0, 0.0)
    return Records(vectors, times, events.counts.copy(), precisions)


def unpack_precisions(packed: Array, width: int) -> torch.Tensor:
    """Matrices of stored precisions.

    Args:
        packed: Diagonals or upper triangles, shape (B, width) or (B, width (width + 1) / 2).
        width: Length of the vectors.

    Returns:
        Shape (B, width, width); of diagonals, diagonal matrices.
    """
    values = torch.from_numpy(packed)
    if packed.shape[1] == width:
        return torch.diag_embed(values)
    row, column = np.triu_indices(width)
    out = values.new_zeros(len(values), width, width)
    out[:, row, column] = values
    out[:, column, row] = values
    return out
