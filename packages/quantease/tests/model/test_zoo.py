"""Architectures of transformers with random weights: quantized, saved, loaded by plain transformers, equal logits."""

import dataclasses
import inspect

import pytest
import torch
import transformers
from quantease.export.save import export_model
from quantease.model.causal_lm import find_blocks, open_causal_lm
from quantease.model.plan import ModelConfig, check_coverage, model_matrices
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "max_seq_len", "max_seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_expert"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "sliding_window": 8,
    "time_step_rank": 4,
    "intermediate_size_mlp": 48,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ZOO = """
    Afmoe Apertus Arcee AriaText Beam Bert BertGeneration BigBird BioGpt BitNet Blenderbot Bloom Camembert
    CodeGen Cohere Cohere2 Cohere2Moe Cwm Data2VecText DiffLlama Doge Dots1 Electra Ernie Ernie4_5 Exaone4
    ExaoneMoe Falcon FalconMamba FlexOlmo Flint GPT2 GPTBigCode GPTJ GPTNeoX GPTNeoXJapanese Gemma Gemma2
    Gemma3Text Gemma4UnifiedText Glm Glm4 Glm4Moe GptOss Granite Llama Llama4Text Mixtral Olmo2
"""
ZOO_NAMES = ZOO.split()


def config_of(name: str):
    kind = getattr(transformers, f"{name}Config")
    known = set(inspect.signature(kind.__init__).parameters)
    known |= {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return kind(**{key: value for key, value in SIZES.items() if key in known})


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def comes_through(model, windows, folder):
    lm = open_causal_lm(model.eval())
    config = ModelConfig(LayerConfig("gptq-descent", bits=3), min_tokens=1)
    check_coverage(lm, model_matrices(lm, config))
    run = quantize_model(lm, windows, folder / "run", config)
    assert export_model(run, folder / "dense", "dense").logit_difference == 0.0
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own, about settings of architectures
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_architectures_of_the_zoo(name, windows, tmp_path):
    torch.manual_seed(0)
    comes_through(transformers.AutoModelForCausalLM.from_config(config_of(name)), windows, tmp_path)


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION |= {"image_size": 28, "patch_size": 14}


@pytest.mark.parametrize("name", ["Gemma3", "Llava"])
def test_text_part_of_vision_language_models(name, windows, tmp_path):
    """Vision towers of equal depth and greater size than the text's stay as they are."""
    torch.manual_seed(0)
    if name == "Gemma3":
        text = config_of("Gemma3Text").to_dict()
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    else:
        vision = transformers.CLIPVisionConfig(**VISION, projection_dim=32)
        config = transformers.LlavaConfig(text_config=config_of("Llama"), vision_config=vision, image_token_index=5)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = comes_through(model, windows, tmp_path)
    assert all("vision" not in block for block in run.lm.blocks)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").state_dict()
    assert loaded.keys() == before.keys()
    changed = {key for key, value in loaded.items() if not torch.equal(value, before[key])}
    assert changed == {f"{run.lm.blocks[i]}.{m.parameter}" for i, ms in enumerate(run.matrices) for m in ms}


def test_experts_see_their_own_inputs(windows, tmp_path):
    """Llama 4 multiplies all experts' inputs at once, gpt-oss stores its matrices as (in, out): both by hooks here."""
    for name in ("Llama4Text", "GptOss"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()
        run = quantize_model(open_causal_lm(model), windows, tmp_path / name, ModelConfig(LayerConfig("gptq", bits=4)))
        layers = {m.name: layer for index, m, layer in run.layers() if index == 0 and m.expert is not None}
        assert len(layers) == 8
        tokens = [layers[key].report.tokens for key in layers if "gate_up" in key]
        assert sum(tokens) == 2 * windows.numel()
        assert all(layer.codes.shape[1] in {32, 48} for layer in layers.values())


def test_shared_layers_are_refused(build):
    model = build("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(ValueError, match=r"blocks 0 and 2 of LlamaForCausalLM share self_attn\.q_proj\.weight"):
        find_blocks(model)


def test_infinities_in_a_configuration_are_written(build, windows, tmp_path):
    model = build("llama")
    model.config.time_step_limit = [0.0, float("inf")]  # as Mamba-2 has it
    comes_through(model, windows, tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    assert list(loaded.time_step_limit) == [0.0, float("inf")]
