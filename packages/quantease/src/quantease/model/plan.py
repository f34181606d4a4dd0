"""What a run will do and what its result depends on, settled before any layer is touched."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from core_tensor.app.files import digest, read_json, reading, write_json
from core_tensor.app.ranks import Ranks
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor

from quantease.choices import DEFAULT_SKIP
from quantease.model.budget import bits_by_layer, outlier_fractions
from quantease.model.causal_lm import CausalLM
from quantease.model.ends import find_ends
from quantease.model.matrices import Matrix, find_matrices
from quantease.problem.config import LayerConfig
from quantease.problem.gram import Shrinkage

BITS_WINDOWS = 8
"""Windows on which errors are measured that share bits; the first rank does it."""

Blocks = tuple[tuple[Matrix, ...], ...]
"""The quantized matrices of every block."""


@dataclass(frozen=True)
class ModelConfig:
    """How a model is quantized.

    Attributes:
        layer: How each of its layers is.
        average_bits: Bits per weight over all matrices, which get more or fewer each by measured error
            (`model.budget`) instead of `layer.bits`; None gives all of them `layer.bits`.
        order: `layer`: inputs of later matrices of a block come from the earlier ones of it already quantized (as in
            the paper); `block`: one pass per block, faster, with only earlier blocks quantized.
        target: What a layer's outputs are to match: those of the `full-precision` model (its weights are moved there
            first as far as held-out tokens confirm, see `problem.target`), or those of its `own` weights for the
            inputs it sees (as in the paper); `auto` is the former for `quantease` and `gptq-descent`.
        tune: What is tuned once codes are fixed (`model.tune`): nothing (`none`), every block (`block`), or every block
            and then all of them together on the whole model's predictions (`model`, which holds all blocks in memory);
            `auto` is `block` where layers aim at full precision, at 3 bits and less for `quantease` and at 2 for
            `gptq-descent`, else `none`.
        tune_steps: Steps of each tuning, one window a step; None is 48, but 16 where `auto` tunes at 3 bits, which
            leaves less to gain.
        skip: Regular expressions over matrix names within a block; what one finds stays as it is.
        lm_head: Whether the output head is quantized as well; where it shares its weights with the embeddings, both.
        embeddings: Whether the token embeddings are (rounded to the clip grid); likewise.
        folds: Token folds of the Gram matrices; held-out choices need 2 or more.
        segment: Consecutive tokens that stay in one fold; None is a whole window (less where there are fewer windows
            than folds). The first tokens of a window are unlike the others, so that every fold needs its share.
        outlier_budget: `layer`: every layer keeps the same fraction of its weights as outliers; `model`: the fraction
            is one of the whole model, and the layers share it by what it saves them.
        min_tokens: Matrices that fewer tokens reach (rarely used experts) are rounded to nearest instead.
        gram_bytes: Memory that Gram matrices may take at a time; a group that needs more takes several passes. As much
            may be taken by what is kept of a block's full-precision pass; beyond that the pass is repeated.
    """

    layer: LayerConfig = field(default_factory=LayerConfig)
    average_bits: float | None = None
    order: Literal["layer", "block"] = "layer"
    target: Literal["auto", "full-precision", "own"] = "auto"
    tune: Literal["auto", "none", "block", "model"] = "auto"
    tune_steps: int | None = None
    skip: Sequence[str] = DEFAULT_SKIP
    lm_head: bool = False
    embeddings: bool = False
    folds: int = 2
    segment: int | None = None
    outlier_budget: Literal["layer", "model"] = "layer"
    min_tokens: int = 32
    gram_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))  # lists, as JSON has them, compare and hash like tuples
        if self.average_bits is not None:
            check_number("average_bits", self.average_bits, low=2.0 if self.layer.symmetric else 1.0, high=8.0)
        check_choice("order", self.order, ("layer", "block"))
        check_choice("target", self.target, ("auto", "full-precision", "own"))
        check_choice("tune", self.tune, ("auto", "none", "block", "model"))
        check_choice("outlier_budget", self.outlier_budget, ("layer", "model"))
        if self.outlier_budget == "model" and self.layer.structure == "structured":
            raise ValueError("outlier_budget: expected 'layer' with structured outliers, got 'model'")
        for name in ("folds", "min_tokens", "gram_bytes"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("tune_steps", "segment"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1, integer=True)
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip: expected regular expressions, got {pattern!r} ({error})") from error

    @property
    def aims_at_full_precision(self) -> bool:
        """Whether layers are quantized towards the full-precision model's outputs."""
        return self.target == "full-precision" or (self.target == "auto" and self.layer.shrinks)

    def tunes(self, what: Literal["block", "model"]) -> bool:
        """Whether blocks are tuned one by one, or the whole model is.

        Args:
            what: Which of the two.

        Returns:
            True or false.
        """
        if self.tune == "auto":
            most = 3 if self.layer.algorithm == "quantease" else 2
            return what == "block" and self._bits <= most and self.aims_at_full_precision
        return self.tune == "model" or self.tune == what

    @property
    def steps(self) -> int:
        """Steps of each tuning."""
        if self.tune_steps is not None:
            return self.tune_steps
        return 16 if self.tune == "auto" and self._bits == 3 else 48

    @property
    def _bits(self) -> float:
        return self.layer.bits if self.average_bits is None else self.average_bits

    @property
    def follows_full_precision(self) -> bool:
        """Whether a stream of hidden states at full precision is needed beside the quantized one."""
        return self.aims_at_full_precision or self.tunes("block") or self.tunes("model")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The configuration that `dataclasses.asdict` made plain values of.

        Args:
            values: As in `run.json`.

        Returns:
            The configuration.

        Raises:
            ValueError: If they are no configuration.
        """
        values = {"tune": "none"} | dict(values)  # runs from before there was tuning
        layer = dict(values.pop("layer"))
        for kind, given in ((cls, values), (LayerConfig, layer)):
            unknown = sorted(set(given) - {f.name for f in fields(kind)})
            if unknown:
                raise ValueError(f"unknown options {', '.join(unknown)}")
        if isinstance(layer.get("shrinkage"), dict):
            layer["shrinkage"] = Shrinkage(**layer["shrinkage"])
        return cls(**values, layer=LayerConfig(**layer))


@dataclass(frozen=True)
class Plan:
    """A run that was checked and not yet begun.

    Attributes:
        config: How the model is quantized.
        matrices: The matrices that will be quantized, by block.
        ends: Those outside the blocks.
        tokens: Calibration tokens of all ranks, shape (windows, length), int64.
        segment: Consecutive tokens that stay in one fold.
        inputs: All that the result depends on, for `run.json`; each layer's file also names the digest of its weights.
    """

    config: ModelConfig
    matrices: Blocks
    ends: tuple[Matrix, ...]
    tokens: Tensor
    segment: int
    inputs: dict[str, Any]

    @property
    def total(self) -> int:
        """Number of matrices in blocks."""
        return sum(map(len, self.matrices))


def make_plan(lm: CausalLM, tokens: Tensor, config: ModelConfig, blocks: int | None, ranks: Ranks) -> Plan:
    """Check the arguments of a run and settle what it quantizes.

    Args:
        lm: The model.
        tokens: Calibration tokens, shape (windows, length), int64.
        config: Options.
        blocks: Quantize only this many blocks from the first on; None is all.
        ranks: The processes that share the run.

    Returns:
        The plan.

    Raises:
        ValueError: If the tokens do not fit the model, or there are fewer windows than ranks.
    """
    check_tensor("tokens", tokens, ndim=2, dtype=torch.int64, nonempty=True)
    vocabulary = lm.skeleton.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"tokens: expected ids in [0, {vocabulary - 1}], got {int(tokens.min())} to {int(tokens.max())}"
        )
    if ranks.size > tokens.shape[0]:
        raise ValueError(f"tokens: expected at least one window for each of {ranks.size} ranks, got {tokens.shape[0]}")
    _check_mixed_bits(lm, config)
    _check_room(lm, config)
    count = len(lm.blocks) if blocks is None else blocks
    check_number("blocks", count, low=1, high=len(lm.blocks), integer=True)
    windows, length = tokens.shape
    segment = config.segment or (length if windows >= config.folds else max(1, length // config.folds))
    inputs = {
        "model": model_identity(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "tokens": {"windows": windows, "length": length, "digest": digest(tokens)},
        "blocks": count,
        "config": asdict(config),
    }
    ends = find_ends(lm, lm_head=config.lm_head, embeddings=config.embeddings)
    return Plan(config, model_matrices(lm, config, count), ends, tokens, segment, inputs)


def _check_mixed_bits(lm: CausalLM, config: ModelConfig) -> None:
    """Mixed bits need the outputs of modules, which experts that are fused in one parameter do not have."""
    fused = next((m.name for ms in model_matrices(lm, config) for m in ms if m.expert is not None), None)
    if config.average_bits is not None and fused is not None:
        raise ValueError(f"average_bits: expected a model of linear modules, but {fused} is a part of a parameter")


def _check_room(lm: CausalLM, config: ModelConfig) -> None:
    """End-to-end tuning holds the weights of all blocks; what would run out of memory at the end is refused now."""
    if not config.tunes("model"):
        return
    weights = sum(p.numel() for index in range(len(lm.blocks)) for p in lm.block(index).parameters())
    needed, free = weights * lm.dtype.itemsize, available_memory(lm.device)
    if free is not None and needed > free:
        raise ValueError(
            f"tune: expected room for all blocks, {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory are "
            "free; use `block`, which holds one at a time"
        )


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device.

    Args:
        device: The device.

    Returns:
        The bytes; None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def model_identity(lm: CausalLM) -> dict[str, Any]:
    """What tells a model from others without reading its blocks; layers know their weights' digests.

    Args:
        lm: The model.

    Returns:
        Plain values.
    """
    embeddings = digest(lm.skeleton.get_input_embeddings().weight)
    return {"architecture": type(lm.skeleton).__name__, "blocks": len(lm.blocks), "embeddings": embeddings}


def model_matrices(lm: CausalLM, config: ModelConfig, blocks: int | None = None) -> Blocks:
    """The matrices that a configuration quantizes.

    Args:
        lm: The model.
        config: Says which are skipped.
        blocks: Only of the first blocks; None is all.

    Returns:
        The matrices of every block.
    """
    count = len(lm.blocks) if blocks is None else blocks
    return tuple(tuple(find_matrices(lm.block(i), config.skip)) for i in range(count))


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized.

    Attributes:
        quantized: Weights of the blocks that are quantized.
        total: All weights of the blocks in parameters of two or more dimensions.
        left_alone: Names of such parameters that are not quantized; a kind that all blocks share is named once, with
            `*` for the number.
    """

    quantized: int
    total: int
    left_alone: tuple[str, ...]

    @property
    def fraction(self) -> float:
        """Part that is quantized; 1 for a model without weights."""
        return self.quantized / self.total if self.total else 1.0


