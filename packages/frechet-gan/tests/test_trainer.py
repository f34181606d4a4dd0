from dataclasses import replace

import pytest
import torch
from core_tensor.testing import assert_close, run_ranks
from frechet_gan import (
    PRESETS,
    FrechetTrainer,
    NetworkConfig,
    PosttrainConfig,
    PostTrainer,
    TrainConfig,
    TransportLoss,
    build_networks,
    encoder_losses,
    load_generator,
)
from frechet_gan.objectives import augment, gradient_penalty, learned_encoder_loss, r1_penalty
from torch import nn

TINY = NetworkConfig("mlp", size=4, latent=5, width=16, features=8)
IMAGES = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", ["mlp", "dcgan", "resnet"])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_networks_have_the_promised_shapes(kind, size, channels):
    config = NetworkConfig(kind, size, channels, latent=6, width=8, features=12, spectral_norm=True)
    generator, discriminator = build_networks(config)
    images = generator(torch.randn(3, 6))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator.features(images).shape == (3, 12)
    assert discriminator(images).shape == (3,)
    for _ in range(50):
        discriminator(images)
    assert float(torch.linalg.matrix_norm(discriminator.head.weight.detach(), 2)) == pytest.approx(1, abs=1e-3)


def test_same_seed_same_networks_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, third = (build_networks(TINY, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(_weights(first), _weights(second))
    assert not torch.equal(_weights(first), _weights(third))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_resumes_bit_exactly(name, tmp_path):
    config = replace(PRESETS[name], batch=32, ema=0.9, seed=2)
    network = replace(TINY, spectral_norm=name == "hinge")
    straight = FrechetTrainer(network, IMAGES, config)
    before = _weights(straight.generator)
    straight.train(3)
    assert not torch.equal(before, _weights(straight.generator))
    first = FrechetTrainer(network, IMAGES, config)
    first.train(2)
    first.save(tmp_path / "run.pt")
    second = FrechetTrainer(network, IMAGES, config)
    second.load(tmp_path / "run.pt")
    second.train(3)
    for a, b in ((straight.generator, second.generator), (straight.average, second.average)):
        assert torch.equal(_weights(a), _weights(b))
    assert torch.equal(_weights(straight.discriminator), _weights(second.discriminator))
    assert torch.equal(straight.sample(5, seed=1), second.sample(5, seed=1))
    second.save(tmp_path / "run.pt")
    generator, loaded = load_generator(tmp_path / "run.pt")
    assert loaded == network
    assert torch.equal(_weights(generator), _weights(second.average))


def test_micro_batches_train_like_the_full_batch():
    network = NetworkConfig("resnet", 8, width=8, latent=5, features=8)
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    gradients = []
    for micro in (None, 8):
        trainer = FrechetTrainer(network, images, TrainConfig(batch=32, micro_batch=micro, seed=1))
        trainer.generator.eval()  # batch normalisation by micro-batch would be another network
        trainer._generator_step()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.generator.parameters()]))
    assert_close("gradient", gradients[0], gradients[1], 1e-4)


def test_options_train():
    for options in ({"bf16": True}, {"diff_augment": True}, {"adversarial_weight": 1.0}, {"normalize": "sg"}):
        trainer = FrechetTrainer(TINY, IMAGES, TrainConfig(batch=16, **options))
        losses = trainer.step()
        assert all(abs(v) < 1e6 for v in losses.values())
        assert torch.isfinite(_weights(trainer.generator)).all()


def test_frozen_encoder_instead_of_a_discriminator():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).requires_grad_(False)
    trainer = FrechetTrainer(TINY, IMAGES, TrainConfig(batch=16), image_loss=TransportLoss(encoder=encoder))
    before = _weights(trainer.discriminator)
    trainer.train(2)
    assert torch.equal(before, _weights(trainer.discriminator))


