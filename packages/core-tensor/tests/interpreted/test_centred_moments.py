import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.centred_moments import reference


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(1, 1, torch.float64), (40, 5, torch.float32), (37, 33, torch.float64), (50, 40, torch.bfloat16)],
)
def test_values(n, d, dtype, monkeypatch):
    from core_tensor.ops.centred_moments import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 6)  # two or three runs of rows, the last one shorter
    x = (torch.randn(n, d, generator=torch.Generator().manual_seed(n)) + 100).to(dtype)
    (mean, scatter), (got_mean, got_scatter) = reference.centred_moments(x), kernels.centred_moments(x)
    assert_close("mean", mean, got_mean, 1e-14)
    assert_close("scatter", scatter, got_scatter, 1e-13)
    assert torch.equal(got_scatter, got_scatter.T)


def test_large_mean_and_drift_keep_their_digits(monkeypatch):
    from core_tensor.ops.centred_moments import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2.0**27
    x[256:] += 1e6  # the shift says nothing about these
    assert_close("scatter", reference.centred_moments(x)[1], kernels.centred_moments(x)[1], 1e-13)
