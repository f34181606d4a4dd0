"""Coordinate-wise minima against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease.algorithms.descent import certify, descend
from quantease.algorithms.gptq import gptq
from quantease.problem.grid import group_index, minmax_grid
from quantease.problem.problem import Problem


def _row_objectives(problem, grid, codes, sparse=None):
    D = problem.weight.double() - grid.dequantize(codes, torch.float64) - (0.0 if sparse is None else sparse)
    return ((D @ problem.sigma.double()) * D).sum(1)


def _best_single_move(problem, grid, codes, frozen=None):
    """Lowest objective of every row over all single-code changes, by trying them all."""
    best = _row_objectives(problem, grid, codes)
    for j, code in itertools.product(range(codes.shape[1]), range(grid.max_code + 1)):
        moved = codes.clone()
        moved[:, j] = code
        if frozen is not None:
            moved[:, j] = torch.where(frozen[:, j], codes[:, j], moved[:, j])
        best = torch.minimum(best, _row_objectives(problem, grid, moved))
    return best


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 14),
    st.sampled_from([-1, 5]),
    st.booleans(),
    st.sampled_from([2, 40]),
    st.booleans(),
    st.integers(0, 99),
)
def test_no_single_code_move_helps(bits, p, group_size, freeze, rank, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(p, rank, generator=generator)
    if dead:
        factor[0] = 0.0
    problem = Problem.scaled(torch.randn(5, p, generator=generator), factor @ factor.T)
    grid = minmax_grid(problem.weight, bits=bits, group=group_index(p, group_size))
    codes = torch.randint(0, 2**bits, (5, p), generator=generator, dtype=torch.uint8)
    frozen = torch.rand(5, p, generator=generator) < 0.3 if freeze else None
    start = problem.candidate(codes, grid)
    found = descend(problem, start, frozen=frozen)
    assert bool((found.objective <= start.objective).all())
    assert torch.allclose(found.objective, _row_objectives(problem, grid, found.codes), rtol=1e-9, atol=1e-12)
    certificate = certify(problem, found, frozen=frozen)
    assert certificate.holds
    assert bool((found.objective <= _best_single_move(problem, grid, found.codes, frozen) + 1e-9 * problem.scale).all())
    if frozen is not None:
        assert torch.equal(found.codes[frozen], codes[frozen])


def test_the_certificate_measures_the_best_single_move(make_problem, make_minmax):
    problem = make_problem(7, 9)
    grid = make_minmax(problem)
    candidate = problem.candidate(torch.randint(0, 8, (7, 9), dtype=torch.uint8), grid)
    certificate = certify(problem, candidate)
    assert not certificate.holds
    gain = (candidate.objective - _best_single_move(problem, grid, candidate.codes)) / candidate.objective
    assert torch.allclose(certificate.gaps, gain, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_never_below_the_exhaustive_optimum_and_equal_to_it_for_independent_inputs(p, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(p, 8, generator=generator)
    weight = torch.randn(3, p, generator=generator)
    for sigma, equal in ((factor @ factor.T, False), (torch.rand(p, generator=generator).diag(), True)):
        problem = Problem.scaled(weight, sigma)
        grid = minmax_grid(weight, bits=2, group=group_index(p, -1))
        everything = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * p).reshape(-1, p)
        optimum = torch.stack([_row_objectives(problem, grid, codes.expand(3, p)) for codes in everything]).amin(0)
        found = descend(problem, problem.candidate(gptq(problem, grid), grid))
        assert bool((found.objective >= optimum - 1e-9 * problem.scale).all())
        if equal:
            assert torch.allclose(found.objective, optimum, rtol=1e-9, atol=1e-12)


def test_too_few_sweeps_give_no_certificate(make_problem, make_minmax):
    problem = make_problem(30, 60)
    grid = make_minmax(problem)
    start = problem.candidate(grid.quantize(torch.zeros_like(problem.weight)), grid)
    assert not certify(problem, descend(problem, start, max_sweeps=1)).holds
    assert certify(problem, descend(problem, start)).holds


@pytest.mark.parametrize("weight", [torch.zeros(3, 6), torch.full((3, 6), 0.25)])
def test_zero_and_constant_rows_are_met_or_certified(make_problem, weight):
    problem = Problem(weight, make_problem(1, 6).sigma)
    grid = minmax_grid(weight, bits=3, group=group_index(6, -1))
    found = descend(problem, problem.candidate(grid.quantize(weight), grid))
    assert certify(problem, found).holds
    assert found.total <= 1e-6 * problem.scale
