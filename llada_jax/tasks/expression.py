"""Integers joined by ``+``, ``-`` and ``*``: a parser that accepts nothing else.

There are no brackets and no signs before a number, so an expression is a flat list of operands and
operators: ``3+4*2-5`` is ``[3, 4, 2, 5]`` and ``["+", "*", "-"]``.
"""

from __future__ import annotations

import dataclasses
import re

_EXPRESSION = re.compile(r"[0-9]{1,4}(?:[-+*][0-9]{1,4}){0,15}")


@dataclasses.dataclass(frozen=True)
class Expression:
    """An expression of integers.

    Attributes:
      operands: the numbers, from left to right.
      operators: ``"+"``, ``"-"`` or ``"*"``; one fewer than the operands.
    """

    operands: tuple[int, ...]
    operators: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Expression | None:
        """Reads an expression of up to 16 numbers of up to 4 digits; ``None`` for another text."""
        text = text.replace(" ", "")
        if not _EXPRESSION.fullmatch(text):
            return None
        operands = tuple(int(number) for number in re.split("[-+*]", text))
        return cls(operands, tuple(character for character in text if character in "+-*"))

    def reduce(self) -> Expression:
        """The expression after one operation: the first ``*``, else the first of all.

        Raises:
          ValueError: if there is no operation left.
        """
        if not self.operators:
            raise ValueError(f"{self} is a number already; it has no operation to reduce")
        at = self.operators.index("*") if "*" in self.operators else 0
        left, right = self.operands[at : at + 2]
        value = {"+": left + right, "-": left - right, "*": left * right}[self.operators[at]]
        return Expression(
            (*self.operands[:at], value, *self.operands[at + 2 :]),
            self.operators[:at] + self.operators[at + 1 :],
        )

    def value(self) -> int:
        """What the expression comes to; products first, as usual."""
        expression = self
        while expression.operators:
            expression = expression.reduce()
        return expression.operands[0]

    def __str__(self) -> str:
        pairs = zip(self.operators, self.operands[1:], strict=True)
        return str(self.operands[0]) + "".join(f"{sign}{number}" for sign, number in pairs)
