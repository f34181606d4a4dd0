"""Layers that aim at the full-precision model's outputs."""

import pytest
import torch
from core_tensor.dev.testing import assert_close
from quantease.evaluation.perplexity import streamed_perplexity
from quantease.model.block_stream import BlockStream
from quantease.model.calibration import INPUT, FullPrecision, block_shape, collect_grams
from quantease.model.causal_lm import open_causal_lm
from quantease.model.matrices import find_matrices
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

SUMS = {
    "llama": {"self_attn.o_proj": 2, "mlp.down_proj": 2},
    "gemma3": {},  # a norm stands between the outputs and the residual
    "opt": {"self_attn.out_proj": 2, "fc2": 2},
    "bloom": {"self_attention.dense": 2, "mlp.dense_4h_to_h": 2},
    "falcon": {"self_attention.dense": 3, "mlp.dense_4h_to_h": 3},  # both branches and the residual in one sum
    "gpt2": {"attn.c_proj": 2, "mlp.c_proj": 2},
    "phi": {"self_attn.dense": 3, "mlp.fc2": 3},
    "mixtral": {"self_attn.o_proj": 2},
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_found_by_what_the_block_does(name, build, tokens):
    lm = open_causal_lm(build(name))
    stream = BlockStream(lm, tokens)
    with lm.loaded(0) as block:
        assert block_shape(stream, 0, block, find_matrices(block), merged=False).sums == SUMS[name]


@pytest.mark.parametrize("room", [0, 1 << 30])
@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_drift_is_that_of_two_models_side_by_side(name, room, build, tokens):
    """Cross products of a block behind a block with other weights, against hooks on two complete models."""
    exact, drifted = build(name), build(name)
    prefix = open_causal_lm(exact).blocks[0].rpartition(".")[0]
    with torch.no_grad():
        for model in (drifted.get_submodule(prefix)[0],):
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    lm, other = open_causal_lm(exact), open_causal_lm(drifted)
    stream, behind = BlockStream(lm, tokens), BlockStream(other, tokens)
    with lm.loaded(0) as block:
        stream.advance(0, block)
    with other.loaded(0) as block:
        behind.advance(0, block)
    with lm.loaded(1) as block:
        matrices = find_matrices(block)
        shape = block_shape(behind, 1, block, matrices, merged=False)
        reference = FullPrecision.before(stream, shape, 1, block, matrices, room)
        assert bool(reference.kept) == (room > 0)
        grams = {}
        for group in shape.groups:
            grams |= collect_grams(behind, 1, block, matrices, group, segment=24, reference=reference)
    inputs, outputs = [{}, {}], [{}, {}]
    for i, model in enumerate((exact, drifted)):
        block = model.get_submodule(prefix)[1]
        for m in matrices:
            module = block.get_submodule(m.name)
            module.register_forward_hook(lambda _, x, y, m=m, i=i: inputs[i].setdefault(m.name, []).append(x[0]))
            module.register_forward_hook(lambda _, x, y, m=m, i=i: outputs[i].setdefault(m.name, []).append(y))
        block.register_forward_hook(lambda _, x, y, i=i: outputs[i].setdefault("", []).append(y))
        block.register_forward_pre_hook(lambda _, x, i=i: inputs[i].setdefault("", []).append(x[0]))
        with torch.no_grad():
            for window in tokens:
                model(window[None])

    def difference(values, key):
        first, second = (torch.cat([_rows(value) for value in side[key]]) for side in values)
        return (first - second).double()

    for m in matrices:
        X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[1][m.name]]).double()
        cross = {key: value.sum(0) for key, value in grams[m.name].cross.items()}
        if m.name not in shape.sums:
            assert_close(m.name, X.T @ difference(inputs, m.name), cross[INPUT], 1e-4)
        elif shape.sums[m.name] == 3 or m.name in {"mlp.down_proj", "mlp.c_proj"}:  # the block's output
            assert_close(m.name, X.T @ difference(outputs, ""), cross[m.name], 1e-4)
        else:  # the block's input and the output itself
            assert_close(m.name, X.T @ (difference(inputs, "") + difference(outputs, m.name)), cross[m.name], 1e-4)


def _rows(value):
    value = value[0] if isinstance(value, tuple) else value
    return value.reshape(-1, value.shape[-1])


def test_no_shift_at_full_precision_inputs(tiny_llama, tokens, tmp_path):
    run = quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path, ModelConfig(LayerConfig(bits=3)), blocks=2)
    factors = {(i, m.name): layer.report.target_factor for i, m, layer in run.layers()}
    assert all(factors[0, f"self_attn.{n}_proj"] == 0.0 for n in "qkv")
    assert factors[0, "self_attn.q_proj"] == factors[0, "self_attn.v_proj"]  # one factor for one input
    assert any(factor > 0 for factor in factors.values())
    own = quantize_model(
        open_causal_lm(tiny_llama), tokens, tmp_path / "own", ModelConfig(LayerConfig(bits=3), target="own"), blocks=1
    )
    assert all(layer.report.target_factor is None for _, _, layer in own.layers())
    assert torch.equal(own.store.load(0, "self_attn.k_proj").codes, run.store.load(0, "self_attn.k_proj").codes)


def test_a_pass_that_is_not_kept_is_repeated_to_the_same_result(tiny_llama, tokens, tmp_path):
    codes = []
    for room in (1, 4 << 30):
        config = ModelConfig(LayerConfig("gptq-descent", bits=3), gram_bytes=room)
        run = quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path / str(room), config, blocks=2)
        codes.append([layer.codes for _, _, layer in run.layers()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_shift_helps_a_trained_model_and_never_hurts(bits, stories, stories_tokens, tmp_path):
    calibration, other = stories_tokens
    lm = open_causal_lm(stories)
    full = streamed_perplexity(lm, other)
    excess = {}
    for target in ("own", "full-precision"):
        config = ModelConfig(LayerConfig("gptq-descent", bits=bits), target=target, tune="none")
        run = quantize_model(lm, calibration, tmp_path / target, config)
        excess[target] = streamed_perplexity(run.lm, other) / full - 1
    assert excess["full-precision"] < excess["own"] * (0.8 if bits < 4 else 1.0) + 1e-3
