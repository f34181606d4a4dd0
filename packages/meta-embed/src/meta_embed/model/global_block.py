"""The global block: logit and item vector of a row, to which a member's vector adds its part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meta_embed.model.blocks import perceptron


class GlobalBlock(nn.Module):
    r"""$\text{logit} = b(x) + h(x)^\top e$, where e is the member's vector and the last entry of h is one.

    The item part of h is a sum of table rows and a linear map of the dense features; b is the same with one column, and
    a perceptron on top of the item part. Where a trained ranker brings its own logit or item vector (columns `base` and
    `vector` of the schema, the first dense ones), they take the place of what is learned here.

    Args:
        id_rows: Rows of the table of every category.
        dense: Dense features in all, those of the ranker included.
        width: Length of h, 2 to 32.
        hidden: Width of the perceptron of b; 0 leaves it away.
        given_base: Whether the first dense column is the logit of a trained ranker.
        given_vector: Length of its item vector, which comes next; 0 if there is none.
    """

    def __init__(
        self,
        id_rows: Sequence[int],
        dense: int,
        width: int = 17,
        hidden: int = 32,
        *,
        given_base: bool = False,
        given_vector: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= width <= 32:
            raise ValueError(f"width: expected 2 to 32, got {width}")
        self.width, self.given_base, self.given_vector = width, given_base, given_vector
        item = width - 1
        own = dense - given_base - given_vector
        learned = bool(id_rows) or own > 0
        self.tables = nn.ModuleList(nn.Embedding(rows, item) for rows in id_rows if not given_vector)
        self.biases = nn.ModuleList(nn.Embedding(rows, 1) for rows in id_rows if not given_base)
        self.project = nn.Linear(own, item, bias=False) if own and not given_vector else None
        same = given_vector in (0, item)
        self.shorten = None if same else nn.Linear(given_vector, item, bias=False)
        self.shift = None if given_base else nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(own, 1, bias=False) if own and not given_base else None
        self.deep = perceptron([item, hidden, 1]) if hidden and learned and not given_base else None
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.1)
            nn.init.zeros_(table.weight[0].detach())  # values that training never saw
        for table in self.biases:
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        for layer in (self.project, self.linear):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.05)

    def forward(self, ids: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Logits without the member's part, and item vectors.

        Args:
            ids: Categories, shape (R, k), int64.
            dense: Numbers, shape (R, p).

        Returns:
            b, shape (R,), and h, shape (R, width).
        """
        start = int(self.given_base)
        own = dense[..., start + self.given_vector :]
        if self.given_vector:
            item = dense[..., start : start + self.given_vector]
            item = item if self.shorten is None else self.shorten(item)
        else:
            item = dense.new_zeros(*dense.shape[:-1], self.width - 1)
            for j, table in enumerate(self.tables):
                item = item + table(ids[..., j])
            item = item if self.project is None else item + self.project(own)
        if self.given_base:
            base = dense[..., 0]
        else:
            assert self.shift is not None
            base = self.shift.expand(dense.shape[:-1])
            base = base if self.linear is None else base + self.linear(own)[..., 0]
            for j, bias in enumerate(self.biases):
                base = base + bias(ids[..., j])[..., 0]
            base = base if self.deep is None else base + self.deep(item)[..., 0]
        return base, torch.cat([item, torch.ones_like(item[..., :1])], -1)
