import pytest
import torch
from frechet_gan import cmmd, effective_rank, evaluate, kid, manifold, train_classifier
from frechet_gan.encoders.classifier import accuracy
from frechet_gan.transport.mmd import GaussianKernel, cubic_kernel, mmd
from torch import nn


def _images(n, seed, scale=1.0):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * scale


def test_perfect_generator_scores_one_without_alarms():
    report = evaluate(lambda n, s: _images(n, 100 + s), _images(800, 0), heldout={"pixels": nn.Flatten()}, seeds=2)
    (view,) = report.encoders
    assert report.alarms == []
    assert report.fdr == pytest.approx(1, abs=0.3)
    assert view.rank == pytest.approx(1, abs=0.05)
    assert abs(view.kid) < 0.02
    assert min(view.precision, view.recall, view.coverage) > 0.8
    assert view.spread["plugin"] > 0
    assert report.as_dict()["encoders"][0]["encoder"] == "pixels"


def test_alarms():
    real = _images(800, 0)

    def first_row(images):
        return images[:, 0, 0]

    def hacked(count, seed):  # right in what the training encoder sees, wrong elsewhere
        images = _images(count, seed + 50) + 4
        images[:, :, 0] -= 4
        return images

    report = evaluate(hacked, real, {"row": first_row}, {"pixels": nn.Flatten()}, count=400)
    assert any(a.startswith("hacking:") for a in report.alarms)
    constant = evaluate(lambda n, s: _images(1, s).expand(n, -1, -1, -1), real, heldout={"pixels": nn.Flatten()})
    assert any("effective rank" in a for a in constant.alarms)
    assert any("coverage" in a for a in constant.alarms)
    few = evaluate(_images(40, 5), real, {"pixels": nn.Flatten()})
    assert any(a.startswith("bias: 40 images for 16") for a in few.alarms)
    assert any("no held-out encoder" in a for a in few.alarms)


def test_memorized_data_raise_an_alarm():
    real = _images(300, 0)
    views = {"pixels": nn.Flatten()}
    for copies in (real, real[:100], real[:150] + 1e-4 * _images(150, 9)):
        report = evaluate(copies, real, heldout=views)
        assert report.encoders[0].memorized > 0.99
        assert any(a.startswith("memorization: ") for a in report.alarms)
    fresh = evaluate(_images(300, 1), real, heldout=views)
    average = evaluate(_images(300, 1) * 0.2, real, heldout=views)  # near the mean of all, a copy of none
    for report in (fresh, average):
        assert report.encoders[0].memorized < 0.1
        assert not any(a.startswith("memorization") for a in report.alarms)


def test_another_range_is_refused():
    real = _images(40, 0).clamp(-1, 1)
    for other in ((real + 1) * 127.5, (real + 1) / 2):
        with pytest.raises(ValueError, match="sampler, real: expected one range of values"):
            evaluate(other, real, heldout={"pixels": nn.Flatten()})
    as_bytes = ((real + 1) * 127.5).round().to(torch.uint8)
    assert evaluate(as_bytes, as_bytes, heldout={"pixels": nn.Flatten()}).encoders[0].distance["plugin"] < 1e-9


def test_kid_has_a_spread_for_few_rows_too():
    mean, spread = kid(_images(300, 0).flatten(1), _images(300, 1).flatten(1))
    assert spread > 0
    assert abs(mean) < 4 * spread


def test_estimators_in_a_report():
    report = evaluate(
        lambda n, s: _images(n, 100 + s, 1.5),
        _images(400, 0),
        heldout={"pixels": nn.Flatten()},
        estimators=["plugin", "rtd"],
        seeds=3,
    )
    distance = report.encoders[0].distance
    assert distance["rtd"] < distance["plugin"]
    assert distance["rtd"] == pytest.approx(16 * 0.25, rel=0.1)


def test_bad_input():
    real = _images(40, 0)
    with pytest.raises(ValueError, match="at least one encoder and every name once"):
        evaluate(real, real)
    with pytest.raises(ValueError, match="every name once"):
        evaluate(real, real, {"a": nn.Flatten()}, {"a": nn.Flatten()})
    with pytest.raises(ValueError, match="at least 16 images"):
        evaluate(real, real[:10], {"a": nn.Flatten()})
    with pytest.raises(ValueError, match="estimators: expected one of"):
        evaluate(real, real, {"a": nn.Flatten()}, estimators=["median"])
    with pytest.raises(ValueError, match=r"encoder\(images\)"):
        evaluate(real, real, {"a": nn.Identity()})


def test_effective_rank():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_mmd_is_unbiased_and_equals_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator), torch.randn(9, 3, generator=generator) + 1
    for kernel in (cubic_kernel, GaussianKernel((0.5, 2.0))):
        single = [[float(kernel(a[None].double(), b[None].double())) for b in y] for a in x]
        own_x = [float(kernel(a[None].double(), b[None].double())) for a in x for b in x if a is not b]
        pairs = sum(
            float(kernel(x[i : i + 1].double(), x[j : j + 1].double())) for i in range(12) for j in range(12) if i != j
        )
        pairs_y = sum(
            float(kernel(y[i : i + 1].double(), y[j : j + 1].double())) for i in range(9) for j in range(9) if i != j
        )
        assert len(own_x) >= 12 * 11
        truth = pairs / 132 + pairs_y / 72 - 2 * sum(map(sum, single)) / 108
        assert float(mmd(x, y, kernel)) == pytest.approx(truth, rel=1e-9)
    same = [
        kid(torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator))[0] for _ in range(10)
    ]
    assert abs(sum(same)) / 10 < 0.02
    assert cmmd(x, y) > cmmd(x, x.clone()) >= -1e-9


def test_manifold_of_known_samples():
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=generator), torch.randn(200, 2, generator=generator) + 50])
    one_mode = manifold(torch.randn(400, 2, generator=generator), real)
    assert one_mode.precision > 0.9
    assert one_mode.recall < 0.55
    assert one_mode.coverage < 0.55
    elsewhere = manifold(torch.randn(400, 2, generator=generator) + 500, real)
    assert (elsewhere.precision, elsewhere.recall, elsewhere.density, elsewhere.coverage) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="k: "):
        manifold(real[:4], real, k=4)


def test_classifier_learns_digits():
    data = pytest.importorskip("frechet_gan.images.data")
    pytest.importorskip("sklearn")
    digits = data.digits()
    model = train_classifier(digits.images[:1200], digits.labels[:1200], steps=150)
    assert accuracy(model, digits.images[1200:], digits.labels[1200:]) > 0.85
    assert model(digits.images[:3]).shape == (3, 64)
