"""Generators and discriminators: an MLP for tiny images, DCGAN and ResNet for 16 to 64 pixels."""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from frechet_gan.choices import KINDS, Kind


@dataclass(frozen=True)
class NetworkConfig:
    """A generator and the discriminator that goes with it.

    Attributes:
        kind: `mlp`, `dcgan` or `resnet`.
        size: Height and width of the images, in pixels; for `dcgan` and `resnet` 4 or 7 times a power of two.
        channels: 1 (grey) or 3 (colour).
        latent: Width of the generator's input.
        width: Hidden units (`mlp`) or channels of the widest image-sized layer (`dcgan`, `resnet`).
        features: Width of the discriminator's feature layer, the space distributions are compared in: a quarter of the
            batch or less, or the batch's moments mean little.
        spectral_norm: Whether every weight of the discriminator has spectral norm one.
    """

    kind: Kind = "mlp"
    size: int = 16
    channels: int = 1
    latent: int = 64
    width: int = 256
    features: int = 32
    spectral_norm: bool = False

    def build(self, seed: int = 0) -> "Networks":
        """Networks with weights set by the seed; torch's global generator is left as it was.

        Args:
            seed: Seed of the initial weights.

        Returns:
            A generator (n, latent) to images (n, c, h, w) in [-1, 1], and a discriminator.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Networks(build_generator(self), Discriminator(self), self.latent)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("channels", self.channels, (1, 3))
        for name in ("size", "latent", "width", "features"):
            check_number(name, getattr(self, name), low=1, integer=True)
        if self.kind != "mlp":
            _doublings(self.size)


@dataclass(frozen=True)
class Networks:
    """A generator and a discriminator, such as your own.

    Attributes:
        generator: Maps latents (n, latent) to images (n, c, h, w) in [-1, 1].
        discriminator: Maps images to logits (n,), and by its method `features` to features (n, d). A method `layers`,
            if there is one, returns the images and the activations of every layer, which the loss then compares.
        latent: Width of the latents.
    """

    generator: nn.Module
    discriminator: nn.Module
    latent: int

    def __post_init__(self) -> None:
        if not callable(getattr(self.discriminator, "features", None)):
            raise TypeError(
                "discriminator: expected a module with a method features (images to features, shape (n, d)), "
                f"got {type(self.discriminator).__name__}"
            )
        check_number("latent", self.latent, low=1, integer=True)


def build_generator(config: NetworkConfig) -> nn.Module:
    """A generator with weights drawn from torch's global generator."""
    if config.kind == "mlp":
        return _mlp_generator(config)
    return DCGANGenerator(config) if config.kind == "dcgan" else ResNetGenerator(config)


