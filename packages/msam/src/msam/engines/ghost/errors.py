"""Why ghost mode cannot continue with a model."""


class UnsupportedError(RuntimeError):
    """The loss does something that cannot be done for all micro-batches at once, each kept apart from the others."""


class DisagreeError(UnsupportedError):
    """The loss takes a decision that micro-batches would take differently, which may not happen with the next batch."""
