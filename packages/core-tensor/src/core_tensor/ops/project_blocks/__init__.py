r"""Euclidean projection of every block of a ragged vector onto a capped box.

Block $i$ holds the variables `offsets[i]:offsets[i + 1]`, and its polytope is

$$ C_i = \{0 \le x \le u, \; w'x \le d_i\} \quad \text{or} \quad \{0 \le x \le u, \; w'x = d_i\}, $$

which is a box ($d = \infty$), a simplex ($u = \infty, w = 1$), a box-cut ($w = 1$) or a knapsack. The projection is
$x = \mathrm{clip}(v - \theta w, 0, u)$ with the multiplier $\theta$ of the cut ($\theta \ge 0$ for `<=`), and its
derivative on the free set $F = \{0 < x < u\}$ is $P = I_F - w_F w_F' / w_F'w_F$ where the cut is tight, else $I_F$.
"""

from typing import Any

import torch
from torch import Tensor

from core_tensor.checks import check_flag, check_offsets, check_tensor, has_values
from core_tensor.ops._operator import operator
from core_tensor.ops.project_blocks import cpu, reference


def _fake(
    values: Tensor, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> Tensor:
    return torch.empty_like(values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, cap, upper, weight, equality = inputs
    ctx.save_for_backward(output, offsets, cap, upper, weight)
    ctx.equality = equality


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    x, offsets, cap, upper, weight = ctx.saved_tensors
    return reference.tangent(gradient, x, offsets, cap, upper, weight, ctx.equality), None, None, None, None, None


_project = operator(
    "project_blocks(Tensor values, Tensor offsets, Tensor cap, Tensor? upper, Tensor? weight, bool equality) -> Tensor",
    reference=reference.project_blocks,
    fake=_fake,
    cpu=cpu.project_blocks,
    cuda="core_tensor.ops.project_blocks.triton:project_blocks",
    setup_context=_setup,
    backward=_backward,
)


def project_blocks(
    values: Tensor,
    offsets: Tensor,
    cap: Tensor,
    upper: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    equality: bool = False,
) -> Tensor:
    r"""Project every block, $\min_{x_i \in C_i} \lVert x_i - v_i \rVert^2$; differentiable in `values`.

    Args:
        values: The points $v$, shape (variables,), float64.
        offsets: Bounds of the blocks, from 0 to `variables` without a fall, shape (blocks + 1,), int64.
        cap: Right-hand sides $d$, shape (blocks,) or (1,) for all, float64; infinite for no cut.
        upper: Bounds $u$, shape (variables,) or (1,) for all, float64; None for none.
        weight: Positive weights $w$ of the cut, shape (variables,), float64; None for ones.
        equality: Whether the cut is `= d` instead of `<= d`. An empty block is left alone.

    Returns:
        The projections, shape (variables,), float64.

    Raises:
        ValueError: If a shape or value does not fit, or an equality block cannot reach its right-hand side.
        TypeError: If a dtype does not fit.
    """
    check_tensor("values", values, ndim=1, dtype=torch.float64, finite=True)
    check_tensor("offsets", offsets, device=values.device)
    check_family(values.shape[0], offsets, cap, upper, weight, equality, torch.float64)
    projected: Tensor = _project(values, offsets, cap, upper, weight, equality)
    return projected


def check_family(
    variables: int,
    offsets: Tensor,
    cap: Tensor,
    upper: Tensor | None,
    weight: Tensor | None,
    equality: bool,
    dtype: torch.dtype,
) -> None:
    """Refuse blocks or polytope parameters that do not fit; see `project_blocks` for the arguments.

    Args:
        variables: Length of the ragged vector.
        offsets: Bounds of the blocks.
        cap: Right-hand sides.
        upper: Upper bounds.
        weight: Weights of the cut.
        equality: Whether the cut is an equation.
        dtype: Expected dtype of `upper` and `weight`.

    Raises:
        ValueError: If a shape or value does not fit.
        TypeError: If a dtype does not fit.
    """
    device = offsets.device if isinstance(offsets, Tensor) else None
    check_tensor("offsets", offsets, ndim=1, dtype=torch.int64, nonempty=True)
    blocks = offsets.shape[0] - 1
    check_offsets("offsets", offsets, variables)
    check_tensor("cap", cap, ndim=1, dtype=torch.float64, device=device)
    if cap.shape[0] not in {1, blocks}:
        raise ValueError(f"cap: expected shape (1,) or ({blocks},), got {tuple(cap.shape)}")
    if upper is not None:
        check_tensor("upper", upper, ndim=1, dtype=dtype, device=device)
        if upper.shape[0] not in {1, variables}:
            raise ValueError(f"upper: expected shape (1,) or ({variables},), got {tuple(upper.shape)}")
    if weight is not None:
        check_tensor("weight", weight, shape=(variables,), dtype=dtype, device=device, finite=True)
    check_flag("equality", equality)
    if has_values(offsets):
        _check_polytopes(variables, offsets, cap, upper, weight, equality)


def _check_polytopes(
    variables: int, offsets: Tensor, cap: Tensor, upper: Tensor | None, weight: Tensor | None, equality: bool
) -> None:
    if not bool((cap >= 0).all()):
        raise ValueError("cap: expected values of at least 0, got a negative one or NaN")
    if upper is not None and not bool((upper >= 0).all()):
        raise ValueError("upper: expected values of at least 0, got a negative one or NaN")
    if weight is not None and not bool((weight > 0).all()):
        raise ValueError("weight: expected positive values, got one of 0 or less")
    if not equality:
        return
    if not bool(torch.isfinite(cap).all()):
        raise ValueError("cap: expected finite values in an equation, got an infinite one")
    blocks = offsets.shape[0] - 1
    reach = reference.reach(variables, offsets, cap, upper, weight)
    full = cap.expand(blocks) if cap.shape[0] == 1 else cap
    short = (reach < full * (1 - 1e-12)) & (offsets[1:] > offsets[:-1])
    if bool(short.any()):
        i = int(short.nonzero()[0])
        raise ValueError(f"cap: block {i} must sum to {float(full[i])}, but its bounds allow {float(reach[i])} at most")
