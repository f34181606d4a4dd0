"""Devices that a user names; torch is loaded when one is."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_device(name: str, device: "torch.device | str") -> "torch.device":
    """Refuse a device that this machine does not have.

    Args:
        name: The argument's name, for the message.
        device: Such as `cpu` or `cuda:0`.

    Returns:
        The device.

    Raises:
        ValueError: If it is no name of a device, or torch finds none of its kind.
    """
    import torch

    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a build without CUDA
        why = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"{name}: expected a device that torch finds here, got {str(device)!r} ({why})") from error
    return found
