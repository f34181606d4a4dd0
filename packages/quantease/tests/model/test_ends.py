"""The output head and the embeddings, quantized on request."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from quantease.algorithms.quantize import quantize_layer
from quantease.cli import main
from quantease.export.save import check_format, export_model
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import open_quantized, quantize_model
from quantease.problem.config import LayerConfig
from quantease.problem.objective import relative_error
from safetensors.torch import load_file

HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
BOTH = {"lm_head": True, "embeddings": True}


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def model(request, build):
    """Random Llamas: head and embeddings apart, and sharing their weights."""
    return build("llama", num_hidden_layers=2, tie_word_embeddings=request.param)


def run(model, tokens, folder, layer=None, **ends):
    config = ModelConfig(layer or LayerConfig("gptq-descent", bits=3, group_size=16), **ends)
    return quantize_model(open_causal_lm(model), tokens, folder, config)


@pytest.mark.parametrize(
    ("name", "symmetric", "ends"),
    [
        ("dense", False, BOTH),
        ("compressed-tensors", False, {"embeddings": True}),
        ("compressed-tensors", True, {"lm_head": True}),
        ("compressed-tensors", True, BOTH),
    ],
)
def test_reloaded_model_is_equal(model, name, symmetric, ends, tokens, tmp_path):
    layer = LayerConfig("rtn", bits=3, group_size=16, symmetric=symmetric)
    quantized = run(model, tokens, tmp_path / "run", layer, **ends)
    assert export_model(quantized, tmp_path / "out", name).logit_difference == 0.0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded(tokens)  # unpacks
    loaded, tied = loaded.state_dict(), model.config.tie_word_embeddings
    for key, asked in ((HEAD, ends.get("lm_head")), (EMBEDDINGS, ends.get("embeddings"))):
        changed = not torch.equal(loaded[key], model.state_dict()[key])
        assert changed == (bool(asked) or tied)
        if changed:
            assert all(len(group.unique()) <= 8 for row in loaded[key] for group in row.split(16))
    if name == "compressed-tensors":
        stored = load_file(tmp_path / "out" / "model.safetensors")
        packed = {key.removesuffix("_packed") for key in stored if key.endswith("_packed")} & {HEAD, EMBEDDINGS}
        apart = {key for key, asked in ((HEAD, "lm_head"), (EMBEDDINGS, "embeddings")) if ends.get(asked)}
        assert packed == ({EMBEDDINGS} if tied else apart)
        ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        assert ("lm_head" in ignored) == (HEAD not in packed)


def test_the_head_is_solved_for_the_states_it_reads(model, tokens, tmp_path):
    """Against its inputs by transformers itself; rounding on the same grid is worse."""
    read = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    sigma = read[0].double().T @ read[0].double()
    chosen = LayerConfig("gptq-descent", bits=3, group_size=16, shrinkage="none")
    (layer,) = run(model, tokens, tmp_path, chosen, lm_head=True).end_layers().values()
    weight = model.lm_head.weight.detach()
    rounded = quantize_layer(weight, sigma, LayerConfig("rtn", bits=3, group_size=16, grid="clip"))
    ours, theirs = (relative_error(weight, found.dequantize(), sigma) for found in (layer, rounded))
    assert ours < 0.8 * theirs
    assert layer.report.calibration_error == pytest.approx(ours, rel=1e-4)


def test_codes_of_embeddings_are_the_nearest(build, tokens, tmp_path):
    quantized = run(build("llama"), tokens, tmp_path, embeddings=True)
    layer = quantized.end_layers()["model.embed_tokens"]
    weight = quantized.original.skeleton.get_input_embeddings().weight
    error = (weight - layer.dequantize()).abs()
    for step in (-1, 1):
        moved = layer.codes.int() + step
        other = (weight - layer.grid.dequantize(moved.clamp(0, 7).to(torch.uint8))).abs()
        assert (error <= other + 1e-6).all()


def test_the_original_stays_and_blocks_run_behind_the_quantized_embeddings(model, tokens, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = run(model, tokens, tmp_path, **BOTH)
    skeleton = quantized.original.skeleton
    assert torch.equal(skeleton.get_input_embeddings().weight, before[EMBEDDINGS])
    assert not torch.equal(quantized.lm.skeleton.get_input_embeddings().weight, before[EMBEDDINGS])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = run(model, tokens, tmp_path / "plain")
    name = "self_attn.q_proj"
    assert not torch.equal(quantized.store.load(0, name).codes, plain.store.load(0, name).codes)
    again = open_quantized(quantized.original, tmp_path)
    assert again.end_layers().keys() == quantized.end_layers().keys()


def test_a_killed_run_ends_in_the_same_files(tiny_llama, tokens, tmp_path):
    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}

    class KilledError(Exception):
        pass

    def kill(done, total, name):
        if name.startswith("1."):
            raise KilledError

    config = ModelConfig(LayerConfig("gptq-descent", bits=2), **BOTH)
    lm = open_causal_lm(tiny_llama)
    quantize_model(lm, tokens, tmp_path / "whole", config)
    with pytest.raises(KilledError):
        quantize_model(lm, tokens, tmp_path / "killed", config, progress=kill)
    quantize_model(lm, tokens, tmp_path / "killed", config)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "native", "gguf"])
def test_other_formats_are_refused_before_any_work(name, build):
    config = ModelConfig(LayerConfig(bits=4, symmetric=True, group_size=32), lm_head=True)
    with pytest.raises(ValueError, match=f"{name} keeps lm_head and embeddings at full precision"):
        check_format(open_causal_lm(build("llama")), config, name)


def test_from_the_command_line(build, tmp_path):
    model = build("llama", vocab_size=512, num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--lm-head", "--text", "self", "--json"]
    command += ["--windows", "2", "--length", "16", "--evaluation", "1", "--algorithm", "rtn"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == 2 * 7 + 1
    rows = json.loads((tmp_path / "out" / "quantease" / "report.json").read_text())["layers"]
    assert rows[-1]["matrix"] == "model.embed_tokens"
