"""Benchmarks of quantease's layer algorithms: speed against torch.matmul, errors on generated and real layers."""

import importlib.util
import pydoc_data.topics
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from core_tensor.dev.benchmarking import Comparison, compare, run_bars
from core_tensor.dev.testing import shared_data
from quantease import (
    GramFolds,
    LayerConfig,
    ModelConfig,
    export_model,
    open_causal_lm,
    quantize_layer,
    quantize_model,
    relative_error,
)
from quantease.algorithms.certified import gptq_descent
from quantease.algorithms.gptq import gptq
from quantease.algorithms.sweep import Sweeper
from quantease.evaluation.perplexity import Predictions, streamed, streamed_perplexity, window_scores
from quantease.evaluation.samples import own_samples
from quantease.evaluation.smollm2 import open_smollm2, smollm2_path
from quantease.evaluation.synthetic import synthetic_layer
from quantease.evaluation.text import python_topics, sample_windows, windows
from quantease.export.save import logit_difference
from quantease.problem.grid import Grid, group_index, minmax_grid
from quantease.problem.objective import row_objective
from quantease.problem.problem import Problem
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

Result = dict[str, Any]
BLOCKS = (0, 14, 29)
"""First, middle and last block of SmolLM2."""


def _square(size: int) -> tuple[Problem, Grid]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 2 * size, generator=generator)
    problem = Problem.scaled(torch.randn(size, size, generator=generator), x @ x.T)
    return problem, minmax_grid(problem.weight, bits=3, group=group_index(size, -1))


def _against_gemm(size: int, ours: Callable[[], Any], quick: bool) -> Comparison:
    a, b = torch.randn(size, size), torch.randn(size, size)
    return compare(ours, lambda: a @ b, pairs=7 if quick else 15)


def _sweep(problem: Problem, grid: Grid) -> Callable[[], None]:
    sweeper = Sweeper(problem, grid)
    residual = sweeper.residual(grid.dequantize(grid.quantize(problem.weight)))
    return lambda: sweeper.sweep(residual)


def cd_sweep_gemm_fraction(quick: bool) -> Result:
    """A dense sweep, 2 p^2 q flops, over torch.matmul's rate at the same shape; least of two sizes."""
    found = {size: _against_gemm(size, _sweep(*_square(size)), quick) for size in (2048, 4096)}
    return {
        "cd_sweep_gemm_fraction": round(min(c.speedup for c in found.values()), 4),
        "cd_sweep_gemm_fraction_detail": {str(size): c.spread() for size, c in found.items()},
    }


def column_loop(problem: Problem, grid: Grid) -> Callable[[], None]:
    """The sweep as the public codes write it (Alg. 2 of the paper): one column at a time, in torch.

    Args:
        problem: Weights and Gram matrix.
        grid: Scales and zero points, one group per row.

    Returns:
        A function that sweeps once from the nearest grid points.
    """
    tilde, W = problem.normalized, problem.weight.T.contiguous()  # (p, p), (p, q)
    P = W + tilde @ W  # computed once; P_hat of every sweep is the product below
    start = grid.dequantize(grid.quantize(problem.weight)).T.contiguous()
    scale, zero = grid.scale[:, 0], grid.zero[:, 0]

    def sweep() -> None:
        What = start.clone()
        fixed = torch.addmm(P, tilde, What, alpha=-1)
        change = torch.zeros_like(What)
        for j in range(W.shape[0]):
            beta = torch.addmv(fixed[j], change[:j].T, tilde[j, :j])
            new = (beta / scale).round_().add_(zero).clamp_(0, grid.max_code).sub_(zero).mul_(scale)
            torch.sub(What[j], new, out=change[j])
            What[j] = new

    return sweep


