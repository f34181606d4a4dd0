import core_tensor
import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.ops.cd_block import reference


def _row_normalised(sigma):
    diagonal = sigma.diagonal()
    normalised = torch.where(diagonal[:, None] == 0, torch.zeros_like(sigma), sigma / diagonal[:, None])
    return normalised.fill_diagonal_(0)


def _arguments(problem, masked=False):
    weight, sigma, scale, zero, group, max_code = problem
    sigma = _row_normalised(sigma)
    residual = weight - scale[group] * ((weight / scale[group]).round().clamp(-2, 2))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2 if masked else None
    return [sigma @ residual, weight, residual, sigma, scale, zero, group, mask, max_code]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 31, 64, 130])
@pytest.mark.parametrize("q", [1, 7, 64, 65])
@pytest.mark.parametrize(("masked", "quantize", "groups"), [(False, True, 1), (True, True, 3), (False, False, 1)])
def test_equal_to_reference(layer_problem, p, q, masked, quantize, groups):
    arguments = _arguments(layer_problem(p, q, groups=groups, seed=p * 100 + q), masked)
    assert_close(
        "residual", reference.cd_block(*arguments, quantize), core_tensor.cd_block(*arguments, quantize), 1e-12
    )


@pytest.mark.parametrize("size", [1, 3, 8, 100, 130])
def test_blocks_of_any_size_equal_the_column_loop(layer_problem, size):
    weight, sigma, scale, zero, group, max_code = layer_problem(130, 33, seed=3)
    normalised = _row_normalised(sigma)
    d = torch.zeros_like(weight)
    for start in range(0, 130, size):
        block = slice(start, min(start + size, 130))
        d[block] = core_tensor.cd_block(
            normalised[block] @ d, weight[block], d[block], normalised[block, block], scale, zero, group[block],
            None, max_code,
        )  # fmt: skip
    what = weight.clone()  # the paper's update, feature by feature, from what = W
    for j in range(130):
        beta = weight[j] + normalised[j] @ (weight - what)
        what[j] = scale[0] * ((torch.round(beta / scale[0]) + zero[0]).clamp(0, max_code) - zero[0])
    torch.testing.assert_close(weight - d, what, rtol=0, atol=1e-12)


def test_masked_coordinates_minimise_exactly(layer_problem):
    arguments = _arguments(layer_problem(20, 6, seed=5), masked=True)
    weight, mask, sigma = arguments[1], arguments[7], arguments[3]
    d = core_tensor.cd_block(*arguments)
    old = arguments[2]
    for j in range(20):  # residual seen by coordinate j: new before it, old behind it
        seen = torch.cat([d[:j], old[j:]])
        best = weight[j] + sigma[j] @ seen
        torch.testing.assert_close((weight - d)[j][mask[j]], best[mask[j]])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_in_float32(layer_problem, scale):
    problem = layer_problem(37, 19, seed=2, weight_scale=scale)
    single = [t.float() if t.is_floating_point() else t for t in problem[:5]]
    arguments = _arguments((*single, problem[5]))
    assert_close("residual", reference.cd_block(*arguments, True), core_tensor.cd_block(*arguments), 1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(layer_problem, threads):
    arguments = _arguments(layer_problem(64, 300, seed=9))
    before = torch.get_num_threads()
    expected = core_tensor.cd_block(*arguments)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(core_tensor.cd_block(*arguments), expected)
    finally:
        torch.set_num_threads(before)


def test_bad_input_names_the_argument(layer_problem):
    arguments = _arguments(layer_problem(5, 4))
    for position, wrong, error, name in (
        (0, torch.zeros(4, 4, dtype=torch.float64), ValueError, "correction"),
        (3, torch.zeros(5, 4, dtype=torch.float64), ValueError, "sigma"),
        (1, torch.zeros(5, 4, dtype=torch.bfloat16), TypeError, "weight"),
        (6, torch.zeros(5, dtype=torch.int32), TypeError, "group"),
        (8, 0, ValueError, "max_code"),
    ):
        with pytest.raises(error, match=name):
            core_tensor.cd_block(*arguments[:position], wrong, *arguments[position + 1 :])


def test_opcheck(layer_problem):
    torch.library.opcheck(torch.ops.core_tensor.cd_block.default, (*_arguments(layer_problem(9, 5), True), True))
