"""Slopes over samples: their means with intervals of 95%, and what they say in a line."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


# Colours that an error shifts by less than this, one of 255 levels, have no slope.
LEAST_COLOUR = 1 / 255
# Student's t, 97.5%, for 1 to 30 degrees of freedom; for more, that of 30, by which intervals are a little too wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Interval = dict[str, Any]


def slopes(found: Mapping[str, float]) -> dict[str, float | None]:
    """Out over in of one sample, of all that is carried and of its colours; `None` where nothing went in."""
    colour = found["colour_out"] / found["colour_in"] if found["colour_in"] >= LEAST_COLOUR else None
    return {"slope": found["out"] / found["in"] if found["in"] else None, "colour_slope": colour}


def interval(values: Sequence[float]) -> Interval:
    r"""Mean m of n values and its interval of 95%: m ± t(n - 1) * s / sqrt(n), with s their deviation.

    Returns:
        `dict`: `value`, `low`, `high` and `n`. Without values all are `None`; one has no interval.
    """
    n = len(values)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    mean = math.fsum(values) / n
    if n == 1:
        return {"value": mean, "low": None, "high": None, "n": 1}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _T[min(n - 1, len(_T)) - 1] * deviation / math.sqrt(n)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def counted(intervals: Sequence[Interval], than: float) -> tuple[int, int, int]:
    """How many there are, how many of them are below `than`, and how many above, with their whole interval.

    Where none has an interval, as one sample gives none, values count.
    """
    told = [one for one in intervals if one["value"] is not None]
    high, low = ("value", "value") if all(one["low"] is None for one in told) else ("high", "low")
    below = sum(one[high] is not None and one[high] < than for one in told)
    above = sum(one[low] is not None and one[low] > than for one in told)
    return len(told), below, above
