"""Names that options may take, without torch, so that the command line starts at once."""

ALGORITHMS = ("rtn", "gptq", "gptq-descent", "quantease-paper", "quantease")
FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "dense", "native", "gguf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SKIP = (r"(^|\.)(gate|router|shared_expert_gate|lm_head)(\.|$)",)
"""Matrices left alone unless asked for: routers, which are tiny and decide everything."""