def test_penalties_against_closed_forms():
    weight = torch.randn(16)
    images = torch.randn(5, 1, 4, 4)

    def linear(x):
        return x.flatten(1) @ weight

    assert_close("r1", weight.square().sum() / 2, r1_penalty(linear, images).detach(), 1e-6)
    penalty = gradient_penalty(linear, images, images + 1, torch.Generator())
    assert_close("gp", (weight.norm() - 1).square(), penalty.detach(), 1e-5)


def test_learned_encoder_gains_nothing_from_scale():
    real, fake = torch.randn(64, 4, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64) * 2
    assert_close("scale", learned_encoder_loss(real, fake), learned_encoder_loss(real * 100, fake * 100), 1e-9)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    learned_encoder_loss(real * scale, fake * scale).backward()
    assert abs(float(scale.grad)) < 1e-9


def test_augmentation_shifts_whole_images():
    images = torch.zeros(20, 1, 16, 16)
    images[:, :, 8, 8] = 1.0
    changed = augment(images, torch.Generator().manual_seed(0))
    peaks = {int(i.flatten().argmax()) for i in changed}
    assert len(peaks) > 5
    assert all(abs(p // 16 - 8) <= 2 and abs(p % 16 - 8) <= 2 for p in peaks)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"images: expected shape \(n, 1, 4, 4\)"):
        FrechetTrainer(TINY, torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match="size: expected 4 or 7 times"):
        NetworkConfig("dcgan", 30)
    with pytest.raises(ValueError, match="g_loss: expected one of"):
        TrainConfig(g_loss="fid")
    with pytest.raises(ValueError, match="d_loss 'frechet'"):
        TrainConfig(g_loss="adversarial", d_loss="frechet")
    trainer = FrechetTrainer(TINY, IMAGES)
    trainer.save(tmp_path / "a.pt")
    other = FrechetTrainer(TINY, IMAGES, TrainConfig(seed=1))
    with pytest.raises(ValueError, match="got other values of seed"):
        other.load(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        load_generator(tmp_path / "b.pt")


def _posttrainer(config):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).requires_grad_(False)
    torch.manual_seed(0)
    nn.init.normal_(encoder[1].weight)
    loss = encoder_losses({"a": encoder, "pixels": nn.Flatten()}, IMAGES, refresh_every=2)
    return PostTrainer(build_networks(TINY, 1)[0], TINY, loss, config)


def test_posttraining_lowers_the_distance_and_resumes_bit_exactly(tmp_path):
    config = PosttrainConfig(batch=64, lr=2e-3, ema=0.9)
    straight = _posttrainer(config)
    straight.warm_up(256)
    start = straight.step()
    straight.train(60)
    assert straight.step() < start
    first, second = _posttrainer(config), _posttrainer(config)
    first.warm_up(64)
    first.train(3)
    first.save(tmp_path / "p.pt")
    second.load(tmp_path / "p.pt")
    for trainer in (first, second):
        trainer.train(5)
    assert torch.equal(_weights(first.generator), _weights(second.generator))
    assert load_generator(tmp_path / "p.pt")[1] == TINY
    with pytest.raises(ValueError, match="configuration of this run"):
        _posttrainer(replace(config, lr=1.0)).load(tmp_path / "p.pt")


def test_posttraining_in_micro_batches_takes_the_same_step():
    whole, parts = _posttrainer(PosttrainConfig(batch=64)), _posttrainer(PosttrainConfig(batch=64, micro_batch=16))
    assert parts.step() == pytest.approx(whole.step(), rel=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in t.generator.parameters()]) for t in (whole, parts)]
    assert_close("gradient", *gradients, 1e-4)


def _rank_weights(rank, world_size):
    trainer = FrechetTrainer(TINY, IMAGES, TrainConfig(batch=16, seed=rank))
    trainer.train(2)
    return _weights(trainer.generator), _weights(trainer.discriminator)


@pytest.mark.distributed
def test_ranks_stay_together():
    first, second = run_ranks(_rank_weights, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
