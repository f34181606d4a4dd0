"""`quantize_model`: every weight matrix of a causal language model, block by block, resumable."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from core_tensor.app.files import reading
from core_tensor.app.ranks import Ranks, current
from core_tensor.app.runs import RunFolder, read_record
from core_tensor.checks import check_number
from torch import Tensor, nn

from quantease.algorithms.heldout import HeldOut
from quantease.algorithms.quantize import choose, quantize_layer
from quantease.model.block_stream import BlockStream
from quantease.model.calibration import INPUT, BlockShape, FullPrecision, block_shape, collect_grams, named
from quantease.model.causal_lm import CausalLM
from quantease.model.ends import end_layers, find_ends, quantize_ends, with_ends
from quantease.model.layer_store import LayerStore
from quantease.model.matrices import Group, Matrix
from quantease.model.plan import (
    Blocks,
    Budgets,
    ModelConfig,
    Plan,
    make_budgets,
    make_plan,
    model_identity,
    model_matrices,
    own_windows,
)
from quantease.model.tune import BlockParameters, Windows, put_norms, tune_block, tune_model
from quantease.problem.config import SCALE_DTYPES, LayerConfig
from quantease.problem.gram import GramFolds, Shrinkage
from quantease.problem.layer import QuantizedLayer
from quantease.problem.target import Targets, shifted_targets

Progress = Callable[[int, int, str], None]
"""Called with the number of matrices done, their total, and what comes next."""

COMMAND = "quantease quantize"


@dataclass(frozen=True)
class QuantizedCausalLM:
    """A model and its quantized layers on disk.

    Attributes:
        lm: The model; its blocks load with the quantized weights in place.
        original: The model as it was.
        config: How it was quantized.
        matrices: The quantized matrices of every block.
        ends: Those outside the blocks; their layers are stored under the number of blocks.
        store: The quantized layers.
        folder: Where they, `run.json` and the report are.
    """

    lm: CausalLM
    original: CausalLM
    config: ModelConfig
    matrices: Blocks
    ends: tuple[Matrix, ...]
    store: LayerStore
    folder: Path

    def layers(self) -> Iterator[tuple[int, Matrix, QuantizedLayer]]:
        """All quantized layers of the blocks in order, one in memory at a time.

        Yields:
            Number of the block, the matrix, and its quantized form.
        """
        for index, matrices in enumerate(self.matrices):
            for matrix in matrices:
                yield index, matrix, self.store.load(index, matrix.name)

    def end_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers outside the blocks.

        Returns:
            By their names in the model.
        """
        return end_layers(self.original, self.ends, self.store)

    def beside(self, index: int) -> dict[str, Tensor]:
        """Tensors of a block that are not quantized.

        Args:
            index: Number of the block.

        Returns:
            By their names in the block, with tuned norms where there are some; the quantized ones as they were.
        """
        with self.original.loaded(index) as block:
            if index < len(self.matrices):
                put_norms(block, self.store.tuned(index))
            return dict(block.state_dict())


