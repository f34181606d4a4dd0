"""The readers of files that somebody else can have written, for the hostile harness."""

import gzip
import struct
import zipfile
from pathlib import Path


def _ledger(folder: Path) -> Path:
    from core_tensor.app.files import write_json

    row = {"method": "sam", "rho": 0.1, "num_micro_batches": 1, "seed": 0, "validation": 90.0, "test": 91.0}
    row |= {"train_loss": 0.1, "step_ms": 2.0, "lambda_max": 3.0, "trace": None, "history": [{"sharpness_gap": 0.1}]}
    runs = {f"sam rho=0.1 m=1 seed={seed}": row | {"seed": seed} for seed in range(3)}
    write_json(folder / "runs.json", {"runs": runs, "rows": []})
    return folder / "runs.json"


def _read_ledger(path: Path) -> None:
    from msam.study.compare import Ledger, as_row, sensitivity, summarise

    runs = list(Ledger(path)._runs.values())
    summarise(runs)
    sensitivity(runs)
    [as_row(run) for run in runs]


def _mnist(folder: Path) -> Path:
    (folder / "mnist").mkdir()
    for part, n in (("train", 2005), ("t10k", 5)):
        images = struct.pack(">I3I", 0x803, n, 28, 28) + bytes(784 * n)
        labels = struct.pack(">2I", 0x801, n) + bytes(i % 10 for i in range(n))
        (folder / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1, mtime=0))
        (folder / "mnist" / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1, mtime=0))
    return folder


def _read_mnist(path: Path) -> None:
    from msam.study.data import mnist

    task = mnist(path, train=3)
    task.model()(task.train[0])


def _polarity(folder: Path) -> Path:
    (folder / "nlp_classification").mkdir()
    with zipfile.ZipFile(folder / "nlp_classification" / "sentence_polarity.zip", "w") as archive:
        for part in ("neg", "pos"):
            text = "\n".join(f"a {part} film {i % 7}" for i in range(1505))
            archive.writestr(f"sentence_polarity/rt-polarity.{part}", text, zipfile.ZIP_DEFLATED)
    return folder


def _read_polarity(path: Path) -> None:
    from msam.study.data import polarity

    task = polarity(path, train=4, vocabulary=20)
    task.model()(task.train[0])


READERS = [
    ("ledger", _ledger, _read_ledger),
    ("mnist", _mnist, _read_mnist),
    ("sentence polarity", _polarity, _read_polarity),
]
