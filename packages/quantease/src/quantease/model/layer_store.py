"""Quantized layers on disk, one file per matrix: the checkpoint of a running job and the record of a finished one."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from core_tensor import pack_bits, unpack_bits
from core_tensor.app.files import atomic_path, write_text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantease.model.weights import metadata
from quantease.problem.gram import Shrinkage
from quantease.problem.layer import LayerReport, Outliers, QuantizedLayer


class LayerStore:
    """A folder of quantized layers: `<block>/<matrix>.safetensors` with packed codes, and `.seconds` beside.

    The files hold nothing that differs between two runs of the same job, so an interrupted and resumed run leaves the
    same bytes as one that was not; times are kept apart.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, block: int, name: str) -> Path:
        return self.folder / f"{block:04d}" / f"{name}.safetensors"

    def has(self, block: int, name: str) -> bool:
        """Whether a layer is stored.

        Args:
            block: Number of its block.
            name: The matrix's name in the block.

        Returns:
            True or false.
        """
        return self._path(block, name).exists()

    def save(self, block: int, name: str, layer: QuantizedLayer, weight: Tensor) -> None:
        """Store a layer; a kill leaves either the whole file or none.

        Args:
            block: Number of its block.
            name: The matrix's name in the block.
            layer: The layer.
            weight: The weights it came from, whose digest is stored.
        """
        tensors = {
            "codes": pack_bits(layer.codes.cpu(), layer.bits),
            "scales": layer.scales,
            "zeros": layer.zeros,
            "group": layer.group,
        }
        if layer.outliers is not None:
            tensors |= {f"outliers.{k}": getattr(layer.outliers, k) for k in ("offsets", "columns", "values")}
        if layer.report.row_gaps is not None:
            tensors["row_gaps"] = layer.report.row_gaps
        header = {
            "block": block,
            "name": name,
            "bits": layer.bits,
            "symmetric": layer.symmetric,
            "report": replace(layer.report, seconds=0.0).to_dict(),
            "weight_sha256": digest(weight),
        }
        with atomic_path(self._path(block, name)) as temporary:
            kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(kept, temporary, metadata={"quantease": json.dumps(header, sort_keys=True)})
        write_text(self._path(block, name).with_suffix(".seconds"), f"{layer.report.seconds:.3f}\n")

    def load(self, block: int, name: str, weight: Tensor | None = None) -> QuantizedLayer:
        """Read a layer.

        Args:
            block: Number of its block.
            name: The matrix's name in the block.
            weight: If given, the weights that it must have come from.

        Returns:
            The layer.

        Raises:
            ValueError: If the file is absent, truncated or foreign, or came from other weights.
        """
        path = self._path(block, name)
        if not path.exists():
            raise ValueError(f"{path}: expected a quantized layer, found no file")
        header = metadata(path)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a whole safetensors file ({error})") from error
        if weight is not None and header["weight_sha256"] != digest(weight):
            raise ValueError(f"{path}: came from other weights than the model's; use a new folder")
        outliers = None
        if "outliers.values" in tensors:
            outliers = Outliers(*(tensors[f"outliers.{k}"] for k in ("offsets", "columns", "values")))
        return QuantizedLayer(
            codes=unpack_bits(tensors["codes"], header["bits"], len(tensors["group"])),
            scales=tensors["scales"],
            zeros=tensors["zeros"],
            group=tensors["group"],
            bits=header["bits"],
            symmetric=header["symmetric"],
            outliers=outliers,
            report=_report(header["report"], tensors.get("row_gaps"), self._seconds(block, name)),
        )

    def _seconds(self, block: int, name: str) -> float:
        times = self._path(block, name).with_suffix(".seconds")
        return float(times.read_text()) if times.exists() else 0.0


def digest(weight: Tensor) -> str:
    """SHA-256 of a tensor's values.

    Args:
        weight: Any tensor.

    Returns:
        Hexadecimal digest.
    """
    raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def _report(values: dict[str, Any], row_gaps: Tensor | None, seconds: float) -> LayerReport:
    known = {f.name for f in fields(LayerReport)} - {"row_gaps", "shrinkage", "trace", "seconds"}
    return LayerReport(
        **{key: value for key, value in values.items() if key in known},
        shrinkage=Shrinkage(**values["shrinkage"]),
        trace=tuple((name, value) for name, value in values["trace"]),
        row_gaps=row_gaps,
        seconds=seconds,
    )