class Discriminator(nn.Module):
    """A trunk to features and a linear head to a logit.

    Args:
        config: What to build.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        trunk = {"mlp": _mlp_trunk, "dcgan": _dcgan_trunk, "resnet": _resnet_trunk}[config.kind](config)
        self.trunk: nn.Sequential = trunk
        self.head = nn.Linear(config.features, 1)
        if config.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    parametrizations.spectral_norm(module)

    def features(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, c, h, w).

        Returns:
            Features, shape (n, d).
        """
        found: Tensor = self.trunk(images)
        return found

    def layers(self, images: Tensor) -> list[Tensor]:
        """Images and every layer's activations up to the features.

        Args:
            images: Images, shape (n, c, h, w).

        Returns:
            One tensor per layer, shape (n, ...); the images come first, the features last.
        """
        found, x = [images], images
        for module in self.trunk:
            x = module(x)
            if isinstance(module, (nn.LeakyReLU, _Down)):
                found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images: large for real ones.

        Args:
            images: Images, shape (n, c, h, w).

        Returns:
            Logits, shape (n,).
        """
        logits: Tensor = self.head(self.trunk(images))[:, 0]
        return logits


def _mlp_generator(config: NetworkConfig) -> nn.Module:
    layers: list[nn.Module] = []
    width = config.latent
    for _ in range(2):
        layers += [nn.Linear(width, config.width), nn.BatchNorm1d(config.width), nn.ReLU()]
        width = config.width
    shape = (config.channels, config.size, config.size)
    layers += [nn.Linear(width, shape[0] * shape[1] * shape[2]), nn.Tanh(), nn.Unflatten(1, shape)]
    return nn.Sequential(*layers)


def _mlp_trunk(config: NetworkConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    width = config.channels * config.size**2
    for target in (config.width, config.width, config.features):
        layers += [nn.Linear(width, target), nn.LeakyReLU(0.2)]
        width = target
    return nn.Sequential(*layers)


def _doublings(size: int) -> tuple[int, int]:
    # the smallest map (4 or 7 pixels) and how often it is doubled
    for start in (4, 7):
        quotient, rest = divmod(size, start)
        if rest == 0 and quotient >= 2 and quotient & (quotient - 1) == 0:
            return start, quotient.bit_length() - 1
    raise ValueError(f"size: expected 4 or 7 times a power of two for dcgan and resnet, got {size}")


class _LayeredGenerator(nn.Module):
    """A generator whose layers follow one another."""

    layers: nn.Sequential

    def forward(self, z: Tensor) -> Tensor:
        """Images from latents.

        Args:
            z: Latents, shape (n, latent).

        Returns:
            Images, shape (n, c, size, size), in [-1, 1].
        """
        images: Tensor = self.layers(z)
        return images


class DCGANGenerator(_LayeredGenerator):
    """Transposed convolutions with batch normalisation, as in DCGAN.

    Args:
        config: What to build.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        start, doublings = _doublings(config.size)
        width = config.width * 2 ** (doublings - 1)
        layers: list[nn.Module] = [
            nn.Linear(config.latent, width * start * start, bias=False),
            nn.Unflatten(1, (width, start, start)),
        ]
        for i in range(doublings):
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            target = config.channels if i == doublings - 1 else width // 2
            layers.append(nn.ConvTranspose2d(width, target, 4, 2, 1, bias=i == doublings - 1))
            width = target
        self.layers = nn.Sequential(*layers, nn.Tanh())


def _dcgan_trunk(config: NetworkConfig) -> nn.Sequential:
    start, doublings = _doublings(config.size)
    layers: list[nn.Module] = []
    width = config.channels
    for i in range(doublings):  # no batch normalisation: it would tie the samples of a gradient penalty together
        target = config.width * 2**i
        layers += [nn.Conv2d(width, target, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = target
    layers += [nn.Flatten(), nn.Linear(width * start * start, config.features), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class _Up(nn.Module):
    """Residual block that doubles the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2)
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.relu(norm(y)))
        return x + y


class _Down(nn.Module):
    """Residual block that halves the map."""

    def __init__(self, width: int, target: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(width, target, 3, padding=1), nn.Conv2d(target, target, 3, padding=1)]
        )
        self.shortcut = nn.Conv2d(width, target, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else F.relu(x)
        y = F.avg_pool2d(self.convolutions[1](F.relu(self.convolutions[0](y))), 2)
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2))
        return shortcut + y


class ResNetGenerator(_LayeredGenerator):
    """Residual generator of SNGAN: one doubling block per scale.

    Args:
        config: What to build.

    Source:
        arXiv 1802.05957, appendix B.4.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        start, doublings = _doublings(config.size)
        width = config.width
        self.layers = nn.Sequential(
            nn.Linear(config.latent, width * start * start),
            nn.Unflatten(1, (width, start, start)),
            *[_Up(width) for _ in range(doublings)],
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, config.channels, 3, padding=1),
            nn.Tanh(),
        )


def _resnet_trunk(config: NetworkConfig) -> nn.Sequential:
    _, doublings = _doublings(config.size)
    blocks = [_Down(config.channels if i == 0 else config.width, config.width, first=i == 0) for i in range(doublings)]
    return nn.Sequential(
        *blocks,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(config.width, config.features),
        nn.LeakyReLU(0.2),
    )
