import re
import sys
from pathlib import Path

import pytest
import torch
from core_tensor.memory import huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_bytes(address):
    """Bytes in huge pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def test_values_and_identity_stay():
    for tensor in (torch.arange(3_000_000), torch.zeros(0), torch.ones(3, device="meta"), torch.ones(5)):
        before = tensor.clone()
        assert huge_pages(tensor) is tensor
        assert tensor.is_meta or torch.equal(tensor, before)


@pytest.mark.skipif(sys.platform != "linux" or not THP.exists(), reason="a matter of Linux")
def test_a_large_tensor_lies_in_huge_pages():
    if "[never]" in THP.read_text():
        pytest.skip("huge pages are switched off here")
    tensor = huge_pages(torch.empty(16 << 20))  # 64 MB
    tensor.fill_(1.0)
    middle = tensor.data_ptr() + (32 << 20)
    found = _huge_bytes(middle)
    if found == 0:
        pytest.skip("no free huge page")
    assert found > 32 << 20
