"""Quantize a causal language model to 3 bits, save it, load it with transformers, and compare perplexities.

The model is a small Llama with random weights, trained here for a few seconds on the text that it is tested on; a path
or a hub id in its place is all that a real model needs.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from quantease import LayerConfig, ModelConfig, export_model, open_causal_lm, perplexity, quantize_model
from quantease.evaluation.text import python_topics

LENGTH = 64


def train_small_llama(text: torch.Tensor, steps: int = 60) -> transformers.LlamaForCausalLM:
    """A byte-level Llama that has seen some English.

    Args:
        text: Bytes as token ids, shape (T,).
        steps: Optimizer steps.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (16,))
        batch = torch.stack([text[s : s + LENGTH] for s in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    """Quantize, save, load, compare."""
    topics = python_topics()
    read, other = (torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8).long() for part in
                   (topics.calibration, topics.evaluation))  # fmt: skip
    model = train_small_llama(read)
    calibration = read[: 32 * LENGTH].reshape(32, LENGTH)
    held_out = other[: 32 * LENGTH]
    print(f"full precision      {perplexity(model, held_out, length=LENGTH):.3f}")
    lm = open_causal_lm(model)  # a folder, a .gguf file or a hub id works as well
    for algorithm in ("rtn", "gptq", "quantease"):
        with tempfile.TemporaryDirectory() as folder:
            config = ModelConfig(LayerConfig(algorithm=algorithm, bits=3))
            run = quantize_model(lm, calibration, Path(folder) / "run", config)
            export_model(run, Path(folder) / "model", "compressed-tensors")
            loaded = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
            print(f"{algorithm:10s} 3 bits   {perplexity(loaded, held_out, length=LENGTH):.3f}")


if __name__ == "__main__":
    main()
