r"""The default: a member's vector is the MAP estimate of a small logistic model under a meta-learned prior.

$$ e_t = \arg\min_e \sum_i w_i \, \ell(b_i + h_i^\top e, y_i) + \tfrac12 (e - \mu(m_t))^\top P (e - \mu(m_t)). $$

The prior mean $\mu(m)$ and the precision P are learned through the solution (`core_tensor.map_head`, implicit function
theorem). A member without events gets $\mu(m_t)$: the cold start. The Hessian at the solution is the precision of
Laplace's approximation to the posterior.

Departure: LiMAML adapts by gradient steps (see `meta_embed.adapt.maml`); where the vector enters the logit linearly the
problem is strictly convex with few unknowns, and its solution is both better and cheaper than K steps.
"""

import torch
from core_tensor.ops.map_head import map_head
from torch import Tensor, nn

from meta_embed.tasks.ragged import check_lengths, pad


class MapHead(nn.Module):
    """A prior over member vectors, and the vectors it gives with a support.

    Works over any trained ranker: it needs only item vectors h and logits b.

    Args:
        prior: Module from member features to prior means, shape (T, width).
        width: Length of the vectors, up to 32.
        precision: Starting value of P's diagonal.
    """

    def __init__(self, prior: nn.Module, width: int, precision: float = 1.0) -> None:
        super().__init__()
        if not precision > 0:
            raise ValueError(f"precision: expected a positive number, got {precision}")
        self.prior, self.width = prior, width
        self.log_scale = nn.Parameter(torch.full((width,), 0.5 * torch.tensor(precision).log().item()))
        self.lower = nn.Parameter(torch.zeros(width, width))

    @property
    def precision(self) -> Tensor:
        """P = L L', L lower triangular with a positive diagonal, shape (width, width)."""
        scale = self.log_scale.exp()
        L = scale[:, None] * (torch.eye(self.width, device=scale.device, dtype=scale.dtype) + self.lower.tril(-1))
        return L @ L.T

    def forward(
        self, h: Tensor, base: Tensor, y: Tensor, w: Tensor, lengths: Tensor, *member: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vectors and posterior precisions of T members.

        The solve is in float32, or float64 where h or the prior is; autocast does not reach into it.

        Args:
            h: Item vectors of all supports, one member after the other, shape (R, width).
            base: Logits without the member's part, shape (R,).
            y: Labels in [0, 1], shape (R,).
            w: Weights, shape (R,).
            lengths: Events of every support, shape (T,), int64.
            *member: What the prior takes, T rows each.

        Returns:
            e, shape (T, width), and H, shape (T, width, width).

        Raises:
            ValueError: If lengths do not sum to R, or `map_head` refuses a value.
            TypeError: If lengths are no int64 tensor.
        """
        check_lengths(lengths, len(h))
        mu = self.prior(*member)
        dtype = torch.float64 if torch.float64 in (h.dtype, mu.dtype) else torch.float32
        with torch.autocast(h.device.type, enabled=False):
            rows = [pad(t.to(dtype), lengths) for t in (h, base, y, w)]
            return map_head(rows[0], rows[1], rows[2], rows[3], lengths, mu.to(dtype), self.precision.to(dtype))


def thompson(e: Tensor, H: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw member vectors from Laplace's posterior N(e, H^-1).

    Args:
        e: MAP vectors, shape (T, d).
        H: Posterior precisions, shape (T, d, d).
        generator: Source of chance.

    Returns:
        One draw per member, shape (T, d).
    """
    L = torch.linalg.cholesky(H)
    z = torch.randn(e.shape, generator=generator, dtype=e.dtype, device=e.device)
    out: Tensor = e + torch.linalg.solve_triangular(L.mT, z[..., None], upper=True)[..., 0]
    return out


def logit_variance(h: Tensor, H: Tensor) -> Tensor:
    """Posterior variance of a row's logit, h' H^-1 h.

    Args:
        h: Item vectors, shape (R, d).
        H: Posterior precision of each row's member, shape (R, d, d).

    Returns:
        Shape (R,).
    """
    L = torch.linalg.cholesky(H)
    out: Tensor = torch.linalg.solve_triangular(L, h[..., None], upper=False)[..., 0].square().sum(-1)
    return out
