"""What the commands can choose from; without torch, so that their help comes at once."""

METHODS = ("sgd", "sam", "asam", "msam", "msam-sequential", "half", "chained")
"""sgd, SAM (one micro-batch), ASAM (element-wise), mSAM by ghost and sequentially, and two cheaper surrogates."""

TASKS = ("digits", "mnist1d", "mnist", "cifar", "polarity")
"""Data sets, each with a model and a schedule that suit it."""

MODELS = ("mlp", "large-mlp", "transformer", "cnn")
"""Models whose steps are timed."""

MODES = ("ghost", "chained", "sequential", "vmap")
"""What is timed: the engines, and ghost mode with a chained ascent."""
