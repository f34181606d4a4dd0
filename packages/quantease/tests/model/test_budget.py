"""One budget of outliers for the whole model."""

import pytest
import torch
from quantease.algorithms.heldout import make_grid
from quantease.model.budget import outlier_fractions
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig, model_matrices
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

OUTLIERS = LayerConfig(bits=3, outliers=0.02, sweeps=3, refits=0)


def test_fractions_are_those_of_one_order_of_all_weights(tiny_llama, tokens):
    """Against a sort of all relative costs, from inputs that hooks on the model itself saw."""
    lm = open_causal_lm(tiny_llama)
    matrices = model_matrices(lm, ModelConfig())
    found = outlier_fractions(lm, tokens, matrices, OUTLIERS)
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2))
        )
        for name, module in tiny_llama.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for window in tokens:
            tiny_llama(window[None])
    for handle in handles:
        handle.remove()
    costs = {}
    for index, block_matrices in enumerate(matrices):
        for matrix in block_matrices:
            name = f"model.layers.{index}.{matrix.name}"
            W, X = tiny_llama.get_submodule(name).weight.detach(), torch.cat(inputs[name])
            energy = X.square().sum(0)
            grid = make_grid(W, energy, OUTLIERS, clip=True)
            error = (W - grid.dequantize(grid.quantize(W))).square() * energy
            costs[index, matrix.name] = error / (X @ W.T).square().sum()
    cut = torch.cat([c.flatten() for c in costs.values()]).quantile(1 - OUTLIERS.outliers)
    for name, cost in costs.items():
        assert found[name] == pytest.approx(float((cost > cut).double().mean()), abs=0.01)
    total = sum(found[name] * cost.numel() for name, cost in costs.items())
    assert total == pytest.approx(OUTLIERS.outliers * sum(c.numel() for c in costs.values()), rel=1e-6)
    assert max(found.values()) > 1.2 * min(found.values())


def test_a_model_keeps_its_budget(tiny_llama, tokens, tmp_path):
    config = ModelConfig(OUTLIERS, outlier_budget="model")
    run = quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path, config, blocks=2)
    kept, weights, fractions = 0, 0, set()
    for _, _, layer in run.layers():
        count = 0 if layer.outliers is None else len(layer.outliers.values)
        kept, weights = kept + count, weights + layer.codes.numel()
        fractions.add(round(count / layer.codes.numel(), 4))
    assert kept == pytest.approx(0.02 * weights, rel=0.02)
    assert len(fractions) > 3
    before = (tmp_path / "outliers.json").read_bytes()
    quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path, config, blocks=2)
    assert (tmp_path / "outliers.json").read_bytes() == before


def test_columns_have_no_budget_of_the_model():
    with pytest.raises(ValueError, match="outlier_budget: expected 'layer' with structured outliers"):
        ModelConfig(LayerConfig(outliers=0.01, structure="structured"), outlier_budget="model")
