"""No model of the zoo is silently wrong, in ghost mode or in what stands in for it."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("msam_zoo", Path(__file__).parents[1] / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("ascent", ["full", "chained"])
@pytest.mark.parametrize("case", [*zoo.LOSSES, *zoo.RANDOM])
def test_gradients_and_state_are_those_of_the_definition(double, case, ascent):
    assert zoo.error(case, "ghost", ascent) < 1e-9


def test_the_zoo_notices_coupling(double, monkeypatch):
    """A zoo in which nothing can go wrong would prove nothing: one direction for all micro-batches is an error."""
    monkeypatch.setattr(
        "msam.engines.ghost.directions.Plan._over_norms",
        lambda plan, radius: plan.per_micro_batch([radius / plan.norms[0]] * plan.count),
    )
    assert zoo.error("plain") > 1e-3
