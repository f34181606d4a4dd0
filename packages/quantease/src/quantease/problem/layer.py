"""What quantizing a layer returns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from core_tensor.checks import check_tensor
from torch import Tensor

from quantease.problem.gram import Shrinkage
from quantease.problem.grid import Grid


@dataclass(frozen=True)
class Outliers:
    """Weights kept beside the codes, a sparse matrix by rows that is added to the dequantized codes.

    Attributes:
        offsets: Start of every row in the two other tensors, shape (q + 1,), int64.
        columns: Input feature of every outlier, ascending in a row, shape (nnz,), int32.
        values: What is added, shape (nnz,), in the storage dtype.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, values: Tensor, mask: Tensor, dtype: torch.dtype) -> "Outliers":
        """Gather the masked entries of a matrix.

        Args:
            values: Shape (q, p).
            mask: Which entries are outliers, shape (q, p), bool.
            dtype: Storage of the values.

        Returns:
            The sparse matrix.
        """
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(offsets, mask.nonzero()[:, 1].to(torch.int32), values[mask].to(dtype))

    def check(self, rows: int, features: int) -> None:
        """Refuse positions outside the matrix, before anything computes with them.

        Args:
            rows: q.
            features: p.

        Raises:
            TypeError: If a dtype does not fit.
            ValueError: If a shape or a position does not fit.
        """
        check_outliers(self.offsets, self.columns, self.values, rows, features)

    @property
    def rows(self) -> Tensor:
        """Output feature of every outlier, shape (nnz,), int64."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def to_dense(self, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix with zeros in it.

        Args:
            features: p.
            dtype: Of the result.

        Returns:
            Shape (q, p).
        """
        dense = torch.zeros(len(self.offsets) - 1, features, dtype=dtype, device=self.values.device)
        dense[self.rows, self.columns.long()] = self.values.to(dtype)
        return dense


def check_outliers(offsets: Tensor, columns: Tensor, values: Tensor, rows: int, features: int) -> None:
    """Refuse outliers in compressed sparse rows whose positions lie outside a matrix.

    Args:
        offsets: Shape (rows + 1,), int64.
        columns: Shape (nnz,), int32.
        values: Shape (nnz,), floating point.
        rows: q.
        features: p.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or a position does not fit.
    """
    count = values.shape[0] if values.ndim == 1 else -1
    check_tensor("outlier_values", values, ndim=1, dtype=(torch.float16, torch.bfloat16, torch.float32), finite=True)
    check_tensor("outlier_columns", columns, shape=(count,), dtype=torch.int32)
    check_tensor("outlier_offsets", offsets, shape=(rows + 1,), dtype=torch.int64)
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((steps < 0).any()):
        raise ValueError(f"outlier_offsets: expected numbers that rise from 0 to {count}, got other ones")
    if count and not 0 <= int(columns.min()) <= int(columns.max()) < features:
        raise ValueError(
            f"outlier_columns: expected numbers in [0, {features}), got {int(columns.min())} to {int(columns.max())}"
        )


@dataclass(frozen=True)
class LayerReport:
    r"""How the quantization of a layer went.

    Attributes:
        algorithm: Name of the algorithm.
        bits_per_weight: Stored bits over the number of weights: codes, scales, zero points and outliers.
        calibration_error: Relative error on all calibration tokens, without shrinkage, as exported.
        heldout_error: Relative error on tokens that took no part, by cross-validation over the folds on a sample of
            rows at the chosen shrinkage; None where nothing was held out.
        shrinkage: What the Gram matrix was shrunk by.
        grid: `clip` or `minmax`: the grid of the starts; refits change its scales.
        objective: $f$ under the shrunken Gram matrix as exported, in float64, relative to that of $\hat W = 0$.
        trace: Names of the steps and the relative objective after each.
        cw_minimum: Whether no single code of any row can be changed for the better, checked in float64; None for
            algorithms that do not aim at it.
        row_gaps: By how much the best single change would lower each row's objective, relative to it, shape (q,),
            float64; None where `cw_minimum` is.
        starts: Number of rows that each start won; empty for algorithms with one start.
        tokens: Number of calibration tokens; None for a bare Gram matrix.
        target_factor: Part c of the least-squares shift towards the full-precision model that the weights were moved by
            before they were quantized (`problem.target`); None where the layer was quantized towards its own weights.
            The errors are relative to the moved weights.
        seconds: Time spent.
    """

    algorithm: str
    bits_per_weight: float
    calibration_error: float
    heldout_error: float | None
    shrinkage: Shrinkage
    grid: str
    objective: float
    trace: tuple[tuple[str, float], ...]
    cw_minimum: bool | None
    row_gaps: Tensor | None
    starts: dict[str, int] = field(default_factory=dict)
    tokens: int | None = None
    target_factor: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with the row gaps as their greatest.

        Returns:
            Plain values.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "row_gaps"}
        gap = None if self.row_gaps is None else float(self.row_gaps.max()) if self.row_gaps.numel() else 0.0
        shrinkage = {"strength": self.shrinkage.strength, "target": self.shrinkage.target}
        trace = [[name, value] for name, value in self.trace]
        return values | {"shrinkage": shrinkage, "trace": trace, "largest_row_gap": gap}


@dataclass(frozen=True)
class QuantizedLayer:
    r"""A quantized weight matrix: $\hat W_{ij} = s_{i g(j)} (c_{ij} - z_{i g(j)}) + H_{ij}$.

    Attributes:
        codes: c, shape (q, p), uint8.
        scales: s, shape (q, G), in the storage dtype.
        zeros: z, shape (q, G), uint8.
        group: g, shape (p,), int64.
        bits: Bits per code.
        symmetric: Whether every zero point is $2^{b-1}$, so that none needs to be stored.
        outliers: H, or None.
        report: How it went.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    bits: int
    symmetric: bool
    outliers: Outliers | None
    report: LayerReport

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        return Grid(self.scales.float(), self.zeros.float(), self.group, 2**self.bits - 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""The weights that the codes, scales and outliers encode.

        Args:
            dtype: Of the result.

        Returns:
            $\hat W$, shape (q, p).
        """
        weight = self.grid.dequantize(self.codes, dtype)
        return weight if self.outliers is None else weight + self.outliers.to_dense(weight.shape[1], dtype)


def bits_per_weight(grid: Grid, bits: int, symmetric: bool, storage: torch.dtype, outliers: Outliers | None) -> float:
    """Stored bits over the number of weights.

    An outlier costs its value and a 16-bit column (32 bits from 65,536 columns on), a row of them a 32-bit offset.

    Args:
        grid: Scales and zero points.
        bits: Bits per code and per stored zero point.
        symmetric: Zero points are implied.
        storage: Dtype of scales and outliers.
        outliers: H, or None.

    Returns:
        Bits per weight.
    """
    width = torch.finfo(storage).bits
    (rows, groups), features = grid.scale.shape, len(grid.group)
    stored = rows * features * bits + rows * groups * (width + (0 if symmetric else bits))
    if outliers is not None:
        stored += len(outliers.values) * (width + (16 if features < 2**16 else 32)) + 32 * rows
    return stored / (rows * features)
