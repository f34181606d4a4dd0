"""Readers of files that somebody else can have written, for the harness that mutates them."""

import gzip
import json
import struct
import zipfile
from pathlib import Path
from typing import Any


def _image(folder: Path, suffix: str, mode: str) -> Path:
    from PIL import Image

    image = Image.new("RGB", (8, 6), "white")
    image.putpixel((2, 3), (200, 30, 10))
    path = folder / f"x.{suffix}"
    image.convert(mode).save(path)
    return path


def _png(folder: Path) -> Path:
    return _image(folder, "png", "RGBA")


def _jpeg(folder: Path) -> Path:
    return _image(folder, "jpg", "RGB")


def _tiff(folder: Path) -> Path:
    return _image(folder, "tif", "L")


def _read_image(path: Path) -> None:
    from frechet_gan.images.arrays import to_images
    from frechet_gan.images.files import read_image

    to_images([read_image(path)], value_range=(-1, 1))


def _zip(folder: Path) -> Path:
    from PIL import Image

    for i in range(3):
        Image.new("L", (4, 4), 50 * i).save(folder / f"{i}.png")
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.write(folder / f"{i}.png", f"{i}.png")
            (folder / f"{i}.png").unlink()
    return folder / "images.zip"


def _array(folder: Path) -> Path:
    import numpy as np

    np.savez(folder / "images.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    return folder / "images.npz"


def _packed_array(folder: Path) -> Path:
    import numpy as np

    np.savez_compressed(folder / "images.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    return folder / "images.npz"


def _read_images(path: Path) -> None:
    from frechet_gan.images.files import read_bytes

    read_bytes(path)


def _stats(folder: Path) -> Path:
    import torch
    from frechet_gan import FeatureStats

    stats = FeatureStats.from_features(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    stats.encoder = "pixels"
    stats.save(folder / "stats.npz")
    return folder / "stats.npz"


def _read_stats(path: Path) -> None:
    from frechet_gan import FeatureStats, frechet_distance

    stats = FeatureStats.load(path)
    frechet_distance(stats, stats)


def _features(folder: Path) -> Path:
    import numpy as np

    np.savez(folder / "features.npz", features=np.ones((4, 3), np.float32), encoder=np.array("pixels"))
    return folder / "features.npz"


def _read_features(path: Path) -> None:
    from frechet_gan.evaluation.compare import cached_features

    cached_features(path, 4)


def _history(folder: Path) -> Path:
    points = [{"step": 2, "cpu_seconds": 0.5, "fd": 3.0, "d_loss": 1.0, "g_loss": 2.0}]
    (folder / "history.json").write_text(json.dumps({"method": "ns", "config": {}, "network": {}, "points": points}))
    return folder


def _read_history(path: Path) -> None:
    from frechet_gan.training.runs import read_histories, summary

    summary(read_histories([path]))


def _report(folder: Path) -> Path:
    (folder / "report.json").write_text(json.dumps({"before": {"encoders": [{"encoder": "pixels"}], "alarms": []}}))
    return folder


def _read_report(path: Path) -> None:
    from frechet_gan.training.runs import read_report

    read_report(path)


def _checkpoint(folder: Path) -> Path:
    import torch
    from frechet_gan import FrechetTrainer, NetworkConfig, TrainConfig

    images = torch.linspace(-1, 1, 16 * 8).view(8, 1, 4, 4)
    trainer = FrechetTrainer(NetworkConfig("mlp", 4, latent=2, width=3, features=2), images, TrainConfig(batch=4))
    trainer.save(folder / "run.pt")
    return folder / "run.pt"


def _read_generator(path: Path) -> None:
    from frechet_gan import load_generator, sample_images

    generator, network = load_generator(path)
    sample_images(generator, network.latent, 2)


def _resume(path: Path) -> None:
    import torch
    from frechet_gan import FrechetTrainer, NetworkConfig, TrainConfig

    images = torch.linspace(-1, 1, 16 * 8).view(8, 1, 4, 4)
    trainer = FrechetTrainer(NetworkConfig("mlp", 4, latent=2, width=3, features=2), images, TrainConfig(batch=4))
    trainer.load(path)
    trainer.sample(2)


def _weights(folder: Path) -> Path:
    import torch

    torch.save({"fc.weight": torch.ones(3, 2), "fc.bias": torch.zeros(3)}, folder / "w.pth")
    return folder / "w.pth"


def _safetensors(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"fc.weight": torch.ones(3, 2), "fc.bias": torch.zeros(3)}, str(folder / "w.safetensors"))
    return folder / "w.safetensors"


def _read_weights(path: Path) -> None:
    from frechet_gan.encoders.weights import fill, read_weights
    from torch import nn

    network = nn.ModuleDict({"fc": nn.Linear(2, 3)})
    fill(network, read_weights(path), path, "a layer")


def _mnist(folder: Path) -> Path:
    images = struct.pack(">4I", 0x803, 3, 4, 4) + bytes(48)
    labels = struct.pack(">2I", 0x801, 3) + bytes([0, 1, 2])
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    return folder


def _read_mnist(path: Path) -> None:
    from frechet_gan.images.data import load_data

    load_data(f"mnist:{path}", size=5)


def _cifar(folder: Path) -> Path:
    import io

    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, format="JPEG")
    one = np.frombuffer(stream.getvalue(), np.uint8)
    offsets = np.arange(4) * len(one)
    arrays: dict[str, Any] = {"train_jpeg": np.tile(one, 3), "train_offsets": offsets, "train_labels": np.arange(3)}
    np.savez_compressed(folder / "cifar.npz", **arrays)
    return folder / "cifar.npz"


def _read_cifar(path: Path) -> None:
    from frechet_gan.images.data import load_data

    load_data(f"cifar:{path}")


def _mobilenet(folder: Path) -> Path:
    import numpy as np

    arrays: dict[str, Any] = {}
    width = 3
    for name in ["Conv2d_0"] + [f"Conv2d_{i}_{kind}" for i in range(1, 14) for kind in ("depthwise", "pointwise")]:
        deep = name.endswith("depthwise")
        after = width if deep else 4
        shape = (1, 3, 3, width) if deep else (after, *((3, 3) if name == "Conv2d_0" else (1, 1)), width)
        arrays[f"{name}.w_u8"] = np.full(shape, 130, np.uint8)
        arrays[f"{name}.b_i32"] = np.zeros(after, np.int32)
        for part in ("w_scale", "w_zero", "b_scale"):
            arrays[f"{name}.{part}"] = np.float32(0.1)
        width = after
    np.savez_compressed(folder / "mobilenet.npz", **arrays)
    return folder / "mobilenet.npz"


def _read_mobilenet(path: Path) -> None:
    from frechet_gan.encoders.mobilenet import MobileNetV1

    MobileNetV1(path)


def _vision_transformer(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    shapes = {
        "cls_token": (1, 1, 64),
        "pos_embed": (1, 5, 64),
        "norm.weight": (64,),
        "norm.bias": (64,),
        "patch_embed.proj.weight": (64, 3, 2, 2),
        "patch_embed.proj.bias": (64,),
        **{f"blocks.0.{n}.{part}": (64,) for n in ("norm1", "norm2") for part in ("weight", "bias")},
        "blocks.0.attn.qkv.weight": (192, 64),
        "blocks.0.attn.qkv.bias": (192,),
        "blocks.0.attn.proj.weight": (64, 64),
        "blocks.0.attn.proj.bias": (64,),
        "blocks.0.mlp.fc1.weight": (8, 64),
        "blocks.0.mlp.fc1.bias": (8,),
        "blocks.0.mlp.fc2.weight": (64, 8),
        "blocks.0.mlp.fc2.bias": (64,),
        "blocks.0.ls1.gamma": (64,),
        "blocks.0.ls2.gamma": (64,),
    }
    save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, str(folder / "v.safetensors"))
    return folder / "v.safetensors"


def _read_dinov2(path: Path) -> None:
    import torch
    from frechet_gan import load_encoder

    load_encoder(f"dinov2:{path}")(torch.zeros(2, 3, 4, 4))


def _clip_config(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}, "model_cfg": {"a": [1]}}))
    return folder


def _read_clip_config(path: Path) -> None:
    from frechet_gan.encoders.clip_dinov2 import check_activation

    check_activation(path / "w.safetensors", "gelu")


READERS = [
    ("png", _png, _read_image),
    ("jpeg", _jpeg, _read_image),
    ("tiff", _tiff, _read_image),
    ("zip of images", _zip, _read_images),
    ("npz of images", _array, _read_images),
    ("compressed npz of images", _packed_array, _read_images),
    ("statistics", _stats, _read_stats),
    ("cached features", _features, _read_features),
    ("history", _history, _read_history),
    ("report", _report, _read_report),
    ("checkpoint", _checkpoint, _read_generator),
    ("checkpoint of a trainer", _checkpoint, _resume),
    ("weights", _weights, _read_weights),
    ("weights in safetensors", _safetensors, _read_weights),
    ("DINOv2", _vision_transformer, _read_dinov2),
    ("configuration of CLIP", _clip_config, _read_clip_config),
    ("MNIST", _mnist, _read_mnist),
    ("CIFAR", _cifar, _read_cifar),
    ("MobileNet", _mobilenet, _read_mobilenet),
]
