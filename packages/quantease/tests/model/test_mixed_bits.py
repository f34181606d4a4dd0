import json
from itertools import product

import pytest
import torch
from quantease.evaluation.perplexity import Predictions, streamed, window_scores
from quantease.export.save import check_format, export_model
from quantease.model.budget import candidates, share_bits
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig


@pytest.mark.parametrize("seed", range(5))
def test_bits_are_the_best_of_all_choices(seed):
    """With groups of one size and convex errors the greedy order is optimal: against every choice there is."""
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(5, 3, generator=generator).sort(1, descending=True).values  # gains of the next bits
    errors = {g: {2 + b: float(3 - falls[g, :b].sum()) for b in range(4)} for g in range(5)}
    for average in (2.0, 2.4, 3.1, 5.0):
        found = share_bits(errors, dict.fromkeys(errors, 7), average)
        total = sum(errors[g][b] for g, b in found.items())
        allowed = [c for c in product(range(2, 6), repeat=5) if sum(c) <= 5 * average + 1e-9]
        assert sum(found.values()) <= 5 * average
        assert total == pytest.approx(min(sum(errors[g][b] for g, b in enumerate(c)) for c in allowed))


def test_bits_that_gain_nothing_are_not_given():
    errors = {"a": {2: 1.0, 3: 1.0, 4: 0.1}, "b": {2: 0.5, 3: 0.6, 4: 0.55}}
    assert share_bits(errors, {"a": 1, "b": 1}, 4.0) == {"a": 4, "b": 2}
    assert share_bits(errors, {"a": 1, "b": 1}, 2.5) == {"a": 2, "b": 2}  # two bits at once do not fit


def test_choices_of_bits():
    assert list(candidates(2.5, symmetric=False)) == [1, 2, 3, 4]
    assert list(candidates(2.5, symmetric=True)) == [2, 3, 4]
    assert list(candidates(7.5, symmetric=False)) == [6, 7, 8]
    with pytest.raises(ValueError, match="average_bits"):
        ModelConfig(LayerConfig(symmetric=True), average_bits=1.5)


def test_mixed_bits_of_a_trained_model(stories, stories_tokens, tmp_path):
    """The average holds, readers of one input agree, and the bits are in better places than the other way round."""
    calibration, other = stories_tokens
    lm = open_causal_lm(stories)
    exact = Predictions(streamed(lm, other))

    def divergence(run):
        return float(window_scores(Predictions(streamed(run.lm, other)), exact).divergences.mean())

    config = ModelConfig(LayerConfig("gptq", grid="clip", bits=3), average_bits=2.5)
    run = quantize_model(lm, calibration, tmp_path / "run", config)
    bits = {(index, m.name): layer.bits for index, m, layer in run.layers()}
    sizes = {(index, m.name): layer.codes.numel() for index, m, layer in run.layers()}
    average = sum(bits[k] * sizes[k] for k in bits) / sum(sizes.values())
    assert 2.4 < average <= 2.5
    for index in range(5):
        assert len({bits[index, f"self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({bits[index, f"mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert export_model(run, tmp_path / "native", "native").logit_difference <= 1e-6
    for kind, message in (("gptq_v2", "one number of bits only"), ("compressed-tensors", "only for symmetric grids")):
        with pytest.raises(ValueError, match=message):
            check_format(lm, config, kind)
    path = tmp_path / "run" / "bits.json"
    shared = json.loads(path.read_text())
    assert shared == {f"{index}.{name}": b for (index, name), b in bits.items()}

    # the same numbers of bits the other way round
    turned = {name: 5 - min(max(b, 1), 4) for name, b in shared.items()}
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "run.json").write_text(json.dumps(inputs | {"result": None}))
    (tmp_path / "turned" / "bits.json").write_text(json.dumps(turned))
    assert divergence(run) < divergence(quantize_model(lm, calibration, tmp_path / "turned", config))


def test_mixed_bits_on_symmetric_grids_load_as_compressed_tensors(tiny_llama, tokens, tmp_path):
    lm = open_causal_lm(tiny_llama)
    config = ModelConfig(LayerConfig("rtn", bits=4, symmetric=True), average_bits=3.5)
    run = quantize_model(lm, tokens, tmp_path / "run", config)
    assert len({layer.bits for _, _, layer in run.layers()}) > 1
    assert export_model(run, tmp_path / "out", "compressed-tensors").logit_difference <= 1e-6
