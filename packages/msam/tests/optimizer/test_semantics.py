"""What users combine mSAM with: batch norm, dropout, AMP, accumulation, clipping, schedules, checkpoints."""

import copy
import pickle

import pytest
import torch
from msam import MSAM, micro_batches, msam_step
from msam.engines import choice
from torch import nn
from torch.nn import functional as F

MODES = pytest.mark.parametrize("mode", ["ghost", "sequential"])


def train(opt, model, oracle, batches):
    return [float(opt.step(oracle.loss_of(model), batch)) for batch in batches]


@MODES
@pytest.mark.parametrize("count", [1, 3])
def test_batch_norm_buffers_are_those_of_plain_accumulation(double, oracle, mode, count):
    make_model, make_batch = oracle.CASES["batch norm"]
    model, batch = make_model(), make_batch()
    plain = copy.deepcopy(model)
    for part in micro_batches(batch, count):
        oracle.loss_of(plain)(part).backward()
    MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=count, mode=mode).step(oracle.loss_of(model), batch)
    for got, want in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@MODES
def test_batch_norm_policies(double, oracle, mode):
    make_model, make_batch = oracle.CASES["batch norm"]
    model, batch = make_model(), make_batch()
    moved = {}
    for policy in ("frozen", "first", "both"):
        twin = copy.deepcopy(model)
        MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=2, mode=mode, bn=policy).step(oracle.loss_of(twin), batch)
        moved[policy] = int(twin[1].num_batches_tracked)
        assert torch.equal(twin[1].running_mean, model[1].running_mean) == (policy == "frozen")
    assert moved == {"frozen": 0, "first": 2, "both": 4}


class Masked(nn.Module):
    """Remembers the dropout masks it drew."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.head, self.masks = nn.Linear(20, 32), nn.Dropout(0.5), nn.Linear(32, 5), []

    def forward(self, x):
        mask = self.drop(torch.ones(len(x), 32))
        apart = torch._C._functorch.is_batchedtensor(mask)  # in ghost mode: then all micro-batches' masks lie below
        self.masks.append(torch._C._functorch.get_unwrapped(mask) if apart else mask)
        return self.head(torch.tanh(self.layer(x)) * mask)


@MODES
@pytest.mark.parametrize("rng", ["same", "independent"])
def test_dropout_masks_of_both_passes(seeded, oracle, mode, rng):
    model, batch = Masked(), (torch.randn(12, 20), torch.randint(5, (12,)))
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode=mode, rng=rng)
    opt.step(oracle.loss_of(model), batch)
    model.masks.clear()
    opt.step(oracle.loss_of(model), batch)
    assert opt.record.mode == mode
    pairs = list(zip(model.masks[::2], model.masks[1::2], strict=True))
    assert len(pairs) == (1 if mode == "ghost" else 3)
    assert all(torch.equal(a, b) == (rng == "same") for a, b in pairs)


@pytest.mark.parametrize("rng", ["same", "independent"])
def test_dropout_masks_of_both_passes_at_once(seeded, oracle, rng):
    """vmap draws masks of its own: without a perturbation the two passes differ by them alone."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.5), nn.Linear(32, 5))
    opt = MSAM(model, torch.optim.SGD, lr=0.1, rho=0.0, num_micro_batches=3, mode="vmap", rng=rng)
    opt.step(oracle.loss_of(model), (torch.randn(12, 20), torch.randint(5, (12,))))
    assert (opt.record.as_dict()["sharpness_gap"] == 0.0) == (rng == "same")


