"""`fid` and the command `eval`."""

import json
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from frechet_gan import FeatureStats, fid, frechet_distance
from frechet_gan.cli import main
from PIL import Image
from torch import nn

GENERATOR = np.random.default_rng(0)
A = GENERATOR.integers(0, 200, (60, 4, 5, 3), dtype=np.uint8)
B = GENERATOR.integers(40, 256, (50, 4, 5, 3), dtype=np.uint8)


def _floats(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


TRUTH = float(frechet_distance(*(_floats(p).flatten(1) for p in (A, B))))


@pytest.fixture
def paths(tmp_path):
    for name, images in (("a", A), ("b", B)):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / name / f"{i:03}.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in (tmp_path / "a").iterdir():
            archive.write(path, path.name)
    np.savez(tmp_path / "b.npz", B)
    return tmp_path


def _run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_fid_of_whatever_holds_images(paths):
    sides = [paths / "a", paths / "a.zip", A, _floats(A), [Image.fromarray(p) for p in A]]
    for side in sides:
        for other in (paths / "b", paths / "b.npz"):
            assert fid(side, other, "pixels") == pytest.approx(TRUTH, rel=1e-5)
    assert fid(_floats(A), _floats(B), nn.Flatten()) == pytest.approx(TRUTH, rel=1e-5)
    stats = FeatureStats.from_features(_floats(B).flatten(1))
    stats.save(paths / "stats.npz")
    assert fid(paths / "a", paths / "stats.npz", "pixels") == pytest.approx(TRUTH, rel=1e-5)
    assert fid((_floats(A) + 1) / 2, B, "pixels", value_range=(0, 1)) == pytest.approx(TRUTH, rel=1e-5)
    with pytest.raises(ValueError, match=r"a: .*looks like \[0, 1\]"):
        fid((_floats(A) + 1) / 2, B, "pixels")


def test_statistics_of_another_encoder_are_refused(paths):
    for name, encoder in (("one", "pixels:2"), ("two", "pixels:3")):
        assert _run("stats", paths / "b", "-o", paths / f"{name}.npz", "--encoder", encoder).exit_code == 0
    assert FeatureStats.load(paths / "one.npz").encoder == "pixels:2 native"
    for arguments in (
        ("fd", paths / "a", paths / "one.npz", "--encoder", "pixels:3"),
        ("fd", paths / "one.npz", paths / "two.npz"),
    ):
        result = _run(*arguments)
        assert result.exit_code == 2
        assert "pixels:2 native" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="statistics of one encoder"):
        fid(paths / "a", paths / "one.npz", "pixels:3")


def test_eval_reports_and_caches(paths):
    (paths / "a" / "notes.txt").write_text("")
    arguments = ["eval", paths / "a", paths / "b", "--encoder", "pixels,pixels:2", "--cache", paths / "cache", "--json"]
    first = _run(*arguments)
    assert first.exit_code == 0, first.output
    assert "1 file is no image by name" in first.stderr
    found = json.loads(first.stdout)
    large, small = found["encoders"]
    assert large["distance"]["plugin"] == pytest.approx(TRUTH, rel=1e-5)
    assert "vale2" in large["distance"]  # 60 features, 50 images: no pilot of full rank, no interval
    assert large["low"] is None
    assert small["low"] < small["distance"]["rtd"] < small["high"]
    assert (small["count"], small["real_count"], small["width"]) == (60, 50, 12)
    assert small["seconds"]["encode"] > 0
    assert not small["from_cache"]
    assert small["rows"]["plugin"] == [60, 50]
    assert small["rows"]["manifold"] == [25, 25]
    again = json.loads(_run(*arguments).stdout)
    assert again["encoders"][0]["from_cache"]
    assert again["encoders"][0]["distance"] == large["distance"]
    Image.fromarray(B[1]).save(paths / "b" / "000.png")
    assert not json.loads(_run(*arguments).stdout)["encoders"][0]["from_cache"]
    text = _run(*arguments[:-1]).stdout
    assert "Frechet distance (plug-in)" in text
    assert "near copies" in text


def test_eval_of_real_data_raises_the_alarm(paths):
    result = _run("eval", paths / "a", paths / "a.zip", "--encoder", "pixels:2")
    assert result.exit_code == 0, result.output
    assert "alarm: memorization: 100 %" in result.stdout


def test_num_is_a_seeded_choice(paths):
    def value(*more):
        return json.loads(_run("eval", paths / "a", paths / "b", "--encoder", "pixels:2", "--json", *more).stdout)

    few = value("--num", 20)
    assert few["encoders"][0]["count"] == few["encoders"][0]["real_count"] == 20
    assert few["encoders"][0]["distance"] == value("--num", 20)["encoders"][0]["distance"]
    assert few["encoders"][0]["distance"] != value("--num", 20, "--seed", 1)["encoders"][0]["distance"]
    result = _run("eval", paths / "a", paths / "b", "--num", 55, "--encoder", "pixels")
    assert result.exit_code == 2
    assert "expected at least 55 images (--num), found 50" in result.stderr


