"""Data sets and small models of the demo, the comparisons and the evidence."""

import io
import itertools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from core_tensor.app.datasets import digits as read_digits
from core_tensor.app.datasets import read_idx
from core_tensor.app.extras import require
from core_tensor.app.files import read_npz, reading
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn

from msam.study.names import TASKS


@dataclass(frozen=True)
class Task:
    """A classification task, cut into three parts, and a model that suits it.

    Attributes:
        name: Name of the data.
        train: Inputs and labels to train on.
        validation: Inputs and labels that hyper-parameters are chosen on.
        test: Inputs and labels for the reported accuracy.
        model: Builds a freshly initialised model (draws from torch's generator).
        batch: Examples per mini-batch.
        epochs: Passes over the training part.
        lr: Largest learning rate of the cosine schedule.
        optimizer: Base optimizer of every method, `"sgd"` or `"adamw"`.
    """

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    batch: int
    epochs: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"


def mlp(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    """A perceptron with ReLU.

    Args:
        widths: Input, hidden and output sizes.
        dropout: Probability after each hidden layer.

    Returns:
        The model.
    """
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    return nn.Sequential(*layers[: -2 if dropout else -1])


def small_cnn(channels: int = 3, width: int = 24, classes: int = 10) -> nn.Sequential:
    """A convolutional network with group norm, for 32 x 32 images.

    Args:
        channels: Of the input.
        width: Channels of the first stage; later ones have two and four times as many.
        classes: Number of classes.

    Returns:
        The model.
    """

    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.ReLU()]

    body = stage(channels, width) + stage(width, 2 * width) + stage(2 * width, 4 * width)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class TextTransformer(nn.Module):
    """A transformer encoder over tokens, with the mean over valid positions as the sentence's feature.

    Args:
        vocabulary: Number of tokens; 0 is padding.
        width: Model width d.
        depth: Layers.
        length: Most tokens of a sentence.
        classes: Number of classes.
        dropout: Probability.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 64,
        depth: int = 1,
        length: int = 32,
        classes: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = [
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=dropout, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.layers = nn.ModuleList(layer)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Class scores.

        Args:
            ids: Tokens, shape (B, T), int64, 0 for padding; no row is all padding.

        Returns:
            Logits, shape (B, classes).
        """
        padding = ids == 0  # (B, T)
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        valid = (~padding).unsqueeze(-1).to(x.dtype)
        return self.head((self.norm(x) * valid).sum(1) / valid.sum(1))  # type: ignore[no-any-return]


