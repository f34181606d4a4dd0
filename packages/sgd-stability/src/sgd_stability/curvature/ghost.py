r"""Gram matrices of per-sample gradients without the gradients ("ghost" route), exact.

For a linear layer the gradient of output c of sample i is the outer product g_ic a_i' of the layer's back-propagated
signal and its input, so layers contribute

    K[ic, jc'] += (a_i . a_j + 1) (g_ic . g_jc')            (the 1 is the bias)

and with T positions per sample (sequences, the patches of a convolution) the sum over both positions. Where T is large
the layer's own gradients (n, R, in out) are formed instead, whichever costs less. Parameters of other layers, of shared
layers and of layers called more than once go through `sgd_stability.curvature.jacobian`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_stability.curvature.jacobian import output_jacobian
from sgd_stability.curvature.network import Network, call


@dataclass(frozen=True)
class LayerSignal:
    """What one layer contributes to per-sample gradients.

    Attributes:
        a: Inputs of the layer, shape (n, T, in).
        g: Back-propagated signals, shape (n, R, T, out).
        weight: Whether the weight is trained.
        bias: Whether there is a trained bias.
    """

    a: Tensor
    g: Tensor
    weight: bool
    bias: bool

    def gradients(self) -> Iterator[Tensor]:
        """The layer's gradients for every sample and cotangent.

        Yields:
            Weight and bias part, each of shape (n, R, size).
        """
        if self.weight:
            yield torch.einsum("nrto,nti->nroi", self.g, self.a).flatten(2)
        if self.bias:
            yield self.g.sum(2)

    def blocks(self) -> Tensor:
        """Inner products of every sample's own gradients, by whichever way is smaller.

        Returns:
            Shape (n, R, R), float64.
        """
        n, R, T, out = self.g.shape
        if out * self.a.shape[2] < R * T * T:
            return torch.stack([(Z @ Z.mT).double() for Z in self.gradients()]).sum(0)
        a, g = self.a.double(), self.g.double().reshape(n, R * T, out)
        inputs = a @ a.mT * self.weight + self.bias  # (n, T, T)
        return torch.einsum("nrtsu,ntu->nrs", (g @ g.mT).reshape(n, R, T, R, T), inputs)

    def ghost_is_cheaper(self) -> bool:
        """Whether inner products of signals cost less than explicit gradients.

        Returns:
            True if they do.
        """
        _, R, T, out = self.g.shape
        size = self.a.shape[2]
        return T * T * (out + 2 + size / R**2) < size * out


@dataclass
class _Recorded:
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs, outputs


def gram(network: Network, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gram matrix K of the weighted output Jacobians.

    Args:
        network: The network.
        dtype: Precision of the inner products; the signals have the model's.

    Returns:
        K[ic, jc'] = z_ic . z_jc', shape (n R, n R), sample-major.
    """
    signals, rest = layer_signals(network, _columns(network))
    size = network.n * network.factor.rank
    K = torch.zeros(size, size, dtype=dtype, device=network.targets.device)
    for signal in signals:
        _add_gram(K, signal)
    if rest is not None:
        Z = rest.reshape(size, -1).to(dtype)
        K.addmm_(Z, Z.T)
    return K


def sample_blocks(network: Network, *, chunk: int = 64) -> Tensor:
    """The diagonal blocks Z_i Z_i' of the Gram matrix, in pieces: any number of samples.

    Args:
        network: The network; its ranks share the samples.
        chunk: Samples at a time.

    Returns:
        Shape (n, R, R).
    """

    def compute(start: int, stop: int) -> Tensor:
        return torch.cat([_blocks(part, _columns(part)) for part in network.chunks(chunk, start, stop)])

    return network.ranks.rows(network.n, compute)


def gradient_norms(network: Network, *, chunk: int = 64) -> Tensor:
    """||grad l_i|| for every sample.

    Args:
        network: The network; its ranks share the samples.
        chunk: Samples at a time.

    Returns:
        Shape (n,).
    """

    def compute(start: int, stop: int) -> Tensor:
        parts = network.chunks(chunk, start, stop)
        return torch.cat([_blocks(part, part.output_gradient()[:, None]).reshape(-1) for part in parts])

    return network.ranks.rows(network.n, compute).clamp_min(0).sqrt()


