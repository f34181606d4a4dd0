"""What training, generation and serving ask of a model, and its two kinds: MAP head and gradient steps."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.adapt.maml import InnerOptions
from meta_embed.adapt.map_head import MapHead
from meta_embed.model.global_block import GlobalBlock
from meta_embed.model.meta_model import MetaModel
from meta_embed.tasks.ragged import Ragged, TaskBatch


class Personalizer(nn.Module):
    """A global block, and a way from a support to a member's vector.

    Args:
        global_block: Logit and item vector of a row.
    """

    def __init__(self, global_block: GlobalBlock) -> None:
        super().__init__()
        self.global_block = global_block

    @property
    def width(self) -> int:
        """Length of a member's vector."""
        return self.global_block.width

    @abstractmethod
    def prior(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Vectors of members without events, from their features: the cold start, shape (T, width)."""

    @abstractmethod
    def adapt(self, member_ids: Tensor, member_dense: Tensor, support: Ragged) -> tuple[Tensor, Tensor | None]:
        """Vectors, shape (T, width), and posterior precisions, shape (T, width, width), where there are any."""

    def logits(self, ids: Tensor, dense: Tensor, e: Tensor) -> Tensor:
        """Logits of rows, b(x) + h(x)'e.

        Args:
            ids: Categories, shape (R, k).
            dense: Numbers, shape (R, p).
            e: Vector of each row's member, shape (R, width).

        Returns:
            Shape (R,).
        """
        base, h = self.global_block(ids, dense)
        out: Tensor = base + (h * e).sum(-1)
        return out

    def query_loss(self, batch: TaskBatch) -> Tensor:
        """Weighted sum of the log losses of all query rows, adapted on the supports.

        Args:
            batch: Tasks.

        Returns:
            A scalar.
        """
        e, _ = self.adapt(batch.member_ids, batch.member_dense, batch.support)
        query = batch.query
        logits = self.logits(query.ids, query.dense, e[query.owner])
        return (query.w * binary_cross_entropy_with_logits(logits, query.y, reduction="none")).sum()


class MapPersonalizer(Personalizer):
    """Vectors by the MAP head, the default.

    Args:
        global_block: Logit and item vector of a row.
        head: Prior and solver.
    """

    def __init__(self, global_block: GlobalBlock, head: MapHead) -> None:
        super().__init__(global_block)
        self.head = head

    def prior(self, ids: Tensor, dense: Tensor) -> Tensor:
        """See `Personalizer`."""
        mu: Tensor = self.head.prior(ids, dense)
        return mu

    def adapt(self, member_ids: Tensor, member_dense: Tensor, support: Ragged) -> tuple[Tensor, Tensor | None]:
        """See `Personalizer`."""
        base, h = self.global_block(support.ids, support.dense)
        e, H = self.head(h, base, support.y, support.w, support.lengths, member_ids, member_dense)
        return e, H


class _DotScore(nn.Module):
    """The global block as a function of vector and row, as `MetaModel` wants it."""

    def __init__(self, block: GlobalBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, e: Tensor, ids: Tensor, dense: Tensor) -> Tensor:
        base, h = self.block(ids, dense)
        out: Tensor = base + (h * e).sum(-1)
        return out


class MamlPersonalizer(Personalizer):
    """Vectors by LiMAML's own algorithm: gradient steps on the meta block.

    Args:
        global_block: Logit and item vector of a row.
        meta_block: From a member's features to a vector.
        inner: The inner loop.
    """

    def __init__(self, global_block: GlobalBlock, meta_block: nn.Module, inner: InnerOptions) -> None:
        super().__init__(global_block)
        self.meta = MetaModel(meta_block, _DotScore(global_block), inner)

    def prior(self, ids: Tensor, dense: Tensor) -> Tensor:
        """See `Personalizer`."""
        return self.meta.vectors({}, (ids, dense))

    def adapt(self, member_ids: Tensor, member_dense: Tensor, support: Ragged) -> tuple[Tensor, Tensor | None]:
        """See `Personalizer`."""
        member, rows = (member_ids, member_dense), (support.ids, support.dense)
        return self.meta.adapt(member, rows, support.y, support.w, support.lengths), None


def no_grad_vectors(model: Personalizer, batch: TaskBatch) -> tuple[Tensor, Tensor | None]:
    """Vectors of a batch, without the outer graph.

    Args:
        model: Any personalizer.
        batch: Tasks; their queries do not matter.

    Returns:
        Vectors and, where there are any, precisions.
    """
    with torch.no_grad():
        return model.adapt(batch.member_ids, batch.member_dense, batch.support)
