"""Few-shot classification of handwritten characters, as in MAML's own experiments."""

import io
import zipfile

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from meta_embed.adapt.maml import InnerOptions, adapt
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

WAYS, SHOTS, ASKED, SIDE = 5, 5, 5, 14


def _characters(name):
    """Drawings of every character, turned by quarters for four times as many, shape (C, drawers, SIDE * SIDE)."""
    image = pytest.importorskip("PIL.Image")
    by_character = {}
    with zipfile.ZipFile(shared_data("omniglot_small", f"{name}.zip")) as archive:
        for path in sorted(n for n in archive.namelist() if n.endswith(".png")):
            drawing = image.open(io.BytesIO(archive.read(path))).convert("L").resize((SIDE, SIDE), image.Resampling.BOX)
            by_character.setdefault(path.rpartition("/")[0], []).append(1.0 - np.asarray(drawing, np.float32) / 255)
    drawings = np.stack([np.stack(d) for d in by_character.values()])
    turned = np.concatenate([np.rot90(drawings, k, axes=(2, 3)) for k in range(4)])
    return torch.from_numpy(turned.reshape(*turned.shape[:2], -1).copy())


def _tasks(characters, count, g):
    """Support and query of `count` tasks: five characters, the labels 0 to 4 in random order."""
    chosen = torch.rand(count, len(characters), generator=g).argsort(1)[:, :WAYS, None]
    drawers = torch.rand(count, WAYS, characters.shape[1], generator=g).argsort(2)[..., : SHOTS + ASKED]
    x = characters[chosen, drawers]  # (count, WAYS, SHOTS + ASKED, pixels)
    y = torch.arange(WAYS)[:, None].expand(count, WAYS, SHOTS + ASKED)
    parts = [(x[:, :, part].flatten(1, 2), y[:, :, part].flatten(1, 2)) for part in (slice(SHOTS), slice(SHOTS, None))]
    return (*parts[0], *parts[1])


@pytest.mark.slow
def test_maml_learns_to_learn_characters():
    g = torch.Generator().manual_seed(0)
    train, test = _characters("images_background_small1"), _characters("images_background_small2")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(SIDE * SIDE, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, WAYS),
    )  # fmt: skip
    start = dict(net.named_parameters())
    rates = {name: torch.tensor(0.4) for name in start}
    options = InnerOptions(steps=2, lr=0.4)

    def loss(parameters, x, y):
        return cross_entropy(functional_call(net, parameters, (x,)), y)

    def answers(parameters, x):
        return vmap(lambda p, x: functional_call(net, p, (x,)))(parameters, x)

    def accuracy(adapted):
        x, y, asked, labels = _tasks(test, 400, torch.Generator().manual_seed(1))
        with torch.no_grad():
            e = {name: p.expand(400, *p.shape) for name, p in start.items()}
            e = adapt(loss, start, rates, (x, y), options) if adapted else e
            return float((answers(e, asked).argmax(-1) == labels).float().mean())

    untrained = accuracy(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(200):
        x, y, asked, labels = _tasks(train, 32, g)
        adapted = adapt(loss, start, rates, (x, y), options)
        optimizer.zero_grad()
        cross_entropy(answers(adapted, asked).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    # chance is 0.2, since every task names its characters anew; both baselines are there
    assert accuracy(False) < 0.25
    assert untrained < 0.3
    assert accuracy(True) > 0.55
