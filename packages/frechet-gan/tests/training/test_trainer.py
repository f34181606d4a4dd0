import copy
from dataclasses import replace

import pytest
import torch
from core_tensor.dev.testing import assert_close, run_ranks
from frechet_gan import (
    PRESETS,
    FrechetTrainer,
    NetworkConfig,
    Networks,
    PosttrainConfig,
    PostTrainer,
    TrainConfig,
    TransportLoss,
    encoder_losses,
    interpolate,
    load_generator,
    sample_images,
)
from frechet_gan.images.augmentation import augment, cut_out, recolour, translate
from frechet_gan.training.objectives import gradient_penalty, learned_encoder_loss, r1_penalty
from torch import nn

TINY = NetworkConfig("mlp", size=4, latent=5, width=16, features=8)
IMAGES = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", ["mlp", "dcgan", "resnet"])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_networks_have_the_promised_shapes(kind, size, channels):
    config = NetworkConfig(kind, size, channels, latent=6, width=8, features=12, spectral_norm=True)
    networks = config.build()
    generator, discriminator = networks.generator, networks.discriminator
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
    first, second, third = (TINY.build(seed).generator for seed in (3, 3, 4))
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


def test_augmentation_moves_recolours_and_cuts():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(20, 3, 16, 16)
    images[:, :, 8, 8] = 1.0
    peaks = {int(i[0].argmax()) for i in translate(images, generator)}
    assert len(peaks) > 5
    assert all(abs(p // 16 - 8) <= 2 and abs(p % 16 - 8) <= 2 for p in peaks)
    holes = (cut_out(images + 1, generator) == 0).sum((1, 2, 3)) / 3
    assert holes.max() == 64  # half the height by half the width, less at the border
    assert holes.min() >= 16
    coloured = torch.rand(200, 3, 4, 4, generator=generator)
    changed = recolour(coloured, generator)
    brightness = changed.mean((1, 2, 3)) - coloured.mean((1, 2, 3))
    assert brightness.abs().max() <= 0.5
    assert brightness.abs().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.autograd.gradcheck(
        lambda x: augment(x, torch.Generator().manual_seed(1)), images[:2].double().requires_grad_()
    )


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.LeakyReLU(0.2))
        self.head = nn.Linear(6, 1)

    def features(self, images):
        return self.trunk(images)

    def forward(self, images):
        return self.head(self.trunk(images))[:, 0]


class _Pairs:
    """A data set of (image, label) pairs, images in bytes, as torchvision's are with `pil_to_tensor`."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return ((IMAGES[index] + 1) * 127.5).round().to(torch.uint8), 0


@pytest.mark.parametrize("preset", ["frechet", "advfd"])
def test_own_networks_and_data_sets(preset, tmp_path):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    own = Networks(generator, _Own(), latent=5)
    results = []
    for images in (_Pairs(), torch.stack([_Pairs()[i][0] for i in range(64)])):
        trainer = FrechetTrainer(copy.deepcopy(own), images, replace(PRESETS[preset], batch=16))
        trainer.train(2)
        results.append(_weights(trainer.generator))
    assert torch.equal(*results)
    trainer.save(tmp_path / "own.pt")
    FrechetTrainer(copy.deepcopy(own), IMAGES, replace(PRESETS[preset], batch=16)).load(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="for your own networks load"):
        load_generator(tmp_path / "own.pt")
    with pytest.raises(TypeError, match="discriminator: expected a module with a method features"):
        Networks(generator, nn.Linear(2, 1), 5)


def test_interpolation_ends_at_samples():
    generator = nn.Sequential(nn.Linear(5, 16), nn.Unflatten(1, (1, 4, 4)))
    images = interpolate(generator, 5, rows=3, steps=4, seed=2).view(3, 4, -1)
    ends = sample_images(generator, 5, 6, seed=2).view(2, 3, -1)
    assert_close("first", ends[0], images[:, 0], 1e-6)
    assert_close("last", ends[1], images[:, -1], 1e-6)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"images: expected shape \(n, 1, 4, 4\) as .*, got \(n, 1, 5, 5\)"):
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
    return PostTrainer(TINY.build(1).generator, TINY, loss, config)


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
    with pytest.raises(ValueError, match="config of this run, got other values of lr"):
        _posttrainer(replace(config, lr=1.0)).load(tmp_path / "p.pt")


def test_posttraining_in_micro_batches_takes_the_same_step():
    whole, parts = _posttrainer(PosttrainConfig(batch=64)), _posttrainer(PosttrainConfig(batch=64, micro_batch=16))
    assert parts.step() == pytest.approx(whole.step(), rel=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in t.generator.parameters()]) for t in (whole, parts)]
    assert_close("gradient", *gradients, 1e-4)


def _generator_gradient(rank, world_size):
    network = replace(TINY, kind="resnet", size=8, width=8)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trainer = FrechetTrainer(network, images, TrainConfig(seed=rank))
    trainer.generator.double().eval()  # batch normalisation counts every rank's own images
    trainer.discriminator.double()
    latents = torch.randn(48, network.latent, generator=torch.Generator().manual_seed(1)).double()
    rows = slice(rank * 48 // world_size, (rank + 1) * 48 // world_size)
    trainer._latents = lambda count: latents[rows]
    trainer._real = lambda count: images[rows].double()
    trainer._generate = trainer.generator
    trainer._generator_step()
    return torch.cat([p.grad.flatten() for p in trainer.generator.parameters()])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_generator_step_of_one():
    whole = _generator_gradient(0, 1)
    for gradient in run_ranks(_generator_gradient, 2):
        assert_close("gradient", whole, gradient, 1e-12)


def _interrupted(_rank, _world_size, folder):
    config = TrainConfig(batch=16)
    straight = FrechetTrainer(TINY, IMAGES, config)
    straight.train(2)
    straight.save(folder / "ranks.pt")
    straight.train(4)
    resumed = FrechetTrainer(TINY, IMAGES, config)
    resumed.load(folder / "ranks.pt")
    resumed.train(4)
    return [_weights(m) for t in (straight, resumed) for m in (t.generator, t.discriminator)]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_stay_together_and_resume_bit_exactly(tmp_path):
    first, second = run_ranks(_interrupted, 2, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], first[2:], strict=True))
    with pytest.raises(ValueError, match="expected a checkpoint of 1 processes, got 2"):
        FrechetTrainer(TINY, IMAGES, TrainConfig(batch=16)).load(tmp_path / "ranks.pt")
