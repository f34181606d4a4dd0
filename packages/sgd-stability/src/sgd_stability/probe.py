"""The cheap curvature of a probe: one Gauss-Newton product, which also yields v'H_iv of every sample on its way."""

from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call

from sgd_stability.network import Inputs, Network
from sgd_stability.truncated import unflatten


@dataclass(frozen=True)
class ProbeProduct:
    """H v of some samples, and what each of them contributes.

    Attributes:
        product: (1/n) sum_i H_i v, shape (d,).
        weighted: Z_i v, whose squared norm is v'H_i v, shape (n, R).
        output_curvature: Trace of Lambda_i, the loss's curvature in the outputs, shape (n,).
    """

    product: Tensor
    weighted: Tensor
    output_curvature: Tensor


def gauss_newton_probe(network: Network, v: Tensor, *, scale: Tensor | None = None, chunk: int = 64) -> ProbeProduct:
    """One Gauss-Newton product by forward-over-reverse in a single pass over the samples.

    The forward pass carries the tangent along and records the graph of the primal only, so the product costs about
    1.4 gradients.

    Args:
        network: The network; its loss convex in the outputs.
        v: Vector, shape (d,).
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        chunk: Samples at a time; small ones stay in the cache.

    Returns:
        The product and its parts.
    """
    parameters = list(network.parameters.values())
    direction = unflatten(v if scale is None else v * scale, network.parameters)
    total = torch.zeros_like(v)
    weighted, traces = [], []
    for start in range(0, network.n, chunk):
        inputs = network.part(start, start + chunk).inputs
        targets = network.targets[start : start + chunk]
        args, kwargs = _arguments(inputs)
        with torch.enable_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in network.parameters.items()}
            outputs, tangent = forward_ad.unpack_dual(functional_call(network.model, duals, args, kwargs))
            tangent = torch.zeros_like(outputs) if tangent is None else tangent.detach()
        factor = network.loss.factor(outputs.detach(), targets)
        u = factor.transpose_times(tangent.reshape(len(targets), -1, 1))  # (n, R, 1)
        pulled = factor.times(u).reshape(outputs.shape)
        gradients = torch.autograd.grad(outputs, parameters, pulled, materialize_grads=True)
        total += torch.cat([g.reshape(-1) for g in gradients])
        weighted.append(u[:, :, 0])
        eye = torch.eye(factor.rank, dtype=outputs.dtype, device=outputs.device)
        traces.append(factor.times(eye.expand(len(targets), -1, -1)).square().sum((1, 2)))
    product = (total if scale is None else total * scale) / network.n
    return ProbeProduct(product, torch.cat(weighted), torch.cat(traces))


def _arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
