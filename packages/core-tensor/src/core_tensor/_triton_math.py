"""Device functions that several Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    # Nearest whole number, ties to even; exact below 2^22 (libdevice's rint does not run in the interpreter).
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize(x, scale, zero, max_code):
    # The grid point s * (clamp(round(x / s) + z, 0, max_code) - z); clamped first, so that rounding stays exact.
    return scale * nearest(tl.minimum(tl.maximum(x / scale, -zero), max_code - zero))
