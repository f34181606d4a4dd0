"""MetaModel: any two modules as meta block and global block, adapted by gradient steps."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from meta_embed.adapt.maml import InnerOptions, Rates, adapt, check_adaptable
from meta_embed.tasks.ragged import check_lengths, pad

VECTOR = "embedding"
"""Name of the adapted parameter where the vector itself is adapted."""


class MetaModel(nn.Module):
    r"""score = g([x, e_t]; \phi), e_t = f(m_t; \theta'_t): the meta block f is adapted per task, g is shared.

    Because the member's features m_t are constant in a task, e_t is one vector per task, and storing it loses nothing.

    Args:
        meta_block: f, from tensors of T members to vectors, shape (T, d).
        global_block: g, from vectors of R rows, shape (R, d), and tensors of R rows to logits, shape (R,).
        inner: The inner loop.
    """

    def __init__(self, meta_block: nn.Module, global_block: nn.Module, inner: InnerOptions | None = None) -> None:
        super().__init__()
        self.meta_block, self.global_block, self.inner = meta_block, global_block, inner or InnerOptions()
        self.rates = Rates(self._adapted_names(), self.inner)

    def _adapted_names(self) -> list[str]:
        names = [name for name, _ in self.meta_block.named_parameters()]
        if self.inner.adapt == "embedding":
            return [VECTOR]
        if self.inner.adapt == "last":
            owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
            last = list(owners)[-1]
            names = [name for name in names if name.rpartition(".")[0] == last]
        if not names:
            raise ValueError("meta_block: expected a module with parameters to adapt")
        return names

    def adapt(
        self, member: tuple[Tensor, ...], rows: tuple[Tensor, ...], y: Tensor, w: Tensor, lengths: Tensor
    ) -> Tensor:
        """Meta embeddings of T members after K steps on their supports.

        Args:
            member: Tensors of the members, T rows each.
            rows: Tensors of all support rows, one member after the other, R rows each.
            y: Labels, shape (R,).
            w: Weights, shape (R,).
            lengths: Events of every support, shape (T,), int64.

        Returns:
            Shape (T, d).

        Raises:
            TypeError: If lengths are no int64 tensor.
            ValueError: If lengths do not sum to R, a block does not return one logit per row, has batch norm in
                training mode, or a layer that torch.func cannot follow.
        """
        check_adaptable(self)
        check_lengths(lengths, len(y))
        padded = tuple(pad(t, lengths) for t in rows)
        task = (*member, *padded, pad(y, lengths), pad(w, lengths))  # rows behind a length weigh nothing
        count = len(member)
        if task[-1].shape[1] == 0:  # nobody has an event
            return self.vectors({}, member)
        if self.inner.adapt == "embedding":
            start = {VECTOR: self.vectors({}, member)}

            def direct(parameters: dict[str, Tensor], *t: Tensor) -> Tensor:
                return self._loss(parameters[VECTOR], t[count:-2], t[-2], t[-1])

            return adapt(direct, start, self.rates(), task, self.inner, per_task=True)[VECTOR]
        own = dict(self.meta_block.named_parameters())
        start = {name: own[name] for name in self.rates.names}

        def loss(parameters: dict[str, Tensor], *t: Tensor) -> Tensor:
            e = functional_call(self.meta_block, parameters, tuple(m[None] for m in t[:count]))[0]
            return self._loss(e, t[count:-2], t[-2], t[-1])

        adapted = adapt(loss, start, self.rates(), task, self.inner)

        def vector(parameters: dict[str, Tensor], *m: Tensor) -> Tensor:
            e: Tensor = functional_call(self.meta_block, parameters, tuple(t[None] for t in m))[0]
            return e

        out: Tensor = torch.func.vmap(vector, randomness="different")(adapted, *member)
        return out

    def _loss(self, e: Tensor, rows: tuple[Tensor, ...], y: Tensor, w: Tensor) -> Tensor:
        logits = self.global_block(e.expand(len(y), -1), *rows)
        if logits.shape != y.shape:
            raise ValueError(f"global_block: expected one logit per row, shape {(*y.shape,)}, got {(*logits.shape,)}")
        each = binary_cross_entropy_with_logits(logits, y, reduction="none")
        return (w * each).sum() / w.sum().clamp_min(1e-12)  # an empty support has the loss, and the gradient, zero

    def vectors(self, parameters: dict[str, Tensor], member: tuple[Tensor, ...]) -> Tensor:
        """Vectors without adaptation, f(m; theta).

        Args:
            parameters: Taken instead of the meta block's own, by name.
            member: Tensors of the members, T rows each.

        Returns:
            Shape (T, d).
        """
        out: Tensor = functional_call(self.meta_block, parameters, member)
        return out

    def forward(self, e: Tensor, *rows: Tensor) -> Tensor:
        """Logits of rows whose members' vectors are known.

        Args:
            e: Vector of each row's member, shape (R, d).
            *rows: Tensors of R rows.

        Returns:
            Shape (R,).
        """
        out: Tensor = self.global_block(e, *rows)
        return out
