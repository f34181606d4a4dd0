r"""Derivatives of the outputs: J v for directions v, J_i' u for every sample, the weighted Jacobians Z_i = W_i' J_i.

J v is taken by forward mode where every operation of the model has one and it is the adjoint of the gradient that
training sees (tested on two samples); else by differentiating the gradient J'u with respect to u ("double backward");
else by central differences of the outputs. Jacobians are taken by `vmap` over the samples, or one sample at a time
where an operation does not batch (recurrent layers, masks that look at their values).
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import jvp, vjp, vmap

from sgd_stability.curvature.network import Inputs, Network, batch_of_one, call

Mode = Literal["forward mode", "double backward", "finite differences"]
_UNSUPPORTED = (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError)
"""What torch raises where an operation has no forward mode, no second derivative or no batching rule."""


def derivatives(network: Network) -> Mode:
    """How J v is taken for this model; found out once.

    Args:
        network: The network.

    Returns:
        The mode.
    """
    if "derivatives" not in network.known:
        network.known["derivatives"] = _choose(network.part(0, min(network.n, 2)))
    return cast("Mode", network.known["derivatives"])


@functools.cache
def _load_forward_mode() -> None:
    """What torch loads at the first dual number warns of torch's own use of torch.jit, which no caller can help."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _choose(some: Network) -> Mode:
    """The first mode that runs and is the adjoint of the gradient: u'(Jv) = (J'u)'v."""
    _load_forward_mode()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(some.size, generator=generator, dtype=torch.float64).to(some.device, some.dtype)
    direction = some.direction(v)
    with torch.enable_grad():
        outputs = call(some.model, some.inputs)
    u = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    gradients = torch.autograd.grad(outputs, list(some.parameters.values()), u, materialize_grads=True)
    expected = sum(float((g.double() * direction[name]).sum()) for name, g in zip(direction, gradients, strict=True))
    slack = 100 * torch.finfo(outputs.dtype).eps ** 0.5
    modes: tuple[Mode, ...] = ("forward mode", "double backward")
    for mode in modes:
        try:
            tangent = _TANGENTS[mode](some, direction)[1]
        except _UNSUPPORTED:
            continue
        size = float(tangent.double().norm() * u.double().norm())
        if abs(float((tangent.double() * u).sum()) - expected) <= slack * max(size, abs(expected)):
            return mode
    return "finite differences"


def outputs_and_tangent(part: Network, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs, with the graph of their gradient, and J v.

    Args:
        part: A few samples.
        direction: v by name.

    Returns:
        z and J v, both of the outputs' shape; the latter detached.
    """
    return _TANGENTS[derivatives(part)](part, direction)


def _forward(part: Network, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One pass carries the tangent along and records the graph of the primal only."""
    with torch.enable_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in part.parameters.items()}
        outputs, tangent = forward_ad.unpack_dual(call(part.model, part.inputs, duals))
        return outputs, torch.zeros_like(outputs) if tangent is None else tangent.detach()


