"""Biases that batch normalization cancels.

In training the mean of the batch takes a bias before a batch normalization away again, so the loss does not depend on
it. With running statistics, as a check looks at the model, it does: curvature that training never meets, and behind
the vanishing second moments of an adaptive optimizer a huge one.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sgd_stability.curvature.network import Network

_SAMPLES = 8


def batch_normalized(model: nn.Module) -> bool:
    """Whether a model normalizes over the batch as it stands, in training mode.

    Args:
        model: The model.

    Returns:
        Whether any of its layers does; those that are synchronized between processes are not looked at.
    """
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.training
        for module in model.modules()
    )


def cancelled_biases(network: Network) -> list[str]:
    """Biases of linear and convolution layers that the outputs in training mode do not depend on.

    Args:
        network: The model in training mode, and the samples. Neither buffers nor random numbers are changed.

    Returns:
        Names of the biases, found by shifting each.
    """
    few = network.part(0, min(_SAMPLES, network.n))
    slack = 1e-3 if network.dtype in {torch.float32, torch.float64} else 5e-2
    straight = _outputs(few, None)
    found = []
    for name, p in network.parameters.items():
        owner, _, last = name.rpartition(".")
        if last != "bias" or not isinstance(network.model.get_submodule(owner), nn.Linear | nn.modules.conv._ConvNd):
            continue
        shift = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
        moved = _outputs(few, {name: p.detach() + shift})
        if float((moved - straight).norm()) <= slack * float(straight.norm()):
            found.append(name)
    return found


def _outputs(network: Network, changed: dict[str, Tensor] | None) -> Tensor:
    """Outputs in the model's own mode, with the same random numbers every time."""
    model, inputs = network.model, network.inputs
    state = {name: buffer.clone() for name, buffer in model.named_buffers()} | (changed or {})
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
    own = [network.device] if network.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=own):
        torch.manual_seed(0)
        outputs = functional_call(model, state, args, kwargs)
    found: Tensor = getattr(outputs, "logits", outputs)
    return found
