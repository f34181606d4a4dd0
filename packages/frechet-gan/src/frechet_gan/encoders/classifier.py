"""A small convolutional classifier: an encoder for data with labels and no pretrained network."""

import torch
from core_tensor.checks import check_number, check_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from frechet_gan.images.arrays import check_images, unit


class Classifier(nn.Module):
    """Two strided convolutions, a feature layer and a linear head; called, it returns the features.

    Args:
        channels: Channels of the images.
        size: Height and width of the images, in pixels.
        classes: Number of classes.
        width: Channels of the first convolution.
        features: Width of the feature layer.
    """

    def __init__(self, channels: int, size: int, classes: int, width: int = 16, features: int = 64) -> None:
        super().__init__()
        small = ((size + 1) // 2 + 1) // 2  # two convolutions of stride two
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * small * small, features),
            nn.GELU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: Images, shape (n, c, h, w), in [-1, 1].

        Returns:
            Features, shape (n, features).
        """
        features: Tensor = self.trunk(images)
        return features


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    batch: int = 128,
    width: int = 16,
    features: int = 64,
    seed: int = 0,
) -> Classifier:
    """Train a classifier to serve as a frozen encoder.

    Args:
        images: Images, shape (n, c, h, w), in [-1, 1], or bytes.
        labels: Class of each, shape (n,), int64.
        steps: Steps of Adam.
        batch: Images per step.
        width: Channels of the first convolution.
        features: Width of the feature layer.
        seed: Seed of weights and data order.

    Returns:
        The classifier in evaluation mode, without gradients in its weights.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_images("images", images)
    check_tensor("labels", labels, shape=(images.shape[0],), dtype=torch.int64)
    check_number("steps", steps, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], images.shape[-1], int(labels.max()) + 1, width, features)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(0, images.shape[0], (batch,), generator=generator)
        loss = F.cross_entropy(model.head(model(unit(images[chosen]))), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images a classifier names correctly.

    Args:
        model: The classifier.
        images: Images, shape (n, c, h, w).
        labels: Class of each, shape (n,).

    Returns:
        Share in [0, 1].
    """
    guesses = torch.cat([model.head(model(unit(part))).argmax(1) for part in images.split(1000)])
    return float((guesses == labels).double().mean())