def split(
    x: Tensor, y: Tensor, validation: int, test: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cut examples at random into three parts.

    Args:
        x: Inputs.
        y: Labels.
        validation: Examples of the validation part.
        test: Examples of the test part.
        seed: Of the permutation.

    Returns:
        Training, validation and test parts.

    Raises:
        ValueError: If there are too few examples, or not one label for each.
    """
    if len(x) != len(y) or len(x) <= validation + test:
        raise ValueError(f"data: expected over {validation + test} examples, got {len(x)} with {len(y)} labels")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(x) - validation - test, validation, test])
    train, held, final = ((x[i], y[i]) for i in parts)
    return train, held, final


def digits(seed: int = 0) -> Task:
    """The 1,797 handwritten digits that scikit-learn ships (8 x 8 pixels).

    Args:
        seed: Of the split.

    Returns:
        The task.
    """
    images, labels = read_digits("msam[demo]")
    x = torch.tensor(images.reshape(-1, 64), dtype=torch.float32) / 16.0
    parts = split(x, torch.tensor(labels), 300, 500, seed)
    return Task("digits", *parts, lambda: mlp(64, 256, 256, 10), batch=128, epochs=40, lr=0.1)


def mnist1d(seed: int = 0) -> Task:
    """MNIST-1D from its generator (package `mnist1d`, no download): 4,000 signals of 40 samples and 1,000 for test.

    Args:
        seed: Of the validation split; the data are the generator's default.

    Returns:
        The task, with the model and schedule of the reference experiment.
    """
    module = require("mnist1d.data", "msam[evidence]")
    made = module.make_dataset(module.get_dataset_args())
    x, y = torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])
    parts = split(x, y, 500, 0, seed)
    test = (torch.tensor(made["x_test"], dtype=torch.float32), torch.tensor(made["y_test"]))
    return Task("mnist1d", parts[0], parts[1], test, lambda: mlp(40, 128, 128, 10), batch=128, epochs=40, lr=0.05)


def _folder(folder: str | Path | None, name: str) -> Path:
    if folder is None:
        raise ValueError(f"data: expected a folder with the files of {name} (--folder), got none")
    return Path(folder)


def _file(folder: str | Path | None, name: str, *parts: str) -> Path:
    path = _folder(folder, name).joinpath(*parts)
    if not path.is_file():
        raise ValueError(f"folder: expected the files of {name} there (--folder), got no {path}")
    return path


def _classes(name: str, labels: Tensor, classes: int) -> Tensor:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{name}: expected labels below {classes}, got {int(labels.min())} to {int(labels.max())}")
    return labels


def mnist(folder: str | Path, train: int = 10_000, seed: int = 0) -> Task:
    """MNIST from its IDX files.

    Args:
        folder: Holds `mnist/*-ubyte.gz`.
        train: Training examples that are used.
        seed: Of the split.

    Returns:
        The task.

    Raises:
        ValueError: If the files hold something else.
    """

    def read(name: str, dims: int) -> Tensor:
        found = read_idx(_file(folder, "mnist", "mnist", f"{name}-ubyte.gz"))
        if found.ndim != dims:
            raise ValueError(f"folder: expected {dims} dimensions in {name}-ubyte.gz, got {found.ndim}")
        return torch.from_numpy(found)

    def images(part: str) -> Tensor:
        return read(f"{part}-images-idx3", 3).flatten(1).float() / 255.0

    def labels(part: str) -> Tensor:
        return _classes("folder", read(f"{part}-labels-idx1", 1).long(), 10)

    x, y = images("train"), labels("train")
    parts = split(x, y, 2000, len(x) - 2000 - train, seed)
    test = (images("t10k"), labels("t10k"))
    if len(test[0]) != len(test[1]) or x.shape[1] != 784 or test[0].shape[1] != 784:
        raise ValueError(f"folder: expected images of 28 x 28 pixels with labels, got {x.shape} and {test[0].shape}")
    return Task("mnist", parts[0], parts[1], test, lambda: mlp(784, 128, 128, 10), batch=128, epochs=5, lr=0.1)


def cifar(folder: str | Path, train: int = 5000, seed: int = 0) -> Task:
    """A subset of CIFAR-10 from JPEGs, at 16 x 16 pixels; accuracies do not compare with published ones.

    Args:
        folder: Holds `cifar10_subset/cifar10_subset_jpeg.npz`.
        train: Training images that are used (the file's classes are interleaved).
        seed: Of the validation split.

    Returns:
        The task.
    """
    image = require("PIL.Image", "msam[evidence]")
    path = _file(folder, "cifar", "cifar10_subset", "cifar10_subset_jpeg.npz")
    packed = read_npz(path, *(f"{part}_{kind}" for part in ("train", "test") for kind in ("jpeg", "offsets", "labels")))

    def part(name: str, count: int) -> tuple[Tensor, Tensor]:
        jpeg, offsets = packed[f"{name}_jpeg"], packed[f"{name}_offsets"]
        with reading(path, "JPEG images of 32 x 32 pixels"):
            pixels = [
                np.asarray(image.open(io.BytesIO(jpeg[a:b].tobytes())))
                for a, b in itertools.pairwise(offsets[: count + 1])
            ]
            x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            y = torch.from_numpy(packed[f"{name}_labels"][:count].astype(np.int64))
            if x.shape[1:] != (3, 32, 32) or y.shape != x.shape[:1]:
                raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}")
            _classes("labels", y, 10)
        return nn.functional.avg_pool2d(x, 2), y

    parts, test = split(*part("train", train), 1000, 0, seed), part("test", 2000)
    return Task("cifar", parts[0], parts[1], test, lambda: small_cnn(width=16), batch=128, epochs=10, lr=0.1)


def polarity(folder: str | Path, train: int = 5000, length: int = 24, vocabulary: int = 3000, seed: int = 0) -> Task:
    """Film-review sentences, positive or negative (Pang and Lee).

    Args:
        folder: Holds `nlp_classification/sentence_polarity.zip`.
        train: Training sentences that are used.
        length: Tokens that are kept of a sentence.
        vocabulary: Tokens in the vocabulary, by frequency; 0 is padding and 1 any other token.
        seed: Of the split.

    Returns:
        The task.
    """
    path = _file(folder, "polarity", "nlp_classification", "sentence_polarity.zip")
    sentences, labels = [], []
    with reading(path, "the sentences of Pang and Lee"), zipfile.ZipFile(path) as archive:
        for label, part in enumerate(("neg", "pos")):
            lines = archive.read(f"sentence_polarity/rt-polarity.{part}").decode("latin1").splitlines()
            sentences += [line.split() for line in lines]
            labels += [label] * len(lines)
    counts: dict[str, int] = {}
    for sentence in sentences:
        for token in sentence:
            counts[token] = counts.get(token, 0) + 1
    ranked = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary - 2]
    index = {token: i + 2 for i, token in enumerate(ranked)}
    x = torch.zeros(len(sentences), length, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids = [index.get(token, 1) for token in sentence[:length]] or [1]
        x[row, : len(ids)] = torch.tensor(ids)
    parts = split(x, torch.tensor(labels), 1000, 2000, seed)
    parts = ((parts[0][0][:train], parts[0][1][:train]), *parts[1:])

    def model() -> nn.Module:
        return TextTransformer(vocabulary, width=32, length=length)

    return Task("polarity", *parts, model, batch=64, epochs=4, lr=3e-3, optimizer="adamw")


def noisy(task: Task, share: float, seed: int = 0) -> Task:
    """Replace the labels of some training examples by wrong ones; validation and test labels stay right.

    Args:
        task: The task.
        share: Share of the training labels that become wrong, in [0, 1].
        seed: Of the choice of examples and of their labels.

    Returns:
        The task with `-noise` in its name; itself for a share of zero.
    """
    check_number("label_noise", share, low=0.0, high=1.0)
    if share == 0:
        return task
    x, y = task.train
    generator, classes = torch.Generator().manual_seed(seed), int(y.max()) + 1
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    labels = y.clone()
    labels[wrong] = (y[wrong] + shift) % classes
    return replace(task, name=f"{task.name}-noise", train=(x, labels))


def load(name: str, folder: str | Path | None = None, seed: int = 0) -> Task:
    """A task by name.

    Args:
        name: One of `TASKS`.
        folder: Folder with the data files of mnist, cifar and polarity.
        seed: Of the split.

    Returns:
        The task.

    Raises:
        ValueError: If the name is unknown, or the folder is needed and not given or lacks the files.
    """
    check_choice("data", name, TASKS)
    if name == "digits":
        return digits(seed)
    if name == "mnist1d":
        return mnist1d(seed)
    made: dict[str, Callable[..., Task]] = {"mnist": mnist, "cifar": cifar, "polarity": polarity}
    return made[name](_folder(folder, name), seed=seed)
