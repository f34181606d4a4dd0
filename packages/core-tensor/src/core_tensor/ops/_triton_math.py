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


@triton.jit
def fixed_point(value, scale):
    # round(value * scale), ties to even as on the CPU, as a 64-bit whole number: sums of these have no order.
    scaled = value * scale
    below = tl.floor(scaled)
    number = below.to(tl.int64)
    rest = scaled - below  # exact, unlike scaled + 0.5
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 != 0))).to(tl.int64)
