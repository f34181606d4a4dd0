"""`quantize_model`: every weight matrix of a causal language model, block by block, resumable."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from core_tensor.app.files import read_json, write_json
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor, nn

from quantease.algorithms.quantize import quantize_layer
from quantease.model.block_stream import BlockStream
from quantease.model.budget import outlier_fractions
from quantease.model.calibration import collect_grams, input_groups
from quantease.model.causal_lm import CausalLM
from quantease.model.layer_store import LayerStore, digest
from quantease.model.matrices import DEFAULT_SKIP, Group, Matrix, find_matrices
from quantease.problem.config import LayerConfig
from quantease.problem.gram import GramFolds, Shrinkage
from quantease.problem.layer import QuantizedLayer

Blocks = tuple[tuple[Matrix, ...], ...]
"""The quantized matrices of every block."""

Progress = Callable[[int, int, str], None]
"""Called with the number of matrices done, their total, and what comes next."""


@dataclass(frozen=True)
class ModelConfig:
    """How a model is quantized.

    Attributes:
        layer: How each of its layers is.
        order: `layer`: inputs of later matrices of a block come from the earlier ones of it already quantized (as in
            the paper); `block`: one pass per block, faster, with only earlier blocks quantized.
        skip: Regular expressions over matrix names within a block; what one finds stays as it is.
        folds: Token folds of the Gram matrices; held-out choices need 2 or more.
        segment: Consecutive tokens that stay in one fold; None is a whole window (less where there are fewer windows
            than folds). The first tokens of a window are unlike the others, so that every fold needs its share.
        outlier_budget: `layer`: every layer keeps the same fraction of its weights as outliers; `model`: the fraction
            is one of the whole model, and the layers share it by what it saves them.
        min_tokens: Matrices that fewer tokens reach (rarely used experts) are rounded to nearest instead.
        gram_bytes: Memory that Gram matrices may take at a time; a group that needs more takes several passes.
    """

    layer: LayerConfig = field(default_factory=LayerConfig)
    order: Literal["layer", "block"] = "layer"
    skip: Sequence[str] = DEFAULT_SKIP
    folds: int = 2
    segment: int | None = None
    outlier_budget: Literal["layer", "model"] = "layer"
    min_tokens: int = 32
    gram_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))  # lists, as JSON has them, compare and hash like tuples
        check_choice("order", self.order, ("layer", "block"))
        check_choice("outlier_budget", self.outlier_budget, ("layer", "model"))
        if self.outlier_budget == "model" and self.layer.structure == "structured":
            raise ValueError("outlier_budget: expected 'layer' with structured outliers, got 'model'")
        for name in ("folds", "min_tokens", "gram_bytes"):
            check_number(name, getattr(self, name), low=1, integer=True)
        if self.segment is not None:
            check_number("segment", self.segment, low=1, integer=True)


@dataclass(frozen=True)
class QuantizedCausalLM:
    """A model and its quantized layers on disk.

    Attributes:
        lm: The model; its blocks load with the quantized weights in place.
        original: The model as it was.
        config: How it was quantized.
        matrices: The quantized matrices of every block.
        store: The quantized layers.
        folder: Where they, `run.json` and the report are.
    """

    lm: CausalLM
    original: CausalLM
    config: ModelConfig
    matrices: Blocks
    store: LayerStore
    folder: Path

    def layers(self) -> Iterator[tuple[int, Matrix, QuantizedLayer]]:
        """All quantized layers in order, one in memory at a time.

        Yields:
            Number of the block, the matrix, and its quantized form.
        """
        for index, matrices in enumerate(self.matrices):
            for matrix in matrices:
                yield index, matrix, self.store.load(index, matrix.name)


def quantize_model(
    lm: CausalLM,
    tokens: Tensor,
    folder: Path | str,
    config: ModelConfig | None = None,
    *,
    blocks: int | None = None,
    progress: Progress | None = None,
) -> QuantizedCausalLM:
    """Quantize a model layer by layer, each for the inputs it sees behind the layers quantized before it.

    Every finished layer is written to `folder`; a run that was killed continues there and ends in the same files.
    Under `torchrun` each rank streams its share of the windows and quantizes its share of a group's layers; `folder`
    must then be on storage that all ranks see.

    Args:
        lm: The model, from `open_causal_lm`.
        tokens: Calibration tokens, shape (windows, length), int64.
        folder: Working folder.
        config: Options; None is `ModelConfig()`.
        blocks: Quantize only this many blocks from the first on; None is all.
        progress: Called before each matrix and at the end.

    Returns:
        The quantized model.

    Raises:
        ValueError: If the tokens do not fit the model, or `folder` holds a run with other options, tokens or weights.
    """
    config = config or ModelConfig()
    _check_tokens(lm, tokens)
    folder = Path(folder)
    count = len(lm.blocks) if blocks is None else blocks
    check_number("blocks", count, low=1, high=len(lm.blocks), integer=True)
    matrices = model_matrices(lm, config, count)
    _claim(folder, _identity(lm, tokens, config, count))
    store = LayerStore(folder / "layers")
    share = _own_share(tokens)
    job = _Job(
        config, store, progress or _silent, sum(map(len, matrices)), _budget(lm, share, folder, config, matrices)
    )
    stream = BlockStream(lm, share)
    for index in range(count):
        with lm.loaded(index) as block:
            job.quantize_block(stream, index, block, matrices[index])
            if index + 1 < count:
                stream.advance(index, block)
    job.progress(job.total, job.total, "")
    return _result(lm, config, matrices, store, folder)


def open_quantized(lm: CausalLM, folder: Path | str) -> QuantizedCausalLM:
    """A finished run of `quantize_model` again.

    Args:
        lm: The model that was quantized.
        folder: The run's working folder.

    Returns:
        The quantized model.

    Raises:
        ValueError: If there is no such run, it is unfinished, or it is of another model.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder}: expected the working folder of a quantization run, found no run.json")
    run = read_json(folder / "run.json")
    layer = dict(run["config"]["layer"])
    if isinstance(layer["shrinkage"], dict):
        layer["shrinkage"] = Shrinkage(**layer["shrinkage"])
    config = ModelConfig(**{**run["config"], "layer": LayerConfig(**layer)})
    if run["model"] != _model_identity(lm):
        raise ValueError(f"{folder}: expected the run of {lm.name}, but it is one of another model")
    matrices = model_matrices(lm, config, run["blocks"])
    store = LayerStore(folder / "layers")
    missing = [f"{i}:{m.name}" for i, ms in enumerate(matrices) for m in ms if not store.has(i, m.name)]
    if missing:
        raise ValueError(f"{folder}: the run is not finished, {len(missing)} layers are missing from {missing[0]} on")
    return _result(lm, config, matrices, store, folder)


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