def _double_backward(part: Network, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """J v = d/du <J'u, v>: the gradient is linear in u."""
    with torch.enable_grad():
        outputs = call(part.model, part.inputs)
        (image,) = _pushed(outputs, part, [direction])
    return outputs, image


def _pushed(outputs: Tensor, part: Network, directions: list[dict[str, Tensor]]) -> list[Tensor]:
    """J v for several v, on one graph of J'u."""
    u = torch.zeros_like(outputs, requires_grad=True)
    gradients = torch.autograd.grad(
        outputs, list(part.parameters.values()), u, create_graph=True, materialize_grads=True
    )
    kept = [(name, g) for name, g in zip(part.parameters, gradients, strict=True) if g.requires_grad]
    images = []
    for direction in directions:
        (image,) = torch.autograd.grad(
            [g for _, g in kept], u, [direction[name] for name, _ in kept], retain_graph=True, materialize_grads=True
        )
        images.append(image.detach())
    return images


def _differences(part: Network, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Central differences: an error of about eps^(2/3), so 1e-10 in float64 and 1e-5 in float32."""
    with torch.enable_grad():
        outputs = call(part.model, part.inputs)
    return outputs, difference(lambda p: call(part.model, part.inputs, p), part, direction)


def difference(
    function: Callable[[dict[str, Tensor]], Tensor], network: Network, direction: dict[str, Tensor]
) -> Tensor:
    """The derivative of a function of the parameters along a direction, by central differences.

    Args:
        function: From parameters by name to a tensor.
        network: Where it is taken.
        direction: v by name.

    Returns:
        The derivative.
    """
    at = network.detached()
    norm = float(torch.stack([d.double().square().sum() for d in direction.values()]).sum().sqrt())
    if norm == 0:
        with torch.no_grad():
            return torch.zeros_like(function(at))
    size = float(torch.stack([p.double().square().sum() for p in at.values()]).sum().sqrt())
    eps = torch.finfo(next(iter(at.values())).dtype).eps
    step = eps ** (1 / 3) * min(max(size, 1e-6), 1.0) / norm
    with torch.no_grad():
        ahead = function({name: p + step * direction[name] for name, p in at.items()})
        behind = function({name: p - step * direction[name] for name, p in at.items()})
        slope: Tensor = (ahead - behind) / (2 * step)
        return slope


_TANGENTS: dict[Mode, Callable[[Network, dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "forward mode": _forward,
    "double backward": _double_backward,
    "finite differences": _differences,
}


def pushed(part: Network, columns: Tensor) -> Tensor:
    """J V for a few samples and all directions.

    Args:
        part: A few samples.
        columns: Directions in rows, shape (k, d).

    Returns:
        Shape (n, O, k).
    """
    mode = derivatives(part)
    if mode == "forward mode":
        try:
            images = _batched_forward(part, columns)
        except _UNSUPPORTED:  # an operation without a batching rule
            images = torch.stack([_forward(part, part.direction(v))[1] for v in columns])
    elif mode == "double backward":
        with torch.enable_grad():
            images = torch.stack(_pushed(call(part.model, part.inputs), part, [part.direction(v) for v in columns]))
    else:
        images = torch.stack([_differences(part, part.direction(v))[1] for v in columns])
    return images.reshape(len(columns), part.n, -1).permute(1, 2, 0).to(columns.dtype)


def _batched_forward(part: Network, columns: Tensor) -> Tensor:
    """Forward mode for all directions at once, shape (k, n, ...)."""
    parameters = part.detached()

    def along(v: Tensor) -> Tensor:
        tangent: Tensor = jvp(lambda p: call(part.model, part.inputs, p), (parameters,), (_unpadded(part, v),))[1]
        return tangent

    return vmap(along)(rows_without_padding(part, columns))


def _unpadded(part: Network, v: Tensor) -> dict[str, Tensor]:
    """Pieces of a vector whose padding rows are zero already; nothing is written in place, for vmap."""
    pieces = v.split([p.numel() for p in part.parameters.values()])
    return {
        name: piece.view_as(p).to(p.dtype) for piece, (name, p) in zip(pieces, part.parameters.items(), strict=True)
    }


def rows_without_padding(part: Network, columns: Tensor) -> Tensor:
    """Directions in rows, without the components of padding rows (see `Network.direction`)."""
    part.direction(columns[0])  # finds the padding
    if not part.known["padding"]:
        return columns
    return torch.stack([torch.cat([d.reshape(-1).to(v) for d in part.direction(v).values()]) for v in columns])


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians


def weighted_jacobian(network: Network, names: list[str] | None = None, *, chunk: int | None = None) -> Tensor:
    """Z_i = W_i' J_i for every sample.

    Args:
        network: The network.
        names: Parameters to differentiate by; all of the network's if absent.
        chunk: Samples at a time; all if absent.

    Returns:
        Z, shape (n, R, d) with the parameters flattened in the network's order.
    """
    return network.factor.transpose_times(output_jacobian(network, names, chunk=chunk).to(network.outputs.dtype))


def output_jacobian(network: Network, names: list[str] | None = None, *, chunk: int | None = None) -> Tensor:
    """J_i for every sample.

    Args:
        network: The network.
        names: Parameters to differentiate by; all of the network's if absent.
        chunk: Samples at a time; all if absent.

    Returns:
        J, shape (n, O, d).
    """
    size = network.rank
    eye = torch.eye(size, dtype=network.outputs.dtype, device=network.device)
    return pulled(network, eye.expand(network.n, -1, -1), names, chunk=chunk)


def pulled(network: Network, cotangents: Tensor, names: list[str] | None = None, *, chunk: int | None = None) -> Tensor:
    """J_i' u_ir for every sample and cotangent.

    Args:
        network: The network.
        cotangents: u_ir, shape (n, R, O).
        names: Parameters to differentiate by; all of the network's if absent.
        chunk: Samples at a time; all if absent.

    Returns:
        Rows J_i' u_ir, shape (n, R, d).
    """
    chosen = {name: network.parameters[name].detach() for name in (names or network.parameters)}
    if network.known.get("batches", True):
        try:
            return _pulled_together(network, cotangents, chosen, chunk)
        except _UNSUPPORTED:
            network.known["batches"] = False
    rows = [_pulled_alone(network.part(i, i + 1), cotangents[i], list(chosen)) for i in range(network.n)]
    return torch.stack(rows)


def _pulled_together(network: Network, cotangents: Tensor, chosen: dict[str, Tensor], chunk: int | None) -> Tensor:
    """By vmap over the samples."""

    def one(sample: Inputs, rows: Tensor) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return call(network.model, batch_of_one(sample), parameters).reshape(-1)

        pull: Any = vjp(outputs, chosen)[1]
        return cast("dict[str, Tensor]", vmap(lambda u: pull(u)[0])(rows))

    inputs: Any = network.inputs if isinstance(network.inputs, Tensor) else dict(network.inputs)
    gradients = vmap(one, chunk_size=chunk)(inputs, cotangents)  # each (n, R, *shape)
    return torch.cat([g.detach().reshape(*g.shape[:2], -1) for g in gradients.values()], 2)


def _pulled_alone(sample: Network, cotangents: Tensor, names: list[str]) -> Tensor:
    """One sample's rows, shape (R, d), by plain backward passes."""
    wanted = [sample.parameters[name] for name in names]
    with torch.enable_grad():
        outputs = call(sample.model, sample.inputs).reshape(-1)
    rows = []
    for u in cotangents:
        found = torch.autograd.grad(outputs, wanted, u.to(outputs.dtype), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)
