"""A pytest plugin (`-p core_tensor.dev.seeded`): every test starts from its own random seed.

Without it a test that draws from the global generators depends on which tests ran before it in the same process, which
differs from run to run under pytest-xdist.
"""

import random
import zlib

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    """Seed Python's, NumPy's and torch's global generators with a hash of the test's name and parameters."""
    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the code under test may draw from
    torch.manual_seed(seed)
