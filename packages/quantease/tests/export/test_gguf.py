import pytest
import torch
from quantease.export import gguf as ours
from quantease.export.save import check_format, export_model
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

gguf = pytest.importorskip("gguf")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def neighbors(weight, heads):
    """Queries and keys as llama.cpp's converter writes them: rotary pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(build, tmp_path_factory):
    """A small Llama as a GGUF file in float32, written with names and orders spelled out by hand."""
    model = build("llama", hidden_size=64, intermediate_size=96)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(94)), "!!", "<a>", "<b>"])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for block in range(config.num_hidden_layers):
        for name, stored in NAMES.items():
            value = state[f"model.layers.{block}.{name}.weight"]
            if stored in {"attn_q", "attn_k"}:
                heads = config.num_attention_heads if stored == "attn_q" else config.num_key_value_heads
                value = neighbors(value, heads).copy()
            writer.add_tensor(f"blk.{block}.{stored}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_gguf_holds_what_was_quantized(bits, file, tokens, tmp_path):
    """Read back by the gguf package, with names and orders of our own; loaded by transformers; metadata kept."""
    lm = open_causal_lm(file)
    config = ModelConfig(LayerConfig("gptq", bits=bits, group_size=32, symmetric=True))
    run = quantize_model(lm, tokens, tmp_path / "run", config)
    report = export_model(run, tmp_path / "out", "gguf")
    assert report.logit_difference <= 1e-6
    kind = ours.TYPES[bits][0]
    assert report.files == (f"model-{kind}.gguf",)
    before, after = (gguf.GGUFReader(path) for path in (file, tmp_path / "out" / report.files[0]))
    tensors = {tensor.name: tensor for tensor in after.tensors}
    for index, matrix, layer in run.layers():
        tensor = tensors[f"blk.{index}.{NAMES[matrix.name]}.weight"]
        assert tensor.tensor_type.name == kind
        value = layer.dequantize().numpy()
        if NAMES[matrix.name] in {"attn_q", "attn_k"}:
            value = neighbors(value, 4 if NAMES[matrix.name] == "attn_q" else 2)
        assert (gguf.quants.dequantize(tensor.data, tensor.tensor_type) == value).all()
    kept = {field.name: field.contents() for field in before.fields.values() if not field.name.startswith("GGUF.")}
    assert {name: after.get_field(name).contents() for name in kept} == kept
    assert (tensors["token_embd.weight"].data == before.tensors[0].data).all()
    assert torch.equal(open_causal_lm(tmp_path / "out" / report.files[0]).skeleton.model.norm.weight, torch.ones(64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(LayerConfig(bits=3, group_size=32, symmetric=True)), "4, 5 or 8 bits on symmetric groups of 32"),
        (ModelConfig(LayerConfig(bits=4, group_size=32)), "symmetric groups of 32"),
        (ModelConfig(LayerConfig(bits=4, group_size=64, symmetric=True)), "symmetric groups of 32"),
        (ModelConfig(LayerConfig(bits=4, group_size=32, symmetric=True), tune="block"), "use --tune none"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(config, message, file):
    with pytest.raises(ValueError, match=message):
        check_format(open_causal_lm(file), config, "gguf")


def test_only_models_from_gguf_files(tiny_llama):
    config = ModelConfig(LayerConfig(bits=4, group_size=32, symmetric=True))
    with pytest.raises(ValueError, match=r"convert the model with llama\.cpp's convert_hf_to_gguf\.py"):
        check_format(open_causal_lm(tiny_llama), config, "gguf")


def test_weights_in_another_form_are_refused(file):
    lm, name = open_causal_lm(file), "blk.0.ffn_up.weight"
    with lm.loaded(0) as block:
        weight = block.mlp.up_proj.weight.detach() + 1
        with pytest.raises(ValueError, match=r"holds blk\.0\.ffn_up\.weight in another form"):
            ours._row_order(lm, weight, ours._File(file).values(name), name)
