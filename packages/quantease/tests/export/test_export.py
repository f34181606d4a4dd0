import json

import pytest
import torch
import transformers
from quantease.algorithms.quantize import quantize_layer
from quantease.evaluation.perplexity import perplexity, streamed_perplexity
from quantease.export.save import FORMATS, check_format, export_model
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.nn import QuantizedLinear
from quantease.problem.config import LayerConfig

GRIDS = {
    "3 bits": {"bits": 3},
    "2 bits, groups": {"bits": 2, "group_size": 16},
    "4 bits, symmetric": {"bits": 4, "symmetric": True},
    "8 bits, symmetric groups": {"bits": 8, "symmetric": True, "group_size": 16},
    "1 bit": {"bits": 1},
}


def quantized(model, tokens, folder, algorithm="rtn", blocks=None, **layer):
    config = ModelConfig(LayerConfig(algorithm=algorithm, **layer))
    return quantize_model(open_causal_lm(model), tokens, folder / "run", config, blocks=blocks)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["dense", "compressed-tensors"])
def test_reloaded_model_is_equal(name, grid, tiny_llama, tokens, tmp_path):
    run = quantized(tiny_llama, tokens, tmp_path, **GRIDS[grid])
    report = export_model(run, tmp_path / "out", name)
    assert report.logit_difference == 0.0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = streamed_perplexity(run.lm, tokens)
    assert perplexity(loaded, tokens.flatten(), length=tokens.shape[1]) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(streamed_perplexity(run.original, tokens), rel=1e-6)


def test_every_architecture_saves_densely(architecture, tokens, tmp_path):
    run = quantized(architecture, tokens, tmp_path, bits=3)
    assert export_model(run, tmp_path / "out", "dense").logit_difference == 0.0


def test_bfloat16_survives(build, tokens, tmp_path):
    run = quantized(build("llama").bfloat16(), tokens, tmp_path, bits=4, scale_dtype="bfloat16")
    for name in ("dense", "compressed-tensors"):
        assert export_model(run, tmp_path / name, name).logit_difference == 0.0


def test_some_blocks_and_shards(tiny_llama, tokens, tmp_path):
    run = quantized(tiny_llama, tokens, tmp_path, bits=3, blocks=2)
    report = export_model(run, tmp_path / "out", "compressed-tensors", shard_bytes=20_000)
    assert "model.safetensors.index.json" in report.files
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.2.mlp.up_proj" in config["ignore"]
    assert "lm_head" in config["ignore"]
    # A second export replaces the first one's weights and leaves other files alone.
    (tmp_path / "out" / "mine.txt").write_text("mine")
    export_model(run, tmp_path / "out", "dense")
    assert sorted(p.name for p in (tmp_path / "out").glob("*safetensors*")) == ["model.safetensors"]
    assert (tmp_path / "out" / "mine.txt").exists()


