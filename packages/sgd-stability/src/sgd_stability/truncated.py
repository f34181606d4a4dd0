r"""The scalable route: per-sample curvature on the top eigenvectors V of H only, in memory of n R k numbers.

Compressing to any orthonormal V keeps every Rayleigh quotient of the second-moment operator, so the threshold of the
compressed family is a certified upper bound on eta*, even if V has not converged.

Departure: the specification takes the top k eigenvectors of H. At small batch sizes a few samples decide, whose
directions H hardly sees; a quarter of the basis is therefore given to the top eigenvectors of the most curved H_i
(`sample_directions`), at the same k an error more than ten times smaller (`tests/test_truncated_route.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from core_tensor.spectrum import Eigenpairs, SymmetricOperator, hessian_operator, lanczos
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

from sgd_stability.family import CurvatureFamily
from sgd_stability.ghost import sample_blocks
from sgd_stability.jacobian import weighted_jacobian
from sgd_stability.network import Inputs, Network, call, single


def gauss_newton_operator(network: Network, *, chunk: int = 1024, scale: Tensor | None = None) -> SymmetricOperator:
    """H = (1/n) sum_i J_i' Lambda_i J_i as an operator: v -> Jv -> W'Jv -> W W'Jv -> J'W W'Jv.

    Args:
        network: The network.
        chunk: Samples at a time.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,); the operator is then P^(-1/2) H P^(-1/2).

    Returns:
        The operator on flat vectors in the order of the network's parameters.
    """
    parts = [network.part(start, start + chunk) for start in range(0, network.n, chunk)]
    parameters = detached(network)
    signs = [part.factor.signs for part in parts]

    def product(vector: Tensor) -> Tensor:
        v = vector if scale is None else vector * scale
        total = torch.zeros_like(v)
        for part, sign in zip(parts, signs, strict=True):
            forward = outputs_of(part)
            outputs, pull = cast("Any", vjp)(forward, parameters)
            Jv = cast("Tensor", jvp(forward, (parameters,), (unflatten(v, parameters),))[1])
            u = part.factor.transpose_times(Jv.reshape(part.n, -1, 1))  # (n, R, 1)
            u = u if sign is None else u * sign[:, :, None]
            (gradient,) = pull(part.factor.times(u).reshape(outputs.shape))
            total += torch.cat([g.reshape(-1) for g in gradient.values()])
        return (total if scale is None else total * scale) / network.n

    first = next(iter(parameters.values()))
    return SymmetricOperator(product, network.size, first.dtype, first.device)


def loss_hessian_operator(network: Network, *, scale: Tensor | None = None) -> SymmetricOperator:
    """The Hessian of the mean loss as an operator.

    Args:
        network: The network.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        The operator.
    """

    def closure() -> Tensor:
        return network.loss.values(call(network.model, network.inputs), network.targets).mean()

    operator = hessian_operator(closure, network.parameters.values())
    if scale is None:
        return operator
    return replace(operator, product=lambda v: scale * operator(scale * v))


def top_eigenvectors(
    operator: SymmetricOperator, k: int, *, tolerance: float = 1e-2, max_steps: int = 300, seed: int = 0
) -> Eigenpairs:
    """The k top eigenvectors by Lanczos.

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
    return lanczos(operator, k, tolerance=tolerance, max_steps=max(max_steps, k), generator=generator)


def sample_directions(network: Network, curvature: Tensor, count: int, *, scale: Tensor | None = None) -> Tensor:
    """Top eigenvectors of the most curved per-sample Hessians.

    Args:
        network: The network.
        curvature: lambda1(H_i), shape (n,).
        count: How many samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        Unit columns, shape (d, count).
    """
    columns = []
    for i in curvature.topk(min(count, network.n)).indices.tolist():
        Z = weighted_jacobian(network.part(i, i + 1))[0]  # (R, d)
        Z = Z if scale is None else Z * scale
        direction = Z.T @ torch.linalg.eigh(Z @ Z.T)[1][:, -1]
        columns.append(direction / direction.norm().clamp_min(1e-30))
    return torch.stack(columns, 1)


