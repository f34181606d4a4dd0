"""The example runs and its models load."""

import re
import runpy
from pathlib import Path


def test_quantize_llama_example(capsys):
    path = Path(__file__).parents[1] / "examples" / "quantize_llama.py"
    runpy.run_path(str(path))["main"]()
    found = re.findall(r"^(full precision|\w+ +3 bits) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    perplexity = {name.split()[0]: float(value) for name, value in found}
    assert set(perplexity) == {"full", "rtn", "gptq", "quantease"}
    assert perplexity["full"] < 40  # of 256 for a model that knows nothing
    assert all(value < 1.2 * perplexity["full"] for value in perplexity.values())
