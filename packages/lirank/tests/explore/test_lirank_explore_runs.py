"""Exploration on a trained run: features, posterior, scores, service, and estimates from logged propensities."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from lirank.cli import main
from lirank.explore.posterior import LogisticPosterior
from lirank.explore.run import Explorer, Logged, choice_probabilities, fit_posterior, head, judge, last_features
from lirank.serve.scorer import Scorer, build, request_schema


@pytest.fixture(scope="module")
def run(trained, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    sample = next(prepared.log("test").read(rows=100))
    dataclasses.replace(trained, sample=sample).save(folder)
    (folder / "data").symlink_to(prepared.folder)
    return folder


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code or (code == 2 and result.exception), (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def posterior(run):
    invoke("explore", "fit", run, "-o", run / "p.safetensors")
    return run / "p.safetensors"


def test_the_head_times_the_features_is_the_logit(trained, prepared):
    batch = trained.encoder.encode(next(prepared.log("test").read(rows=50)))
    with torch.no_grad():
        logits = trained.model.network(trained.model.vectors(batch), None, calibrate=False)
    for task in range(2):
        found = last_features(trained.model, batch, task).double() @ head(trained.model, task)
        torch.testing.assert_close(found, logits[:, task].double(), rtol=0, atol=1e-5)


def test_without_events_the_mean_scores_as_the_model(trained, prepared):
    batch = trained.encoder.encode(next(prepared.log("test").read(rows=50)))
    mean = head(trained.model, 0)
    explorer = Explorer(trained.model, LogisticPosterior.prior(len(mean), 4.0, mean), 0)
    found = explorer.probabilities(batch, explorer.logits(batch, "greedy"))
    torch.testing.assert_close(found, trained.model.predict(batch)[:, 0], rtol=0, atol=1e-6)
    optimistic = explorer.logits(batch, "ucb", alpha=2.0)
    bonus = last_features(trained.model, batch, 0).double().norm(dim=1)  # 2 / sqrt(precision) times the length
    torch.testing.assert_close(optimistic - explorer.logits(batch, "greedy"), bonus, rtol=1e-5, atol=1e-6)


def test_the_posterior_of_a_run_is_the_oracle_s(trained, prepared, run, posterior):
    table = next(prepared.log("train").read())
    batch = trained.encoder.encode(table)
    mean = head(trained.model, 0)
    phi = last_features(trained.model, batch, 0)
    expected = LogisticPosterior.prior(len(mean), 1.0, mean).updated(phi, batch.labels[:, 0])
    found = Explorer.open(trained, run, posterior).posterior
    torch.testing.assert_close(found.mean, expected.mean)
    # and half of it, forgotten, then the rest
    first, seen = fit_posterior(trained, iter([table.slice(0, 500)]), 0)
    second, more = fit_posterior(trained, iter([table.slice(500)]), 0, posterior=first, keep=0.5)
    assert seen + more == table.num_rows
    assert float(torch.logdet(second.precision)) < float(torch.logdet(found.precision))


def test_requests_explore(run, posterior, trained):
    scorer = Scorer.open(run, None, posterior)
    names = request_schema(trained.encoder.schema).names
    row = {"time": 10**9, "user": 3, "item": "item-5", "city": 2, "price": 1.5, "age": 40.0, "tags": ["t1"]}
    rows = pa.Table.from_pylist([row | {"item": f"item-{i}"} for i in range(20)]).select(names)
    first = scorer.explore(rows, "thompson", seed=1, draws=2000)
    again = scorer.explore(rows, "thompson", seed=1, draws=2000)
    assert np.array_equal(first["click"], again["click"])
    assert not np.array_equal(first["click"], scorer.explore(rows, "thompson", seed=2)["click"])
    assert first["propensity"].sum() == pytest.approx(1.0)
    batch = trained.encoder.encode(trained.causal.lookup(rows), labels=False)
    other = scorer.explorer.first_places(batch, 2000, torch.Generator().manual_seed(9)).numpy()
    assert np.abs(other - first["propensity"]).max() < 4 * np.sqrt(2 * 0.25 / 2000)  # two samples of the same
    assert (scorer.explore(rows, "ucb", alpha=1.0)["click"] > scorer.explore(rows, "greedy")["click"]).all()
    assert set(scorer.explore(rows.slice(0, 0), "thompson", draws=5)) == {"click", "propensity"}
    with pytest.raises(ValueError, match="expected a posterior"):
        Scorer.open(run).explore(rows, "ucb")


def test_the_service_explores(run, posterior):
    from fastapi.testclient import TestClient

    row = {"time": 10**9, "user": 3, "item": "item-5", "city": 2, "price": 1.5, "age": 40.0, "tags": ["t1"]}
    with TestClient(build(run, None, posterior=posterior)) as client:
        assert client.get("/health").json()["explores"] == "click"

        def ask(**options):
            return client.post("/score", content=json.dumps({"rows": [row] * 3, "options": options}))

        answer = ask(explore="thompson", draws=100, seed=3)
        assert answer.status_code == 200, answer.text
        assert answer.json()["propensity"] == pytest.approx([1 / 3] * 3, abs=0.7)
        assert set(ask().json()) == {"click", "like"}
        for wrong in ({"explore": "cubic"}, {"explore": "ucb", "alpha": -1}, {"seed": 2**70}, {"draw": 1}):
            assert ask(**wrong).status_code == 400


def test_another_run_s_posterior_is_refused(run, posterior, trained, tmp_path):
    other = dataclasses.replace(trained, record={"other": 1})
    other.save(tmp_path)
    with pytest.raises(ValueError, match="another run"):
        Scorer.open(tmp_path, None, posterior)


# --- off-policy estimates


def test_estimates_of_a_known_world():
    """Requests of 3 candidates with known click rates, logged by softmax: all estimators find the new value."""
    rng = np.random.default_rng(0)
    n, k = 20_000, 3
    rate = rng.uniform(0.05, 0.6, size=(n, k))
    logging = np.exp(rng.normal(size=(n, k)))
    logging /= logging.sum(1, keepdims=True)
    taken = (rng.random((n, 1)) > logging.cumsum(1)).sum(1).clip(max=k - 1)
    shown = np.zeros((n, k), bool)
    shown[np.arange(n), taken] = True
    reward = (rng.random((n, k)) < rate) & shown
    request = np.repeat(np.arange(n), k)
    scores = (rate + rng.normal(size=(n, k)) * 0.2).ravel()
    order = rng.permutation(n * k)  # rows in any order
    logged = Logged(request[order], shown.ravel()[order], reward.ravel().astype(float)[order], logging.ravel()[order])
    chances = choice_probabilities(request[order], scores[order], "best")
    truth = rate[np.arange(n), scores.reshape(n, k).argmax(1)].mean()
    found = judge(logged, chances, rate.ravel()[order], cluster=request[order])
    assert list(found) == ["IPS", "SNIPS", "DM", "DR"]
    for name, estimate in found.items():
        assert abs(estimate.value - truth) < 4 * estimate.standard_error, name
    assert found["DR"].standard_error < found["IPS"].standard_error
    # the logging policy itself has the mean reward of the log
    own = judge(logged, logging.ravel()[order])
    assert own["IPS"].value == pytest.approx(reward.sum() / n)


def test_ties_are_shared_and_softmax_is_softmax():
    request = np.array([0, 0, 1, 1, 1])
    scores = np.array([1.0, 1.0, 0.0, 2.0, 1.0])
    assert choice_probabilities(request, scores, "best").tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]
    expected = torch.softmax(torch.tensor([0.0, 2.0, 1.0]) / 0.5, 0).numpy()
    np.testing.assert_allclose(choice_probabilities(request, scores, "softmax", 0.5)[2:], expected, rtol=1e-6)


def test_requests_that_make_no_sense_are_refused():  # VW#4536: two actions of one event
    one = np.ones(2)
    with pytest.raises(ValueError, match="request 7 has 2"):
        Logged(np.array([7, 7]), one > 0, one, one)
    logged = Logged(np.array([7, 8]), one > 0, one, one)
    with pytest.raises(ValueError, match=r"request 8 has 0\.5"):
        judge(logged, np.array([1.0, 0.5]))


def test_the_command_judges_policies(run, posterior, make_table):
    table = make_table(600, seed=4)
    rng = np.random.default_rng(1)
    request = np.repeat(np.arange(200), 3)
    shown = np.zeros(600, int)
    shown[np.arange(200) * 3 + rng.integers(3, size=200)] = 1
    table = table.set_column(0, "time", pa.array(np.full(600, 10**7)))
    click = pa.array(table["click"].to_numpy(), mask=shown == 0)  # unknown where not shown
    table = table.set_column(table.column_names.index("click"), "click", click)
    for name, values in (("request", [f"r{r}" for r in request]), ("shown", shown), ("chance", np.full(600, 1 / 3))):
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, run / "requests.parquet")
    base = ("explore", "estimate", run, run / "requests.parquet", "--request", "request", "--shown", "shown")
    base = (*base, "--propensity", "chance", "--json")
    for options in (
        (),
        ("--policy", "softmax", "--temperature", 0.5),
        ("--policy", "ucb", "--posterior", posterior),
        ("--policy", "thompson", "--posterior", posterior, "--draws", 50),
    ):
        found = json.loads(invoke(*base, *options).stdout)
        assert (found["requests"], found["candidates"]) == (200, 600)
        assert found["estimates"]["SNIPS"]["low"] < found["estimates"]["SNIPS"]["high"]
    invoke(*base, "--policy", "ucb", code=2)
    invoke(*base, "--posterior", posterior, code=2)
    invoke(*base[:-2], "absent", code=2)
    invoke("explore", "fit", run, "--from", posterior, "-o", run / "q.safetensors", code=2)  # no new rows
    later = make_table(50, seed=5).set_column(0, "time", pa.array(np.full(50, 10**7)))
    pq.write_table(later, run / "later.parquet")
    added = json.loads(
        invoke(
            *("explore", "fit", run, run / "later.parquet", "--from", posterior, "--keep", 0.9),
            *("-o", run / "q.safetensors", "--json"),
        ).stdout
    )
    assert added["events"] == 50
