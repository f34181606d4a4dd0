"""What a quantized model is worth: text, perplexity, comparisons, reports."""
