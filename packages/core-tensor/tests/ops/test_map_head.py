import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.map_head import map_head, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

F64 = torch.float64


def _arguments(tasks, rows, d, dtype=F64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + 100 * tasks + 10 * rows + d)
    h = scale * torch.randn(tasks, rows, d, generator=g, dtype=F64)
    base = torch.randn(tasks, rows, generator=g, dtype=F64)
    y = (torch.rand(tasks, rows, generator=g) < 0.5).double()
    w = torch.rand(tasks, rows, generator=g, dtype=F64) + 0.1
    lengths = torch.randint(0, rows + 1, (tasks,), generator=g)
    mu = torch.randn(tasks, d, generator=g, dtype=F64)
    A = torch.randn(d, d, generator=g, dtype=F64)
    P = A @ A.T / d + 0.5 * torch.eye(d, dtype=F64)
    P = P.tril() + P.tril(-1).T  # symmetric to the last bit, which a product need not be
    return [t if t is lengths else t.to(dtype) for t in (h, base, y, w, lengths, mu, P)]


def _gradient(e, h, base, y, w, lengths, mu, P):
    """Of the objective, task by task, by autograd: shares nothing with either implementation."""
    found = []
    for t, n in enumerate(lengths.tolist()):
        x = e[t].clone().requires_grad_()
        z = base[t, :n] + h[t, :n] @ x
        loss = (w[t, :n] * (softplus(z, threshold=800.0) - y[t, :n] * z)).sum()
        loss = loss + 0.5 * (x - mu[t]) @ P @ (x - mu[t])
        found.append(torch.autograd.grad(loss, x)[0])
    return torch.stack(found) if found else torch.zeros_like(mu)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 19), st.integers(1, 32), st.integers(0, 9))
def test_optimal_and_equal_to_the_reference(tasks, rows, d, seed):
    arguments = _arguments(tasks, rows, d, seed=seed)
    e, H = map_head(*arguments)
    expected, hessian = reference.map_head(*arguments, 50)
    assert_close("e", expected, e, 1e-11)
    assert_close("H", hessian, H, 1e-11)
    assert tasks == 0 or float(_gradient(e, *arguments).abs().max()) <= 1e-9


def _separable(d):
    h, base, _, w, lengths, mu, P = _arguments(4, 16, d)
    y = (h.sum(2) > 0).double()  # a plane separates the labels: without a prior no minimum exists
    return [3 * h, 0 * base, y, w, lengths.clamp_min(8), 0 * mu, 1e-6 * P]


def _degenerate(d):
    h, base, y, w, lengths, mu, P = _arguments(4, 16, d)
    h[:, 4:] = h[:, :1]  # the same row over and over
    h[2] = 0.0  # nothing to learn from
    w[3] = 0.0
    return [h, base, y, w, lengths.clamp_min(8), mu, 1e-4 * P]


def _contradictory(d):
    h, base, y, w, lengths, mu, P = _arguments(4, 16, d)
    return [h[:, :1].expand_as(h), 50 * base, y, 1e3 * w, lengths.clamp_min(8), mu, 1e-3 * P]


def _saturated(d):
    h, _, y, w, lengths, mu, P = _arguments(4, 16, d)
    return [h, 200 * (0.5 - y), y, w, lengths.clamp_min(8), mu, 1e-2 * P]  # all confidently wrong, no curvature


def _uneven(d):
    h, base, y, w, lengths, mu, P = _arguments(4, 16, d)
    h[:, ::3] *= 1e3
    return [h, base, y, w, lengths.clamp_min(8), mu, P]


@pytest.mark.parametrize("d", [1, 2, 8, 17, 32])
@pytest.mark.parametrize("case", [_separable, _degenerate, _contradictory, _saturated, _uneven])
def test_newton_converges_on_hard_supports(case, d):
    arguments = case(d)
    scale = float((arguments[3][..., None] * arguments[0]).abs().sum(1).max()) + 1.0
    for e in (map_head(*arguments)[0], reference.map_head(*arguments, 50)[0]):
        assert float(_gradient(e, *arguments).abs().max()) <= 1e-8 * max(1.0, scale / 1e3)


def test_an_empty_task_is_its_prior():
    h, base, y, w, lengths, mu, P = _arguments(3, 4, 5)
    e, H = map_head(h, base, y, w, torch.zeros_like(lengths), mu, P)
    assert torch.equal(e, mu)
    assert torch.equal(H, P.expand_as(H))


def test_padding_is_never_read_and_tasks_do_not_meet():
    h, base, y, w, lengths, mu, P = _arguments(6, 9, 7)
    e, H = map_head(h, base, y, w, lengths, mu, P)
    behind = torch.arange(9) >= lengths[:, None]
    for t in (h, base, y, w):
        t[behind] = torch.nan
    again, hessian = map_head(h, base, y, w, lengths, mu, P)
    assert torch.equal(e, again)
    assert torch.equal(H, hessian)
    for i, n in enumerate(lengths.tolist()):
        part = [t[i : i + 1, :n] for t in (h, base, y, w)]
        alone, _ = map_head(*part, lengths[i : i + 1], mu[i : i + 1], P)
        assert torch.equal(alone[0], e[i])


def _leaves(d=3, seed=5):
    h, base, y, w, lengths, mu, P = _arguments(3, 4, d, seed=seed)
    y = 0.1 + 0.8 * y  # inside [0, 1], so that finite differences stay there
    A = torch.linalg.cholesky(P)
    return [t.requires_grad_() for t in (h, base, y, w, mu, A)], lengths


