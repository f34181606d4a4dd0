"""The curvature prior: its limits, its resting point, and lazy rows that equal a step-by-step pull."""

import copy

import numpy as np
import pytest
import torch
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train.loop import CHECKPOINT, TrainConfig, Trainer
from lirank.train.prior import TABLE, CurvaturePrior, load_curvature, save_curvature

CONFIG = ModelConfig(dim=4, widths=(8,), cross_rank=4, history_width=4)
TRAINING = TrainConfig(epochs=1, batch_size=128, cold_share=0.0)


@pytest.fixture(scope="module")
def start(prepared, tmp_path_factory):
    """A trained model, its encoder, its curvature, and the rows for the next training."""
    encoder = prepared.encoder()
    torch.manual_seed(0)
    model = Ranker(encoder, CONFIG)
    trainer = Trainer(model, encoder, TRAINING)
    trainer.fit(prepared.log("train"), None, tmp_path_factory.mktemp("start"))
    return model, encoder, trainer.curvature(prepared.log("train")), prepared.log("valid")


def trained(start, folder, weight, config=TRAINING, prior=True, **options):
    model, encoder, curvature, rows = start
    model = copy.deepcopy(model)
    known = CurvaturePrior.of(weight, model.state_dict(), curvature, **options) if prior else None
    torch.manual_seed(1)
    trainer = Trainer(model, encoder, config, prior=known)
    trainer.fit(rows, None, folder)
    return trainer.model.state_dict(), trainer


