"""Options of `quantize_layer`."""

from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number

from quantease.choices import ALGORITHMS
from quantease.problem.gram import Shrinkage

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized.

    Attributes:
        algorithm: `rtn` (nearest grid point), `gptq`, `gptq-descent` (GPTQ on the clip grid and sparse descent to a
            certified coordinate-wise minimum, in a fraction of the default's time), `quantease-paper` (relaxed schedule
            from W; with `outliers` the paper's iterative hard thresholding) or `quantease` (shrunken Gram matrix, clip
            grid, several starts, the same descent, best start per row, scale refit; with `outliers` mixed descent).
        bits: Bits per code, 1 to 8; symmetric grids need 2 or more.
        group_size: Consecutive inputs that share a scale; -1 is one scale per row (per channel).
        symmetric: Zero point fixed in the middle of the codes.
        grid: `minmax`, `clip` (ends pulled in, weighted by the inputs' energy), or `auto`: `minmax`, but `clip` for
            `gptq-descent`, and for `quantease` the better of the two on held-out tokens, `clip` where nothing is held
            out.
        act_order: GPTQ visits inputs by falling energy.
        damping: GPTQ adds this fraction of the Gram matrix's mean diagonal to its diagonal.
        shrinkage: A fixed `Shrinkage`; `heldout` (chosen on held-out folds, by `oas` where no two folds have tokens);
            `none`; or `auto`: `heldout` for `quantease` and `gptq-descent` on a `GramFolds`, else `none`.
        thorough: `quantease` also starts from relaxed schedules, which take most of the time and gain 0 to 4 %.
        sweeps: Dense sweeps over all coordinates; None is 30 for `quantease-paper`, 9 per relaxed start of `quantease`.
        relax: Every `relax`-th sweep leaves the grid (sweep t counted from 0 with t mod relax = 1); 0 never does.
        refits: Rounds of closed-form scale refit and descent at the end of `quantease`.
        outliers: Fraction of the weights kept at full precision, 0 to 0.5.
        structure: `unstructured` (single weights) or `structured` (whole input columns).
        scale_dtype: Storage of scales and outliers, `float16`, `bfloat16` or `float32`.
        block: Features per block of a dense sweep, at most 1024.
    """

    algorithm: Literal["rtn", "gptq", "gptq-descent", "quantease-paper", "quantease"] = "quantease"
    bits: int = 3
    group_size: int = -1
    symmetric: bool = False
    grid: Literal["auto", "minmax", "clip"] = "auto"
    act_order: bool = True
    damping: float = 0.01
    shrinkage: Shrinkage | Literal["auto", "heldout", "none"] = "auto"
    thorough: bool = False
    sweeps: int | None = None
    relax: int = 3
    refits: int = 2
    outliers: float = 0.0
    structure: Literal["unstructured", "structured"] = "unstructured"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    block: int = 512

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_number("bits", self.bits, low=2 if self.symmetric else 1, high=8, integer=True)
        check_number("group_size", self.group_size, low=-1, integer=True)
        check_choice("grid", self.grid, ("auto", "minmax", "clip"))
        check_number("damping", self.damping, low=0.0, high=1.0)
        check_number("relax", self.relax, low=0, integer=True)
        check_number("refits", self.refits, low=0, integer=True)
        check_number("outliers", self.outliers, low=0.0, high=0.5)
        check_choice("structure", self.structure, ("unstructured", "structured"))
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        check_number("block", self.block, low=1, high=1024, integer=True)
        if self.group_size == 0:
            raise ValueError("group_size: expected -1 or a positive number, got 0")
        if self.relax == 1:
            raise ValueError("relax: expected 0 or at least 2 (with 1 no sweep would be quantised), got 1")
        if self.sweeps is not None:
            check_number("sweeps", self.sweeps, low=1, integer=True)
        if not isinstance(self.shrinkage, Shrinkage):
            check_choice("shrinkage", self.shrinkage, ("auto", "heldout", "none"))
        if self.outliers and self.algorithm in {"rtn", "gptq", "gptq-descent"}:
            raise ValueError(f"outliers: expected 0 with algorithm {self.algorithm!r}, got {self.outliers}")

    @property
    def storage(self) -> torch.dtype:
        """Dtype in which scales and outliers are stored."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def shrinks(self) -> bool:
        """Whether the algorithm shrinks the Gram matrix unless told otherwise."""
        return self.algorithm in {"gptq-descent", "quantease"}

    @property
    def clips(self) -> bool:
        """Whether the algorithm's own grid is the clip grid."""
        return self.grid == "clip" or (self.grid == "auto" and self.algorithm in {"gptq-descent", "quantease"})