def cd_sweep_vs_column_loop(quick: bool) -> Result:
    """A dense sweep against the column loop, and the loop's own rate, p = q = 4096."""
    problem, grid = _square(4096)
    loop = column_loop(problem, grid)
    found = compare(_sweep(problem, grid), loop, pairs=3 if quick else 5)
    return {
        "cd_sweep_vs_column_loop": round(found.speedup, 3),
        "cd_sweep_vs_column_loop_detail": found.spread(),
        "column_loop_gemm_fraction": round(_against_gemm(4096, loop, True).speedup, 4),
    }


def _fresh(problem: Problem) -> Problem:
    """The problem without the factors that earlier calls left in it."""
    return Problem(problem.weight, problem.sigma)


def gptq_gemm_fraction(quick: bool) -> Result:
    """GPTQ with its Cholesky factorisation, counted as 2 p^2 q flops, over torch.matmul's rate at 4096."""
    problem, grid = _square(4096)
    found = _against_gemm(4096, lambda: gptq(_fresh(problem), grid), quick)
    return {"gptq_gemm_fraction": round(found.speedup, 4), "gptq_gemm_fraction_detail": found.spread()}


def gptq_descent_vs_gptq(quick: bool) -> Result:
    """GPTQ and descent to a certified minimum over GPTQ's time; the greater of a generated and a real layer."""
    layer = synthetic_layer("A", seed=0, features=2048, rows=2048)
    real, folds, _ = smollm2_layers((14,))["14.mlp.down_proj"]
    problems = {"synthetic": (layer.weight, layer.gram), "SmolLM2 14.mlp.down_proj": (real, folds.total)}
    found, details = {}, {}
    for name, (weight, sigma) in problems.items():
        problem = Problem.scaled(weight, sigma)
        grid = minmax_grid(weight, bits=3, group=group_index(weight.shape[1], -1))
        codes, certificate = gptq_descent(problem, grid)
        if not certificate.holds:
            raise RuntimeError(f"the minimum of {name} was not certified")
        moved = round(float((codes != gptq(problem, grid)).double().mean()), 5)
        found[name] = compare(
            lambda p=problem, g=grid: gptq_descent(_fresh(p), g),
            lambda p=problem, g=grid: gptq(_fresh(p), g),
            pairs=5 if quick else 9,
        )
        details[name] = found[name].spread() | {"moved": moved}
    return {
        "gptq_descent_vs_gptq": round(max(c.ratio for c in found.values()), 4),
        "gptq_descent_vs_gptq_detail": details,
    }


def outlier_error_vs_iht(quick: bool) -> Result:
    """Mixed descent over the paper's iterative hard thresholding: layer error at equal storage, synthetic A."""
    results: Result = {}
    for bits, fraction in ((3, 0.01), (2, 0.02)):
        ratios, unseen = [], []
        for seed in range(2 if quick else 5):
            layer = synthetic_layer("A", seed=seed, features=512, rows=512)
            ours, theirs = (
                quantize_layer(layer.weight, layer.gram, LayerConfig(name, bits=bits, outliers=fraction))  # type: ignore[arg-type]
                for name in ("quantease", "quantease-paper")
            )
            if ours.report.bits_per_weight != theirs.report.bits_per_weight:
                raise RuntimeError("the two do not store the same")
            ratios.append(round(ours.report.calibration_error / theirs.report.calibration_error, 4))
            errors = [relative_error(layer.weight, found.dequantize(), layer.heldout) for found in (ours, theirs)]
            unseen.append(round(errors[0] / errors[1], 4))
        name = f"outlier_error_{bits}b_vs_iht"
        results |= {name: statistics.median(ratios), f"{name}_detail": {"calibration": ratios, "unseen": unseen}}
    return results


_MEMORY = """
import re, sys
from pathlib import Path
from quantease import LayerConfig, ModelConfig, export_model, open_causal_lm, quantize_model
import quantease.export, transformers.models.llama.modeling_llama, torch
def peak():
    # of this program alone: getrusage would start from the peak of the process that started it
    return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
before = peak()
folder = sys.argv[1]
lm = open_causal_lm(folder)
tokens = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0))
run = quantize_model(lm, tokens, folder + "/run", ModelConfig(LayerConfig("gptq")), blocks=2)
quantized = peak()
export_model(run, folder + "/out")
print(before, quantized, peak())
"""


