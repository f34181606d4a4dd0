"""Weighted output Jacobians Z_i = W_i' J_i, explicitly: exact for any model that torch.func can differentiate."""

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from sgd_stability.curvature.network import Inputs, Network, single


def weighted_jacobian(network: Network, names: list[str] | None = None, *, chunk: int | None = None) -> Tensor:
    """Z_i = W_i' J_i for every sample, by vmap over jacrev.

    Args:
        network: The network.
        names: Parameters to differentiate by; all of the network's if absent.
        chunk: Samples at a time; all if absent.

    Returns:
        Z, shape (n, R, d) with the parameters flattened in the network's order.
    """
    return network.factor.transpose_times(output_jacobian(network, names, chunk=chunk))


def output_jacobian(network: Network, names: list[str] | None = None, *, chunk: int | None = None) -> Tensor:
    """J_i for every sample, by vmap over jacrev.

    Args:
        network: The network.
        names: Parameters to differentiate by; all of the network's if absent.
        chunk: Samples at a time; all if absent.

    Returns:
        J, shape (n, O, d).
    """
    chosen = {name: network.parameters[name].detach() for name in (names or network.parameters)}

    def outputs(parameters: dict[str, Tensor], sample: Inputs) -> Tensor:
        z: Tensor = functional_call(network.model, parameters, *single(sample))
        return z.reshape(-1)

    inputs = dict(network.inputs) if not isinstance(network.inputs, Tensor) else network.inputs
    per_sample = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=chunk)
    jacobians: dict[str, Tensor] = per_sample(chosen, inputs)  # each (n, O, *shape)
    return torch.cat([j.detach().flatten(2) for j in jacobians.values()], 2)