def test_curvature_is_the_mean_squared_gradient(start, prepared):
    model, encoder, curvature, _ = start
    trainer = Trainer(model, encoder, TRAINING)
    model.eval()
    count, total = 0, torch.zeros_like(model.network.mlp.linear[0].weight)
    table = torch.zeros_like(model.table.weight)
    dense = copy.deepcopy(model)  # the same with an ordinary table
    dense.table.lazy = False
    dense.table.weight.requires_grad_()
    for rows in prepared.log("train").read(rows=128):
        batch = encoder.encode(rows)
        dense.zero_grad()
        losses, weight = trainer._loss(dense(batch), batch)
        (losses / weight).backward()
        total += len(batch) * dense.network.mlp.linear[0].weight.grad.square()
        table += len(batch) * dense.table.weight.grad.square()
        count += 1
    torch.testing.assert_close(curvature["network.mlp.linear.0.weight"], total / count, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(curvature[TABLE], table / count, rtol=1e-3, atol=1e-8)


def test_a_weight_of_zero_is_a_plain_warm_start(start, tmp_path):
    plain, _ = trained(start, tmp_path / "a", 0.0, prior=False)
    found, _ = trained(start, tmp_path / "b", 0.0)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_a_huge_weight_changes_nothing_that_was_known(start, tmp_path, kind):
    model, _, curvature, _ = start
    config = TrainConfig(epochs=1, batch_size=128, cold_share=0.0, row_optimizer=kind)
    found, _ = trained(start, tmp_path, 1e20, config)
    before = model.state_dict()
    for name, h in curvature.items():
        known = h > 1e-15  # 1e20 times that is huge in float32 too
        assert torch.equal(found[name][known], before[name][known]), name


def test_more_weight_stays_nearer_in_the_metric_of_the_curvature(start, tmp_path):
    model, _, curvature, _ = start
    before, distances = model.state_dict(), []
    for weight in (0.0, 1.0, 100.0, 10_000.0):
        found, _ = trained(start, tmp_path / str(weight), weight)
        distances.append(sum(float((h * (found[n] - before[n]).square()).sum()) for n, h in curvature.items()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05 * distances[0]


def test_rows_caught_up_late_equal_rows_pulled_at_every_step(start, tmp_path):
    model, encoder, curvature, rows = start
    found = []
    for often in (False, True):
        twin = copy.deepcopy(model)
        config = TrainConfig(epochs=1, batch_size=16, cold_share=0.0, schedule="cosine")
        prior = CurvaturePrior.of(30.0, twin.state_dict(), curvature)
        torch.manual_seed(1)
        trainer = Trainer(twin, encoder, config, prior=prior)
        trainer._total = 10
        for table in rows.read(rows=16):
            trainer.train_step(encoder.encode(table))
            if often:
                trainer.pull.everything()
        trainer.pull.everything()
        found.append(twin.table.weight.detach().clone())
    moved = (found[0] - model.table.weight).abs().max()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4 * float(moved))


def test_the_resting_point_is_the_minimum_of_the_objective():
    """One weight, one batch: the pull acts in Adam's metric, so that gradient and penalty balance."""
    from lirank.layers.table import FusedTable
    from lirank.train.prior import Pull
    from lirank.train.row_optimizers import RowOptimizer

    target, anchor, h, weight = 2.0, -1.0, 0.7, 3.0
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    rows = RowOptimizer(FusedTable(1, 1))
    known = {"w": torch.tensor([anchor]), TABLE: torch.zeros(1, 1)}
    curvature = {"w": torch.tensor([h]), TABLE: torch.zeros(1, 1)}
    pull = Pull(CurvaturePrior(weight, known, curvature), {"w": parameter}, optimizer, rows)
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3000)
        noise = float(np.sin(step))  # gradients differ from step to step, as those of batches do
        optimizer.zero_grad()
        (0.5 * (parameter - target).square() + noise * parameter).sum().backward()
        optimizer.step()
        pull.after_step(torch.zeros(0, dtype=torch.int64))
    assert float(parameter.detach()) == pytest.approx((target + weight * h * anchor) / (1 + weight * h), abs=0.02)


def test_two_anchors_are_one_penalty():
    generator = torch.Generator().manual_seed(0)
    w, w0, w1 = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    h0, h1 = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
    h0[0] = h1[0] = 0.0
    prior = CurvaturePrior.of(1.0, {"w": w1}, {"w": h1}, {"w": w0}, {"w": h0}, 0.3)

    def gradient(w):
        return 0.3 * h0 * (w - w0) + 0.7 * h1 * (w - w1)

    torch.testing.assert_close(prior.curvature["w"] * (w - prior.anchor["w"]), gradient(w))
    assert prior.anchor["w"][0] == w1[0]


def test_a_killed_training_with_a_prior_goes_on_to_the_same_bytes(start, tmp_path):
    config = TrainConfig(epochs=2, batch_size=32, checkpoint_every=1)
    whole, _ = trained(start, tmp_path / "whole", 10.0, config)

    class KilledError(Exception):
        pass

    def kill(state):
        if state["step"] == 3:
            raise KilledError

    model, encoder, curvature, rows = start
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    prior = CurvaturePrior.of(10.0, model.state_dict(), curvature)
    with pytest.raises(KilledError):
        Trainer(twin, encoder, config, prior=prior).fit(rows, None, tmp_path / "killed", kill)
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    found, _ = trained(start, tmp_path / "killed", 10.0, config)
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_priors_that_do_not_fit_are_refused(start, tmp_path):
    model, encoder, curvature, _ = start
    save_curvature(tmp_path / "c.safetensors", curvature)
    assert set(load_curvature(tmp_path / "c.safetensors", model)) == set(curvature)
    save_curvature(tmp_path / "c.safetensors", {TABLE: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"table\.weight does not fit"):
        load_curvature(tmp_path / "c.safetensors", model)
    with pytest.raises(ValueError, match="negative"):
        CurvaturePrior.of(1.0, model.state_dict(), {TABLE: -curvature[TABLE] - 1})
    with pytest.raises(ValueError, match=r"expected a curvature of network"):
        Trainer(model, encoder, TRAINING, prior=CurvaturePrior.of(1.0, model.state_dict(), {TABLE: curvature[TABLE]}))
