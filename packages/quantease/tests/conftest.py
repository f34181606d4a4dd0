"""Random layers, small causal language models and real tokens, shared by the tests."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from core_tensor.dev.testing import shared_data
from quantease.problem.grid import group_index, minmax_grid
from quantease.problem.problem import Problem
from torch import Tensor

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
FALCON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "opt": ("OPTConfig", FALCON | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", FALCON | {"alibi": False}),
    "falcon-alibi": ("FalconConfig", FALCON | {"alibi": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "phi": ("PhiConfig", SMALL),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", GROUPED | EXPERTS | {"head_dim": 8}),
}


def build(name: str, seed: int = 0, **sizes: int) -> torch.nn.Module:
    """A random model of one of `ARCHITECTURES`, without dropout; `sizes` replace those of its configuration."""
    import transformers

    kind, values = ARCHITECTURES[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(values | sizes), **special)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session", name="build")
def build_fixture() -> Callable[..., torch.nn.Module]:
    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A random model of every architecture in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> torch.nn.Module:
    return build("llama")


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def stories() -> torch.nn.Module:
    """The trained stories260K model of llama2.c as a `LlamaForCausalLM`."""
    return stories_model(shared_data("stories260k", "stories260K.bin"))


@pytest.fixture(scope="session")
def stories_tokens(stories: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Calibration and other windows of 128 tokens, sampled from the model itself with a fixed seed."""
    torch.manual_seed(0)
    start = torch.ones(24, 1, dtype=torch.int64)
    sample = stories.generate(start, max_new_tokens=127, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    return sample[:12], sample[12:]


def stories_model(path: Path) -> torch.nn.Module:
    import transformers

    raw = path.read_bytes()
    d, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    flat = torch.from_numpy(np.frombuffer(raw[28:], np.float32).copy())
    position = 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return flat[position - size : position].reshape(shape)

    kv = d * kv_heads // heads
    embedding = take(vocabulary, d)
    names = {
        "input_layernorm": (layers, d),
        "self_attn.q_proj": (layers, d, d),
        "self_attn.k_proj": (layers, kv, d),
        "self_attn.v_proj": (layers, kv, d),
        "self_attn.o_proj": (layers, d, d),
        "post_attention_layernorm": (layers, d),
        "mlp.gate_proj": (layers, hidden, d),
        "mlp.down_proj": (layers, d, hidden),
        "mlp.up_proj": (layers, hidden, d),
    }
    stacked = {name: take(*shape) for name, shape in names.items()}
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": take(d)}
    for name, values in stacked.items():
        for i, value in enumerate(values):
            if name in {"self_attn.q_proj", "self_attn.k_proj"}:  # pairs (2i, 2i+1) -> halves
                value = value.reshape(-1, d // heads // 2, 2, d).transpose(1, 2).reshape(-1, d)
            state[f"model.layers.{i}.{name}.weight"] = value.clone()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture
def make_problem():
    """Random layers whose inputs are correlated; `rank` below p makes the Gram matrix singular."""

    def make(q=9, p=20, *, seed=0, rank=None, dtype=torch.float32, dead=()):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(q, p, generator=generator)
        factor = torch.randn(p, rank or 3 * p, generator=generator, dtype=torch.float64)
        factor *= torch.linspace(2.0, 0.2, p)[:, None]
        factor[list(dead)] = 0.0
        sigma = (factor @ factor.T + 0.3 * factor.sum(1)[:, None] * factor.sum(1) / p).to(dtype)
        return Problem.scaled(weight.to(dtype), sigma)

    return make


@pytest.fixture
def make_minmax():
    def make(problem, *, bits=3, group_size=-1, symmetric=False, mask=None):
        group = group_index(problem.weight.shape[1], group_size)
        return minmax_grid(problem.weight, bits=bits, group=group, symmetric=symmetric, mask=mask)

    return make
