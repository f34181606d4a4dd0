"""What users do to operators: compile them, ask for gradients, lower the precision around them, look at shapes only."""

import copy
import importlib.util
import random
import sys
from pathlib import Path

import core_tensor
import pytest
import torch
from torch.utils import _pytree as pytree


def _operators():
    spec = importlib.util.spec_from_file_location("operators", Path(__file__).with_name("operators.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OPERATORS


OPERATORS = _operators()
READ_VALUES = {"block_curvature", "dual_bounds", "dual_pass"}
"""Return or check numbers on the way, so that a compiled program is cut there."""
DIFFERENTIABLE = {
    name for name, make in OPERATORS.items() if hasattr(sys.modules[make(random.Random(0))[0].__module__], "_backward")
}


def _case(name, seed=3):
    function, arguments = OPERATORS[name](random.Random(seed))
    return function, arguments


def _tensors(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _same(a, b):
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(torch.allclose(x.double(), y.double(), equal_nan=True) for x, y in pairs)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_compiled_programs_get_the_same_result(name):
    function, arguments = _case(name)
    expected = function(**copy.deepcopy(arguments))
    torch._dynamo.reset()
    whole = name not in READ_VALUES
    compiled = torch.compile(lambda given: function(**given), backend="eager", fullgraph=whole)
    assert _same(compiled(copy.deepcopy(arguments)), expected)


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - DIFFERENTIABLE))
def test_results_without_a_gradient_do_not_pretend_to_have_one(name):
    function, arguments = _case(name)

    def wants_gradient(leaf):
        floating = isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point
        return leaf.clone().requires_grad_() if floating else leaf

    given = {key: pytree.tree_map(wants_gradient, value) for key, value in arguments.items()}
    if "out" in given:
        given["out"] = None
    assert not any(t.requires_grad for t in _tensors(function(**given)))


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_autocast_changes_nothing(name):
    function, arguments = _case(name)
    expected = function(**copy.deepcopy(arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(**copy.deepcopy(arguments))
    assert _same(found, expected)
    assert [t.dtype for t in _tensors(found)] == [t.dtype for t in _tensors(expected)]


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - READ_VALUES))
def test_shapes_and_dtypes_without_values(name):
    function, arguments = _case(name)
    to_meta = {
        key: pytree.tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, value)
        for key, value in arguments.items()
    }
    expected, found = _tensors(function(**arguments)), _tensors(function(**to_meta))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def test_a_compiled_program_cannot_leave_the_arrays():
    words = core_tensor.pack_bits(torch.zeros(2, 16, dtype=torch.uint8), 3)
    layer = (words, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8), 3, -1)
    torch._dynamo.reset()
    compiled = torch.compile(core_tensor.quantized_linear, backend="eager", fullgraph=True)
    for column in (16, -1, 2**30):
        outliers = (torch.tensor([0, 1, 1]), torch.tensor([column], dtype=torch.int32), torch.ones(1))
        with pytest.raises(ValueError, match=r"outliers\[1\]: expected indices in"):
            compiled(torch.ones(1, 16), *layer, outliers)
