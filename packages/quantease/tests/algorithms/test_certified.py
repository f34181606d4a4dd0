"""GPTQ and descent to a certified minimum, against the float64 certificate and against the search of all moves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease.algorithms import certified
from quantease.algorithms.certified import gptq_descent
from quantease.algorithms.descent import certify, descend
from quantease.algorithms.gptq import gptq
from quantease.evaluation.synthetic import synthetic_layer
from quantease.problem.grid import group_index, minmax_grid
from quantease.problem.problem import Problem


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([-1, 5]),
    st.sampled_from([3, 80]),
    st.booleans(),
    st.sampled_from([1e-12, 1.0, 1e12]),
    st.integers(0, 99),
)
def test_certificate_agrees_with_float64(bits, p, group_size, rank, dead, size, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(p, rank, generator=generator)
    if dead:
        factor[0] = 0.0
    problem = Problem.scaled(size * torch.randn(7, p, generator=generator), factor @ factor.T)
    grid = minmax_grid(problem.weight, bits=bits, group=group_index(p, group_size), scale_dtype=torch.float32)
    codes, certificate = gptq_descent(problem, grid)
    start = problem.candidate(gptq(problem, grid), grid)
    found = problem.candidate(codes, grid)
    assert bool((found.objective <= start.objective * (1 + 1e-6)).all())
    assert certificate.holds
    assert float(certify(problem, found).gaps.max()) <= 1e-6


@pytest.mark.parametrize("kind", ["A", "B"])
def test_as_good_as_the_descent_in_float64(kind):
    layer = synthetic_layer(kind, seed=0, features=200, rows=96)
    problem = Problem.scaled(layer.weight, layer.gram)
    grid = minmax_grid(layer.weight, bits=3, group=group_index(200, -1))
    codes, certificate = gptq_descent(problem, grid)
    exact = descend(problem, problem.candidate(gptq(problem, grid), grid))
    assert certificate.holds
    assert certify(problem, problem.candidate(codes, grid)).holds
    assert float((codes != exact.codes).double().mean()) < 1e-3
    assert problem.candidate(codes, grid).total == pytest.approx(exact.total, rel=1e-4)


def test_a_wrong_gradient_is_found_out(make_problem, make_minmax, monkeypatch):
    """With a gradient that is far off, the measured error is large, every code is a suspect, and float64 finishes."""
    problem = make_problem(12, 60)
    grid = make_minmax(problem)

    def wrong(*arguments, **options):
        codes = grid.quantize(problem.weight)
        return codes, torch.zeros_like(problem.weight)  # which says that nothing wants to move

    monkeypatch.setattr(certified, "gptq_with_gradient", wrong)
    codes, certificate = gptq_descent(problem, grid)
    assert not torch.equal(codes, grid.quantize(problem.weight))
    assert certificate.holds
    assert certify(problem, problem.candidate(codes, grid)).holds


def test_too_few_sweeps_give_no_certificate(make_problem, make_minmax, monkeypatch):
    problem = make_problem(30, 60)
    grid = make_minmax(problem)
    monkeypatch.setattr(
        certified, "gptq_with_gradient",
        lambda problem, grid, **_: (
            torch.zeros_like(problem.weight, dtype=torch.uint8),
            (problem.weight - grid.dequantize(torch.zeros_like(problem.weight, dtype=torch.uint8))) @ problem.sigma,
        ),
    )  # fmt: skip
    assert not gptq_descent(problem, grid, max_sweeps=1)[1].holds
