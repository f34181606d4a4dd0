"""The largest eigenvalue of a transformer of 100 million parameters, in a process of at most 8 GB."""

import multiprocessing
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from sgd_stability.curvature.spectra import gauss_newton_operator, network_of
from sgd_stability.curvature.truncated import top_eigenvectors
from torch import Tensor, nn


class LanguageModel(nn.Module):
    """Twelve pre-norm encoder layers of width 768 under a causal mask, with tied embeddings: 100.4M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20_000, 768)
        nn.init.normal_(self.embed.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(768), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, T, V) of tokens (n, T)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layers(self.embed(tokens), mask=mask, is_causal=True)
        return hidden @ self.embed.weight.T


MEMORY = 8 * 2**30


def top_eig_child(results: Any) -> None:
    """The largest eigenvalue of the language model's Gauss-Newton Hessian, with all allocations capped at 8 GB."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel()
    generator = torch.Generator().manual_seed(0)
    frequent = 1 / torch.arange(1, 20_001)
    tokens = torch.multinomial(frequent, 8 * 17, replacement=True, generator=generator).reshape(8, 17)
    network = network_of(model, "token_cross_entropy", (tokens[:, :-1], tokens[:, 1:].contiguous()))
    start = time.process_time()
    found = top_eigenvectors(gauss_newton_operator(network), 1, max_steps=10)
    results.put(
        {
            "seconds": time.process_time() - start,
            "parameters": network.size,
            "products": found.products,
            "lambda1": float(found.values[0]),
            "relative_residual": float(found.residuals[0] / found.values[0]),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )


def top_eig_100m(_: bool) -> Mapping[str, Any]:
    """CPU seconds of a 100M-parameter transformer's largest eigenvalue in a process of at most 8 GB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=top_eig_child, args=(results,))
    child.start()
    child.join()
    if child.exitcode:
        return {"top_eig_100m_parameters": None, "top_eig_100m_parameters_reason": f"exit code {child.exitcode}"}
    detail = results.get()
    return {"top_eig_100m_parameters": detail.pop("seconds"), "top_eig_100m_parameters_detail": detail}