def test_packed_layer_is_what_compressed_tensors_unpacks(tiny_llama, tokens, tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    run = quantized(tiny_llama, tokens, tmp_path, bits=3)
    export_model(run, tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layer = run.store.load(1, "mlp.down_proj")
    name = "model.layers.1.mlp.down_proj"
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 3, layer.codes.shape)
    zeros = unpack_from_int32(tensors[f"{name}.weight_zero_point"], 3, layer.zeros.shape, packed_dim=0)
    torch.testing.assert_close(codes.int() + 4, layer.codes.int())  # signed there, unsigned here
    torch.testing.assert_close(zeros.int() + 4, layer.zeros.int())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_packed_one_by_one(name, build, tokens, tmp_path):
    """In the names and shapes of the checkpoints that the models come from, which vLLM reads as well."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    run = quantized(build(name), tokens, tmp_path, bits=4, symmetric=True, group_size=8)
    assert export_model(run, tmp_path / "out").logit_difference == 0.0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    mlp, gate, down = ("block_sparse_moe", "w1", "w2") if name == "mixtral" else ("mlp", "gate_proj", "down_proj")
    prefix = f"model.layers.1.{mlp}"
    for part, fused in ((gate, "gate_up_proj"), (down, "down_proj")):
        layer = run.store.load(1, f"mlp.experts.{fused}.3")
        shape = tensors[f"{prefix}.experts.3.{part}.weight_shape"].tolist()
        codes = unpack_from_int32(tensors[f"{prefix}.experts.3.{part}.weight_packed"], 4, torch.Size(shape))
        torch.testing.assert_close(codes.int() + 8, layer.codes[: shape[0]].int())
        torch.testing.assert_close(tensors[f"{prefix}.experts.3.{part}.weight_scale"], layer.scales[: shape[0]].float())
    assert f"{prefix}.gate.weight" in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert f"{prefix}.gate" in config["ignore"]


def test_experts_that_no_reader_finds_are_refused(build, tokens, tmp_path):
    lm = open_causal_lm(build("mixtral"))
    for layer, skip, words in (
        ({}, (), "on symmetric grids only"),
        ({"symmetric": True}, (r"gate_up_proj\.2$", "gate$"), "all experts of"),
    ):
        with pytest.raises(ValueError, match=words):
            check_format(lm, ModelConfig(LayerConfig("rtn", **layer), skip=skip), "compressed-tensors")


def test_what_a_format_cannot_hold_is_refused(build, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"holds nn\.Linear layers, not attn\.c_attn; use dense"):
        export_model(quantized(build("gpt2"), tokens, tmp_path / "a", bits=3), tmp_path / "a" / "out")
    run = quantized(build("llama"), tokens, tmp_path / "b", bits=3, group_size=20)
    with pytest.raises(ValueError, match="divisible by the group size 20"):
        export_model(run, tmp_path / "b" / "out")
    with pytest.raises(ValueError, match="format: expected one of"):
        export_model(run, tmp_path / "b" / "out", "zip")
    assert not (tmp_path / "a" / "out").exists()


def test_a_save_that_loads_differently_is_not_kept(tiny_llama, tokens, tmp_path, monkeypatch):
    from dataclasses import replace

    from quantease.export import dense

    def wrong(run, index):
        return {k: v * 1.01 if "up_proj" in k else v for k, v in dense.block(run, index).items()}

    monkeypatch.setitem(FORMATS, "dense", replace(FORMATS["dense"], block=wrong))
    with pytest.raises(ValueError, match="logits differ"):
        export_model(quantized(tiny_llama, tokens, tmp_path, bits=3), tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon"])
@pytest.mark.parametrize("structure", ["unstructured", "structured"])
def test_native_keeps_outliers(name, structure, build, tokens, tmp_path):
    run = quantized(build(name), tokens, tmp_path, "quantease", blocks=2, bits=3, outliers=0.05, structure=structure)
    report = export_model(run, tmp_path / "out", "native")
    assert report.logit_difference <= 1e-6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == sum(map(len, run.matrices))
    for index, matrix, layer in run.layers():
        assert layer.outliers is not None
        packed = layers[f"{run.lm.blocks[index]}.{matrix.name}"]
        assert packed.outliers == len(layer.outliers.values) > 0
        torch.testing.assert_close(packed.dequantize(), layer.dequantize(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_native_leaves_buffers_to_transformers(tmp_path, tokens):
    """CodeGen computes its table of positions when it loads; with it left out, logits were off by half."""
    torch.manual_seed(0)
    config = transformers.CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    run = quantized(model, tokens, tmp_path, bits=3)
    assert export_model(run, tmp_path / "out", "native").logit_difference <= 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["FalconMamba", "GPTBigCode"])
def test_layers_that_their_holder_initializes_load_packed(name, tmp_path, tokens):
    """Mixers and the like look for the `weight` of their layers while transformers loads them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "state_size": 8}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes)).eval()
    run = quantized(model, tokens, tmp_path, bits=4, symmetric=True)
    assert export_model(run, tmp_path / "out").logit_difference == 0.0


def test_native_saves_and_loads_again(tiny_llama, tokens, tmp_path):
    run = quantized(tiny_llama, tokens, tmp_path, bits=2, group_size=16)
    export_model(run, tmp_path / "out", "native")
    first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    first.save_pretrained(tmp_path / "again")
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(first(tokens).logits, second(tokens).logits, rtol=0, atol=0)


def test_native_in_bfloat16(build, tokens, tmp_path):
    run = quantized(build("llama").bfloat16(), tokens, tmp_path, bits=4, scale_dtype="bfloat16")
    assert export_model(run, tmp_path / "out", "native").logit_difference < 0.03


def test_formats_name_what_they_cannot_hold(build, tokens, tmp_path):
    outliers = quantized(build("llama"), tokens, tmp_path / "a", "quantease", blocks=1, bits=3, outliers=0.01)
    with pytest.raises(ValueError, match="compressed-tensors has no outliers"):
        export_model(outliers, tmp_path / "a" / "out")
    with pytest.raises(ValueError, match="native holds modules, not"):
        export_model(quantized(build("mixtral"), tokens, tmp_path / "b", bits=3), tmp_path / "b" / "out", "native")


def test_quantized_linear_is_differentiable_in_its_input():
    weight, x = torch.randn(5, 16), torch.randn(3, 16, requires_grad=True)
    layer = quantize_layer(weight, torch.eye(16), LayerConfig(algorithm="rtn", bits=3))
    module = QuantizedLinear.from_layer(layer, bias=torch.randn(5))
    torch.testing.assert_close(module(x), x @ layer.dequantize().T + module.bias)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 16))
    assert "16, 5, bits=3" in repr(module)


def test_an_outlier_outside_the_matrix_is_refused_on_loading(tiny_llama, tokens, tmp_path):
    """Column 2**30 in a saved file once was a segmentation fault."""
    from safetensors.torch import load_file, save_file

    run = quantized(tiny_llama, tokens, tmp_path, "quantease", blocks=1, bits=3, outliers=0.05)
    export_model(run, tmp_path / "out", "native")
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj.outlier_"
    for key, change in (
        ("columns", lambda v: v.index_fill(0, torch.tensor([1]), 2**30)),
        ("columns", lambda v: -v - 1),
        ("offsets", lambda v: v + 1),
        ("offsets", lambda v: v.flip(0)),
        ("values", lambda v: v * torch.inf),
    ):
        save_file(whole | {name + key: change(whole[name + key])}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"mlp\.up_proj: outlier_"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        module = QuantizedLinear.from_layer(run.store.load(0, "mlp.up_proj"))
        with pytest.raises(ValueError, match=r"outlier_"):
            module.load_state_dict(module.state_dict() | {f"outlier_{key}": change(whole[name + key])})
