r"""The scalable route: per-sample curvature on the top eigenvectors V of H only, in memory of n R k numbers.

Compressing to any orthonormal V keeps every Rayleigh quotient of the second-moment operator, so the threshold of the
compressed family is a certified upper bound on eta*, even if V has not converged.

Departure: the specification takes the top k eigenvectors of H. At small batch sizes a few samples decide, whose
directions H hardly sees; a quarter of the basis is therefore given to the top eigenvectors of the most curved H_i, at
the same k an error more than ten times smaller (`tests/test_truncated_route.py`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from core_tensor.linalg.spectrum import Eigenpairs, SymmetricOperator, hessian_operator, lanczos
from torch import Tensor
from torch.func import grad, jvp, vmap

from sgd_stability.curvature.jacobian import derivatives, difference, pushed, rows_without_padding
from sgd_stability.curvature.network import Inputs, Network, batch_of_one, call, unflatten
from sgd_stability.curvature.sample_curvature import sample_curvature
from sgd_stability.theory.family import CurvatureFamily

_NUMBERS = 2**25
"""Most numbers of the tangents of one chunk."""
_HELD = 2**29
"""Most numbers of a Lanczos basis in full precision (2 GB in float32); the directions kept take half of it."""


def loss_hessian_operator(network: Network, *, scale: Tensor | None = None) -> SymmetricOperator:
    """The Hessian of the mean loss as an operator, by double backward, or by differences of gradients without it.

    Args:
        network: The network; its ranks share the samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        The operator.
    """
    start, stop = network.ranks.range(network.n)
    own = network.part(start, stop)
    local = _local_hessian(own, network.n) if own.n else torch.zeros_like

    def product(v: Tensor) -> Tensor:
        image = network.ranks.sum(local(v if scale is None else scale * v))
        return image if scale is None else scale * image

    return SymmetricOperator(product, network.size, network.dtype, network.device)


def _local_hessian(own: Network, n: int) -> Callable[[Tensor], Tensor]:
    """This process's share of the Hessian of the mean over n samples."""

    def closure() -> Tensor:
        return own.loss.values(call(own.model, own.inputs), own.targets).sum() / n

    def gradient(parameters: dict[str, Tensor]) -> Tensor:
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            loss = own.loss.values(call(own.model, own.inputs, leaves), own.targets).sum() / n
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found]).to(own.dtype)

    exact = hessian_operator(closure, own.parameters.values())

    def product(v: Tensor) -> Tensor:
        if own.known.get("twice differentiable", True):
            try:
                return exact(v.to(exact.dtype)).to(v.dtype)
            except (RuntimeError, NotImplementedError):  # an operation without a second derivative
                own.known["twice differentiable"] = False
        return difference(gradient, own, own.direction(v))

    return product


