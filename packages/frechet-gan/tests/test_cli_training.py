"""Commands that train: run, interrupt, resume, continue, compare."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from frechet_gan import FrechetTrainer, PostTrainer, read_checkpoint
from frechet_gan.cli import main
from frechet_gan.images.files import read_folder
from PIL import Image

SMALL = ["--width", "16", "--features", "8", "--latent", "6", "--batch", "16", "--every", "2", "--steps", "6"]


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(64):
        pixels = generator.integers(0, 256, (4, 4)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path


def _run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def _json(*args):
    result = _run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def _same(first, second):
    a, b = read_checkpoint(first), read_checkpoint(second)
    for part in ("generator", "discriminator", "random"):
        left, right = a[part], b[part]
        pairs = zip(left.values(), right.values(), strict=True) if isinstance(left, dict) else [(left, right)]
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("where", ["step", "save"])
def test_an_interrupted_run_resumes_to_the_same_result(folder, where, monkeypatch):
    train = ["train", "--data", folder / "images", *SMALL, "--loss", "frechet", "--ema", "0.9", "-o"]
    straight = _json(*train, folder / "straight")
    calls = []
    method = getattr(FrechetTrainer, where)

    def killed(self, *args):
        calls.append(1)
        if len(calls) == (5 if where == "step" else 2):  # the second save is that of step 4
            raise KeyboardInterrupt
        return method(self, *args)

    monkeypatch.setattr(FrechetTrainer, where, killed)
    assert _run(*train, folder / "killed").exit_code != 0
    monkeypatch.undo()
    resumed = _json(*train, folder / "killed")
    _same(folder / "straight" / "checkpoint.pt", folder / "killed" / "checkpoint.pt")
    assert resumed["fd"] == straight["fd"]
    histories = [json.loads((folder / n / "history.json").read_text()) for n in ("straight", "killed")]
    steps = [[p["step"] for p in h["points"]] for h in histories]
    assert steps[0] == steps[1] == [2, 4, 6]
    assert _json(*train, folder / "killed", "--resume")["fd"] == straight["fd"]  # finished: nothing is done again
    for other, what in ((("--seed", "3"), "config.seed"), (("--heldout", "pixels"), "heldout")):
        refused = _run(*train, folder / "killed", *other)
        assert refused.exit_code == 2
        assert what in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    pixels = np.zeros((4, 4), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "00.png")  # other data of the same shape
    refused = _run(*train, folder / "killed")
    assert refused.exit_code == 2
    assert "data.digest" in refused.stderr
    assert (folder / "straight" / "samples_000006.png").exists()


def test_sample_posttrain_and_compare(folder, monkeypatch):
    for method, seed in (("frechet", 0), ("ns", 0), ("ns", 1), ("hinge", 0)):
        _json(
            "train",
            "--data",
            folder / "images",
            *SMALL,
            "--loss",
            method,
            "--seed",
            seed,
            "-o",
            folder / f"{method}{seed}",
        )
    checkpoint = folder / "frechet0" / "checkpoint.pt"
    assert _json("sample", checkpoint, "--count", 7, "-o", folder / "samples")["count"] == 7
    assert read_folder(folder / "samples").shape == (7, 1, 4, 4)
    options = ["posttrain", checkpoint, "--data", folder / "images", "--steps", 4, "--batch", 16, "--every", 2, "-o"]
    straight = _json(*options, folder / "post")
    assert straight["after"]["encoders"][1]["heldout"]
    calls = []
    step = PostTrainer.step

    def killed(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(PostTrainer, "step", killed)
    assert _run(*options, folder / "post2").exit_code != 0
    monkeypatch.undo()
    assert _json(*options, folder / "post2", "--resume")["after"] == straight["after"]
    pytest.importorskip("matplotlib")
    runs = [folder / n for n in ("frechet0", "ns0", "ns1", "hinge0")]
    rows = {r["method"]: r for r in _json("compare", *runs, "--plot", folder / "curves.png")["rows"]}
    assert rows["ns"]["ratio_to_ns"] == 1
    assert rows["ns"]["seeds"] == 2
    assert (folder / "curves.png").stat().st_size > 1000
    assert "ratio_to_ns" in _run("compare", *runs).output


def test_bad_input_is_one_line(folder):
    (folder / "empty").mkdir()
    (folder / "a.pt").write_bytes(b"nothing")
    cases = [
        (("train", "--data", folder / "empty", "-o", folder / "x"), "expected images"),
        (("train", "--data", "celeba", "-o", folder / "x"), "data: expected digits"),
        (("train", "--data", folder / "images", "--net", "dcgan", "-o", folder / "x"), "size: expected"),
        (("sample", folder / "a.pt", "-o", folder / "x"), "expected a checkpoint"),
        (("posttrain", folder / "a.pt", "-o", folder / "x"), "expected a checkpoint"),
        (("compare", folder / "images"), "expected the folder of a run"),
    ]
    for arguments, message in cases:
        result = _run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (folder / "x").exists()
