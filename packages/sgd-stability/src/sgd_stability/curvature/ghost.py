r"""Gram matrices of per-sample gradients without the gradients ("ghost" route), exact: see `curvature.signals`.

Linear layers, convolutions, embeddings and norms are handled by their signals. Parameters of other layers, of shared
layers, of layers called more than once or with a reparametrized weight (weight norm) go through the explicit gradients
of `curvature.jacobian`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgd_stability.curvature.factors import OutputFactor
from sgd_stability.curvature.jacobian import pulled
from sgd_stability.curvature.network import Inputs, Network, call, unflatten
from sgd_stability.curvature.signals import Explicit, Lookup, Outer, Signal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_PLAIN = (nn.Linear, *_CONVOLUTIONS, nn.Embedding, nn.LayerNorm)
_NUMBERS = 2**27
"""Most numbers of the explicit gradients of a group of samples."""
_REPLICATED = 128
"""Most samples times cotangents that share one pass forward and back."""
Inverse = Mapping[str, Tensor] | None
"""P^-1 of every parameter by name, in the parameter's shape; None for P = I."""


@dataclass
class _Recorded:
    name: str
    module: nn.Module
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs, outputs


def gram(network: Network, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gram matrix K of the weighted output Jacobians.

    Args:
        network: The network.
        dtype: Precision of the inner products; the signals have the model's.

    Returns:
        K[ic, jc'] = z_ic . z_jc', shape (n R, n R), sample-major.
    """
    size = network.n * network.rank
    K = torch.zeros(size, size, dtype=dtype, device=network.device)
    for signal in layer_signals(network):
        signal.add_gram(K)
    return K


def sample_blocks(network: Network, *, scale: Tensor | None = None, chunk: int = 64) -> Tensor:
    """The diagonal blocks Z_i P^-1 Z_i' of the Gram matrix, in pieces: any number of samples.

    Args:
        network: The network; its ranks share the samples.
        scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
        chunk: Samples at a time.

    Returns:
        Shape (n, R, R), float64.
    """
    inverse = None if scale is None else unflatten(scale.square(), network.parameters)

    def compute(start: int, stop: int) -> Tensor:
        parts = network.chunks(chunk, start, stop)
        return torch.cat([_blocks(part, None, inverse) for part in parts])

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
        parts = network.chunks(max(1, min(chunk, _NUMBERS // network.size)), start, stop)
        return torch.cat([_blocks(part, part.output_gradient()[:, None]).reshape(-1) for part in parts])

    return network.ranks.rows(network.n, compute).clamp_min(0).sqrt()


def layer_signals(network: Network, cotangents: Tensor | None = None, inverse: Inverse = None) -> list[Signal]:
    """Back-propagate cotangents of the outputs and record what every layer sees.

    Args:
        network: The network.
        cotangents: u_ir, shape (n, R, O); row r of sample i gives the gradient J_i' u_ir. The columns of W_i if absent,
            so that these are the rows of Z_i.
        inverse: P^-1 by name.

    Returns:
        One signal per layer, and one for the explicit gradients of all other parameters, if there are any.
    """
    # 1. forward, with every known layer recorded; a few samples once per cotangent, for one pass back instead of R
    n, R = network.n, network.rank if cotangents is None else cotangents.shape[1]
    copies = R if n * R <= _REPLICATED else 1
    if "layers" not in network.known:
        network.known["layers"] = list(_layers(network))
    recorded = [_Recorded(name, module) for name, module in network.known["layers"]]
    handles = [record.module.register_forward_hook(_hook(record)) for record in recorded]
    try:
        with torch.enable_grad():
            outputs = call(network.model, _repeated(network.inputs, copies))
    finally:
        for handle in handles:
            handle.remove()
    used = [r for r in recorded if len(r.calls) == 1 and _is_per_sample(r, copies * n)]
    # 2. backward to their outputs
    if cotangents is None:
        cotangents = _columns(network.loss.factor(outputs.detach()[::copies], network.targets), n, outputs)
    flat = outputs.reshape(copies * n, -1)
    sources = [record.calls[0][1] for record in used]
    cotangents = cotangents.to(flat.dtype)
    rows = [cotangents.flatten(0, 1)] if copies == R else cotangents.unbind(1)
    passes = [
        torch.autograd.grad(flat, sources, row, retain_graph=True, materialize_grads=True)
        for row in (rows if sources else ())
    ]
    names = {id(p): name for name, p in network.parameters.items()}
    signals: list[Signal] = []
    for i, record in enumerate(used):
        found = [gradients[i] for gradients in passes]
        gradients = found[0].unflatten(0, (n, R)) if copies == R else torch.stack(found, 1)
        signals += _signals(record, record.calls[0][0][::copies], gradients, names, inverse)
    # 3. explicit gradients by what is left
    covered = {id(p) for record in used for p in record.module.parameters(recurse=False)}
    others = [name for name, p in network.parameters.items() if id(p) not in covered]
    if others:
        Z = pulled(network, cotangents, others, chunk=64)
        if inverse is not None:
            Z = Z * torch.cat([inverse[name].reshape(-1) for name in others]).sqrt()
        signals.append(Explicit(Z))
    return signals


def _repeated(inputs: Inputs, copies: int) -> Inputs:
    """Every sample `copies` times in a row."""
    if copies == 1:
        return inputs
    if isinstance(inputs, Mapping):
        return {name: value.repeat_interleave(copies, 0) for name, value in inputs.items()}
    return inputs.repeat_interleave(copies, 0)


def _columns(factor: OutputFactor, n: int, like: Tensor) -> Tensor:
    """W_i' as rows of cotangents, shape (n, R, O)."""
    eye = torch.eye(factor.rank, dtype=like.dtype, device=like.device)
    return factor.times(eye.expand(n, -1, -1)).mT


def _layers(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Layers of a known type whose trained parameters are a weight and a bias that belong to them alone."""
    owners: dict[int, int] = {}
    for module in network.model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    chosen = {id(p) for p in network.parameters.values()}
    for name, module in network.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(id(p) in chosen for p in own.values()) or any(owners[id(p)] > 1 for p in own.values()):
            continue
        if type(module) in _PLAIN and own.keys() <= {"weight", "bias"} and "weight" in own and _is_plain(module):
            yield name, module


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer does nothing beyond its formula."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return True


def _is_per_sample(record: _Recorded, n: int) -> bool:
    """Whether the layer was called with the samples along the first dimension."""
    x, least = record.calls[0][0], 1 if isinstance(record.module, nn.Embedding) else 2
    return x.ndim >= least and len(x) == n


def _hook(record: _Recorded) -> Callable[..., Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        record.calls.append((inputs[0].detach() if inputs else output.new_zeros(()), output))
        return output.clone()  # an in-place activation must not overwrite what is differentiated

    return hook


def _signals(
    record: _Recorded, x: Tensor, gradients: Tensor, names: Mapping[int, str], inverse: Inverse
) -> Iterator[Signal]:
    """The signals of one layer, from its input and the gradients (n, R, ...) at its output."""
    module = record.module
    own = dict(module.named_parameters(recurse=False))

    def of(name: str) -> Tensor | float:
        """P^-1 of a parameter, 1 without one, 0 where it is not trained."""
        if name not in own or id(own[name]) not in names:
            return 0.0
        return 1.0 if inverse is None else inverse[names[id(own[name])]]

    weight, bias = of("weight"), of("bias")
    if isinstance(module, nn.Embedding):
        yield _lookup(module, x, gradients, weight)
    elif isinstance(module, nn.LayerNorm):
        yield from _norm(module, x, gradients, weight, bias)
    elif isinstance(module, nn.Linear):
        a = x.reshape(len(x), -1, x.shape[-1])  # (n, T, in)
        g = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])  # (n, R, T, out)
        yield Outer(a, g, weight, bias)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        flat = weight.flatten(1) if isinstance(weight, Tensor) else weight
        yield Outer(_patches(module, x), gradients.flatten(3).mT, flat, bias)


def _lookup(module: nn.Embedding, x: Tensor, gradients: Tensor, weight: Tensor | float) -> Lookup:
    tokens = x.reshape(len(x), -1)
    g = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])
    if isinstance(weight, Tensor):
        g = g * weight.sqrt()[tokens][:, None]
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[:, None, :, None]
    return Lookup(tokens, g)


def _norm(
    module: nn.LayerNorm, x: Tensor, gradients: Tensor, weight: Tensor | float, bias: Tensor | float
) -> Iterator[Explicit]:
    """sum_t g_t * (normalized x)_t for the gain and sum_t g_t for the bias."""
    shape, kept = module.normalized_shape, len(module.normalized_shape)
    size = gradients.shape[-kept:].numel()
    normalized = F.layer_norm(x, shape, None, None, module.eps).reshape(len(x), 1, -1, size)
    g = gradients.reshape(*gradients.shape[:2], -1, size)  # (n, R, T, size)
    for inverse, Z in ((weight, g * normalized), (bias, g)):
        if isinstance(inverse, Tensor):
            yield Explicit(Z.sum(2) * inverse.reshape(-1).sqrt())
        elif inverse:
            yield Explicit(Z.sum(2))


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Unfolded inputs of a convolution, shape (n, positions, in * kernel)."""
    kernel, dilation, padding, stride = (
        tuple(int(v) for v in value) for value in (module.kernel_size, module.dilation, module.padding, module.stride)
    )
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation, padding, stride = x[:, :, None], (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    return F.unfold(x, kernel, dilation, padding, stride).mT


def _blocks(network: Network, cotangents: Tensor | None, inverse: Inverse = None) -> Tensor:
    """Per-sample inner products of the gradients J_i' u_ir, or of the rows of Z_i, shape (n, R, R)."""
    R = network.rank if cotangents is None else cotangents.shape[1]
    total = torch.zeros(network.n, R, R, dtype=torch.float64, device=network.device)
    for signal in layer_signals(network, cotangents, inverse):
        total += signal.blocks()
    return total
