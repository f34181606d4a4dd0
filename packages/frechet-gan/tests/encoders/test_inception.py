"""FID's Inception-v3 against a plain forward written from the published architecture, by the names in the file."""

import re

import pytest
import torch
from core_tensor.dev.testing import assert_close
from frechet_gan import fid, inception
from frechet_gan.encoders.inception import InceptionFID
from torch.nn import functional as F


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in InceptionFID().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # the published file has none
        if name.endswith(("running_var", "bn.weight")):
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif name.endswith("conv.weight"):
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.randn(value.shape, generator=generator) * 0.1
    return state


def _plain(w, x):
    """The network as a formula; x in [-1, 1] as the graph scales it."""

    def unit(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        mean, var = w[f"{name}.bn.running_mean"], w[f"{name}.bn.running_var"]
        scale = w[f"{name}.bn.weight"] / (var + 1e-3).sqrt()
        return (x * scale.view(-1, 1, 1) + (w[f"{name}.bn.bias"] - mean * scale).view(-1, 1, 1)).clamp_min(0)

    def pool(x):  # the average of the pixels that exist
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3)
        return F.avg_pool2d(x, 3, 1, 1) * 9 / F.conv2d(ones, kernel, padding=1)

    def chain(x, prefix, *steps):
        for name, stride, padding in steps:
            x = unit(x, f"{prefix}.{name}", stride, padding)
        return x

    for name, stride, padding in (("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)):
        x = unit(x, name, stride, padding)
    x = F.max_pool2d(x, 3, 2)
    x = unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        a = unit(x, f"{m}.branch1x1")
        b = chain(x, m, ("branch5x5_1", 1, 0), ("branch5x5_2", 1, 2))
        c = chain(x, m, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1))
        x = torch.cat([a, b, c, unit(pool(x), f"{m}.branch_pool")], 1)
    m = "Mixed_6a"
    c = chain(x, m, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0))
    x = torch.cat([unit(x, f"{m}.branch3x3", 2), c, F.max_pool2d(x, 3, 2)], 1)
    wide, tall = (0, 3), (3, 0)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        b = chain(x, m, ("branch7x7_1", 1, 0), ("branch7x7_2", 1, wide), ("branch7x7_3", 1, tall))
        names = [("branch7x7dbl_1", 1, 0)] + [
            (f"branch7x7dbl_{i}", 1, tall if i % 2 == 0 else wide) for i in range(2, 6)
        ]
        x = torch.cat([unit(x, f"{m}.branch1x1"), b, chain(x, m, *names), unit(pool(x), f"{m}.branch_pool")], 1)
    m = "Mixed_7a"
    a = chain(x, m, ("branch3x3_1", 1, 0), ("branch3x3_2", 2, 0))
    b = chain(
        x, m, ("branch7x7x3_1", 1, 0), ("branch7x7x3_2", 1, wide), ("branch7x7x3_3", 1, tall), ("branch7x7x3_4", 2, 0)
    )
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b", "Mixed_7c"):
        a = unit(x, f"{m}.branch3x3_1")
        b = chain(x, m, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1))
        pooled = pool(x) if m == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat(
            [
                unit(x, f"{m}.branch1x1"),
                unit(a, f"{m}.branch3x3_2a", 1, (0, 1)),
                unit(a, f"{m}.branch3x3_2b", 1, (1, 0)),
                unit(b, f"{m}.branch3x3dbl_3a", 1, (0, 1)),
                unit(b, f"{m}.branch3x3dbl_3b", 1, (1, 0)),
                unit(pooled, f"{m}.branch_pool"),
            ],
            1,
        )
    return x.mean((2, 3))


def test_equals_a_plain_forward(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    encoder = inception(tmp_path / "w.pth")
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = (images + 1) * 127.5
    assert_close("graph's scale", _plain(weights, (pixels - 128) / 128), encoder(images), 1e-5)
    encoder.network.like_pytorch_fid = True
    features = encoder(images)
    assert_close("pytorch-fid's scale", _plain(weights, images), features, 1e-5)
    assert features.shape == (2, 2048)
    assert encoder.published is False


def test_layout_of_the_published_file():
    names = [n for n in InceptionFID().state_dict() if not n.endswith("num_batches_tracked")]
    kinds = {re.sub(r"^(Conv2d_\w+|Mixed_\w+)\.|branch\w+\.", "", n) for n in names}
    assert kinds == {
        *("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "fc.weight", "fc.bias"),
    }
    assert sum(n.endswith("conv.weight") for n in names) == 94
    assert InceptionFID().fc.weight.shape == (1008, 2048)


def test_other_weights_are_refused(weights, tmp_path, monkeypatch):
    torchvision_like = {**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    cases = {
        "torchvision": (torchvision_like, r"expected fc.weight .* \(1008, 2048\), got \(1000, 2048\)"),
        "missing": ({k: v for k, v in weights.items() if k != "fc.bias"}, "found no fc.bias"),
        "more": ({**weights, "AuxLogits.fc.bias": torch.zeros(3)}, "unknown AuxLogits.fc.bias"),
        "nan": ({**weights, "fc.bias": torch.full((1008,), torch.nan)}, "finite weights"),
        "list": ([1, 2], "state dictionary"),
    }
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth: expected.*{message}|{message}"):
            inception(tmp_path / f"{name}.pth")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript archives run code"):
        inception(tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError):
        inception(tmp_path / "absent.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"encoder: expected FID's weights as .*pt_inception-2015-12-05-6726825d\.pth"):
        fid("a", "b")
    (tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "hub" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth")
    assert inception().published is False