def coverage(lm: CausalLM, matrices: Blocks) -> Coverage:
    """What a choice of matrices covers of the blocks it is made in.

    Args:
        lm: The model.
        matrices: The quantized matrices of every block.

    Returns:
        The coverage.
    """
    kinds: dict[str, None] = {}
    quantized = total = 0
    for index, chosen in enumerate(matrices):
        block = lm.block(index)
        parameters = {matrix.parameter for matrix in chosen}
        quantized += sum(matrix.weight(block).numel() for matrix in chosen)
        for name, value in block.named_parameters():
            if value.ndim >= 2:
                total += value.numel()
                if name not in parameters:
                    kinds[re.sub(r"\b\d+\b", "*", f"{lm.blocks[index]}.{name}")] = None
    return Coverage(quantized, total, tuple(kinds))


def check_coverage(lm: CausalLM, matrices: Blocks) -> Coverage:
    """Refuse, before any work, a run that would leave most of the blocks' weights at full precision.

    Args:
        lm: The model.
        matrices: The matrices that would be quantized.

    Returns:
        The coverage.

    Raises:
        ValueError: If it is below one half.
    """
    found = coverage(lm, matrices)
    if found.fraction < 0.5:
        shown = ", ".join(found.left_alone[:4]) + (", ..." if len(found.left_alone) > 4 else "")
        raise ValueError(
            f"model: only {100 * found.fraction:.1f} % of the block weights would be quantized, since these are of no "
            f"known kind: {shown}; give --skip to leave them alone on purpose"
        )
    return found


