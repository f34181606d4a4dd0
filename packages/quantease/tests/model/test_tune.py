import json

import pytest
import torch
from quantease.evaluation.perplexity import Predictions, streamed, window_scores
from quantease.export.save import export_model
from quantease.model import tune
from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import open_causal_lm
from quantease.model.matrices import find_matrices
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import open_quantized, quantize_model
from quantease.problem.config import LayerConfig
from torch.func import functional_call

PARAMETERS = {
    "llama": ("input_layernorm.weight", "post_attention_layernorm.weight"),
    "gpt2": ("ln_1.weight", "ln_2.weight"),  # transposed matrices, norms with biases
    "gemma": ("input_layernorm.weight", "post_attention_layernorm.weight"),  # weights around 0: (1 + w) x
    "mixtral": ("input_layernorm.weight", "post_attention_layernorm.weight"),  # experts in one parameter
}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "outliers"), [("llama", 0.0), ("llama", 0.05), ("gpt2", 0.0), ("gemma", 0.0), ("mixtral", 0.05)]
)
def test_overrides_are_the_weights_that_are_stored(name, outliers, build, tokens, tmp_path):
    """A block with multipliers computes what it computes with the scales and norms that rounding them leaves."""
    algorithm = "quantease-paper" if outliers else "gptq"
    config = ModelConfig(LayerConfig(algorithm, bits=3, outliers=outliers, scale_dtype="float32"), min_tokens=1)
    lm = open_causal_lm(build(name))
    run = quantize_model(lm, tokens, tmp_path, config, blocks=1)
    with run.lm.loaded(0) as block:
        layers = {m.name: run.store.load(0, m.name) for m in run.matrices[0]}
        found = tune.BlockParameters(block, run.matrices[0], layers)
        assert tuple(found.norms) == PARAMETERS[name]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf in found.leaves:
                leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))
        wanted = found.overrides()
        found.put(found.round())
        for key, value in wanted.items():
            torch.testing.assert_close(block.get_parameter(key), value, rtol=1e-5, atol=1e-6)
        found.put(found.untouched())


@pytest.mark.parametrize(
    ("name", "outliers"), [("llama", 0.0), ("llama", 0.05), ("phi", 0.0), ("gpt2", 0.0), ("mixtral", 0.0)]
)
def test_multiplied_outputs_are_those_of_multiplied_weights(name, outliers, build, tokens, tmp_path):
    """Values and gradients, for linear modules with biases (phi) and without, and where nothing can be multiplied."""
    config = ModelConfig(LayerConfig("quantease-paper" if outliers else "rtn", bits=3, outliers=outliers))
    model = build(name)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value)
    run = quantize_model(open_causal_lm(model), tokens, tmp_path, config, blocks=1)
    stream = BlockStream(run.lm, tokens)
    with run.lm.loaded(0) as block:
        layers = {m.name: run.store.load(0, m.name) for m in run.matrices[0]}
        found = tune.BlockParameters(block, run.matrices[0], layers)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf in found.leaves:
                leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))
        results = []
        for call in (found, lambda *args, **kwargs: functional_call(block, found.overrides(), args, kwargs)):
            out = stream.apply(call, stream.hidden[0], 0, 0)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), found.leaves)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_hidden_states_of_the_tuning_are_those_of_the_finished_block(tiny_llama, tokens, tmp_path, monkeypatch):
    config = ModelConfig(LayerConfig("gptq", bits=2), tune="block", tune_steps=5)
    quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path / "kept", config)
    formed = []

    def forget(*args):
        tuned, losses, behind = tune.tune_block(*args)
        formed.append(behind is not None)
        return tuned, losses, None  # so that the block runs again

    monkeypatch.setattr("quantease.model.quantize_model.tune_block", forget)
    quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path / "again", config)
    assert all(formed)
    assert files(tmp_path / "kept") == files(tmp_path / "again")


