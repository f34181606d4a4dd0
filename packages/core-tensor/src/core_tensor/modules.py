"""The module inside the wrappers that training puts around it."""

from torch import nn


def unwrap(model: nn.Module, *, parallel: bool = True) -> nn.Module:
    """The module inside `torch.compile`, DistributedDataParallel and DataParallel, in whatever order they were put on.

    Args:
        model: A module, perhaps wrapped.
        parallel: False to look behind `torch.compile` only, and stop at a parallel wrapper.

    Returns:
        The module itself, whose parameters the wrappers share.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and parallel and isinstance(model, wrappers):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
