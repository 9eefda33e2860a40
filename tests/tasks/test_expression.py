"""The parser for integers with + - *, against Python's own arithmetic."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llada_jax.tasks.expression import Expression

numbers = st.integers(0, 9999)


@st.composite
def expressions(draw) -> str:
    operands = draw(st.lists(numbers, min_size=1, max_size=16))
    return "".join(f"{n}{draw(st.sampled_from('+-*'))}" for n in operands[:-1]) + str(operands[-1])


@given(expressions())
def test_value_and_text(text):
    expression = Expression.parse(text)
    assert str(expression) == text
    assert expression.value() == eval(text)  # text of our own making


@given(st.text("0123456789+-*/() x", max_size=12))
def test_other_text_is_none(text):
    parsed = Expression.parse(text)
    assert parsed is None or parsed.value() == eval(
        "".join(str(int(part)) if part.isdigit() else part for part in _split(text))
    )


def _split(text):
    for sign in "+-*":
        text = text.replace(" ", "").replace(sign, f" {sign} ")
    return text.split()


@pytest.mark.parametrize("text", ["", "-1", "1+", "1++1", "(1)", "1/2", "1**2", "12345", "1\n+1"])
def test_not_expressions(text):
    assert Expression.parse(text) is None


def test_reduce():
    assert str(Expression.parse("3+4*2-5").reduce()) == "3+8-5"
    assert str(Expression.parse("3-8+5").reduce()) == "-5+5"
    with pytest.raises(ValueError, match="a number already"):
        Expression.parse("3").reduce()
