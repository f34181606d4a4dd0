import json

import numpy as np
import pytest
from click.testing import CliRunner
from frechet_gan import FeatureStats, frechet_distance
from frechet_gan.cli import main
from frechet_gan.images.files import read_folder
from PIL import Image


@pytest.fixture
def folders(tmp_path):
    generator = np.random.default_rng(0)
    for name, shift in (("a", 0), ("b", 60)):
        (tmp_path / name).mkdir()
        for i in range(44):
            pixels = generator.integers(0, 190, (4, 5)) + shift
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def _run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.parametrize("estimator", ["plugin", "fid_inf", "vale2", "rtd"])
def test_fd_of_two_folders(folders, estimator):
    result = _run("fd", folders / "a", folders / "b", "--encoder", "pixels", "--estimator", estimator, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    if estimator == "rtd":
        assert found["low"] < found["fd"] < found["high"]
    else:
        assert found["low"] is found["high"] is None
    assert found["counts"] == [44, 44]
    assert found["width"] == 20
    if estimator == "plugin":
        truth = float(frechet_distance(*(read_folder(folders / n).flatten(1) for n in "ab")))
        assert found["fd"] == pytest.approx(truth, rel=1e-6)
        assert "below 4 per feature" in found["warning"]


def test_stats_files_stand_in_for_folders(folders):
    for name in "ab":
        result = _run("stats", folders / name, "-o", folders / f"{name}.npz", "--encoder", "pixels", "--json")
        assert json.loads(result.stdout)["count"] == 44
    truth = json.loads(_run("fd", folders / "a", folders / "b", "--encoder", "pixels", "--json").stdout)["fd"]
    for left, right in (("a.npz", "b"), ("a", "b.npz"), ("a.npz", "b.npz")):
        result = _run("fd", folders / left, folders / right, "--encoder", "pixels", "--json")
        assert json.loads(result.stdout)["fd"] == pytest.approx(truth, rel=1e-6)
    assert FeatureStats.load(folders / "a.npz").count == 44
    text = _run("fd", folders / "a", folders / "b", "--encoder", "pixels", "--seeds", "2", "--estimator", "rtd")
    assert text.output.startswith("Frechet distance")


def test_bad_input_is_one_line_and_exit_code_2(folders):
    (folders / "empty").mkdir()
    (folders / "broken").mkdir()
    (folders / "broken" / "x.png").write_bytes(b"no image")
    (folders / "mixed").mkdir()
    for size in (4, 6):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(folders / "mixed" / f"{size}.png")
    np.savez(folders / "foreign.npz", features=np.zeros((3, 3)))
    cases = {
        "empty": "expected images",
        "broken": "expected a readable image",
        "mixed": "expected an image of shape",
        "foreign.npz": "no array mu, sigma",
    }
    for name, message in cases.items():
        result = _run("fd", folders / "a", folders / name, "--encoder", "pixels")
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert _run("fd", folders / "a", folders / "absent").exit_code == 2
    for width in (3, 4):
        np.savez(folders / f"wide{width}.npz", mu=np.zeros(width), sigma=np.eye(width))
    result = _run("fd", folders / "wide3.npz", folders / "wide4.npz")
    assert result.exit_code == 2
    assert "y: expected features of width 3 as x has, got 4" in result.stderr
    unknown = _run("fd", folders / "a", folders / "b", "--encoder", "resnet")
    assert unknown.exit_code == 2
    assert "encoder: expected" in unknown.stderr
    wide = _run("stats", folders / "a", "-o", folders / "out.npy", "--encoder", "pixels")
    assert wide.exit_code == 2
    assert not (folders / "out.npy").exists()
    mixed = _run("fd", folders / "a", folders / "mixed", "--encoder", "pixels", "--size", "8")
    assert mixed.exit_code == 0, mixed.output
