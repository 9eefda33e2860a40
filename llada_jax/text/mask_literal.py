"""The mask's name in a user's text stays text.

Most tokenizers turn the characters ``<|mask|>`` into the mask token wherever they stand. In a
prompt this token would be an undecided position: the prompt would end there, or be overwritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True)
class MaskLiteral:
    """Replaces the mask token in an encoded text by the tokens that spell its name.

    Attributes:
      mask_id: the token to replace; ``None`` where there is no mask.
      spelling: ordinary tokens of the name; empty if the vocabulary has no other way to write it
        than the mask token, which is then dropped.
    """

    mask_id: int | None
    spelling: tuple[int, ...]

    @classmethod
    def of(
        cls, mask_id: int | None, name: str, encode: Callable[[str], Iterable[int]]
    ) -> MaskLiteral:
        """Finds the spelling: both halves of the name, encoded apart."""
        middle = len(name) // 2
        ids = [*encode(name[:middle]), *encode(name[middle:])] if mask_id is not None else []
        return cls(mask_id, tuple(token for token in ids if token != mask_id))

    def spell_out(self, token_ids: list[int]) -> list[int]:
        """The ids with every mask token replaced."""
        if self.mask_id is None or self.mask_id not in token_ids:
            return token_ids
        spelled: list[int] = []
        for token in token_ids:
            spelled += self.spelling if token == self.mask_id else (token,)
        return spelled
