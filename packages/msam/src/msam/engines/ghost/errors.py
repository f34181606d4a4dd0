"""Why ghost mode cannot go on with a model."""


class UnsupportedError(RuntimeError):
    """The model uses a perturbed parameter in a way that ghost mode has no exact rule for."""


class NotFiniteError(UnsupportedError):
    """A loss or a gradient is not finite, so that nothing can be proved with this batch."""


class ChangedError(RuntimeError):
    """The model took another path than the ones that were proved before."""
