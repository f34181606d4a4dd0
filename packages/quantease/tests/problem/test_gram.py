import itertools

import pytest
import torch
from core_tensor.dev.testing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from quantease import GramFolds, Shrinkage
from quantease.problem.gram import oas


def _tokens(count, features, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 50), st.lists(st.integers(0, 200), max_size=4))
def test_folds_depend_on_the_tokens_not_on_the_batches(tokens, folds, segment, cuts):
    x = _tokens(tokens, 5)
    whole = GramFolds(5, folds=folds, segment=segment, dtype=torch.float64)
    whole.update(x)
    pieces = GramFolds(5, folds=folds, segment=segment, dtype=torch.float64)
    edges = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    for a, b in itertools.pairwise(edges):
        pieces.update(x[a:b])
    assert torch.equal(whole.counts, pieces.counts)
    assert_close("folds", whole.folds, pieces.folds, 1e-12)
    assert_close("total", x.double().T @ x.double(), whole.total, 1e-12)
    fold = torch.arange(tokens) // segment % folds
    for f in range(folds):
        assert int(whole.counts[f]) == int((fold == f).sum())
        assert_close("fold", x[fold == f].double().T @ x[fold == f].double(), whole.folds[f], 1e-12)


def test_state_continues():
    x = _tokens(100, 4)
    whole, first, second = (GramFolds(4, segment=16) for _ in range(3))
    whole.update(x)
    first.update(x[:37])
    second.load_state_dict(first.state_dict())
    second.update(x[37:])
    assert torch.equal(whole.counts, second.counts)
    assert_close("folds", whole.folds, second.folds, 1e-6)


@pytest.mark.parametrize("target", ["diagonal", "identity"])
def test_shrinkage_keeps_the_trace_and_ends_at_the_target(target):
    sigma = _tokens(9, 6).T @ _tokens(9, 6)
    for strength in (0.0, 0.3, 1.0):
        shrunk = Shrinkage(strength, target)(sigma)
        assert torch.isclose(shrunk.trace(), sigma.trace())
    assert torch.count_nonzero(shrunk - shrunk.diagonal().diag()) == 0
    assert torch.equal(Shrinkage(0.0, target)(sigma), sigma)


def test_oas_equals_scikit_learn_in_form_and_shrinks_less_with_more_tokens():
    strengths = []
    for tokens in (20, 200, 20_000):
        gram = GramFolds(10, dtype=torch.float64)
        gram.update(_tokens(tokens, 10) * torch.arange(1, 11))
        strengths.append(oas(gram).strength)
    assert strengths[0] > strengths[1] > strengths[2] > 0
    assert oas(GramFolds(3)).strength == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GramFolds(3).update(torch.zeros(2, 4)), ValueError, "x: expected shape"),
        (lambda: GramFolds(3).update(torch.full((2, 3), torch.nan)), ValueError, "x: expected finite"),
        (lambda: GramFolds(0), ValueError, "features: "),
        (lambda: GramFolds(3, folds=0), ValueError, "folds: "),
        (lambda: GramFolds(3, dtype=torch.float16), ValueError, "dtype: "),
        (lambda: Shrinkage(1.5), ValueError, "strength: "),
        (lambda: Shrinkage(0.5, "zero"), ValueError, "target: "),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
