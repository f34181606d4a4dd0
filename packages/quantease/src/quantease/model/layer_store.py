"""Quantized layers on disk, one file per matrix: the checkpoint of a running job and the record of a finished one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from core_tensor import pack_bits, unpack_bits
from core_tensor.app.files import atomic_path, digest, reading, write_text
from core_tensor.checks import check_number, check_tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantease.model.weights import metadata
from quantease.problem.config import SCALE_DTYPES
from quantease.problem.gram import Shrinkage
from quantease.problem.layer import LayerReport, Outliers, QuantizedLayer


@dataclass(frozen=True)
class Tuned:
    """What tuning changed in a block; see `model.tune`.

    Attributes:
        scales: Scales by matrix, which replace those of the layers' files, each of shape (q, G).
        norms: Weights of the norms by parameter name in the block.
    """

    scales: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


TUNED = "tuned.safetensors"
"""File of a folder (a block's, or the store's for what was tuned end to end) that holds scales and norms."""


class LayerStore:
    """A folder of quantized layers: `<block>/<matrix>.safetensors` with packed codes, and `.seconds` beside.

    Tuned scales and norms lie apart, in a file per block and one for the whole model, each of which appears as a whole;
    the latter counts where both are. The layers' files keep the scales from before the tuning, for which the reports
    and certificates in them hold.

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
            "weight_digest": digest(weight),
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
            The layer, with tuned scales where there are some.

        Raises:
            ValueError: If the file is absent, truncated or foreign, or came from other weights.
        """
        path = self._path(block, name)
        header = self._header(path)
        with reading(path, "a layer that quantease wrote"):
            if weight is not None and header["weight_digest"] != digest(weight):
                raise ValueError(f"{path}: came from other weights than the model's; use a new folder")
            layer = _layer(header, load_file(path), self._seconds(block, name))
        tuned = self.tuned(block)
        if tuned is None or name not in tuned.scales:
            return layer
        scales, shape = tuned.scales[name], tuple(layer.scales.shape)
        check_tensor(f"tuned scales of {name}", scales, shape=shape, dtype=layer.scales.dtype, finite=True)
        return replace(layer, scales=scales)

    def has_tuned(self, block: int | None = None) -> bool:
        """Whether a block was tuned.

        Args:
            block: Its number; None for the whole model, end to end.

        Returns:
            True or false.
        """
        return self._tuned_path(block).exists()

    def save_tuned(self, tuned: Mapping[int, Tuned], losses: Mapping[str, float], block: int | None = None) -> None:
        """Store what tuning found; a kill leaves either the whole file or none.

        Args:
            tuned: By number of the block.
            losses: Before and after.
            block: The only block; None for the whole model.
        """
        tensors = {
            f"{index}/{kind}/{name}": value.detach().cpu().contiguous()
            for index, found in tuned.items()
            for kind, values in (("scales", found.scales), ("norms", found.norms))
            for name, value in values.items()
        }
        with atomic_path(self._tuned_path(block)) as temporary:
            save_file(tensors, temporary, metadata={"quantease": json.dumps(dict(losses), sort_keys=True)})

    def tuned(self, block: int) -> Tuned | None:
        """What tuning changed in a block.

        Args:
            block: Its number.

        Returns:
            Scales and norms; None where nothing was tuned.

        Raises:
            ValueError: If the file is truncated or foreign.
        """
        path = next((p for p in (self._tuned_path(None), self._tuned_path(block)) if p.exists()), None)
        if path is None:
            return None
        metadata(path)
        found: dict[str, dict[str, Tensor]] = {"scales": {}, "norms": {}}
        with reading(path, "scales and norms that quantease tuned"), safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                number, kind, name = key.split("/", 2)
                if int(number) == block:
                    found[kind][name] = file.get_tensor(key).clone()
        return Tuned(**found)

    def tuning_losses(self, block: int | None = None) -> dict[str, float]:
        """The loss before and after tuning.

        Args:
            block: Number of the block; None for the whole model.

        Returns:
            `before` and `after`.
        """
        return metadata(self._tuned_path(block))

    def _tuned_path(self, block: int | None) -> Path:
        return self.folder / TUNED if block is None else self.folder / f"{block:04d}" / TUNED

    def report(self, block: int, name: str) -> LayerReport:
        """The report of a layer, without its codes.

        Args:
            block: Number of its block.
            name: The matrix's name in the block.

        Returns:
            The report, without row gaps.
        """
        path = self._path(block, name)
        with reading(path, "a layer that quantease wrote"):
            return _report(self._header(path)["report"], None, self._seconds(block, name))

    def _header(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            raise ValueError(f"{path}: expected a quantized layer, found no file")
        return metadata(path)

    def _seconds(self, block: int, name: str) -> float:
        times = self._path(block, name).with_suffix(".seconds")
        if not times.exists():
            return 0.0
        with reading(times, "a number of seconds"):
            return float(times.read_text())


def _layer(header: dict[str, Any], tensors: dict[str, Tensor], seconds: float) -> QuantizedLayer:
    """The layer that a file holds; what does not fit together raises."""
    check_number("bits", header["bits"], low=1, high=8, integer=True)
    group = tensors["group"]
    scales, zeros = tensors["scales"], tensors["zeros"]
    check_tensor("group", group, ndim=1, dtype=torch.int64, nonempty=True)
    check_tensor("scales", scales, ndim=2, dtype=tuple(SCALE_DTYPES.values()), finite=True, nonempty=True)
    check_tensor("zeros", zeros, shape=tuple(scales.shape), dtype=torch.uint8)
    words = -(-len(group) * header["bits"] // 32)
    check_tensor("codes", tensors["codes"], shape=(scales.shape[0], words), dtype=torch.int32)
    if not 0 <= int(group.min()) <= int(group.max()) < scales.shape[1]:
        raise ValueError(f"group: expected numbers in [0, {scales.shape[1]})")
    outliers = None
    if "outliers.values" in tensors:
        outliers = Outliers(*(tensors[f"outliers.{k}"] for k in ("offsets", "columns", "values")))
        outliers.check(scales.shape[0], len(group))
    return QuantizedLayer(
        codes=unpack_bits(tensors["codes"], header["bits"], len(group)),
        scales=scales,
        zeros=zeros,
        group=group,
        bits=header["bits"],
        symmetric=bool(header["symmetric"]),
        outliers=outliers,
        report=_report(header["report"], tensors.get("row_gaps"), seconds),
    )


def _report(values: dict[str, Any], row_gaps: Tensor | None, seconds: float) -> LayerReport:
    known = {f.name for f in fields(LayerReport)} - {"row_gaps", "shrinkage", "trace", "seconds"}
    return LayerReport(
        **{key: value for key, value in values.items() if key in known},
        shrinkage=Shrinkage(**values["shrinkage"]),
        trace=tuple((name, value) for name, value in values["trace"]),
        row_gaps=row_gaps,
        seconds=seconds,
    )
