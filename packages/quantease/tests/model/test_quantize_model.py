import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantease.evaluation.perplexity import streamed_perplexity
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import open_quantized, quantize_model
from quantease.problem.config import LayerConfig

RTN = LayerConfig(algorithm="rtn", bits=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix != ".seconds" and p.is_file()
    }


@pytest.mark.parametrize("order", ["layer", "block"])
def test_layers_see_what_precedes_them(order, tiny_llama, tokens, tmp_path, build):
    """The Gram matrix of a layer is that of its inputs behind the layers that were quantized before it."""
    from quantease.algorithms.quantize import quantize_layer
    from quantease.problem.gram import GramFolds

    config = ModelConfig(RTN, order=order)
    run = quantize_model(open_causal_lm(tiny_llama), tokens, tmp_path, config)
    assert len(list(run.layers())) == 21
    reference = build("llama")  # the same weights, with what is quantized before block 1's down_proj put in place
    name = "mlp.down_proj"
    original = reference.model.layers[1].get_submodule(name).weight.detach().clone()
    for index, matrix, layer in run.layers():
        if index == 0 or (index == 1 and order == "layer" and matrix.name != name):
            matrix.assign(reference.model.layers[index], layer.dequantize())
    gram = GramFolds(48)
    handle = reference.model.layers[1].get_submodule(name).register_forward_pre_hook(lambda _, x: gram.update(x[0]))
    with torch.no_grad():
        for window in tokens:
            reference(window[None])
    handle.remove()
    expected = quantize_layer(original, gram, config.layer)
    got = run.store.load(1, name)
    assert expected.report.tokens == got.report.tokens == tokens.numel()
    assert got.report.calibration_error == pytest.approx(expected.report.calibration_error, rel=1e-5)


@pytest.mark.slow
def test_killed_run_resumes_to_identical_files(tiny_llama, tokens, tmp_path):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import os, signal, torch
from conftest import build
from quantease.model.causal_lm import open_causal_lm
from quantease.problem.config import LayerConfig
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
def progress(done, total, name):
    if done == 12:  # in the middle of a group of a later block
        os.kill(os.getpid(), signal.SIGKILL)
tokens = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))
config = ModelConfig(LayerConfig(bits=3), tune="model", tune_steps=4)
quantize_model(open_causal_lm(build("llama")), tokens, sys.argv[2], config, progress=progress)
"""

    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(tmp_path / "killed")]
    assert subprocess.run(command, check=False, timeout=900).returncode == -signal.SIGKILL
    config = ModelConfig(LayerConfig(bits=3), tune="model", tune_steps=4)
    lm = open_causal_lm(tiny_llama)
    quantize_model(lm, tokens, tmp_path / "whole", config)
    interrupted = contents(tmp_path / "killed")
    assert 0 < len(interrupted) < len(contents(tmp_path / "whole"))
    quantize_model(lm, tokens, tmp_path / "killed", config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_experts_are_quantized_each(tokens, tmp_path, build):
    lm = open_causal_lm(build("mixtral"))
    config = ModelConfig(LayerConfig(algorithm="gptq", bits=4), min_tokens=50)
    run = quantize_model(lm, tokens, tmp_path, config)
    names = [m.name for m in run.matrices[0]]
    assert names.count("mlp.experts.gate_up_proj.0") == 1
    assert len(names) == 12
    assert not any("gate" in n.split(".")[-1] for n in names)  # the router stays
    algorithms = {}
    for _, matrix, layer in run.layers():
        if matrix.expert is not None:
            algorithms[layer.report.algorithm] = algorithms.get(layer.report.algorithm, 0) + 1
            assert (layer.report.algorithm == "rtn") == (layer.report.tokens < 50)
    assert set(algorithms) == {"rtn", "gptq"}
    assert streamed_perplexity(run.lm, tokens) == pytest.approx(streamed_perplexity(lm, tokens), rel=0.1)


def test_conv1d_is_transposed(tokens, tmp_path, build):
    model = build("gpt2")
    run = quantize_model(open_causal_lm(model), tokens, tmp_path, ModelConfig(RTN))
    layer = run.store.load(0, "attn.c_attn")
    assert layer.codes.shape == (96, 32)
    with run.lm.loaded(0) as block:
        torch.testing.assert_close(block.attn.c_attn.weight.T, layer.dequantize(), rtol=0, atol=0)


def test_open_again(tiny_llama, tokens, tmp_path, build):
    lm = open_causal_lm(tiny_llama)
    run = quantize_model(lm, tokens, tmp_path, ModelConfig(RTN), blocks=2)
    again = open_quantized(lm, tmp_path)
    assert again.config == run.config
    assert streamed_perplexity(again.lm, tokens) == streamed_perplexity(run.lm, tokens)
    with pytest.raises(ValueError, match="another model"):
        open_quantized(open_causal_lm(build("llama", seed=5)), tmp_path)
    next((tmp_path / "layers").rglob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="not finished, 1 layers are missing"):
        open_quantized(lm, tmp_path)


def test_folder_of_another_run_is_refused(tiny_llama, tokens, tmp_path):
    lm = open_causal_lm(tiny_llama)
    quantize_model(lm, tokens, tmp_path, ModelConfig(RTN), blocks=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"other inputs \(config\.layer\.bits: 3 then, 4 now\)"):
        quantize_model(lm, tokens, tmp_path, ModelConfig(LayerConfig(algorithm="rtn", bits=4)), blocks=1)
    with pytest.raises(ValueError, match=r"other inputs \(tokens\.digest: "):
        quantize_model(lm, tokens.flip(0), tmp_path, ModelConfig(RTN), blocks=1)
    assert contents(tmp_path) == before


def test_layers_of_other_weights_are_refused(tokens, tmp_path, build):
    model = build("llama")
    quantize_model(open_causal_lm(model), tokens, tmp_path, ModelConfig(RTN), blocks=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    run = quantize_model(open_causal_lm(model), tokens, tmp_path, ModelConfig(RTN), blocks=1)  # was finished already
    with pytest.raises(ValueError, match="came from other weights"), run.lm.loaded(0):
        pass
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"result": None}))
    with pytest.raises(ValueError, match="came from other weights"):
        quantize_model(open_causal_lm(model), tokens, tmp_path, ModelConfig(RTN), blocks=1)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)])
def test_bad_tokens(bad, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="tokens: expected"):
        quantize_model(open_causal_lm(tiny_llama), bad, tmp_path)
    with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 96\], got 97"):
        quantize_model(open_causal_lm(tiny_llama), torch.full((1, 4), 97), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stories_quantized_is_still_a_language_model(stories, stories_tokens, tmp_path):
    calibration, other = stories_tokens
    lm = open_causal_lm(stories)
    full = streamed_perplexity(lm, other)
    run = quantize_model(lm, calibration, tmp_path / "rtn", ModelConfig(RTN))
    rounded = streamed_perplexity(run.lm, other)
    assert 2.0 < full < 6.0
    assert 1.3 * full < rounded < 10 * full
