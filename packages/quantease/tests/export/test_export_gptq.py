"""The formats `gptq` and `gptq_v2`, read by an unpacker of Python integers and, where installed, by GPTQModel."""

import importlib.util
import json

import pytest
import torch
import transformers
from quantease.evaluation.evaluate import load_for_evaluation
from quantease.export import gptq
from quantease.export.save import check_format, export_model, logit_difference
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig
from safetensors.torch import load_file

WIDE = {"hidden_size": 64, "intermediate_size": 96}
SIZES = {
    "llama": WIDE,
    "qwen2": WIDE,
    "opt": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 64},
}


def wide(build, name="llama", **values):
    """A model whose layers have inputs and outputs divisible by 32."""
    return build(name, **(WIDE | values))


def quantized(model, tokens, folder, blocks=None, **layer):
    config = ModelConfig(LayerConfig(algorithm="rtn", **layer))
    return quantize_model(open_causal_lm(model), tokens, folder / "run", config, blocks=blocks)


def fields(words, bits, count):
    """Fields of `bits` bits of every column of int32 words, lowest first, by Python integers of any length."""
    columns = []
    for column in words.T.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        columns.append([stream >> (bits * j) & (2**bits - 1) for j in range(count)])
    return torch.tensor(columns).T  # (count, columns)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (3, 16), (4, 16), (8, -1)])
def test_fields_hold_codes_and_zero_points(bits, group_size, symmetric, build, tokens, tmp_path):
    run = quantized(wide(build), tokens, tmp_path, bits=bits, group_size=group_size, symmetric=symmetric)
    for name, less in (("gptq", 1), ("gptq_v2", 0)) if symmetric else (("gptq_v2", 0),):
        assert export_model(run, tmp_path / name, name).logit_difference == 0.0
        tensors = load_file(tmp_path / name / "model.safetensors")
        layer = run.store.load(1, "mlp.down_proj")
        prefix = "model.layers.1.mlp.down_proj."
        out, features = layer.codes.shape
        stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        assert set(stored) == {"qweight", "qzeros", "scales", "g_idx"}
        assert stored["qweight"].shape == (features * bits // 32, out)
        assert torch.equal(fields(stored["qweight"], bits, features), layer.codes.T.long())
        assert torch.equal(fields(stored["qzeros"].T, bits, out).T + less, layer.zeros.T.long())
        assert torch.equal(stored["scales"], layer.scales.T)
        assert torch.equal(stored["g_idx"], layer.group.int())
        assert stored["g_idx"].dtype == stored["qweight"].dtype == stored["qzeros"].dtype == torch.int32
        settings = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        expected = {"bits": bits, "group_size": group_size, "sym": symmetric, "checkpoint_format": name}
        assert settings.items() >= expected.items()


def test_zero_points_of_zero_are_for_the_second_version(build, tokens, tmp_path):
    model = wide(build)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5].abs_()  # no negative weight: the zero point is 0
    run = quantized(model, tokens, tmp_path, bits=3)
    assert int(run.store.load(1, "mlp.up_proj").zeros[5]) == 0
    with pytest.raises(ValueError, match=r"zero point 0 in model\.layers\.\d\..* does not survive; use gptq_v2"):
        export_model(run, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    assert export_model(run, tmp_path / "out", "gptq_v2").logit_difference == 0.0


def test_subtracting_one_from_whole_words_would_borrow():
    """Why v1 is written field by field and refused at 0: 5 next to 0 becomes 4 + 1 borrowed, and reads back as 6."""
    packed = gptq.pack_bits(torch.tensor([[0, 5] + [4] * 30], dtype=torch.uint8), 3)
    words = packed - gptq.pack_bits(torch.ones(1, 32, dtype=torch.uint8), 3)  # as readers' whole-word arithmetic has it
    assert (fields(words.T, 3, 32)[:2, 0] + 1).tolist() != [0, 5]


@pytest.mark.parametrize("name", ["opt", "bloom", "qwen2"])
def test_architectures(name, build, tokens, tmp_path):
    run = quantized(build(name, **SIZES[name]), tokens, tmp_path, bits=3)
    assert export_model(run, tmp_path / "out", "gptq_v2").logit_difference == 0.0


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mixtral"])
def test_what_transformers_would_load_wrongly_is_refused(name, build, tokens, tmp_path):
    sizes = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64}
    with pytest.raises(ValueError, match=r"gptq holds plain nn\.Linear layers, not .*; use native or dense"):
        check_format(open_causal_lm(build(name, **sizes)), ModelConfig(LayerConfig(bits=3)), "gptq_v2")


def test_some_blocks_in_bfloat16(build, tokens, tmp_path):
    run = quantized(wide(build).bfloat16(), tokens, tmp_path, blocks=2, bits=4, scale_dtype="bfloat16")
    assert export_model(run, tmp_path / "out", "gptq_v2").logit_difference == 0.0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (packed,) = settings["modules_in_block_to_quantize"]
    assert len(packed) == 14
    assert r"-:^model\.layers\.2\.mlp\.up_proj$" in settings["dynamic"]


def test_evaluation_loads_it_without_gptqmodel(build, tokens, tmp_path):
    run = quantized(wide(build), tokens, tmp_path, bits=3)
    export_model(run, tmp_path / "out", "gptq_v2")
    model = load_for_evaluation(str(tmp_path / "out"), tokenizer=False)[0]
    assert logit_difference(run, lambda: model) == 0.0


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        ({"bits": 5}, WIDE, "gptq has 2, 3, 4, 8 bits, not 5; use compressed-tensors"),
        ({"bits": 4}, {}, "inputs and outputs divisible by 32, got 32 and 16 in self_attn.k_proj"),
        ({"bits": 4, "group_size": 40}, WIDE, "divisible by the group size 40, got 64"),
    ],
)
def test_what_it_cannot_hold_is_refused(layer, sizes, message, build, tokens, tmp_path):
    run = quantized(build("llama", **sizes), tokens, tmp_path, **layer)
    with pytest.raises(ValueError, match=message):
        export_model(run, tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gptqmodel", "optimum"))), reason="gptqmodel and optimum are not installed"
)
@pytest.mark.parametrize("name", SIZES)
def test_gptqmodel_reads_what_we_wrote(name, build, tokens, tmp_path):
    run = quantized(build(name, **SIZES[name]), tokens, tmp_path, bits=3)
    export_model(run, tmp_path / "out", "gptq_v2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert logit_difference(run, lambda: model) <= 1e-3  # its kernel computes in half precision
