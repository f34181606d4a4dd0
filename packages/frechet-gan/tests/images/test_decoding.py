"""What modes, depths, orientation and transparency of an image file become."""

import numpy as np
import pytest
import torch
from frechet_gan.images.arrays import to_image, to_images
from frechet_gan.images.decoding import decode
from frechet_gan.images.files import read_image
from PIL import Image


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / f"x.{suffix}")
    pixels = decode(tmp_path / f"x.{suffix}", "x")
    assert pixels.shape == (16, 16, 1)
    assert (pixels[:, :, 0].ravel() == np.arange(256)).all()


def test_a_range_no_header_gives_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 1e5, np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(ValueError, match="expected 8 or 16 bits per channel"):
            read_image(tmp_path / name)


def test_orientation_is_honored(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # left half white
    for orientation, expected in ((1, pixels), (3, pixels[:, ::-1]), (6, np.rot90(pixels, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        assert (decode(tmp_path / "x.png", "x") == expected).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "x.png", transparency=0)
    else:
        clear.convert(mode).save(tmp_path / "x.png")
    pixels = decode(tmp_path / "x.png", "x")
    assert pixels[0, 0].tolist() == [255] * pixels.shape[2]
    assert pixels[0, 1].tolist() == [0] * pixels.shape[2]


def test_broken_and_huge_images(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for cut in (0, 8, 40, len(content) // 2):
        with pytest.raises(ValueError, match="x: expected a readable image"):
            decode(content[:cut], "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="x: expected a readable image"):
        decode(content, "x")


BYTES = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "item",
    [
        BYTES,
        BYTES.transpose(2, 0, 1),
        torch.from_numpy(BYTES),
        Image.fromarray(BYTES),
        (Image.fromarray(BYTES), 3),
        {"image": BYTES, "label": 1},
        {"pixel_values": torch.from_numpy(BYTES).permute(2, 0, 1)},
    ],
    ids=["hwc", "chw", "tensor", "pil", "pair", "dict", "pixel_values"],
)
def test_whatever_a_user_holds_is_recognized(item):
    assert torch.equal(to_image(item), torch.from_numpy(BYTES).permute(2, 0, 1))


def test_batches_and_ranges():
    images = np.stack([BYTES, BYTES[::-1]])
    truth = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(to_images(images), truth)
    assert torch.allclose(to_images([Image.fromarray(i) for i in images]), truth)
    assert torch.allclose(to_images(truth), truth)
    assert torch.allclose(to_images((truth + 1) / 2, value_range=(0, 1)), truth, atol=1e-6)
    assert torch.allclose(to_images((truth + 1) * 127.5, value_range=(0, 255)), truth, atol=1e-6)
    grey = Image.fromarray(BYTES[:, :, 0])
    assert to_images([grey, Image.fromarray(BYTES)]).shape == (2, 3, 5, 6)  # a grey one among colored ones


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((torch.rand(4, 3, 5, 5) + 1) * 100, r"expected values in \[-1, 1\], got .* x / 127.5 - 1"),
        (torch.rand(4, 3, 5, 5), r"looks like \[0, 1\]"),
        (torch.full((4, 3, 5, 5), torch.nan), "finite"),
        (torch.zeros(4, 2, 5, 5), "1 or 3 channels"),
        (torch.zeros(3, 5, 5), "four dimensions"),
        (np.zeros((2, 5, 5, 3), np.int64), "uint8 or floating"),
        ([np.zeros((5, 5, 3), np.int64)], "uint8 or floating"),
        ([{"picture": 1}], "expected an entry image"),
        ("folder", "expected a tensor"),
        ([np.zeros((5, 5, 4), np.uint8)], "c = 1 or 3"),
        ([np.zeros((5, 5, 3), np.uint8), np.zeros((6, 5, 3), np.uint8)], "one shape"),
    ],
)
def test_what_is_not_recognized_is_refused_by_name(images, message):
    with pytest.raises((ValueError, TypeError), match=f"^x: .*{message}"):
        to_images(images, "x")
