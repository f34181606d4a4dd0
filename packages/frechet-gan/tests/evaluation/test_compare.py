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
    assert "1 files are no images by their names" in first.stderr
    found = json.loads(first.stdout)
    large, small = found["encoders"]
    assert large["distance"]["plugin"] == pytest.approx(TRUTH, rel=1e-5)
    assert "vale2" in large["distance"]  # 60 features, 50 images: no pilot of full rank, no interval
    assert large["low"] is None
    assert small["low"] < small["distance"]["rtd"] < small["high"]
    assert (small["count"], small["real_count"], small["width"]) == (60, 50, 12)
    assert small["seconds"]["encode"] > 0
    assert not small["from_cache"]
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
    assert in_memory == pytest.approx(from_files, rel=2e-2 if resize == "native" else 1e-4)