@pytest.mark.parametrize("resize", ["native", "clean", "legacy-tf", "legacy-pytorch"])
def test_files_and_memory_are_resized_alike(paths, resize):
    from frechet_gan import FrozenEncoder

    encoder = FrozenEncoder(nn.Flatten(), 7)
    from_files = fid(paths / "a", paths / "b", encoder, resize=resize)
    in_memory = fid(A, B, encoder, resize=resize)
    assert in_memory == pytest.approx(from_files, rel=1e-4)


def test_images_of_several_sizes_and_loaders(paths):
    from frechet_gan import FrozenEncoder

    encoder = FrozenEncoder(nn.Flatten(), 6)
    odd = [Image.fromarray(p).resize((9, 7 + i % 2)) for i, p in enumerate(A)]
    (paths / "odd").mkdir()
    for i, image in enumerate(odd):
        image.save(paths / "odd" / f"{i:03}.png")
    truth = fid(paths / "odd", B, encoder)
    arrays = [np.asarray(i) for i in odd]
    floats = [a / 255 for a in arrays]
    assert fid(odd, B, encoder, batch=7) == pytest.approx(truth, rel=1e-5)
    assert fid(({"image": i, "label": 0} for i in odd), B, encoder) == pytest.approx(truth, rel=1e-5)
    assert fid(floats, B, encoder, value_range=(0, 1)) == pytest.approx(truth, rel=1e-5)
    data = torch.utils.data.TensorDataset(torch.from_numpy(A).permute(0, 3, 1, 2), torch.zeros(60))
    loader = torch.utils.data.DataLoader(data, 7)
    assert fid(loader, B, encoder) == pytest.approx(fid(A, B, encoder), rel=1e-9)
    assert fid(data, B, encoder, num=20) == pytest.approx(fid(A, B, encoder, num=20), rel=1e-9)
    for bad, options, message in (
        (floats, {}, r"a: .*looks like \[0, 1\]"),
        (arrays, {"encoder": nn.Flatten()}, "a: expected images of one shape"),
        (loader, {"num": 5}, "num: expected None, because a does not say"),
        (A, {"num": 61}, r"a: expected at least 61 images \(--num\), found 60"),
        ([], {}, "a: expected images, got none"),
        (A / 255, {"value_range": (1, 1)}, "value_range: expected a smallest and a larger"),
        (A.astype(float), {"value_range": (0, 1)}, r"a: expected values in \[0, 1\], got \[0, 199\]"),
        (A, {"device": "cuda:99"}, "device: expected a device that torch finds here, got 'cuda:99'"),
        (A, {"device": "gpu"}, "device: expected a device"),
    ):
        with pytest.raises(ValueError, match=message):
            fid(bad, B, **{"encoder": encoder, **options})


def test_cache_of_statistics_is_by_content(paths):
    first = fid(paths / "a", paths / "b", "pixels", cache=paths / "cache")
    kept = sorted((paths / "cache").glob("stats-*.npz"))
    assert len(kept) == 2
    (paths / "a").rename(paths / "elsewhere")
    assert fid(paths / "elsewhere", paths / "b", "pixels", cache=paths / "cache") == first
    assert sorted((paths / "cache").glob("*.npz")) == kept
    Image.fromarray(A[1]).save(paths / "elsewhere" / "000.png")
    assert fid(paths / "elsewhere", paths / "b", "pixels", cache=paths / "cache") != first
    result = _run("stats", paths / "b", "-o", paths / "s.npz", "--encoder", "pixels", "--cache", paths / "cache")
    assert result.exit_code == 0, result.output
    assert fid(paths / "b", paths / "s.npz", "pixels", resize="native") < 1e-9


def test_formats_and_names_that_would_mislead(paths):
    (paths / "jpeg").mkdir()
    for i, pixels in enumerate(B):
        Image.fromarray(pixels).save(paths / "jpeg" / f"{i:03}.jpg")
    result = _run("eval", paths / "a", paths / "jpeg", "--encoder", "pixels:1,pixels:2")
    assert result.exit_code == 0, result.output
    assert "note: 0 % of the generated and 100 % of the real images are JPEG files" in result.stderr
    assert "| pixels:1" in result.stdout  # two columns, not one under one name
    assert "pixels:2" in result.stdout
    twice = _run("eval", paths / "a", paths / "b", "--encoder", "pixels,pixels")
    assert twice.exit_code == 2
    assert "encoders: expected at least one name, and each once" in twice.stderr


def test_parts_are_drawn_from_folders_in_the_order_of_their_classes(monkeypatch):
    from frechet_gan.evaluation import report

    monkeypatch.setattr(report, "MANIFOLD_ROWS", 100)
    monkeypatch.setattr(report, "MMD_ROWS", 100)
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(400)[:, None] // 200 * 20.0
    sides = [classes + torch.randn(400, 4, generator=generator) for _ in range(2)]
    sides[1] = sides[1].flip(0)  # the same law, with the classes the other way round
    view = report.judge("any", [sides[0]], sides[1])
    assert view.precision > 0.8
    assert view.coverage > 0.8
    assert view.memorized < 0.3
    assert view.cmmd < 5
    assert view.rows["manifold"] == (100, 100)
    assert view.rows["cmmd"] == (100, 100)
