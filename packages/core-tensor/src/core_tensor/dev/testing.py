"""Shared by the tests of every package: error measures, awkward shapes, several gloo processes, shared data."""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

AWKWARD_SIZES = (1, 2, 3, 7, 31, 33, 64, 127, 130)
"""Sizes that are no multiple of a block, prime, or one."""

AWKWARD_SCALES = (1e-30, 1e-3, 1.0, 1e3, 1e30)
"""Scales that make careless sums of squares under- or overflow in float32."""


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float) -> None:
    """Assert that the error of `got` is below `ratio` times the size of the reference, both as root mean squares.

    Args:
        name: What is compared, for the message.
        reference: The truth, usually computed in float64.
        got: What the kernel returned, of the same shape.
        ratio: Allowed relative error.

    Raises:
        AssertionError: If shapes differ, a value is not finite where the reference is, or the error is larger.
    """
    if reference.shape != got.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)} instead of {tuple(reference.shape)}")
    if reference.numel() == 0:
        return
    truth, value = reference.detach().double().cpu(), got.detach().double().cpu()
    if not torch.equal(torch.isfinite(truth), torch.isfinite(value)):
        raise AssertionError(f"{name}: NaN or infinite where the reference is not (or the reverse)")
    largest = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((truth - value) / largest).square().mean().sqrt()  # scaled first: 1e-30 squared would vanish
    size = (truth / largest).square().mean().sqrt()
    if error > ratio * size:
        raise AssertionError(f"{name}: relative error {float(error / size):.3e} exceeds {ratio:.1e}")


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `function(rank, world_size, *args)` in several processes joined by gloo and collect what each returns.

    Args:
        function: A module-level function. Its file is loaded by path in every process, because pytest's importlib mode
            gives test modules names that other processes cannot import.
        world_size: Number of processes.
        args: Further arguments, picklable.

    Returns:
        The results, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A script loaded by the name `__main__` would run again, and spawn again.
    module = "__mp_main__" if function.__module__ == "__main__" else function.__module__
    target = (inspect.getfile(function), module, function.__qualname__, pickle.dumps(args))
    with tempfile.TemporaryDirectory() as folder:
        # ranks are forks of a server that has imported torch, once, and never computed
        multiprocessing.set_forkserver_preload([__name__])
        arguments = (world_size, port, folder, *target)
        torch.multiprocessing.start_processes(_rank, arguments, world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, file: str, module: str, name: str, args: bytes) -> None:
    torch.set_num_threads(1)
    function = getattr(_load(file, module), name)
    store = torch.distributed.TCPStore("127.0.0.1", port, world_size, rank == 0, timeout=timedelta(seconds=120))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, world_size, *pickle.loads(args)), Path(folder) / str(rank))
        torch.distributed.barrier()  # torch 2.6 waits for ever in the next call if the store's process has gone
    finally:
        torch.distributed.destroy_process_group()


def _load(file: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that arguments of the module's own types unpickle
    spec.loader.exec_module(module)
    return module


def shared_data(*parts: str) -> Path:
    """A file of the shared data folder; the calling test skips visibly where the folder is absent.

    The folder is `$CORE_TENSOR_SHARED_DATA`, or `../shared/data` beside the repository.

    Args:
        parts: Path inside the folder.

    Returns:
        The existing path.
    """
    import pytest

    root = os.environ.get("CORE_TENSOR_SHARED_DATA")
    folders = [Path(root)] if root else [up / "shared" / "data" for up in Path.cwd().resolve().parents]
    for folder in folders:
        path = folder.joinpath(*parts)
        if path.exists():
            return path
    return pytest.skip(f"shared data {'/'.join(parts)} is absent (set CORE_TENSOR_SHARED_DATA)")
