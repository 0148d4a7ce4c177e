"""Checks of arguments that many places need. Each raises a `ValueError` that names argument, value and remedy."""

import math
import numbers
from typing import Any


def check_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an `int`; NumPy's are whole numbers too."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"`{name}` must be a whole number of {limit}, got {value!r}.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """`value` as a `float`, if it is a finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` is a probability in [0, 1], got {value!r}.")
