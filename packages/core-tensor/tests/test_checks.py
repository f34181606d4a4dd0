import math

import numpy as np
import pytest
import torch
from core_tensor.checks import check_choice, check_number, check_tensor


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(2), {"dtype": torch.float64}, TypeError, "x: expected dtype torch.float64, got torch.float32"),
        (torch.zeros(2), {"ndim": 2}, ValueError, r"x: expected 2 dimensions, got shape \(2,\)"),
        (torch.zeros(2, 3), {"shape": (None, 4)}, ValueError, r"x: expected shape \(any, 4\), got \(2, 3\)"),
        (torch.zeros(2), {"shape": (None, 4)}, ValueError, "x: expected shape"),
        (torch.tensor([1.0, math.nan]), {"finite": True}, ValueError, "x: expected finite values, got 1 NaN"),
        (torch.zeros(0, 3), {"nonempty": True}, ValueError, "x: expected at least one element"),
    ],
)
def test_check_tensor_refuses(value, options, error, message):
    with pytest.raises(error, match=message):
        check_tensor("x", value, **options)


def test_check_tensor_accepts():
    check_tensor("x", torch.zeros(2, 3), ndim=2, shape=(None, 3), dtype=(torch.float32, torch.float64), finite=True)


@pytest.mark.parametrize(
    ("value", "options", "error"),
    [
        (math.nan, {}, ValueError),
        (0.0, {"low": 0.0, "open_low": True}, ValueError),
        (1.0, {"high": 1.0, "open_high": True}, ValueError),
        (2, {"high": 1}, ValueError),
        (1.5, {"integer": True}, TypeError),
        (True, {}, TypeError),
        ("1", {}, TypeError),
    ],
)
def test_check_number_refuses(value, options, error):
    with pytest.raises(error, match="x: expected"):
        check_number("x", value, **options)


def test_check_number_accepts_the_ends_of_a_closed_interval():
    check_number("x", 0, low=0, high=1, integer=True)
    check_number("x", 1.0, low=0, high=1)


def test_check_number_takes_numpys_numbers():
    check_number("x", np.int64(3), low=1, integer=True)
    check_number("x", np.float32(0.5), low=0, high=1)
    with pytest.raises(TypeError, match="x: expected an int, got float64"):
        check_number("x", np.float64(3), integer=True)


def test_check_choice():
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ValueError, match="x: expected one of 'a', 'b', got 'c'"):
        check_choice("x", "c", ("a", "b"))
