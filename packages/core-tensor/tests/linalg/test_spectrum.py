import math

import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.linalg.spectrum import SymmetricOperator, hessian_operator, hutchinson_trace, lanczos
from hypothesis import given, settings
from hypothesis import strategies as st


def _operator(matrix):
    return SymmetricOperator(lambda v: matrix @ v, len(matrix), matrix.dtype)


def _symmetric(size, seed, eigenvalues=None):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.randn(size, generator=generator, dtype=torch.float64) if eigenvalues is None else eigenvalues
    return (q * values) @ q.T


def _net(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(7, 4, dtype=dtype), torch.randint(0, 3, (7,))
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def _dense_hessian(model, closure):
    parameters = list(model.parameters())
    first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in first]
    return torch.stack([torch.cat([p.reshape(-1) for p in row]) for row in rows])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_hessian_products_equal_the_dense_hessian(keep_graph):
    model, closure = _net()
    dense = _dense_hessian(model, closure)
    operator = hessian_operator(closure, model.parameters(), keep_graph=keep_graph)
    eye = torch.eye(operator.size, dtype=torch.float64)
    assert_close("Hessian", dense, torch.stack([operator(e) for e in eye]), 1e-14)
    with torch.no_grad():
        assert operator(eye[0]).requires_grad is False


def test_hessian_of_linear_and_partly_unused_losses():
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    linear = hessian_operator(lambda: a.sum() + b.sum(), [a, b])
    assert torch.equal(linear(torch.ones(5)), torch.zeros(5))
    partial = hessian_operator(lambda: a.square().sum(), [a, b])
    assert torch.equal(partial(torch.ones(5)), torch.tensor([2.0, 2, 0, 0, 0]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_lanczos_meets_the_promised_residual(size, k, seed):
    k = min(k, size)
    matrix = _symmetric(size, seed)
    found = lanczos(_operator(matrix), k, tolerance=1e-8, generator=torch.Generator().manual_seed(seed))
    assert found.converged
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    assert_close("eigenvalues", exact, found.values, 1e-7)
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(residuals, found.residuals, atol=1e-12)
    assert_close("orthonormal", torch.eye(k, dtype=torch.float64), found.vectors.T @ found.vectors, 1e-12)


def test_repeated_zero_and_rank_deficient_spectra():
    identity = lanczos(_operator(torch.eye(6, dtype=torch.float64)), 4)
    assert identity.converged
    assert torch.allclose(identity.values, torch.ones(4, dtype=torch.float64), rtol=1e-14)
    double = lanczos(_operator(torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))), 2)
    assert torch.allclose(double.values, torch.tensor([3.0, 3.0], dtype=torch.float64), rtol=1e-12)
    zero = lanczos(_operator(torch.zeros(5, 5, dtype=torch.float64)), 3)
    assert zero.converged
    assert torch.equal(zero.values, torch.zeros(3, dtype=torch.float64))
    matrix = _symmetric(20, 1, torch.tensor([3.0, 2.0] + [0.0] * 18, dtype=torch.float64))
    low_rank = lanczos(_operator(matrix), 4, tolerance=1e-6)
    assert torch.allclose(low_rank.values, torch.tensor([3.0, 2, 0, 0], dtype=torch.float64), atol=1e-10)


def test_running_out_of_steps_is_reported():
    found = lanczos(_operator(_symmetric(60, 3)), 1, tolerance=1e-10, max_steps=4)
    assert not found.converged
    assert found.products == 4
    assert float(found.residuals) > 1e-10 * float(found.values)


def test_largest_is_algebraic_and_negation_gives_the_smallest():
    matrix = torch.diag(torch.tensor([-10.0, 1.0, 4.0], dtype=torch.float64))
    assert float(lanczos(_operator(matrix)).values) == pytest.approx(4)
    assert -float(lanczos(_operator(-matrix)).values) == pytest.approx(-10)


def test_warm_start_saves_products_and_seeds_repeat():
    operator = _operator(_symmetric(80, 5))
    cold = lanczos(operator, tolerance=1e-6, generator=torch.Generator().manual_seed(1))
    again = lanczos(operator, tolerance=1e-6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cold.vectors, again.vectors)
    assert lanczos(operator, tolerance=1e-5, start=cold.vectors[:, 0]).products == 1


def test_float32_operators_converge():
    matrix = _symmetric(200, 2).float()
    found = lanczos(_operator(matrix), 3, tolerance=1e-4)
    assert found.converged
    assert_close("values", torch.linalg.eigvalsh(matrix.double()).flip(0)[:3], found.values, 1e-5)


def test_hutchinson_is_unbiased_within_its_standard_error():
    matrix = _symmetric(30, 4)
    found = hutchinson_trace(_operator(matrix), 400, generator=torch.Generator().manual_seed(0))
    assert abs(found.value - float(matrix.trace())) < 4 * found.standard_error
    spread = math.sqrt(2 * float(matrix.square().sum() - matrix.diagonal().square().sum()) / 400)
    assert found.standard_error == pytest.approx(spread, rel=0.15)
    assert math.isnan(hutchinson_trace(_operator(matrix), 1).standard_error)
    diagonal = _operator(torch.diag(torch.arange(5.0)))
    assert hutchinson_trace(diagonal, 2).value == 10