def peak_memory(quick: bool) -> Result:
    """Peak memory above that of the imports, over the weights in float32: quantize, then also save and load again."""
    del quick
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16
        )
        model = AutoModelForCausalLM.from_config(config)
        weights = 4 * sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder)
        del model
        command = [sys.executable, "-c", _MEMORY, folder]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, quantized, saved = map(int, output.split()[-3:])
    return {
        "peak_memory_over_weights": round((saved - before) / weights, 3),
        "peak_memory_over_weights_detail": {
            "weights_MB": round(weights / 1e6),
            "imports_MB": round(before / 1e6),
            "while_quantizing": round((quantized - before) / weights, 3),
        },
    }


def export_reload_difference(quick: bool) -> Result:
    """Logits of a saved model as transformers (and GPTQModel) load it against those in memory, over the greatest."""
    del quick
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))
    results: Result = {}
    peers = all(map(importlib.util.find_spec, ("gptqmodel", "optimum")))
    for name, layer in (
        ("compressed-tensors", LayerConfig("rtn")),
        ("gptq", LayerConfig("rtn", symmetric=True)),
        ("gptq_v2", LayerConfig("rtn")),
        ("native", LayerConfig("quantease", outliers=0.01)),
    ):
        key = f"reload_difference_{name.replace('-', '_')}"
        if name.startswith("gptq") and not peers:
            results |= {key: None, f"{key}_reason": "peers not installed: gptqmodel and optimum"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = quantize_model(open_causal_lm(model.eval()), tokens, f"{folder}/run", ModelConfig(layer))
            export_model(run, f"{folder}/out", name)
            load = partial(AutoModelForCausalLM.from_pretrained, f"{folder}/out", dtype=torch.float32)
            results[key] = logit_difference(run, load)
    return results


def paper_vs_gptq_layer_error(quick: bool) -> Result:
    """The paper's method against GPTQ without act-order: median over the synthetic sets A and B, five seeds."""
    del quick  # the bar is defined on all ten layers
    ratios: dict[str, list[float]] = {"A": [], "B": []}
    for kind in ("A", "B"):
        for seed in range(5):
            layer = synthetic_layer(kind, seed=seed)  # type: ignore[arg-type]
            errors = [
                quantize_layer(layer.weight, layer.gram, config).report.calibration_error
                for config in (LayerConfig("quantease-paper"), LayerConfig("gptq", act_order=False))
            ]
            ratios[kind].append(round(errors[0] / errors[1], 4))
    return {
        "paper_vs_gptq_layer_error": round(statistics.median(ratios["A"] + ratios["B"]), 4),
        "paper_vs_gptq_layer_error_detail": ratios,
    }


def default_worse_rows(quick: bool) -> Result:
    """Rows in which the default, as exported, is above GPTQ act-order or RTN under the matrix it optimised."""
    layers: list[tuple[Tensor, Tensor | GramFolds]] = []
    for kind in ("A", "B"):
        for seed in range(1 if quick else 5):
            layer = synthetic_layer(kind, seed=seed, features=512, rows=512)  # type: ignore[arg-type]
            layers.append((layer.weight, layer.gram))
    layers += [(weight, folds) for weight, folds, _ in smollm2_layers(BLOCKS[:1] if quick else BLOCKS).values()]
    return {
        "default_worse_rows": sum(_worse_rows(weight, gram) for weight, gram in layers),
        "default_worse_rows_detail": {"rows": sum(weight.shape[0] for weight, _ in layers)},
    }


def _worse_rows(weight: Tensor, gram: Tensor | GramFolds) -> int:
    ours = quantize_layer(weight, gram)
    shrinkage = ours.report.shrinkage
    sigma = shrinkage(gram.total if isinstance(gram, GramFolds) else gram)

    def rows(layer: Any) -> Tensor:
        return row_objective(weight.double() - layer.dequantize(torch.float64), sigma)

    others = []
    for config in (LayerConfig("rtn", shrinkage=shrinkage), LayerConfig("gptq", shrinkage=shrinkage)):
        others += [rows(quantize_layer(weight, gram, replace(config, grid=grid))) for grid in ("minmax", "clip")]
    return int((rows(ours) > torch.stack(others).amin(0) * (1 + 1e-9)).sum())


def heldout_layer_error_vs_gptq(quick: bool) -> Result:
    """The default against GPTQ act-order on tokens that calibration never saw, layers of SmolLM2."""
    del quick  # the bar is defined on all these layers
    ratios: dict[str, dict[str, float]] = {"quantease": {}, "gptq_same_shrinkage_and_clip": {}, "quantease_paper": {}}
    for name, (weight, calibration, unseen) in smollm2_layers(BLOCKS).items():
        ours = quantize_layer(weight, calibration)
        others = (
            LayerConfig("gptq"),
            LayerConfig("gptq", grid="clip", shrinkage=ours.report.shrinkage),
            LayerConfig("quantease-paper"),
        )
        base, *rest = (
            relative_error(weight, quantize_layer(weight, calibration, c).dequantize(), unseen) for c in others
        )
        for key, error in zip(ratios, (relative_error(weight, ours.dequantize(), unseen), *rest), strict=True):
            ratios[key][name] = round(error / base, 4)
    medians = {key: round(statistics.median(values.values()), 4) for key, values in ratios.items()}
    detail = {"medians": medians, "layers": ratios["quantease"]}
    return {"heldout_layer_error_vs_gptq": medians["quantease"], "heldout_layer_error_vs_gptq_detail": detail}


def smollm2_layers(blocks: tuple[int, ...]) -> dict[str, tuple[Tensor, GramFolds, Tensor]]:
    """Linear layers of SmolLM2 with what they see.

    Args:
        blocks: Numbers of the decoder blocks.

    Returns:
        By layer: weights, folds of 2,048 calibration tokens, Gram matrix of 1,024 tokens of another part of the text.
    """
    path = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "\n".join(pydoc_data.topics.topics.values())
    middle = len(text) // 2
    modules = {
        f"{block}.{name}": module
        for block in blocks
        for name, module in model.model.layers[block].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    grams = []
    for part, count in ((text[:60_000], 4), (text[middle : middle + 60_000], 2)):
        tokens = tokenizer(part, return_tensors="pt").input_ids[0, : 512 * count].reshape(count, 512)
        grams.append({name: GramFolds(module.in_features, segment=512) for name, module in modules.items()})
        hooks = [
            module.register_forward_pre_hook(lambda _, args, gram=grams[-1][name]: gram.update(args[0]))
            for name, module in modules.items()
        ]
        with torch.no_grad():
            for window in tokens:
                model(window[None])
        for hook in hooks:
            hook.remove()
    return {name: (m.weight.detach().clone(), grams[0][name], grams[1][name].total) for name, m in modules.items()}


def whole_model(quick: bool) -> Result:
    """SmolLM2-135M at 3 and 2 bits: divergence beside GPTQ on the clip grid, perplexity, CPU time beside GPTQ.

    The bars are defined on all 30 blocks and three places of the calibration text, which takes hours of one core;
    `--quick` quantizes the first two blocks from one, and says so.
    """
    lm, blocks, seeds = open_smollm2(), 2 if quick else None, 1 if quick else 3
    text, found, details = python_topics(), {}, {"blocks": blocks or len(lm.blocks), "seeds": seeds}
    evaluation = windows(lm.tokenizer, text.evaluation, 512, 2 if quick else 16)
    exact = Predictions(streamed(lm, evaluation))
    full = window_scores(exact).to_dict()["perplexity"]
    methods = {"gptq": LayerConfig("gptq"), "gptq-clip": LayerConfig("gptq", grid="clip"), "quantease": LayerConfig()}
    rows: dict[tuple[int, str], list[dict[str, float]]] = {}
    for seed in range(seeds):
        calibration, _ = sample_windows(lm.tokenizer, text.calibration, 512, 4 if quick else 16, seed=seed)
        for bits, name in ((3, "gptq"), (3, "gptq-clip"), (3, "quantease"), (2, "gptq-clip"), (2, "quantease")):
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                config = ModelConfig(replace(methods[name], bits=bits))
                run = quantize_model(lm, calibration, folder, config, blocks=blocks)
                seconds = time.process_time() - start
                scores = window_scores(Predictions(streamed(run.lm, evaluation), room=0), exact).to_dict()
            rows.setdefault((bits, name), []).append(scores | {"seconds": seconds})
    for (bits, name), values in rows.items():
        details[f"{name}, {bits} bits"] = {key: [round(row[key], 4) for row in values] for key in values[0]}

    def mean(bits: int, name: str, key: str) -> float:
        return statistics.fmean(row[key] for row in rows[bits, name])

    for bits in (3, 2):
        ratio = mean(bits, "quantease", "kl") / mean(bits, "gptq-clip", "kl")
        found[f"kl_vs_gptq_clip_{bits}bit"] = round(ratio, 4)
    found["ppl_3bit_over_fp"] = round(mean(3, "quantease", "perplexity") / full, 4)
    found["default_cpu_vs_gptq"] = round(mean(3, "quantease", "seconds") / mean(3, "gptq", "seconds"), 3)
    return found | {"whole_model_detail": details}


def stories_ratio(quick: bool) -> Result:
    """Perplexity of stories260K over full precision's, default options, calibrated on samples of its own."""
    tests = Path(__file__).parents[1] / "tests" / "conftest.py"
    model = runpy.run_path(str(tests))["stories_model"](shared_data("stories260k", "stories260K.bin"))
    ratios: dict[int, list[float]] = {3: [], 2: []}
    for seed in range(1 if quick else 5):
        sample = own_samples(model, 80, 256, seed=seed, batch=80)
        lm = open_causal_lm(model)
        full = streamed_perplexity(lm, sample[32:])
        for bits, found in ratios.items():
            with tempfile.TemporaryDirectory() as folder:
                run = quantize_model(lm, sample[:32], folder, ModelConfig(LayerConfig(bits=bits)))
                found.append(round(streamed_perplexity(run.lm, sample[32:]) / full, 4))
    return {
        **{f"stories260k_ppl_ratio_{bits}bit": round(statistics.fmean(found), 4) for bits, found in ratios.items()},
        "stories260k_ppl_ratio_detail": {str(bits): found for bits, found in ratios.items()},
    }


BARS = {
    "cd_sweep_gemm_fraction": cd_sweep_gemm_fraction,
    "cd_sweep_vs_column_loop": cd_sweep_vs_column_loop,
    "gptq_gemm_fraction": gptq_gemm_fraction,
    "gptq_descent_vs_gptq": gptq_descent_vs_gptq,
    "paper_vs_gptq_layer_error": paper_vs_gptq_layer_error,
    "default_worse_rows": default_worse_rows,
    "heldout_layer_error_vs_gptq": heldout_layer_error_vs_gptq,
    "outlier_error_vs_iht": outlier_error_vs_iht,
    "peak_memory_over_weights": peak_memory,
    "export_reload_difference": export_reload_difference,
    "stories260k_ppl_ratio_3bit": stories_ratio,
    "kl_vs_gptq_clip_3bit": whole_model,
}

if __name__ == "__main__":
    run_bars("quantease", BARS)