def layer_signals(network: Network, cotangents: Tensor) -> tuple[list[LayerSignal], Tensor | None]:
    """Back-propagate cotangents of the outputs and record what every linear layer sees.

    Args:
        network: The network.
        cotangents: u_ir, shape (n, R, O); row r of sample i gives the gradient J_i' u_ir.

    Returns:
        The signals of the layers handled here, and the explicit gradients (n, R, size) by all other parameters, or
        None if there are none.
    """
    recorded = {name: _Recorded(module) for name, module in _layers(network)}
    handles = [record.module.register_forward_hook(_hook(record)) for record in recorded.values()]
    try:
        with torch.enable_grad():
            outputs = call(network.model, network.inputs)
    finally:
        for handle in handles:
            handle.remove()
    used = {
        name: record
        for name, record in recorded.items()
        if len(record.calls) == 1 and len(record.calls[0][0]) == network.n and record.calls[0][0].ndim >= 2
    }
    flat = outputs.reshape(network.n, -1)
    sources = [record.calls[0][1] for record in used.values()]
    rows = cotangents.to(flat.dtype).unbind(1) if sources else ()
    per_row = [torch.autograd.grad(flat, sources, row, retain_graph=True, materialize_grads=True) for row in rows]
    signals = [
        _signal(record, torch.stack([grads[i] for grads in per_row], 1), network)
        for i, record in enumerate(used.values())
    ]
    covered = {id(p) for record in used.values() for p in record.module.parameters(recurse=False)}
    others = [name for name, p in network.parameters.items() if id(p) not in covered]
    if not others:
        return signals, None
    return signals, cotangents.to(flat.dtype) @ output_jacobian(network, others, chunk=64)


def _columns(network: Network) -> Tensor:
    # W_i' as rows of cotangents, shape (n, R, O).
    factor = network.factor
    eye = torch.eye(factor.rank, dtype=network.outputs.dtype, device=network.outputs.device)
    return factor.times(eye.expand(network.n, -1, -1)).mT


def _layers(network: Network) -> Iterator[tuple[str, nn.Linear | nn.Conv1d | nn.Conv2d]]:
    """Layers whose gradients are outer products and whose parameters belong to them alone."""
    owners: dict[int, int] = {}
    for module in network.model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    chosen = {id(p) for p in network.parameters.values()}
    for name, module in network.model.named_modules():
        own = list(module.parameters(recurse=False))
        if not any(id(p) in chosen for p in own) or any(owners[id(p)] > 1 for p in own):
            continue
        if type(module) is nn.Linear or _is_plain_convolution(module):
            yield name, cast("nn.Linear | nn.Conv1d | nn.Conv2d", module)


def _is_plain_convolution(module: nn.Module) -> bool:
    if type(module) is not nn.Conv1d and type(module) is not nn.Conv2d:
        return False
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _hook(record: _Recorded) -> Callable[..., Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        record.calls.append((inputs[0].detach(), output))
        return output.clone()  # an in-place activation must not overwrite what is differentiated

    return hook


def _signal(record: _Recorded, gradients: Tensor, network: Network) -> LayerSignal:
    module, x = record.module, record.calls[0][0]
    if isinstance(module, nn.Linear):
        a = x.reshape(len(x), -1, x.shape[-1])  # (n, T, in)
        g = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])  # (n, R, T, out)
    else:
        a = _patches(module, x)
        g = gradients.flatten(3).mT
    trained = {id(p) for p in network.parameters.values()}
    return LayerSignal(a, g, id(module.weight) in trained, module.bias is not None and id(module.bias) in trained)


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    # Unfolded inputs of a convolution, shape (n, positions, in * kernel).
    kernel, dilation, padding, stride = (
        tuple(int(v) for v in value) for value in (module.kernel_size, module.dilation, module.padding, module.stride)
    )
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation, padding, stride = x[:, :, None], (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    return F.unfold(x, kernel, dilation, padding, stride).mT


def _add_gram(K: Tensor, signal: LayerSignal) -> None:
    n, R, T, _ = signal.g.shape
    if not signal.ghost_is_cheaper():
        for Z in signal.gradients():
            flat = Z.reshape(n * R, -1).to(K.dtype)
            K.addmm_(flat, flat.T)
        return
    view = K.view(n, R, n, R)
    for t in range(T):
        a, g = signal.a[:, t].to(K.dtype), signal.g[:, :, t].reshape(n * R, -1).to(K.dtype)
        for u in range(T):
            b, f = signal.a[:, u].to(K.dtype), signal.g[:, :, u].reshape(n * R, -1).to(K.dtype)
            inputs = a @ b.T * signal.weight + signal.bias
            view.addcmul_((g @ f.T).view(n, R, n, R), inputs[:, None, :, None])


def _blocks(network: Network, cotangents: Tensor) -> Tensor:
    # Per-sample inner products of the gradients J_i' u_ir, shape (n, R, R).
    signals, rest = layer_signals(network, cotangents)
    total = torch.zeros(network.n, cotangents.shape[1], cotangents.shape[1], dtype=torch.float64)
    total = total.to(network.targets.device)
    for signal in signals:
        total += signal.blocks()
    if rest is not None:
        total += (rest @ rest.mT).double()
    return total
