"""mSAM in the Hugging Face Trainer and accelerate; it lives in `msam.integrations.hf`."""

from msam.integrations.hf import MSAMTrainer, causal_tokens, valid_tokens

__all__ = ["MSAMTrainer", "causal_tokens", "valid_tokens"]
