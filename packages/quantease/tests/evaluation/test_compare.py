import torch
from quantease.demo import DemoConfig, evaluation_windows
from quantease.evaluation.compare import best, compare_methods
from quantease.evaluation.text import python_topics, sample_windows
from quantease.model.causal_lm import open_causal_lm
from quantease.model.plan import ModelConfig
from quantease.problem.config import LayerConfig


class Words:
    """A tokenizer with a number for every word, without special tokens."""

    bos_token_id = None

    def __init__(self):
        self.known = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}


def runs(ids, length=24):
    flat = ids.reshape(-1, ids.shape[-1]).tolist()
    return {tuple(window[i : i + length]) for window in flat for i in range(len(window) - length + 1)}


def test_evaluation_never_reaches_what_is_quantized(tiny_llama, tokens, tmp_path):
    """Folds, targets and tuning: other evaluation tokens change no byte of any layer."""
    lm = open_causal_lm(tiny_llama)
    other = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(5))
    methods = {"quantease": LayerConfig(bits=2), "gptq": LayerConfig("gptq", bits=2)}
    found = []
    for place, evaluation in (("a", tokens[2:].flip(0)), ("b", other)):
        folder, config = tmp_path / place, ModelConfig(tune="model", tune_steps=3)
        compared = compare_methods(lm, tokens[:2], evaluation, folder, methods, config, blocks=1)
        assert [len(values) for values in compared.divergences.values()] == [2, 2]
        assert best(compared.rows) == min(compared.divergences, key=lambda name: sum(compared.divergences[name]))
        found.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))})
    assert len(found[0]) == 2 * 7 + 4  # layers, and what was tuned per block and for the model
    assert found[0] == found[1]


def test_texts_of_the_demonstration_are_disjoint_from_each_other_and_from_calibration():
    tokenizer, text = Words(), python_topics()
    config = DemoConfig.quick()
    windows = evaluation_windows(tokenizer, text.evaluation, config)
    assert windows.shape == (5, config.evaluation_length)
    calibration, further = sample_windows(tokenizer, text.calibration, 512, 8, 4)
    parts = [runs(windows[i : i + 1]) for i in range(5)] + [runs(calibration), runs(further)]
    assert sum(map(len, parts)) == len(set().union(*parts))