def test_implicit_gradient_against_finite_differences():
    leaves, lengths = _leaves()

    def solve(h, base, y, w, mu, A):
        return map_head(h, base, y, w, lengths, mu, A @ A.T)[0]

    assert torch.autograd.gradcheck(solve, leaves, eps=1e-6, atol=1e-7)


def test_implicit_gradient_against_unrolled_newton():
    (h, base, y, w, mu, A), lengths = _leaves(d=5)
    leaves = (h, base, y, w, mu, A)
    inside = (torch.arange(4) < lengths[:, None]).double()
    direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64)

    def unrolled():
        P, e = A @ A.T, mu
        for _ in range(12):
            z = base + (h @ e[..., None])[..., 0]
            p = z.sigmoid()
            gradient = ((w * inside * (p - y))[..., None] * h).sum(1) + (e - mu) @ P
            H = (h * (w * inside * p * (1 - p))[..., None]).mT @ h + P
            e = e - torch.linalg.solve(H, gradient)
        return e

    implicit = map_head(h, base, y, w, lengths, mu, A @ A.T)[0]
    assert_close("e", unrolled(), implicit, 1e-12)
    expected = torch.autograd.grad((unrolled() * direction).sum(), leaves)
    got = torch.autograd.grad((implicit * direction).sum(), leaves)
    for name, one, other in zip(("h", "base", "y", "w", "mu", "A"), expected, got, strict=True):
        assert_close(name, one, other, 1e-10)


def test_native_gradient_equals_the_reference():
    for d, dtype, ratio in ((1, F64, 1e-12), (7, F64, 1e-12), (32, F64, 1e-12), (8, torch.float32, 2e-6)):
        arguments = _arguments(5, 13, d, dtype)
        e = map_head(*arguments)[0]
        v = torch.randn(e.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)
        got = torch.ops.core_tensor.map_head_backward(v, e, *arguments)
        expected = reference.map_head_backward(v, e, *arguments)
        for name, one, other in zip(("h", "base", "y", "w", "mu", "P"), expected, got, strict=True):
            assert_close(name, one, other, ratio)


def test_a_precision_that_is_symmetric_but_for_rounding():
    (h, base, y, w, mu, A), lengths = _leaves()
    skewed = (A @ A.T).detach()
    skewed[0, 1] *= 1 + 1e-9
    e, _ = map_head(h, base, y, w, lengths, mu, skewed.requires_grad_())
    e.sum().backward()
    assert torch.isfinite(skewed.grad).all()


def test_no_gradient_through_the_precision():
    (h, base, y, w, mu, A), lengths = _leaves()
    _, H = map_head(h, base, y, w, lengths, mu, A @ A.T)
    assert not H.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    arguments = _arguments(3, 5, 4)
    torch.library.opcheck(torch.ops.core_tensor.map_head.default, (*arguments, 50))
    leaves = [t if t.dtype == torch.int64 else t.requires_grad_() for t in arguments]
    torch.library.opcheck(torch.ops.core_tensor.map_head.default, (*leaves, 50))


def test_threads_change_nothing():
    arguments = _arguments(130, 11, 9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = map_head(*arguments)
        torch.set_num_threads(2)
        two = map_head(*arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({0: torch.zeros(3, 4, 33, dtype=F64)}, ValueError, "h: expected a width of 1 to 32"),
        ({0: torch.zeros(3, 4, 5, dtype=torch.int64)}, TypeError, "h: expected dtype"),
        ({1: torch.zeros(3, 5, dtype=F64)}, ValueError, "base: expected shape"),
        ({2: torch.full((3, 4), 1.5, dtype=F64)}, ValueError, r"y: expected values in \[0, 1\], got 1.5"),
        ({2: torch.full((3, 4), torch.nan, dtype=F64)}, ValueError, "y: expected values"),
        ({3: torch.full((3, 4), -1.0, dtype=F64)}, ValueError, "w: expected values"),
        ({3: torch.full((3, 4), torch.inf, dtype=F64)}, ValueError, "w: expected values"),
        ({0: torch.full((3, 4, 5), torch.inf, dtype=F64)}, ValueError, "h: expected finite values"),
        ({4: torch.tensor([1, 5, 1])}, ValueError, r"lengths: expected values in \[0, 4\]"),
        ({4: torch.tensor([1, -1, 1])}, ValueError, "lengths: expected values"),
        ({4: torch.tensor([1, 2**62, 1])}, ValueError, "lengths: expected values"),
        ({4: torch.tensor([1, 1, 1], dtype=torch.int32)}, TypeError, "lengths: expected dtype"),
        ({5: torch.full((3, 5), torch.nan, dtype=F64)}, ValueError, "mu: expected finite"),
        ({6: -torch.eye(5, dtype=F64)}, ValueError, "P: expected a positive definite matrix"),
        ({6: torch.eye(5, dtype=F64) + torch.ones(5, 5, dtype=F64).triu(1)}, ValueError, "P: expected a symmetric"),
    ],
)
def test_bad_input(change, kind, message):
    arguments = _arguments(3, 4, 5)
    arguments[4] = torch.full((3,), 4)
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(kind, match=message):
        map_head(*arguments)
    with pytest.raises(ValueError, match="steps: expected"):
        map_head(*_arguments(3, 4, 5), steps=0)
