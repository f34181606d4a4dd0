"""Why ghost mode cannot continue with a model."""

from collections.abc import Sequence
from typing import Any


class UnsupportedError(RuntimeError):
    """The loss does something that cannot be done for all micro-batches at once, each kept apart from the others."""


class DisagreeError(UnsupportedError):
    """The loss takes a decision that micro-batches would take differently, which may not happen with the next batch.

    Args:
        message: What is read.
        answers: What each micro-batch would be told.
    """

    def __init__(self, message: str, answers: Sequence[Any]) -> None:
        super().__init__(message)
        self.answers = answers
