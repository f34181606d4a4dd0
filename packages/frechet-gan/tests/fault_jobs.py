"""Long commands of frechet-gan for `tools/faults.py`."""

from pathlib import Path

import numpy as np
from frechet_gan import read_checkpoint
from PIL import Image

SMALL = "--width 16 --features 8 --latent 6 --batch 16 --every 5 --steps 60 --threads 1"
JOBS = {
    "train": {"command": f"frechet-gan train --data images {SMALL} -o OUT", "varies": ["history.*", "run.json"]},
    "stats": {"command": "frechet-gan stats images --encoder pixels -o OUT/stats.npz"},
}


def prepare(folder: Path) -> None:
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(256):
        Image.fromarray(generator.integers(0, 256, (8, 8)).astype(np.uint8)).save(folder / "images" / f"{i:03}.png")


def content(path: Path) -> bytes:
    """A checkpoint also holds times."""
    if path.name != "checkpoint.pt":
        return path.read_bytes()
    networks = read_checkpoint(path)
    tensors = [networks[part][name] for part in ("generator", "discriminator") for name in sorted(networks[part])]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)
