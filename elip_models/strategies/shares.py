"""Shares of a number of tokens, in integers alone.

They are exact where the number is a symbol of an exported graph, too. A graph of ONNX has the
product of a float and a symbol in fp32, which may round to the other side of an integer.
"""

from fractions import Fraction
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def floor_of(share: float | Fraction, count: Number) -> Number:
    """Return share * count, rounded down; of a tensor of integers, for each."""
    top, bottom = _ratio(share)
    return top * count // bottom


def ceil_of(share: float | Fraction, count: int) -> int:
    """Return share * count, rounded up."""
    top, bottom = _ratio(share)
    return (top * count + bottom - 1) // bottom


def nearest_to(share: float | Fraction, count: int) -> int:
    """Return share * count, rounded to the nearest integer, and a half up."""
    top, bottom = _ratio(share)
    return (2 * top * count + bottom) // (2 * bottom)


def _ratio(share: float | Fraction) -> tuple[int, int]:
    """Return numerator and denominator; those of a float are the nearest up to a million."""
    if not isinstance(share, Fraction):
        share = Fraction(share).limit_denominator(10**6)
    return share.as_integer_ratio()