def _nan(_):
    return torch.full((3,), math.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: hessian_operator(lambda: w.sum(), []), ValueError, "parameters: .*at least one"),
        (lambda w: hessian_operator(lambda: w.sum(), [w.detach()]), ValueError, "parameters: .*gradient"),
        (lambda w: hessian_operator(lambda: w.sum(), [w + 0j]), TypeError, "parameters: .*complex64"),
        (lambda w: hessian_operator(lambda: w.sum(), [w, w.double()]), TypeError, "parameters: .*one dtype"),
        (lambda w: hessian_operator(lambda: w, [w]), ValueError, "closure: .*shape"),
        (lambda w: hessian_operator(lambda: w.sum() / 0, [w]), ValueError, "closure: .*finite"),
        (lambda w: hessian_operator(lambda: w.detach().sum(), [w]), ValueError, "closure: .*constant"),
        (lambda _: lanczos(_operator(torch.eye(3)), 4), ValueError, "k: "),
        (lambda _: lanczos(_operator(torch.eye(3)), 2, max_steps=1), ValueError, "max_steps: "),
        (lambda _: lanczos(_operator(torch.eye(3)), max_vectors=2), ValueError, "max_vectors: "),
        (lambda _: lanczos(_operator(torch.eye(3)), basis_dtype=torch.int8), TypeError, "basis_dtype: "),
        (lambda _: lanczos(_operator(torch.eye(3)), start=torch.zeros(3)), ValueError, "start: "),
        (lambda _: lanczos(_operator(torch.eye(3)), start=torch.ones(4)), ValueError, "start: "),
        (lambda _: lanczos(SymmetricOperator(_nan, 3)), ValueError, "operator: .*finite"),
        (lambda _: hutchinson_trace(SymmetricOperator(_nan, 3)), ValueError, "operator: .*finite"),
        (lambda _: hutchinson_trace(_operator(torch.eye(3)), 0), ValueError, "probes: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, requires_grad=True))


def _decaying(size=3000):
    values = torch.cat([10 / torch.arange(1, 41).double(), torch.linspace(0, 0.05, size - 40).double()])
    reflector = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reflector /= reflector.norm()

    def reflect(v):
        return v - 2 * torch.dot(reflector, v) * reflector  # dense eigenvectors at the price of two dot products

    return SymmetricOperator(lambda v: reflect(values * reflect(v)), size, torch.float64), values


@pytest.mark.parametrize(("k", "max_vectors"), [(1, 3), (1, 6), (4, 6), (4, 8), (10, 20)])
def test_thick_restart_finds_the_same_pairs_in_less_memory(k, max_vectors):
    operator, values = _decaying()
    options = {"tolerance": 1e-6, "max_steps": 600}
    whole = lanczos(operator, k, **options, generator=torch.Generator().manual_seed(1))
    found = lanczos(operator, k, **options, max_vectors=max_vectors, generator=torch.Generator().manual_seed(1))
    assert found.converged
    assert whole.products > max_vectors  # so that there was a restart
    assert found.products <= 5 * whole.products
    assert_close("values", values[:k], found.values, 1e-11)
    images = torch.stack([operator(v) for v in found.vectors.T], 1)
    assert torch.allclose((images - found.vectors * found.values).norm(dim=0), found.residuals, rtol=1e-3, atol=1e-10)
    assert_close("orthonormal", torch.eye(k, dtype=torch.float64), found.vectors.T @ found.vectors, 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_restarts_at_any_size_meet_the_promised_residual(size, k, more, seed):
    k = min(k, size)
    matrix = _symmetric(size, seed)
    found = lanczos(_operator(matrix), k, tolerance=1e-6, max_steps=5000, max_vectors=k + 2 + more)
    assert found.converged
    assert_close("eigenvalues", torch.linalg.eigvalsh(matrix).flip(0)[:k], found.values, 1e-5)


def test_restarts_at_invariant_subspaces():
    matrix = _symmetric(20, 1, torch.tensor([3.0, 2.0] + [0.0] * 18, dtype=torch.float64))
    low_rank = lanczos(_operator(matrix), 4, tolerance=1e-6, max_vectors=6)
    assert torch.allclose(low_rank.values, torch.tensor([3.0, 2, 0, 0], dtype=torch.float64), atol=1e-10)
    identity = lanczos(_operator(torch.eye(30, dtype=torch.float64)), 3, max_vectors=5)
    assert identity.converged
    assert torch.allclose(identity.values, torch.ones(3, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("max_vectors", [None, 10])
def test_a_basis_in_bfloat16_says_what_its_rounding_costs(max_vectors):
    exact, values = _decaying()
    operator = SymmetricOperator(lambda v: exact(v.double()).float(), exact.size)
    options = {"tolerance": 1e-2, "max_vectors": max_vectors, "generator": torch.Generator().manual_seed(1)}
    found = lanczos(operator, 4, **options, basis_dtype=torch.bfloat16)
    assert found.converged
    assert found.vectors.dtype == torch.float32
    assert bool(((found.values - values[:4]).abs() <= found.residuals).all())
    images = torch.stack([operator(v) for v in found.vectors.T], 1)
    residuals = (images - found.vectors * found.values.float()).norm(dim=0)
    assert torch.allclose(residuals.double(), found.residuals, rtol=0.5)
    assert bool((residuals <= 1e-2 * values[:4]).all())
    rough = lanczos(operator, 4, **{**options, "tolerance": 1e-4}, basis_dtype=torch.bfloat16)
    assert not rough.converged  # out of reach of the storage, and said so
