"""QuantEase: LLM post-training quantization by coordinate descent, outlier-aware."""
