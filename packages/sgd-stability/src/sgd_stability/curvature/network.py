"""A model, its loss and a set of samples, checked once: what every route to the per-sample curvature starts from."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from core_tensor.app.ranks import ALONE, Ranks
from core_tensor.linalg.spectrum import check_parameters
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgd_stability.curvature.factors import OutputFactor
from sgd_stability.curvature.losses import SampleLoss, check_additive

Inputs = Tensor | Mapping[str, Tensor]
_NUMBERS = 2**24
"""Most output numbers held at once: a language model's logits for 256 x 1,024 tokens would take 53 GB."""
_COMPARED = 64
"""Samples on which the independence of the others is tested."""


@dataclass(frozen=True)
class Network:
    """A model at its present parameters, on some samples.

    Attributes:
        model: The model.
        loss: The loss.
        inputs: A tensor, or a mapping passed as keyword arguments; n along the first dimension.
        targets: Targets, n along the first dimension.
        parameters: The trainable parameters by name; curvature is taken over these.
        ranks: Who shares the work; all of them hold all of the samples.
        known: What was found out once about the model; shared by all of its parts.
    """

    model: nn.Module
    loss: SampleLoss
    inputs: Inputs
    targets: Tensor
    parameters: dict[str, Tensor]
    ranks: Ranks = ALONE
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def outputs(self) -> Tensor:
        """Outputs of all samples, detached, shape (n, ...)."""
        with torch.no_grad():
            return call(self.model, self.inputs)

    @cached_property
    def factor(self) -> OutputFactor:
        """Factors of the loss's curvature in the outputs."""
        return self.loss.factor(self.outputs, self.targets)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.targets)

    @property
    def size(self) -> int:
        """Number of parameters d."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def rank(self) -> int:
        """R, the rows of every Z_i: one per output of a sample."""
        if "rank" not in self.known:
            self.known["rank"] = self.part(0, 1).outputs.numel()
        return int(self.known["rank"])

    @property
    def convex(self) -> bool:
        """Whether no sample's loss is concave in its outputs in any direction."""
        return self.loss.convex or all(part.factor.signs is None for part in self.chunks(256))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors: the parameters', or float32 where those have half precision."""
        own = next(iter(self.parameters.values())).dtype
        return torch.float32 if own in {torch.float16, torch.bfloat16} else own

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def detached(self) -> dict[str, Tensor]:
        """The parameters without their graph.

        Returns:
            Parameters by name.
        """
        return {name: p.detach() for name, p in self.parameters.items()}

    def mean_loss(self) -> float:
        """Mean loss of the samples.

        Returns:
            The loss.
        """
        return math.fsum(float(p.loss.values(p.outputs, p.targets).sum()) for p in self.chunks(256)) / self.n

    def output_gradient(self) -> Tensor:
        """Gradient of every sample's loss in its outputs.

        Returns:
            Shape (n, O).
        """
        z = self.outputs.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.loss.values(z, self.targets).sum(), z)
        return gradient.reshape(self.n, -1)

    def relative_residual(self) -> float:
        """Distance of the outputs from where every sample's loss is least, by a Newton step, relative to their size.

        Measured in the outputs: in the weights a large curvature would hide a residual of any size.

        Returns:
            rms ||dl_i/dz_i|| / (rms (tr Lambda_i / O) rms ||z_i||); 0 if all slopes vanish.
        """
        slope = curvature = size = 0.0
        for part in self.chunks(256):
            slope += float(part.output_gradient().double().square().sum())
            curvature += float((part.factor.trace().double() / self.rank).square().sum())
            size += float(part.outputs.double().square().sum())
        if slope == 0:
            return 0.0
        product = math.sqrt(curvature) * math.sqrt(size / self.n)
        return math.sqrt(slope) / product if product > 0 else math.inf

    def part(self, start: int, stop: int) -> "Network":
        """The same model on a range of the samples, for this process alone.

        Args:
            start: First sample.
            stop: One past the last.

        Returns:
            The smaller network.
        """
        return self.select(slice(start, stop))

    def select(self, which: slice | Tensor) -> "Network":
        """The same model on some of the samples, for this process alone.

        Args:
            which: Slice or indices.

        Returns:
            The smaller network.
        """
        return replace(self, inputs=take(self.inputs, which), targets=self.targets[which], ranks=ALONE)

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator["Network"]:
        """The samples of a range, a few at a time: fewer than asked for where a sample has many outputs.

        Args:
            size: Most samples at a time.
            start: First sample.
            stop: One past the last; n if absent.

        Yields:
            Smaller networks.
        """
        stop = self.n if stop is None else stop
        size = max(1, min(size, _NUMBERS // max(self.rank, 1)))
        if (start, stop) == (0, self.n) and self.n <= size and self.ranks is ALONE:
            yield self  # with what it has computed
            return
        for first in range(start, stop, size):
            yield self.part(first, min(first + size, stop))

    def direction(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector as a direction of the parameters.

        The row of an embedding that pads has no gradient; its component is dropped, so that forward mode agrees.

        Args:
            v: Shape (d,).

        Returns:
            Pieces by name, in the parameters' dtypes.
        """
        pieces = unflatten(v, self.parameters)
        if "padding" not in self.known:
            self.known["padding"] = _padding(self.model, self.parameters)
        for name, row in self.known["padding"]:
            pieces[name] = pieces[name].clone()
            pieces[name][row] = 0
        return {name: piece.to(self.parameters[name].dtype) for name, piece in pieces.items()}


def _padding(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Rows that pad, of embeddings whose weight belongs to no other module."""
    names = {id(p): name for name, p in parameters.items()}
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    return [
        (names[id(module.weight)], module.padding_idx)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.padding_idx is not None
        and id(module.weight) in names
        and owners.count(id(module.weight)) == 1
    ]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated forward and twice: plain attention, recurrent cells step by step, dense rows.

    Args:
        model: The model that is about to be evaluated.

    Yields:
        Nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        sparse = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
        for module in sparse:
            module.sparse = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module in sparse:
                module.sparse = True


def call(model: nn.Module, inputs: Inputs, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Evaluate a model.

    Args:
        model: The model; returns a tensor, or something with a field `logits`, as transformers' models do.
        inputs: A tensor, or keyword arguments.
        parameters: What replaces its parameters.

    Returns:
        Outputs, shape (n, ...).

    Raises:
        TypeError: If the model returns neither.
    """
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
    with differentiable(model):
        outputs = (
            model(*args, **kwargs) if parameters is None else functional_call(model, dict(parameters), args, kwargs)
        )
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model: expected a tensor of outputs, got {type(outputs).__name__}; wrap the model so that it returns one"
        )
    return outputs


def unflatten(vector: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split a flat vector as the parameters are.

    Args:
        vector: Shape (d,).
        parameters: Parameters by name.

    Returns:
        Pieces by name.
    """
    pieces = vector.split([p.numel() for p in parameters.values()])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, parameters.items(), strict=True)}


def take(inputs: Inputs, which: slice | Tensor) -> Inputs:
    """Select samples.

    Args:
        inputs: A tensor, or a mapping of tensors.
        which: Slice or indices.

    Returns:
        The same structure with fewer samples.
    """
    if isinstance(inputs, Mapping):
        return {name: value[which] for name, value in inputs.items()}
    return inputs[which]


def batch_of_one(sample: Inputs) -> Inputs:
    """One sample, without its batch dimension, as a batch.

    Args:
        sample: A tensor, or a mapping of tensors.

    Returns:
        The batch.
    """
    return {name: value[None] for name, value in sample.items()} if isinstance(sample, Mapping) else sample[None]


def make_network(
    model: nn.Module,
    loss: SampleLoss,
    inputs: Inputs,
    targets: Tensor,
    parameters: Iterable[str] | None = None,
    ranks: Ranks = ALONE,
) -> Network:
    """Check that the loss is a sum over samples, and everything else that later routes rely on.

    Args:
        model: The model, as it is trained, but without layers that mix samples or draw random numbers.
        loss: The loss.
        inputs: Inputs of the samples.
        targets: Targets of the samples.
        parameters: Names of the parameters to include; all that require a gradient if absent.
        ranks: Who shares the work.

    Returns:
        The network.

    Raises:
        ValueError: If the model has no (real) parameters, cannot be evaluated on the data, mixes samples, or the loss
            is not a finite sum over samples.
        TypeError: If parameters or outputs are not real floating tensors.
    """
    model = bare(model)
    names = None if parameters is None else set(parameters)
    chosen: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)
    }
    if not chosen:
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    if names is not None and names - chosen.keys():
        raise ValueError(f"parameters: expected names of trainable parameters, got {sorted(names - chosen.keys())}")
    check_parameters(chosen.values())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"model: expected a loss that is a sum over samples, but {name or type(module).__name__} normalizes "
                "over the batch; call model.eval() or freeze its statistics"
            )
    network = Network(model, loss, inputs, targets, chosen, ranks)
    if network.n == 0:
        raise ValueError("data: expected at least one sample, got none")
    first = _first(network)
    if loss.fit is not None:
        network = replace(network, loss=loss.fit(first.outputs, targets))
    check_independent(network)
    for part in network.chunks(256):
        check_additive(network.loss, part.outputs, part.targets)
    return network


