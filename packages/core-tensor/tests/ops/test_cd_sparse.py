import core_tensor
import pytest
import torch
from core_tensor.ops.cd_sparse import reference


def _arguments(problem, frozen_share=0.0):
    weight, sigma, scale, zero, group, max_code = problem
    w, s, z = weight.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()  # row-major
    codes = (torch.round(w / s[:, group]) + z[:, group]).clamp(0, max_code)
    gradient = (w - s[:, group] * (codes - z[:, group])) @ sigma
    frozen = None
    if frozen_share:
        frozen = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < frozen_share
    return [codes.to(torch.uint8), gradient, sigma, s, group, frozen, max_code], w, z


@pytest.mark.parametrize("p", [1, 2, 31, 33, 64, 130])
@pytest.mark.parametrize(("q", "groups", "frozen"), [(1, 1, 0.0), (9, 3, 0.3)])
def test_equal_to_reference(layer_problem, p, q, groups, frozen):
    arguments, _, _ = _arguments(layer_problem(p, q, groups=groups, seed=p + q), frozen)
    expected, got = reference.cd_sparse(*arguments, 50), core_tensor.cd_sparse(*arguments, 50)
    assert torch.equal(expected[0], got[0])
    torch.testing.assert_close(expected[1], got[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(expected[2], got[2])
    assert torch.equal(expected[3], got[3])


@pytest.mark.parametrize("seed", range(5))
def test_ends_in_a_coordinatewise_minimum(layer_problem, seed):
    """Brute force: no change of a single code lowers the float64 objective."""
    problem = layer_problem(24, 7, bits=2, seed=seed)
    arguments, w, z = _arguments(problem)
    _, sigma, scale, _, group, max_code = problem
    codes, gradient, moves, converged = core_tensor.cd_sparse(*arguments)
    assert bool(converged.all())
    assert int(moves.sum()) > 0
    s = scale.T[:, group]
    residual = w - s * (codes.double() - z[:, group])
    torch.testing.assert_close(gradient, residual @ sigma, rtol=1e-9, atol=1e-9)
    objective = ((residual @ sigma) * residual).sum(1)
    start = w - s * (arguments[0].double() - z[:, group])
    assert bool((objective <= ((start @ sigma) * start).sum(1) + 1e-12).all())
    for j in range(24):
        for code in range(max_code + 1):
            moved = residual.clone()
            moved[:, j] = w[:, j] - s[:, j] * (code - z[:, group[j]])
            assert bool((((moved @ sigma) * moved).sum(1) >= objective * (1 - 1e-12)).all())


def test_zero_sweeps_change_nothing(layer_problem):
    arguments, _, _ = _arguments(layer_problem(10, 3))
    codes, gradient, moves, converged = core_tensor.cd_sparse(*arguments, max_sweeps=0)
    assert torch.equal(codes, arguments[0])
    assert torch.equal(gradient, arguments[1])
    assert int(moves.sum()) == 0
    assert not bool(converged.any())


def test_frozen_coordinates_never_move(layer_problem):
    arguments, _, _ = _arguments(layer_problem(40, 6, seed=8), 0.5)
    codes, *_ = core_tensor.cd_sparse(*arguments)
    assert torch.equal(codes[arguments[5]], arguments[0][arguments[5]])


def test_bad_input_names_the_argument(layer_problem):
    arguments, _, _ = _arguments(layer_problem(5, 4))
    with pytest.raises(TypeError, match="codes"):
        core_tensor.cd_sparse(arguments[0].int(), *arguments[1:])
    with pytest.raises(ValueError, match="sigma"):
        core_tensor.cd_sparse(*arguments[:2], arguments[2][:3], *arguments[3:])


def test_opcheck(layer_problem):
    arguments, _, _ = _arguments(layer_problem(9, 5), 0.2)
    torch.library.opcheck(torch.ops.core_tensor.cd_sparse.default, (*arguments, 10))
