r"""The scalable route: per-sample curvature on the top eigenvectors V of H only, in memory of n R k numbers.

Compressing to any orthonormal V keeps every Rayleigh quotient of the second-moment operator, so the threshold of the
compressed family is a certified upper bound on eta*, even if V has not converged.

Departure: the specification takes the top k eigenvectors of H. At small batch sizes a few samples decide, whose
directions H hardly sees; a quarter of the basis is therefore given to the top eigenvectors of the most curved H_i, at
the same k an error more than ten times smaller (`tests/test_truncated_route.py`).
"""

from dataclasses import replace

import torch
from core_tensor.linalg.spectrum import Eigenpairs, SymmetricOperator, hessian_operator, lanczos
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from sgd_stability.curvature.network import Inputs, Network, arguments, call, single, unflatten
from sgd_stability.curvature.sample_curvature import sample_curvature
from sgd_stability.theory.family import CurvatureFamily

_NUMBERS = 2**25
"""Most numbers of the tangents of one chunk."""


def loss_hessian_operator(network: Network, *, scale: Tensor | None = None) -> SymmetricOperator:
    """The Hessian of the mean loss as an operator.

    Args:
        network: The network; its ranks share the samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

    Returns:
        The operator.
    """
    start, stop = network.ranks.range(network.n)
    own = network.part(start, stop)

    def closure() -> Tensor:
        return network.loss.values(call(network.model, own.inputs), own.targets).sum() / network.n

    first = next(iter(network.parameters.values()))
    local = hessian_operator(closure, network.parameters.values()) if own.n else torch.zeros_like

    def product(v: Tensor) -> Tensor:
        image = network.ranks.sum(local(v if scale is None else scale * v))
        return image if scale is None else scale * image

    return SymmetricOperator(product, network.size, first.dtype, first.device)


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
    chunk = max(1, min(256, _NUMBERS // (len(columns) * network.outputs[0].numel())))

    def compute(start: int, stop: int) -> Tensor:
        return torch.cat([_compressed(part, columns) for part in network.chunks(chunk, start, stop)])

    rows = network.ranks.rows(network.n, compute)  # (n, min(R, k), k + 1): factors, and their signs
    signs = None if bool((rows[:, :, -1] >= 0).all()) else rows[:, :, -1]
    family = CurvatureFamily.from_factors(rows[:, :, :-1], signs)
    curvature = sample_curvature(network, scale=scale) if curvature is None else curvature
    return replace(family, sample_curvature=curvature.double(), truncated=True)


def _compressed(part: Network, columns: Tensor) -> Tensor:
    # W_i'J_iV of some samples; only F'F matters, so more rows than columns are folded by QR.
    parameters = part.detached()
    args, kwargs = arguments(part.inputs)

    def forward(values: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(part.model, values, args, kwargs)
        return outputs

    def along(v: Tensor) -> Tensor:
        tangent: Tensor = jvp(forward, (parameters,), (unflatten(v, parameters),))[1]
        return tangent

    JV = vmap(along)(columns).reshape(len(columns), part.n, -1).permute(1, 2, 0)  # (n, O, k)
    F = part.factor.transpose_times(JV)  # (n, R, k)
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
    parameters = network.detached()
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

    def compute(start: int, stop: int) -> Tensor:
        part = network.part(start, stop)
        inputs = part.inputs if isinstance(part.inputs, Tensor) else dict(part.inputs)
        return vmap(one, chunk_size=chunk)(inputs, part.targets).detach()

    dense = network.ranks.rows(network.n, compute)
    family = CurvatureFamily.from_hessians((dense + dense.mT) / 2)
    return replace(family, truncated=V.shape[1] < V.shape[0])