def test_the_proof_leaves_no_trace(seeded, oracle):
    """The first step of ghost mode draws as many random numbers as the second."""
    model, batch = Masked(), (torch.randn(12, 20), torch.randint(5, (12,)))
    twin = copy.deepcopy(model)
    found = []
    for m, steps in ((model, 1), (twin, 2)):
        opt = MSAM(m, torch.optim.SGD, lr=0.0, num_micro_batches=3, mode="ghost")
        torch.manual_seed(1)
        for _ in range(steps):
            torch.manual_seed(1)
            opt.step(oracle.loss_of(m), batch)
        found.append((torch.get_rng_state(), oracle.gradients(m)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@MODES
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_state_is_the_base_optimizers_and_resume_is_bit_exact(seeded, oracle, mode, base, tmp_path):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batches = make_model(), [make_batch() for _ in range(6)]
    arguments = {"lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    opt = MSAM(model, base, num_micro_batches=3, mode=mode, **arguments)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6)
    for batch in batches[:3]:
        opt.step(oracle.loss_of(model), batch)
        schedule.step()
    bare = base(model.parameters(), **arguments)
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert set(opt.state_dict()) == {"state", "param_groups"}
    assert str(bare.state_dict()) == str(opt.state_dict())
    torch.save([model.state_dict(), opt.state_dict(), schedule.state_dict()], tmp_path / "checkpoint")
    twin = make_model()
    again = MSAM(twin, base, num_micro_batches=3, mode=mode, **arguments)
    later = torch.optim.lr_scheduler.CosineAnnealingLR(again, 6)
    for target, state in zip((twin, again, later), torch.load(tmp_path / "checkpoint"), strict=True):
        target.load_state_dict(state)
    for m, o, s in ((model, opt, schedule), (twin, again, later)):
        for batch in batches[3:]:
            o.step(oracle.loss_of(m), batch)
            s.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"every": 2}, {"ascent": "chained"}, {"rho": lambda step: 0.1 / (1 + step)}],
    ids=["every", "chained", "rho"],
)
def test_stateful_options_resume_from_one_more_key(seeded, oracle, options):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batches = make_model(), [make_batch() for _ in range(5)]
    opt = MSAM(model, torch.optim.SGD, lr=0.05, num_micro_batches=3, mode="ghost", **options)
    train(opt, model, oracle, batches[:3])
    state = copy.deepcopy(opt.state_dict())
    assert set(state) == {"state", "param_groups", "msam"}
    twin = copy.deepcopy(model)
    again = MSAM(twin, torch.optim.SGD, lr=0.05, num_micro_batches=3, mode="ghost", **options)
    again.load_state_dict(state)
    again.follow(nn.Sequential(twin))  # a wrapper put on later
    assert train(opt, model, oracle, batches[3:]) == train(again, twin, oracle, batches[3:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="'msam'"):
        again.load_state_dict({k: v for k, v in state.items() if k != "msam"})


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"ascent": "chained"}], ids=["full", "every", "chained"])
def test_a_copy_goes_on_as_the_original(seeded, oracle, way, options):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batches = make_model(), [make_batch() for _ in range(5)]
    groups = [{"params": model[0].parameters(), "perturb": False}, {"params": list(model[2:].parameters()), "rho": 0.3}]
    opt = MSAM(model, torch.optim.SGD, groups, lr=0.05, momentum=0.9, num_micro_batches=3, **options)
    train(opt, model, oracle, batches[:3])
    before = [p.clone() for p in model.parameters()]
    copied = copy.deepcopy((model, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    twin, again = copied
    assert again.model is twin
    losses = train(again, twin, oracle, batches[3:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert train(opt, model, oracle, batches[3:]) == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert again.record.mode == opt.record.mode
    again.param_groups[0]["lr"] = 7.0
    assert again.base.param_groups[0]["lr"] == 7.0
    assert opt.param_groups[0]["lr"] == 0.05


@MODES
def test_accumulation_equals_one_big_batch(double, oracle, mode):
    make_model, make_batch = oracle.CASES["mlp"]
    model, (x, y) = make_model(), make_batch()
    twin = copy.deepcopy(model)
    MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=4, mode=mode).step(oracle.loss_of(model), (x, y))
    opt = MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=2, mode=mode)
    for half in (slice(0, 6), slice(6, 12)):
        opt.backward(oracle.loss_of(twin), (x[half], y[half]), weight=0.5)
    opt.step()
    assert oracle.relative_error(list(twin.parameters()), list(model.parameters())) < 1e-14


def test_passes_by_hand_equal_one_call(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    twin = copy.deepcopy(model)
    MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=5).step(oracle.loss_of(model), batch)
    opt = MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=5)
    opt.zero_grad()
    for part in micro_batches(batch, 5):
        with opt.ascent():
            oracle.loss_of(twin)(part).backward()
        with opt.descent(weight=len(part[0])):
            oracle.loss_of(twin)(part).backward()
    opt.step()
    assert oracle.relative_error(list(twin.parameters()), list(model.parameters())) < 1e-14


def test_msam_step_is_the_optimizers_step(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    twin = copy.deepcopy(model)
    opt, other = (MSAM(m, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="ghost") for m in (model, twin))
    assert float(msam_step(opt, oracle.loss_of(model), batch)) == float(other.step(oracle.loss_of(twin), batch))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_standard_closure_is_sam(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    truth = oracle.brute_force(model, batch, [12], rho=0.05)
    before = [p.clone() for p in model.parameters()]
    opt = MSAM(model, torch.optim.SGD, lr=1.0, num_micro_batches=1)

    def closure():
        opt.zero_grad()
        loss = oracle.loss_of(model)(batch)
        loss.backward()
        return loss

    opt.step(closure)
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    assert oracle.relative_error(moved, truth) < 1e-10


@MODES
def test_grad_scaler(seeded, oracle, mode):
    """A scaled run equals a plain one, whatever the scale; an infinite gradient skips the step and lowers the scale."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    twin = copy.deepcopy(model)
    plain = MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode=mode, clip_norm=0.5)
    plain.step(oracle.loss_of(twin), batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode=mode, clip_norm=0.5)
    opt.step(oracle.loss_of(model), batch, scaler=scaler)
    scaler.update()
    assert oracle.relative_error(list(model.parameters()), list(twin.parameters())) < 1e-6
    torch.testing.assert_close(opt.record.gradient_norms, plain.record.gradient_norms, rtol=1e-4, atol=0)
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    opt.step(lambda part: 1e3 * oracle.loss_of(model)(part), batch, scaler=scaler)  # overflows float32
    assert opt.record.skipped
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_autocast(seeded, oracle):
    """Both engines agree in bfloat16 to its rounding; the masters stay float32."""
    make_model, make_batch = oracle.CASES["transformer"]
    model, batch = make_model(), make_batch()
    found = []
    for mode in ("sequential", "ghost"):
        twin = copy.deepcopy(model)
        opt = MSAM(twin, torch.optim.SGD, lr=0.1, rho=0.05, num_micro_batches=3, mode=mode)

        def loss_fn(part, twin=twin):
            with torch.autocast("cpu", torch.bfloat16):
                return oracle.loss_of(twin)(part)

        opt.backward(loss_fn, batch)
        assert opt.record.mode == mode
        found.append(oracle.gradients(twin))
    assert all(g.dtype == torch.float32 for g in found[1])
    assert oracle.relative_error(found[1], found[0]) < 0.03


def test_clipping_comes_after_averaging(double, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    opt = MSAM(model, torch.optim.SGD, lr=1.0, num_micro_batches=3, clip_norm=0.01)
    before = [p.clone() for p in model.parameters()]
    opt.step(oracle.loss_of(model), batch)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(("gain", "mode"), [(0.0, "sequential"), (1e9, "ghost")])
def test_auto_takes_the_faster_engine_and_the_same_gradient(double, oracle, monkeypatch, gain, mode):
    monkeypatch.setattr(choice, "GAIN", gain)  # how many times as long sequential mode may take
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3)
    opt.backward(oracle.loss_of(model), batch)
    assert opt.record.mode == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="sequential").backward(oracle.loss_of(twin), batch)
    assert oracle.relative_error(oracle.gradients(model), oracle.gradients(twin)) < 1e-12


def test_weight_decay_is_not_in_the_ascent(double, oracle):
    """A decay so large that it would dominate the ascent gradient changes the gradient not at all."""
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    found = []
    for decay in (0.0, 1e3):
        model.zero_grad()
        opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, weight_decay=decay)
        opt.backward(oracle.loss_of(model), batch)
        found.append(oracle.gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@MODES
def test_a_micro_batch_without_gradient(double, mode):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(6, 4)
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode=mode)
    opt.step(lambda part: (part[1] * model(part[0])[:, 0]).mean(), (x, weight))
    assert float(opt.record.gradient_norms[0]) == 0.0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_every_really_skips_the_first_pass(seeded, oracle):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch, calls = make_model(), make_batch(), []
    opt = MSAM(model, torch.optim.SGD, lr=0.01, num_micro_batches=3, every=4, mode="sequential")
    for _ in range(8):
        opt.step(lambda part: calls.append(1) or oracle.loss_of(model)(part), batch)
    assert len(calls) == 2 * 6 + 6 * 3


def test_plain_steps_keep_frozen_statistics(seeded, oracle):
    make_model, make_batch = oracle.CASES["batch norm"]
    model, moved = make_model(), []
    opt = MSAM(model, torch.optim.SGD, lr=0.01, num_micro_batches=3, every=2, bn="frozen")
    for _ in range(2):
        opt.step(oracle.loss_of(model), make_batch())
        moved.append(int(model[1].num_batches_tracked))
    assert moved == [0, 0]


@pytest.mark.parametrize(("mode", "passes"), [("ghost", 1), ("sequential", 3)])
def test_chained_ascent_costs_one_pass_and_perturbs(seeded, oracle, mode, passes):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch, calls = make_model(), make_batch(), []
    opt = MSAM(model, torch.optim.SGD, lr=0.01, num_micro_batches=3, ascent="chained", mode=mode)
    for _ in range(2):
        opt.step(lambda part: calls.append(1) or oracle.loss_of(model)(part), batch)
    assert len(calls) == 2 * passes
    assert bool((opt.record.gradient_norms > 0).all())


@pytest.mark.parametrize("scaled", [False, True])
def test_chained_ascent_of_some_groups_at_the_same_weights_is_the_full_one(double, oracle, scaled):
    make_model, make_batch = oracle.CASES["mlp"]
    model, batch = make_model(), make_batch()
    first, rest = list(model[0].parameters()), list(model[2:].parameters())
    found = []
    for ascent, steps in (("full", 1), ("chained", 2)):
        opt = MSAM(
            model, torch.optim.SGD, [{"params": first, "perturb": False}, {"params": rest}], lr=0.0, rho=0.3,
            num_micro_batches=3, ascent=ascent,
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
        for _ in range(steps):
            opt.step(oracle.loss_of(model), batch, scaler=scaler)
            if scaler is not None:
                scaler.update()
        found.append((oracle.gradients(model), opt.record.gradient_norms))
    assert oracle.relative_error(found[1][0], found[0][0]) < 1e-12
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-10, atol=0)


def test_masked_tokens_weigh_micro_batches(double, oracle):
    """The mean over valid tokens: exact with shard_weight, and a warning and the sequential numbers without."""
    make_model, make_batch = oracle.CASES["transformer"]
    model, (ids, labels) = make_model(), make_batch()
    labels = labels.clone()
    labels[:4, 1:] = -100

    def loss_fn(part):
        return F.cross_entropy(model(part[0]), part[1].flatten(), ignore_index=-100)

    def valid(part):
        return int((part[1] != -100).sum())

    found = []
    for mode in ("ghost", "sequential"):
        model.zero_grad()
        opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode=mode, shard_weight=valid)
        opt.backward(loss_fn, (ids, labels))
        assert opt.record.mode == mode
        found.append((oracle.gradients(model), opt.record.gradient_norms))
    assert oracle.relative_error(found[0][0], found[1][0]) < 1e-12
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=0)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3, mode="auto")
    with pytest.warns(UserWarning, match="shard_weight"):
        opt.backward(loss_fn, (ids, labels))