def default_directions(size: int) -> int:
    """The k of the truncated route where none is asked for: 40, fewer where they would take over a gigabyte.

    Args:
        size: Number of parameters d.

    Returns:
        k, at least 4.
    """
    return max(4, min(40, _HELD // (2 * size)))


def top_eigenvectors(
    operator: SymmetricOperator, k: int, *, tolerance: float = 1e-2, max_steps: int = 300, seed: int = 0
) -> Eigenpairs:
    """The k top eigenvectors by Lanczos, restarted where the basis would not fit; in bfloat16 where 2 k would not.

    Args:
        operator: H.
        k: How many.
        tolerance: Relative residual.
        max_steps: Most products with H.
        seed: Seed of the start.

    Returns:
        The pairs and whether they converged.
    """
    generator = torch.Generator().manual_seed(seed)
    k = min(k, operator.size)
    fitting, least = _HELD // operator.size, max(2 * k, k + 6)
    half = fitting < least and tolerance >= 1e-2 and operator.dtype == torch.float32
    return lanczos(
        operator, k, tolerance=tolerance, max_steps=max(max_steps, k), generator=generator,
        max_vectors=max(least, 2 * fitting if half else fitting), basis_dtype=torch.bfloat16 if half else None,
    )  # fmt: skip


def projected_family(
    network: Network, V: Tensor, *, scale: Tensor | None = None, curvature: Tensor | None = None
) -> CurvatureFamily:
    """The Gauss-Newton family compressed to orthonormal vectors, in memory of n k min(R, k) numbers.

    Args:
        network: The network; its ranks share the samples.
        V: Orthonormal columns, shape (d, k).
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        curvature: lambda1(H_i) of the whole H_i, shape (n,); computed if absent.

    Returns:
        The truncated family.
    """
    columns = (V if scale is None else V * scale[:, None]).T  # (k, d)
    chunk = max(1, min(256, _NUMBERS // (len(columns) * network.rank)))

    def compute(start: int, stop: int) -> Tensor:
        return torch.cat([_compressed(part, columns) for part in network.chunks(chunk, start, stop)])

    rows = network.ranks.rows(network.n, compute)  # (n, min(R, k), k + 1): factors, and their signs
    signs = None if bool((rows[:, :, -1] >= 0).all()) else rows[:, :, -1]
    family = CurvatureFamily.from_factors(rows[:, :, :-1], signs)
    curvature = sample_curvature(network, scale=scale) if curvature is None else curvature
    return replace(family, sample_curvature=curvature.double(), truncated=True)


def _compressed(part: Network, columns: Tensor) -> Tensor:
    """W_i'J_iV of some samples; only F'F matters, so more rows than columns are folded by QR."""
    F = part.factor.transpose_times(pushed(part, columns))  # (n, R, k)
    signs = part.factor.signs
    if F.shape[1] <= F.shape[2]:
        signs = F.new_ones(F.shape[:2]) if signs is None else signs.to(F)
    elif signs is None:
        F = torch.linalg.qr(F, mode="r").R  # (n, k, k)
        signs = F.new_ones(F.shape[:2])
    else:
        values, vectors = torch.linalg.eigh((F * signs[:, :, None].to(F)).mT @ F)
        F, signs = (vectors * values.abs().sqrt()[:, None, :]).mT, values.sign()
    return torch.cat([F, signs[:, :, None]], 2)


def projected_hessians(network: Network, V: Tensor, *, chunk: int = 64, scale: Tensor | None = None) -> CurvatureFamily:
    """The family of true per-sample Hessians V'H_iV compressed to orthonormal vectors; they may be indefinite.

    Args:
        network: The network; its ranks share the samples.
        V: Orthonormal columns, shape (d, k); the identity gives the exact family.
        chunk: Samples at a time.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        The family, truncated if k < d. Its sample curvatures are those of the compressed H_i: underestimates.
    """
    columns = (V if scale is None else V * scale[:, None]).T

    def compute(start: int, stop: int) -> Tensor:
        part = network.part(start, stop)
        if part.known.get("hessian batches", True):
            try:
                return _hessians_together(part, columns, chunk)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                part.known["hessian batches"] = False
        rows = []
        for i in range(part.n):
            one = part.part(i, i + 1)
            product = _local_hessian(one, 1)
            rows.append(torch.stack([columns @ product(v) for v in columns]))
        return torch.stack(rows)

    dense = network.ranks.rows(network.n, compute)
    family = CurvatureFamily.from_hessians((dense + dense.mT) / 2)
    return replace(family, truncated=V.shape[1] < V.shape[0])


def _hessians_together(part: Network, columns: Tensor, chunk: int) -> Tensor:
    """V'H_iV of some samples by forward over reverse mode, shape (n, k, k)."""
    if derivatives(part) != "forward mode":
        raise NotImplementedError("no forward mode")
    parameters = part.detached()
    directions = rows_without_padding(part, columns)

    def loss(parameters: dict[str, Tensor], sample: Inputs, target: Tensor) -> Tensor:
        return part.loss.values(call(part.model, batch_of_one(sample), parameters), target[None])[0]

    def one(sample: Inputs, target: Tensor) -> Tensor:
        def along(v: Tensor) -> Tensor:
            slope = grad(lambda p: loss(p, sample, target))
            image: dict[str, Tensor] = jvp(slope, (parameters,), (unflatten(v, parameters),))[1]
            return columns @ torch.cat([g.reshape(-1) for g in image.values()])

        return vmap(along)(directions)  # (k, k)

    inputs = part.inputs if isinstance(part.inputs, Tensor) else dict(part.inputs)
    return vmap(one, chunk_size=chunk)(inputs, part.targets).detach()
