import msgspec
import pytest
from lirank.evidence.ablation import COMPONENTS, FULL_MODELS, TRAINING, ablate, gap_closed, summary
from lirank.evidence.generator import Market

TINY = Market(users=120, items=80, events=6000, ids=0.5)
BY_NAME = {component.name: component for component in COMPONENTS}


@pytest.mark.parametrize("name", ["ids", "position debiasing"])
def test_both_sides_see_the_same_rows_and_the_truth_is_an_upper_bound(tmp_path, name):
    training = msgspec.structs.replace(TRAINING, epochs=1)
    row = ablate(BY_NAME[name], 1, tmp_path, market=TINY, training=training)
    assert row["rows"] > 300
    for side in ("on", "off"):
        assert row[side]["auc"] < row["bayes"] + 0.02
        assert 0 < row[side]["rmse"] < 1
    assert row["difference"] == pytest.approx(row["on"][row["judge"]] - row["off"][row["judge"]])
    interval = row["auc_difference"]
    assert interval["low"] <= interval["value"] <= interval["high"]


def test_a_finished_study_is_read_and_not_run_again(tmp_path, monkeypatch):
    training = msgspec.structs.replace(TRAINING, epochs=1)
    first = ablate(BY_NAME["dense gate"], 0, tmp_path, market=TINY, training=training)
    monkeypatch.setattr("lirank.evidence.ablation.Trainer", None)
    assert ablate(BY_NAME["dense gate"], 0, tmp_path, market=TINY, training=training) == first


def test_logistic_regression_closes_nothing_of_the_gap_and_the_truth_everything(tmp_path, monkeypatch):
    few = {name: FULL_MODELS[name] for name in ("low-rank DCN + MLP (base)",)}
    monkeypatch.setattr("lirank.evidence.ablation.FULL_MODELS", few)
    training = msgspec.structs.replace(TRAINING, epochs=1)
    found = gap_closed(0, tmp_path, market=TINY, training=training)
    assert list(found) == ["logistic regression", "LightGBM", *few, "truth"]
    assert found["logistic regression"]["gap_closed"] == 0
    assert found["truth"]["gap_closed"] == 1
    assert all(entry["auc"] <= found["truth"]["auc"] for entry in found.values())


def test_a_summary_counts_wins_by_what_is_better():
    side = {"gap_closed": 0.5}
    rows = [
        {"component": c, "judge": j, "difference": d, "null": null, "on": side, "off": side}
        for c, j, d, null in (
            ("a", "auc", 0.02, False), ("a", "auc", -0.01, False), ("a", "auc", 0.001, True),
            ("b", "rmse", -0.02, False), ("b", "rmse", -0.01, False),
        )
    ]  # fmt: skip
    a, b = summary(rows)
    assert (a["won"], b["won"]) == (1, 2)
    assert a["difference"] == pytest.approx(0.005)
    assert a["difference_se"] == pytest.approx(0.015)
    assert (a["null"], a["null_se"]) == (0.001, None)
    assert b["null"] is None
