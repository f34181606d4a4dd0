"""A model, its loss and a set of samples, checked once: what every route to the per-sample curvature starts from."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from core_tensor.linalg.spectrum import check_parameters
from torch import Tensor, nn

from sgd_stability.curvature.factors import OutputFactor
from sgd_stability.curvature.losses import SampleLoss, check_additive
from sgd_stability.distributed import ALONE, Ranks, bare

Inputs = Tensor | Mapping[str, Tensor]


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
    """

    model: nn.Module
    loss: SampleLoss
    inputs: Inputs
    targets: Tensor
    parameters: dict[str, Tensor]
    ranks: Ranks = ALONE

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

    def detached(self) -> dict[str, Tensor]:
        """The parameters without their graph.

        Returns:
            Parameters by name.
        """
        return {name: p.detach() for name, p in self.parameters.items()}

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
        slope = float(self.output_gradient().double().square().sum(1).mean().sqrt())
        if slope == 0:
            return 0.0
        z = self.outputs.double().reshape(self.n, -1)
        curvature = float(self.factor.trace().double().square().mean().sqrt()) / z.shape[1]
        size = float(z.square().sum(1).mean().sqrt())
        return slope / (curvature * size) if curvature * size > 0 else math.inf

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
        return Network(self.model, self.loss, take(self.inputs, which), self.targets[which], self.parameters)

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator["Network"]:
        """The samples of a range, a few at a time.

        Args:
            size: Samples at a time.
            start: First sample.
            stop: One past the last; n if absent.

        Yields:
            Smaller networks.
        """
        stop = self.n if stop is None else stop
        if (start, stop) == (0, self.n) and self.n <= size and self.ranks is ALONE:
            yield self  # with what it has computed
            return
        for first in range(start, stop, size):
            yield self.part(first, min(first + size, stop))


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Evaluate a model.

    Args:
        model: The model; must return a tensor.
        inputs: A tensor, or keyword arguments.

    Returns:
        Outputs, shape (n, ...).

    Raises:
        TypeError: If the model does not return a tensor.
    """
    args, kwargs = arguments(inputs)
    outputs = model(*args, **kwargs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model: expected a tensor of outputs, got {type(outputs).__name__}; wrap the model so that it returns one"
        )
    return outputs


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs as arguments of the model.

    Args:
        inputs: A tensor, or keyword arguments.

    Returns:
        Positional and keyword arguments.
    """
    return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))


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


def single(sample: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """One sample, without its batch dimension, as arguments of the model.

    Args:
        sample: A tensor, or a mapping of tensors.

    Returns:
        Positional and keyword arguments, a batch of one.
    """
    if isinstance(sample, Mapping):
        return (), {name: value[None] for name, value in sample.items()}
    return (sample[None],), {}


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
        ValueError: If the model has no (real) parameters, mixes samples, or the loss is not a finite sum over samples.
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
    network = Network(model, loss, inputs, targets, chosen, ranks)
    if network.n == 0:
        raise ValueError("data: expected at least one sample, got none")
    check_independent(network)
    check_additive(loss, network.outputs, targets)
    return network


def check_independent(network: Network) -> None:
    """Refuse a model whose output for one sample depends on the others, or changes from call to call.

    Args:
        network: The network.

    Raises:
        ValueError: If it does.
    """
    for name, module in network.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"model: expected a loss that is a sum over samples, but {name or type(module).__name__} normalises "
                "over the batch; call model.eval() or freeze its statistics"
            )
    outputs = network.outputs
    if not bool(outputs.isfinite().all()):
        raise ValueError("model: expected finite outputs, got NaN or infinite ones")
    half = (network.n + 1) // 2
    with torch.no_grad():
        alone = call(network.model, take(network.inputs, slice(0, half)))
    if len(outputs) != network.n:
        raise ValueError(f"model: expected {network.n} outputs, one per sample, got {len(outputs)}")
    if bool(((outputs[:half] - alone).abs() > 1e-3 * (outputs.abs().max() + 1e-6)).any()):
        raise ValueError(
            "model: expected outputs that depend on their own sample only and repeat from call to call; "
            "switch off dropout and layers that mix the batch (model.eval())"
        )