def projected_family(
    network: Network,
    V: Tensor,
    *,
    chunk: int = 256,
    scale: Tensor | None = None,
    sample_curvature: Tensor | None = None,
) -> CurvatureFamily:
    """The Gauss-Newton family compressed to orthonormal vectors.

    Args:
        network: The network.
        V: Orthonormal columns, shape (d, k).
        chunk: Samples at a time.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        sample_curvature: lambda1(H_i) of the whole H_i; computed by the ghost route if absent (needs `scale` None).

    Returns:
        The truncated family.

    Raises:
        ValueError: If a preconditioner comes without sample curvatures.
    """
    if sample_curvature is None and scale is not None:
        raise ValueError("sample_curvature: expected with a preconditioner")
    parameters = detached(network)
    columns = (V if scale is None else V * scale[:, None]).T  # (k, d)
    pieces, signs = [], []
    for start in range(0, network.n, chunk):
        part = network.part(start, start + chunk)
        forward = outputs_of(part)

        def along(v: Tensor, forward: Callable[..., Tensor] = forward) -> Tensor:
            tangent: Tensor = jvp(forward, (parameters,), (unflatten(v, parameters),))[1]
            return tangent

        JV = vmap(along)(columns).reshape(len(columns), part.n, -1).permute(1, 2, 0)  # (n, O, k)
        pieces.append(part.factor.transpose_times(JV))
        signs.append(part.factor.signs)
    factors = torch.cat(pieces)
    sign = None if any(s is None for s in signs) else torch.cat([s for s in signs if s is not None])
    family = CurvatureFamily.from_factors(factors, sign)
    if sample_curvature is None:
        sample_curvature = block_curvature(network)
    return replace(family, sample_curvature=sample_curvature.double(), truncated=True)


def block_curvature(network: Network) -> Tensor:
    """lambda1(H_i) of every sample through the (R, R) blocks of the Gram matrix.

    Args:
        network: The network.

    Returns:
        Shape (n,).
    """
    blocks, signs = sample_blocks(network), network.factor.signs
    if signs is None:
        psd: Tensor = torch.linalg.eigvalsh(blocks)[:, -1].clamp_min(0)
        return psd
    lam, U = torch.linalg.eigh(blocks)
    root = (U * lam.clamp_min(0).sqrt()[:, None]) @ U.mT  # similar to Z' diag(signs) Z away from zero
    top: Tensor = torch.linalg.eigvalsh(root @ (signs.double()[:, :, None] * root))[:, -1]
    return top


def scaled_curvature(network: Network, scale: Tensor) -> Tensor:
    """lambda1(P^(-1/2) H_i P^(-1/2)) of every sample, from explicit Jacobians, a few samples at a time.

    Args:
        network: The network; its loss convex in the outputs.
        scale: P^(-1/2), shape (d,).

    Returns:
        Shape (n,).
    """
    found = []
    for start in range(0, network.n, 32):
        Z = (weighted_jacobian(network.part(start, start + 32)) * scale).double()
        found.append(torch.linalg.eigvalsh(Z @ Z.mT)[:, -1].clamp_min(0))
    return torch.cat(found)


def projected_hessians(network: Network, V: Tensor, *, chunk: int = 64, scale: Tensor | None = None) -> CurvatureFamily:
    """The family of true per-sample Hessians V'H_iV compressed to orthonormal vectors; they may be indefinite.

    Args:
        network: The network.
        V: Orthonormal columns, shape (d, k); the identity gives the exact family.
        chunk: Samples at a time.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        The family, truncated if k < d. Its sample curvatures are those of the compressed H_i: underestimates.
    """
    parameters = detached(network)
    columns = (V if scale is None else V * scale[:, None]).T

    def loss(parameters: dict[str, Tensor], sample: Inputs, target: Tensor) -> Tensor:
        outputs: Tensor = functional_call(network.model, parameters, *single(sample))
        return network.loss.values(outputs, target[None])[0]

    def one(sample: Inputs, target: Tensor) -> Tensor:
        def along(v: Tensor) -> Tensor:
            slope = grad(lambda p: loss(p, sample, target))
            image: dict[str, Tensor] = jvp(slope, (parameters,), (unflatten(v, parameters),))[1]
            return columns @ torch.cat([g.reshape(-1) for g in image.values()])

        return vmap(along)(columns)  # (k, k)

    inputs = dict(network.inputs) if not isinstance(network.inputs, Tensor) else network.inputs
    dense = vmap(one, chunk_size=chunk)(inputs, network.targets).detach()
    family = CurvatureFamily.from_hessians((dense + dense.mT) / 2)
    return replace(family, truncated=V.shape[1] < V.shape[0])


def detached(network: Network) -> dict[str, Tensor]:
    """The network's parameters without their graph.

    Args:
        network: The network.

    Returns:
        Parameters by name.
    """
    return {name: p.detach() for name, p in network.parameters.items()}


def outputs_of(network: Network) -> Callable[[dict[str, Tensor]], Tensor]:
    """Outputs as a function of the parameters.

    Args:
        network: The network.

    Returns:
        The function.
    """
    inputs = network.inputs
    args = (inputs,) if isinstance(inputs, Tensor) else ()
    kwargs = {} if isinstance(inputs, Tensor) else dict(inputs)

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(network.model, parameters, args, kwargs)
        return outputs

    return forward


def unflatten(vector: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split a flat vector as the parameters are.

    Args:
        vector: Shape (d,).
        parameters: Parameters by name.

    Returns:
        Pieces by name.
    """
    pieces = vector.split([p.numel() for p in parameters.values()])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, parameters.items(), strict=True)}
