"""The matrices outside the blocks, quantized on request: the output head and the token embeddings.

They come first, for what the full-precision model feeds them, so that the blocks are then quantized behind embeddings
that already have their errors and can make up for them.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from core_tensor.app.ranks import Ranks
from torch import Tensor, nn

from quantease.algorithms.quantize import quantize_layer
from quantease.model.block_stream import BlockStream, EnoughSeen
from quantease.model.calibration import named
from quantease.model.causal_lm import CausalLM
from quantease.model.layer_store import LayerStore
from quantease.model.matrices import Matrix
from quantease.model.weights import assign
from quantease.problem.config import LayerConfig
from quantease.problem.gram import GramFolds
from quantease.problem.layer import QuantizedLayer


def find_ends(lm: CausalLM, *, lm_head: bool, embeddings: bool) -> tuple[Matrix, ...]:
    """The matrices outside the blocks that are asked for.

    Args:
        lm: The model.
        lm_head: Whether the output head is.
        embeddings: Whether the token embeddings are.

    Returns:
        The matrices, by their names in the model; a single one where head and embeddings share their weights.

    Raises:
        ValueError: If the model has no such matrix.
    """
    asked = []
    for wanted, what, kind, module in (
        (lm_head, "lm_head", nn.Linear, lm.skeleton.get_output_embeddings()),
        (embeddings, "embeddings", nn.Embedding, lm.skeleton.get_input_embeddings()),
    ):
        if wanted and not isinstance(module, kind):
            raise ValueError(f"{what}: expected nn.{kind.__name__} in {lm.name}, got {type(module).__name__}")
        asked += [module] if wanted else []
    if len({id(module.weight) for module in asked}) < len(asked):
        del asked[1:]
    tied = set(lm.skeleton.all_tied_weights_keys)
    found = []
    for chosen in asked:
        names = [name for name, m in lm.skeleton.named_modules() if getattr(m, "weight", None) is chosen.weight]
        name = next(name for name in names if f"{name}.weight" not in tied)  # the one under which it is stored
        found.append(Matrix(name, f"{name}.weight"))
    return tuple(found)


def reads_states(lm: CausalLM, matrix: Matrix) -> bool:
    """Whether a matrix outside the blocks is (also) the output head, which reads the last hidden states.

    Args:
        lm: The model.
        matrix: The matrix.

    Returns:
        True or false.
    """
    head = lm.skeleton.get_output_embeddings()
    return head is not None and lm.skeleton.get_parameter(matrix.parameter) is head.weight


def quantize_ends(
    lm: CausalLM,
    ends: Sequence[Matrix],
    windows: Tensor,
    store: LayerStore,
    layer: LayerConfig,
    ranks: Ranks,
    *,
    folds: int,
    segment: int,
    first: int,
) -> None:
    """Quantize matrices outside the blocks; what is stored already stays.

    The head is quantized as any layer, for the states behind the last block at full precision. Embeddings are looked
    up and not multiplied, so that the nearest codes are the best ones; their scales come from the clip grid.

    Args:
        lm: The model at full precision.
        ends: The matrices.
        windows: This rank's calibration tokens, shape (windows, length), int64.
        store: Where the layers go, under the number of blocks.
        layer: Options of the layers; outliers do not apply.
        ranks: The processes that share the run.
        folds: Token folds.
        segment: Consecutive tokens that stay in one fold.
        first: Tokens of other ranks before this one's.
    """
    place, layer = len(lm.blocks), replace(layer, outliers=0.0)
    rounding = replace(layer, algorithm="rtn", grid="minmax" if layer.grid == "minmax" else "clip", shrinkage="none")
    missing = [m for m in ends if not store.has(place, m.name)]
    ranks.barrier()  # every rank has looked before any of them writes
    for matrix in missing:
        weight = matrix.weight(lm.skeleton)
        with named(matrix.name):
            if reads_states(lm, matrix):
                gram: Tensor | GramFolds = _head_gram(lm, windows, ranks, folds=folds, segment=segment, first=first)
                chosen = layer
            else:
                gram = torch.eye(weight.shape[1], device=weight.device)
                chosen = rounding
            if ranks.first:
                store.save(place, matrix.name, quantize_layer(weight, gram, chosen), weight)
        ranks.barrier()


def _head_gram(lm: CausalLM, windows: Tensor, ranks: Ranks, *, folds: int, segment: int, first: int) -> GramFolds:
    """Gram matrix of what the head reads in the full-precision model."""
    stream = BlockStream(lm, windows)
    for index in range(len(lm.blocks)):
        with lm.loaded(index) as block:
            stream.advance(index, block)
    head = lm.skeleton.get_output_embeddings()
    gram = GramFolds(
        head.in_features,
        folds=folds,
        segment=segment,
        dtype=torch.float64,
        products=torch.float32,
        first=first,
        device=lm.device,
    )

    def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(args[0])
        raise EnoughSeen  # without the logits themselves

    hook = head.register_forward_pre_hook(accumulate)
    try:
        for window in range(len(windows)):
            try:
                stream.logits(window)
            except EnoughSeen:
                continue
    finally:
        hook.remove()
    for values in (gram.folds, gram.counts):
        ranks.sum(values)
    return gram


def end_layers(lm: CausalLM, ends: Sequence[Matrix], store: LayerStore) -> dict[str, QuantizedLayer]:
    """The quantized layers outside the blocks.

    Args:
        lm: The model at full precision.
        ends: The matrices.
        store: Where the layers are.

    Returns:
        By name.

    Raises:
        ValueError: If one is absent or came from other weights.
    """
    return {m.name: store.load(len(lm.blocks), m.name, m.weight(lm.skeleton)) for m in ends}


def with_ends(lm: CausalLM, ends: Sequence[Matrix], store: LayerStore) -> CausalLM:
    """The model with quantized layers outside the blocks in place; the one given is left as it is.

    Args:
        lm: The model at full precision.
        ends: The matrices.
        store: Where their layers are.

    Returns:
        A model that shares all other tensors with it.
    """
    if not ends:
        return lm
    shared = {id(t): t for t in (*lm.skeleton.parameters(), *lm.skeleton.buffers())}
    skeleton = copy.deepcopy(lm.skeleton, shared)
    for matrix, layer in zip(ends, end_layers(lm, ends, store).values(), strict=True):
        assign(skeleton, matrix.parameter, layer.dequantize().to(lm.device, lm.dtype))
    skeleton.tie_weights()
    return replace(lm, skeleton=skeleton)