def own_windows(plan: Plan, ranks: Ranks) -> tuple[Tensor, int]:
    """Consecutive windows for every rank.

    Args:
        plan: The plan.
        ranks: The processes that share the run.

    Returns:
        This rank's, shape (windows, length), int64, and the number of tokens before them.
    """
    shares = plan.tokens.tensor_split(ranks.size)
    return shares[ranks.rank], sum(share.numel() for share in shares[: ranks.rank])


@dataclass(frozen=True)
class Budgets:
    """What differs between the layers of a run.

    Attributes:
        outliers: Fraction of outliers by `<block>.<matrix>`; empty where every layer has the same.
        bits: Bits by `<block>.<matrix>`; empty likewise.
    """

    outliers: Mapping[str, float]
    bits: Mapping[str, int]

    def of(self, index: int, name: str, layer: LayerConfig) -> LayerConfig:
        """Options of one layer.

        Args:
            index: Number of its block.
            name: The matrix.
            layer: Options of all layers.

        Returns:
            Its own.
        """
        key = f"{index}.{name}"
        outliers = self.outliers.get(key, layer.outliers) if layer.outliers else 0.0
        return replace(layer, outliers=outliers, bits=self.bits.get(key, layer.bits))


def make_budgets(lm: CausalLM, plan: Plan, folder: Path, ranks: Ranks) -> Budgets:
    """Share outliers and bits among the layers, where a run has one budget of them for all.

    What was shared is kept in files for a run that continues.

    Args:
        lm: The model.
        plan: The plan.
        folder: The run's folder.
        ranks: The processes that share the run.

    Returns:
        The budgets.
    """
    config = plan.config
    outliers: Mapping[str, float] = {}
    bits: Mapping[str, int] = {}
    if config.layer.outliers and config.outlier_budget == "model":
        outliers = _kept(
            folder / "outliers.json",
            lambda: outlier_fractions(lm, own_windows(plan, ranks)[0], plan.matrices, config.layer),
            ranks,
            float,
        )
    if config.average_bits is not None:
        average, tokens = config.average_bits, plan.tokens[:BITS_WINDOWS]

        def share() -> Mapping[tuple[int, str], int]:
            return bits_by_layer(lm, tokens, plan.matrices, config.layer, average) if ranks.first else {}

        bits = _kept(folder / "bits.json", share, ranks, int)
    return Budgets(outliers, bits)


def _kept(
    path: Path, make: Callable[[], Mapping[tuple[int, str], Any]], ranks: Ranks, kind: Callable[[Any], Any]
) -> dict[str, Any]:
    """Numbers by layer out of a file, which is made where it is not there yet."""
    there = ranks.share(path.exists())
    if not there:
        found = make()
        if ranks.first:
            write_json(path, {f"{index}.{name}": value for (index, name), value in found.items()})
        ranks.barrier()
    values = read_json(path)
    with reading(path, "numbers by layer"):
        return {str(name): kind(value) for name, value in values.items()}
