"""What can be wrong with training data."""

from __future__ import annotations

import warnings


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line and the way out."""


class DataWarning(UserWarning):
    """Data that is used, but for a part that was left out."""


def warn(message: str) -> None:
    """Warns in one line. The source line that ``warnings`` would quote is of no use to a reader."""
    warnings.warn_explicit(message, DataWarning, filename="llada_jax.data", lineno=0)