def quantize_model(
    lm: CausalLM,
    tokens: Tensor,
    folder: Path | str,
    config: ModelConfig | None = None,
    *,
    blocks: int | None = None,
    overwrite: bool = False,
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
        overwrite: Delete another run that `folder` holds.
        progress: Called before each matrix and at the end.

    Returns:
        The quantized model.

    Raises:
        ValueError: If the tokens do not fit the model, `folder` holds a run with other options, tokens or weights, or
            another process is using it.
    """
    ranks = current()
    plan = make_plan(lm, tokens, config or ModelConfig(), blocks, ranks)
    with RunFolder.claim(folder, COMMAND, plan.inputs, overwrite=overwrite, ranks=ranks) as run:
        store = LayerStore(run.path / "layers")
        if run.result is None:
            _execute(lm, plan, store, make_budgets(lm, plan, run.path, ranks), ranks, progress or _silent)
            run.finish({"layers": plan.total})
        elif progress is not None:
            progress(plan.total, plan.total, "")
    return _quantized(lm, plan.config, plan.matrices, plan.ends, store, run.path)


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
    record = read_record(folder)
    inputs = record["inputs"]
    with reading(folder / "run.json", "the record of a quantization run"):
        config, blocks, model = ModelConfig.from_json(inputs["config"]), inputs["blocks"], inputs["model"]
        check_number("blocks", blocks, low=1, high=len(lm.blocks), integer=True)
    if model != model_identity(lm):
        raise ValueError(f"{folder}: expected the run of {lm.name}, but it is one of another model")
    matrices, store = model_matrices(lm, config, blocks), LayerStore(folder / "layers")
    missing = [f"{i}:{m.name}" for i, ms in enumerate(matrices) for m in ms if not store.has(i, m.name)]
    ends = find_ends(lm, lm_head=config.lm_head, embeddings=config.embeddings)
    missing += [m.name for m in ends if not store.has(len(lm.blocks), m.name)]
    missing += [f"{i}:tuning" for i in range(blocks) if config.tunes("block") and not store.has_tuned(i)]
    missing += ["tuning"] if config.tunes("model") and not store.has_tuned() else []
    if missing:
        raise ValueError(f"{folder}: the run is not finished, {len(missing)} layers are missing from {missing[0]} on")
    return _quantized(lm, config, matrices, ends, store, folder)


def run_dtype(folder: Path | str) -> str:
    """Dtype of the model that a run quantized.

    Args:
        folder: The run's working folder.

    Returns:
        Such as `float32`.

    Raises:
        ValueError: If there is no such run.
    """
    dtype = read_record(folder)["inputs"].get("dtype")
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"{folder}/run.json: expected the dtype of the model, got {dtype!r}")
    return str(dtype)


def _quantized(
    lm: CausalLM, config: ModelConfig, matrices: Blocks, ends: tuple[Matrix, ...], store: LayerStore, folder: Path
) -> QuantizedCausalLM:
    def overlay(index: int, block: nn.Module) -> None:
        if index < len(matrices):
            for matrix in matrices[index]:
                matrix.assign(block, store.load(index, matrix.name, matrix.weight(block)).dequantize())
            put_norms(block, store.tuned(index))

    quantized = replace(with_ends(lm, ends, store), overlay=overlay)
    return QuantizedCausalLM(quantized, lm, config, matrices, ends, store, folder)


def _silent(done: int, total: int, name: str) -> None:
    del done, total, name


def _execute(lm: CausalLM, plan: Plan, store: LayerStore, budgets: Budgets, ranks: Ranks, progress: Progress) -> None:
    """Quantize all blocks in order; two streams of the same windows run beside each other, one at full precision."""
    tokens, first = own_windows(plan, ranks)
    original, config = lm, plan.config
    if plan.ends:
        options = {"folds": config.folds, "segment": plan.segment, "first": first}
        quantize_ends(lm, plan.ends, tokens, store, config.layer, ranks, **options)
        lm = with_ends(lm, plan.ends, store)
    stream = BlockStream(lm, tokens)
    beginning = stream.fork()
    exact = None
    if config.follows_full_precision:
        exact = BlockStream(original, tokens) if plan.ends else stream.fork()
    windows = Windows(ranks, len(plan.tokens), first // plan.tokens.shape[1], len(tokens))
    done = 0
    for index, matrices in enumerate(plan.matrices):
        with lm.loaded(index) as block:
            job = _BlockJob(
                plan, store, budgets, ranks, progress, stream, exact, windows, first, index, block, matrices, done
            )
            with named(f"block {index}"), _with_remedy(lm.dtype):
                job.run()
            if index + 1 < len(plan.matrices):
                job.advance()
        done += len(matrices)
    if config.tunes("model") and exact is not None and not store.has_tuned():
        progress(plan.total, plan.total, "tuning")
        _tune_end_to_end(original, plan, store, beginning, exact, windows)
    progress(plan.total, plan.total, "")


@contextmanager
def _with_remedy(dtype: torch.dtype) -> Iterator[None]:
    """Activations and Gram matrices that are not finite are nearly always overflow of half precision."""
    try:
        yield
    except ValueError as error:
        if dtype == torch.float32 or "finite" not in str(error):
            raise
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{error}; the model ran in {name}: --dtype float32 helps against overflow") from error


def _tune_end_to_end(
    lm: CausalLM, plan: Plan, store: LayerStore, stream: BlockStream, exact: BlockStream, windows: Windows
) -> None:
    for index in range(len(plan.matrices), len(lm.blocks)):
        with lm.loaded(index) as block:
            exact.advance(index, block)
    quantized = _quantized(lm, plan.config, plan.matrices, plan.ends, store, store.folder)
    with ExitStack() as stack:
        blocks = [stack.enter_context(quantized.lm.loaded(index)) for index in range(len(lm.blocks))]
        parameters = {
            index: BlockParameters(blocks[index], matrices, {m.name: store.load(index, m.name) for m in matrices})
            for index, matrices in enumerate(plan.matrices)
            if matrices
        }
        tuned, losses = tune_model(parameters, blocks, stream, exact, windows, plan.config.steps)
    if windows.ranks.first:
        store.save_tuned(tuned, losses)
    windows.ranks.barrier()


@dataclass
class _BlockJob:
    """Quantizes the matrices of one block.

    Attributes:
        plan: The run.
        store: Where quantized layers go.
        budgets: What differs between the layers.
        ranks: The processes that share the run.
        progress: Told before each matrix.
        stream: Hidden states behind quantized blocks.
        exact: Hidden states behind full-precision blocks; None where they are not needed.
        windows: The windows of both streams.
        first: Tokens of other ranks before this one's.
        index: Number of the block.
        block: The block, at full precision; its matrices are replaced as they are quantized.
        matrices: What is quantized of it.
        done: Matrices of earlier blocks.
    """

    plan: Plan
    store: LayerStore
    budgets: Budgets
    ranks: Ranks
    progress: Progress
    stream: BlockStream
    exact: BlockStream | None
    windows: Windows
    first: int
    index: int
    block: nn.Module
    matrices: Sequence[Matrix]
    done: int

    def __post_init__(self) -> None:
        self.by_name = {m.name: m for m in self.matrices}
        self.behind: list[Tensor] | None = None  # hidden states behind the block, where tuning has formed them

    def run(self) -> None:
        tunes = self.plan.config.tunes("block") and bool(self.matrices)
        finished = all(self.store.has(self.index, m.name) for m in self.matrices)
        finished = finished and (not tunes or self.store.has_tuned(self.index))
        self.ranks.barrier()  # every rank has looked before any of them writes
        if finished:
            if self.exact is not None:
                self.exact.advance(self.index, self.block)
            self._assign([m.name for m in self.matrices])
            put_norms(self.block, self.store.tuned(self.index))
        else:
            self._quantize()
            if tunes:
                self._tune()

    def advance(self) -> None:
        """Move the quantized stream behind the block, once it is finished."""
        if self.behind is None:
            self.stream.advance(self.index, self.block)
        else:
            self.stream.hidden = self.behind

    def _quantize(self) -> None:
        merged = self.plan.config.order == "block"
        shape = block_shape(self.stream, self.index, self.block, self.matrices, merged=merged)
        reference = None
        if self.exact is not None and self.plan.config.aims_at_full_precision:
            room = self.plan.config.gram_bytes
            reference = FullPrecision.before(self.exact, shape, self.index, self.block, self.matrices, room)
        elif self.exact is not None:
            self.exact.advance(self.index, self.block)
        for group in shape.groups:
            self._quantize_group(group, shape, reference)
            self._assign(group.names)
            self.done += len(group.names)

    def _tune(self) -> None:
        if self.exact is None:
            return
        layers = {m.name: self.store.load(self.index, m.name) for m in self.matrices}
        parameters = BlockParameters(self.block, self.matrices, layers)
        steps = self.plan.config.steps
        tuned, losses, self.behind = tune_block(self.index, parameters, self.stream, self.exact, self.windows, steps)
        self.ranks.barrier()  # nobody reads tuned scales while others still start from the old ones
        if self.ranks.first:
            self.store.save_tuned({self.index: tuned}, losses, self.index)
        parameters.put(tuned)
        self.ranks.barrier()

    def _assign(self, names: Sequence[str]) -> None:
        for name in names:
            matrix = self.by_name[name]
            layer = self.store.load(self.index, name, matrix.weight(self.block))
            matrix.assign(self.block, layer.dequantize())

    def _quantize_group(self, group: Group, shape: BlockShape, reference: FullPrecision | None) -> None:
        missing = {name for name in group.names if not self.store.has(self.index, name)}
        self.ranks.barrier()
        if not missing:
            return
        for part in self._passes(group):
            if not missing.intersection(part.names):
                continue
            grams = collect_grams(
                self.stream,
                self.index,
                self.block,
                self.matrices,
                part,
                folds=self.plan.config.folds,
                segment=self.plan.segment,
                first=self.first,
                reference=reference,
            )
            # What the readers of one input decide together does not depend on which of them are missing.
            for leader in dict.fromkeys(part.leader.values()):
                readers = [name for name in part.names if part.leader[name] == leader]
                if missing.intersection(readers):
                    self._quantize_readers(readers, missing, grams[leader], shape)
            self.ranks.barrier()

    def _quantize_readers(self, readers: Sequence[str], missing: set[str], gram: GramFolds, shape: BlockShape) -> None:
        start = time.perf_counter()
        with named(readers[0]):
            targets = self._targets(readers, gram, shape)
            config, choice = self._choice(readers, gram, targets)
        shared = (time.perf_counter() - start) / len(readers)
        factor = targets.factor if gram.cross else None
        share = [name for name in readers if name in missing][self.ranks.rank :: self.ranks.size]
        for name in share:
            self.progress(self.done + readers.index(name), self.plan.total, f"{self.index}.{name}")
            own = self.budgets.of(self.index, name, config)
            with named(name):
                layer = quantize_layer(targets.weights[name], gram, own, choice=choice)
            report = replace(layer.report, target_factor=factor, seconds=layer.report.seconds + shared)
            layer = replace(layer, report=report)
            self.store.save(self.index, name, layer, self.by_name[name].weight(self.block))

    def _targets(self, readers: Sequence[str], gram: GramFolds, shape: BlockShape) -> Targets:
        # Conv1D's weight is a transposed view
        weights = {name: self.by_name[name].weight(self.block).float().contiguous() for name in readers}
        if not gram.cross:
            return Targets(weights, 0.0)
        pulls = {
            name: gram.cross[name] if name in shape.sums else gram.cross[INPUT].float() @ weights[name].T
            for name in readers
        }
        return shifted_targets(weights, gram.folds, pulls)

    def _choice(self, readers: Sequence[str], gram: GramFolds, targets: Targets) -> tuple[LayerConfig, HeldOut]:
        layer = self.plan.config.layer
        config = replace(layer, bits=self.budgets.of(self.index, readers[0], layer).bits)  # the same for all readers
        if gram.tokens < self.plan.config.min_tokens:
            config = replace(config, algorithm="rtn", outliers=0.0, shrinkage="none")
        weights = [targets.weights[name] for name in readers]
        return config, choose(weights, gram, config, self._start(readers[0]))

    def _start(self, name: str) -> tuple[Shrinkage, bool] | None:
        """What the same matrix of the previous block was given, if there is one."""
        if self.index == 0 or not self.store.has(self.index - 1, name):
            return None
        before = self.store.report(self.index - 1, name)
        return before.shrinkage, before.grid == "clip"

    def _passes(self, group: Group) -> Iterator[Group]:
        """Parts of a group whose Gram matrices (and cross products) fit into `gram_bytes` together."""
        names: list[str] = []
        leaders: dict[str, int] = {}
        for name in group.names:
            leader = group.leader[name]
            features = self.by_name[leader].weight(self.block).shape[1]
            size = 4 * self.plan.config.folds * features**2 * (1 if self.exact is None else 2)
            if names and leader not in leaders and sum(leaders.values()) + size > self.plan.config.gram_bytes:
                yield Group(tuple(names), {n: group.leader[n] for n in names})
                names, leaders = [], {}
            names.append(name)
            leaders[leader] = size
        yield Group(tuple(names), {n: group.leader[n] for n in names})
