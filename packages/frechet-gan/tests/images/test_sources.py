"""Folders, zip files and npz files of images; resizing; worker processes."""

import pathlib
import zipfile

import numpy as np
import pytest
import torch
from frechet_gan.images.files import image_batches, read_bytes
from frechet_gan.images.resizing import resized
from frechet_gan.images.sources import open_images
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(root / ("below" if i > 3 else ".") / f"{i}.png")
    return root


def _all(path, **options):
    return torch.cat(list(image_batches(path, 3, **options)))


TRUTH = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_folder_zip_and_npz_hold_the_same_images(folder, tmp_path):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for name in names:
            archive.write(folder / name, name)
        archive.writestr("__MACOSX/._0.png", b"shadow")
    np.savez(tmp_path / "stored.npz", PIXELS)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=PIXELS)
    for path in (folder, tmp_path / "i.zip", tmp_path / "stored.npz", tmp_path / "packed.npz"):
        for workers in (0, 2):
            assert torch.equal(_all(path, workers=workers), TRUTH), path
        assert torch.equal(read_bytes(path), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert torch.equal(_all(folder, chosen=[1, 5]), TRUTH[[1, 5]])


def test_a_grey_picture_among_colored_ones(folder):
    Image.fromarray(PIXELS[0, :, :, 0]).save(folder / "0.png")
    images = _all(folder)
    assert images.shape == (7, 3, 6, 5)
    assert torch.equal(images[0, 0], images[0, 2])
    for i in range(7):
        Image.fromarray(PIXELS[i, :, :, 0]).save(folder / ("below" if i > 3 else ".") / f"{i}.png")
    assert _all(folder).shape == (7, 1, 6, 5)
    assert _all(folder, channels=3).shape == (7, 3, 6, 5)


def test_what_is_skipped_is_named_and_links_are_followed(folder, tmp_path):
    for name in ("readme.txt", "x.npy", ".hidden.png"):
        (folder / name).write_bytes(b"")
    for suffix in ("ppm", "jfif", "pgm"):
        picture = Image.fromarray(PIXELS[0] if suffix != "pgm" else PIXELS[0, :, :, 0])
        picture.save(folder / f"z.{suffix}", format="JPEG" if suffix == "jfif" else None)
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(PIXELS[0]).save(other / "linked.png")
    pathlib.Path(folder / "link").symlink_to(other)
    pathlib.Path(folder / "below" / "circle").symlink_to(folder)
    source = open_images(folder)
    assert len(source) == 7 + 3 + 1
    assert "link/linked.png" in source.names
    assert source.skipped == ["readme.txt", "x.npy"]
    assert "2 files are no image by name and skipped (readme.txt, x.npy)" in source.note()


def test_digest_follows_the_content(folder):
    before = open_images(folder).digest()
    (folder / "readme.txt").write_text("not an image")
    assert open_images(folder).digest() == before
    Image.fromarray(PIXELS[1]).save(folder / "0.png")
    assert open_images(folder).digest() != before


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"PK\3\4")
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((3, 4, 4, 2), np.uint8))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", images=PIXELS)
    np.savez(tmp_path / "cut.npz", arr_0=PIXELS)
    (tmp_path / "x.txt").write_text("")
    for name in ("empty", "x.zip", "wide.npz", "float.npz", "other.npz", "x.txt"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            open_images(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "absent")


def test_tensorflow_1_resize_by_definition():
    size, (h, w) = 9, PIXELS.shape[1:3]
    found = resized(PIXELS[0], size, "legacy-tf").double()
    image = PIXELS[0].astype(float)
    for i in range(size):
        for j in range(size):
            y, x = i * h / size, j * w / size
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            truth = top * (1 - (y - y0)) + bottom * (y - y0)
            assert np.allclose(found[:, i, j], truth, atol=1e-3)


@pytest.mark.parametrize("mode", ["native", "clean", "legacy-tf", "legacy-pytorch"])
def test_every_mode_keeps_a_plain_image_and_its_own_size(mode):
    plain = np.full((6, 5, 3), 77, np.uint8)
    assert torch.allclose(resized(plain, 12, mode).float(), torch.tensor(77.0), atol=1e-3)
    assert torch.equal(resized(PIXELS[0][:5], 5, mode), torch.from_numpy(PIXELS[0][:5].copy()).permute(2, 0, 1))
    assert resized(PIXELS[0], 3, mode).shape == (3, 3, 3)
    assert resized(PIXELS[0][:, :, :1], 3, mode).shape == (1, 3, 3)


def test_modes_differ_where_it_matters():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255  # antialiasing makes them grey
    spread = {
        m: float(resized(stripes, 24, m).float().std()) for m in ("native", "clean", "legacy-tf", "legacy-pytorch")
    }
    assert max(spread["native"], spread["clean"]) < 25
    assert min(spread["legacy-tf"], spread["legacy-pytorch"]) > 60