def test_gradients_by_blocks_are_those_of_the_whole_model(build, tokens, tmp_path, monkeypatch):
    model = build("llama")
    lm = open_causal_lm(model)
    found = {}

    def once(parameters, learn, judge, windows, steps, device):
        learn(1)
        found.update({index: block.leaves for index, block in parameters.items()}, judged=judge(1))
        return {index: block.untouched() for index, block in parameters.items()}, {"before": 0.0, "after": 0.0}

    monkeypatch.setattr(tune, "_tune", once)
    config = ModelConfig(LayerConfig("gptq", bits=3), tune="model")
    monkeypatch.setattr("quantease.model.quantize_model.tune_block", lambda i, p, *_: (p.untouched(), {}, None))
    run = quantize_model(lm, tokens, tmp_path, config, blocks=2)

    whole = build("llama")
    overrides, leaves = {}, {}
    for index in range(2):
        block = whole.model.layers[index]
        layers = {m.name: run.store.load(index, m.name) for m in run.matrices[index]}
        for matrix in run.matrices[index]:
            matrix.assign(block, layers[matrix.name].dequantize())
        parameters = tune.BlockParameters(block, run.matrices[index], layers)
        overrides |= {f"model.layers.{index}.{k}": v for k, v in parameters.overrides().items()}
        leaves[index] = parameters.leaves
    p = model(tokens[1:2]).logits[0].detach().log_softmax(-1)
    q = functional_call(whole, overrides, (tokens[1:2],)).logits[0].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    kl.backward()
    assert found["judged"] == pytest.approx(float(kl.detach()), rel=1e-4)
    for index in range(2):
        for got, expected in zip(found[index], leaves[index], strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_tuned_model_is_saved_as_it_computes(name, build, tokens, tmp_path):
    lm = open_causal_lm(build(name))
    config = ModelConfig(LayerConfig("gptq", grid="clip", bits=2), tune="model", tune_steps=6, min_tokens=1)
    run = quantize_model(lm, tokens, tmp_path / "run", config, blocks=2)
    for index in range(2):
        assert run.store.tuning_losses(index)["after"] < run.store.tuning_losses(index)["before"]
    losses = run.store.tuning_losses()
    assert losses["after"] < losses["before"]
    exact = Predictions(streamed(lm, tokens))
    kl = float(window_scores(Predictions(streamed(run.lm, tokens)), exact).divergences.mean())
    assert kl == pytest.approx(losses["after"], rel=1e-4)
    formats = ["dense"] if name in {"gpt2", "mixtral"} else ["dense", "native", "compressed-tensors"]
    for kind in formats:
        assert export_model(run, tmp_path / kind, kind).logit_difference <= 1e-6


def test_tuning_is_taken_up_where_it_stopped(tiny_llama, tokens, tmp_path):
    lm = open_causal_lm(tiny_llama)
    config = ModelConfig(LayerConfig("gptq", bits=2), tune="model", tune_steps=5)
    run = quantize_model(lm, tokens, tmp_path, config)
    whole = files(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    for lost in (("layers/tuned.safetensors",), ("layers/tuned.safetensors", "layers/0002/tuned.safetensors")):
        for name in lost:
            (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=r"not finished, \d layers are missing from (2:)?tuning on"):
            open_quantized(lm, tmp_path)
        (tmp_path / "run.json").write_text(json.dumps(record | {"result": None}))
        quantize_model(lm, tokens, tmp_path, config)
        assert files(tmp_path) == whole
    assert run.store.load(0, "mlp.down_proj").scales.dtype == torch.float16


def test_only_two_bits_and_less_are_tuned_unasked():
    assert ModelConfig(LayerConfig(bits=2)).tunes("block")
    assert not ModelConfig(LayerConfig(bits=2)).tunes("model")
    assert ModelConfig(LayerConfig(bits=3)).tunes("block")
    assert not ModelConfig(LayerConfig(bits=4)).tunes("block")
    assert not ModelConfig(LayerConfig("gptq-descent", bits=3)).tunes("block")
    assert ModelConfig(LayerConfig("gptq-descent", bits=2)).tunes("block")
    assert not ModelConfig(LayerConfig(bits=4), average_bits=3.5).tunes("block")
    steps = [ModelConfig(LayerConfig(bits=b), tune=t).steps for b, t in ((2, "auto"), (3, "auto"), (3, "block"))]
    assert steps == [48, 16, 48]
    assert not ModelConfig(LayerConfig("gptq", bits=2)).tunes("block")
    assert not ModelConfig(LayerConfig(bits=2), target="own").tunes("block")
    assert ModelConfig(LayerConfig("gptq", bits=4), tune="model").tunes("block")


def test_models_that_do_not_fit_are_refused_before_any_work(tiny_llama, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("quantease.model.plan.available_memory", lambda _: 1000)
    with pytest.raises(ValueError, match="tune: expected room for all blocks"):
        quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path / "run", ModelConfig(tune="model"))
    assert not (tmp_path / "run").exists()


def test_what_does_not_help_is_not_kept(tiny_llama, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "RATE", 30.0)  # far too long steps
    lm = open_causal_lm(tiny_llama)
    config = ModelConfig(LayerConfig("gptq", bits=4), tune="model", tune_steps=5)
    run = quantize_model(lm, tokens, tmp_path / "tuned", config, blocks=1)
    plain = quantize_model(lm, tokens, tmp_path / "plain", ModelConfig(config.layer, tune="none"), blocks=1)
    for index, matrix, layer in run.layers():
        assert torch.equal(layer.scales, plain.store.load(index, matrix.name).scales)
    assert all(losses["before"] == losses["after"] for losses in (run.store.tuning_losses(i) for i in (0, None)))


def test_tuning_helps_a_trained_model_on_other_text(stories, stories_tokens, tmp_path):
    calibration, other = stories_tokens
    lm = open_causal_lm(stories)
    exact = Predictions(streamed(lm, other))
    kl = {}
    for what in ("none", "block"):
        config = ModelConfig(LayerConfig("gptq", grid="clip", bits=2), tune=what)
        run = quantize_model(lm, calibration, tmp_path / what, config)
        kl[what] = float(window_scores(Predictions(streamed(run.lm, other)), exact).divergences.mean())
    assert kl["block"] < 0.95 * kl["none"]


def test_windows_are_shared_and_means_are_the_same_for_any_number_of_ranks(build, tokens):
    lm = open_causal_lm(build("llama"))
    with lm.loaded(0) as block:
        assert set(tune.norm_weights(block)) == set(PARAMETERS["llama"])
        assert find_matrices(block)
    alone = tune.Windows(tune.Ranks(), 4, 0, 4)
    second = tune.Windows(tune.Ranks(), 4, 2, 2)
    assert [second.local(i) for i in range(4)] == [None, None, 0, 1]
    assert sorted(alone.order(8)[:4]) == sorted(alone.order(8)[4:]) == [0, 1, 2, 3]
    assert alone.mean(float, torch.device("cpu")) == 1.5
    assert BlockStream(lm, tokens).fork().tokens is not None
