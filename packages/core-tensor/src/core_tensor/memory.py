"""How the memory of large tensors is laid out."""

import ctypes
import mmap
import sys

from torch import Tensor

from core_tensor.checks import has_values

_HUGE = 2 << 20
"""Bytes of a huge page."""


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask the system to hold a large tensor in pages of 2 MB, before anything is written into it.

    Rows of a table that a batch names lie far apart, so nearly each one is on a page whose address the processor has
    to look up, and with pages of 4 kB that look-up costs more than the row. Linux heeds the advice where
    `/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`; elsewhere nothing happens. Values are
    untouched. A page is taken whole on its first write, so a table that stays mostly unwritten takes more memory.

    Args:
        tensor: A contiguous tensor on the CPU, fresh from `torch.empty` or `torch.zeros`.

    Returns:
        The same tensor.
    """
    size = tensor.numel() * tensor.element_size()
    if sys.platform == "linux" and size >= 2 * _HUGE and tensor.device.type == "cpu" and has_values(tensor):
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + size - start) // page * page
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(start, length, mmap.MADV_HUGEPAGE)  # advice: a kernel that cannot follow it says so, and no more
    return tensor