def _first(network: Network) -> Network:
    """The first sample, evaluated: what fails here is the caller's model on the caller's data."""
    first = network.part(0, 1)
    try:
        outputs = first.outputs
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"model: cannot be evaluated on the data ({type(error).__name__}: {why})") from error
    if outputs.ndim == 0 or len(outputs) != 1:
        raise ValueError(f"model: expected one output per sample, got shape {tuple(outputs.shape)} for one sample")
    return first


def check_independent(network: Network) -> None:
    """Refuse a model whose output for one sample depends on the others, or changes from call to call.

    Args:
        network: The network.

    Raises:
        ValueError: If it does.
    """
    for part in network.chunks(256):
        if not bool(part.outputs.isfinite().all()):
            raise ValueError("model: expected finite outputs, got NaN or infinite ones")
        if len(part.outputs) != part.n:
            raise ValueError(f"model: expected {part.n} outputs, one per sample, got {len(part.outputs)}")
    some = next(iter(network.part(0, min(network.n, _COMPARED)).chunks(_COMPARED)))
    half = (some.n + 1) // 2
    with torch.no_grad():
        together = call(network.model, some.inputs)
        alone = call(network.model, take(some.inputs, slice(0, half)))
    if bool(((together[:half] - alone).abs() > 1e-3 * (together.abs().max() + 1e-6)).any()):
        raise ValueError(
            "model: expected outputs that depend on their own sample only and repeat from call to call; "
            "switch off dropout and layers that mix the batch (model.eval())"
        )


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, which torch.func cannot differentiate.

    Args:
        model: A model, perhaps wrapped.

    Returns:
        The model itself; parameters are shared.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