def _result(lm: CausalLM, config: ModelConfig, matrices: Blocks, store: LayerStore, folder: Path) -> QuantizedCausalLM:
    def overlay(index: int, block: nn.Module) -> None:
        for matrix in matrices[index] if index < len(matrices) else ():
            matrix.assign(block, store.load(index, matrix.name, matrix.weight(block)).dequantize())

    return QuantizedCausalLM(replace(lm, overlay=overlay), lm, config, matrices, store, folder)


@dataclass
class _Job:
    """What `quantize_block` needs from one block to the next."""

    config: ModelConfig
    store: LayerStore
    progress: Progress
    total: int
    outliers: Mapping[str, float]
    done: int = 0

    def quantize_block(self, stream: BlockStream, index: int, block: nn.Module, matrices: Sequence[Matrix]) -> None:
        by_name = {m.name: m for m in matrices}
        for group in self._groups(stream, index, block, matrices):
            rank, world = _rank()
            missing = [n for n in group.names if not self.store.has(index, n)]
            _barrier()  # every rank has looked before any of them writes
            if missing:
                needed = Group(tuple(missing), {n: group.leader[n] for n in missing})
                for part in _passes(needed, by_name, block, self.config):
                    grams = self._grams(stream, index, block, matrices, part)
                    for name in part.names[rank::world]:
                        self.progress(self.done + group.names.index(name), self.total, f"{index}.{name}")
                        weight = by_name[name].weight(block).contiguous()  # Conv1D's is a transposed view
                        layer = quantize_layer(weight, grams[name], self._layer_config(index, name, grams[name]))
                        self.store.save(index, name, layer, weight)
                    _barrier()
            for name in group.names:
                matrix = by_name[name]
                matrix.assign(block, self.store.load(index, name, matrix.weight(block)).dequantize())
            self.done += len(group.names)

    def _groups(self, stream: BlockStream, index: int, block: nn.Module, matrices: Sequence[Matrix]) -> list[Group]:
        if all(self.store.has(index, m.name) for m in matrices):
            names = tuple(m.name for m in matrices)
            return [Group(names, {n: n for n in names})]
        return input_groups(stream, index, block, matrices, merged=self.config.order == "block")

    def _grams(
        self, stream: BlockStream, index: int, block: nn.Module, matrices: Sequence[Matrix], group: Group
    ) -> Mapping[str, GramFolds]:
        windows, length = stream.tokens.shape
        folds = self.config.folds
        segment = self.config.segment or (length if windows >= folds else max(1, length // folds))
        return collect_grams(stream, index, block, matrices, group, folds=folds, segment=segment)

    def _layer_config(self, index: int, name: str, gram: GramFolds) -> LayerConfig:
        if gram.tokens >= self.config.min_tokens:
            layer = self.config.layer
            return replace(layer, outliers=self.outliers.get(f"{index}.{name}", layer.outliers))
        return replace(self.config.layer, algorithm="rtn", outliers=0.0, shrinkage="none")


def _passes(group: Group, matrices: Mapping[str, Matrix], block: nn.Module, config: ModelConfig) -> Iterator[Group]:
    """Parts of a group whose Gram matrices fit into `gram_bytes` together."""
    names: list[str] = []
    leaders: dict[str, int] = {}
    for name in group.names:
        leader = group.leader[name]
        features = matrices[leader].weight(block).shape[1]
        size = 4 * config.folds * features**2
        if names and leader not in leaders and sum(leaders.values()) + size > config.gram_bytes:
            yield Group(tuple(names), {n: group.leader[n] for n in names})
            names, leaders = [], {}
        names.append(name)
        leaders[leader] = size
    yield Group(tuple(names), {n: group.leader[n] for n in names})


def _budget(lm: CausalLM, tokens: Tensor, folder: Path, config: ModelConfig, matrices: Blocks) -> dict[str, float]:
    # Fractions of outliers by layer where the budget is one of the model; kept in a file for a run that continues.
    if not config.layer.outliers or config.outlier_budget == "layer":
        return {}
    path = folder / "outliers.json"
    if not path.exists():
        fractions = outlier_fractions(lm, tokens, matrices, config.layer)
        if _rank()[0] == 0:
            write_json(path, {f"{index}.{name}": value for (index, name), value in fractions.items()})
        _barrier()
    found: dict[str, float] = read_json(path)
    return found


def _silent(done: int, total: int, name: str) -> None:
    del done, total, name


def _check_tokens(lm: CausalLM, tokens: Tensor) -> None:
    check_tensor("tokens", tokens, ndim=2, dtype=torch.int64, nonempty=True)
    vocabulary = lm.skeleton.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"tokens: expected ids in [0, {vocabulary - 1}], got {int(tokens.min())} to {int(tokens.max())}"
        )


def _model_identity(lm: CausalLM) -> dict[str, Any]:
    embeddings = digest(lm.skeleton.get_input_embeddings().weight)
    return {"architecture": type(lm.skeleton).__name__, "blocks": len(lm.blocks), "embeddings_sha256": embeddings}


def _identity(lm: CausalLM, tokens: Tensor, config: ModelConfig, blocks: int) -> dict[str, Any]:
    # What decides the result; every layer's file also names the digest of the weights it came from.
    values = asdict(config)
    return {
        "model": _model_identity(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "tokens": list(tokens.shape),
        "tokens_sha256": digest(tokens),
        "blocks": blocks,
        "config": values | {"skip": list(config.skip)},
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "run.json"
    if path.exists():
        before = read_json(path)
        changed = sorted(key for key in identity if before.get(key) != identity[key])
        if changed:
            raise ValueError(f"{folder}: holds a run with another {', '.join(changed)}; use a new folder")
    elif _rank()[0] == 0:
        write_json(path, identity)
    _barrier()


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _barrier() -> None:
    if _rank()[1] > 1:
        torch.distributed.barrier()


def _own_share(tokens: Tensor) -> Tensor:
    # Consecutive windows for every rank; all ranks hear of a mistake.
    rank, world = _rank()
    if world > tokens.shape[0]:
        raise ValueError(f"tokens: expected at least one window for each of {world} ranks, got {tokens.shape[0]}")
    return tokens.tensor_split(world)[rank]
