"""Training and test problems that can never meet: a prompt's hash decides its side."""

from __future__ import annotations

import hashlib

HELD_OUT_IN = 16  # one prompt in so many belongs to the test split


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the test split: the same on every machine, for ever.

    Args:
      prompt: the user's turn of a problem.

    Returns:
      True for one prompt in 16.
    """
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_IN == 0
