"""What conditions of any kind have in common: rows, one a film frame, that are taken as `[start:stop]`."""

from typing import Any


def bounds(rows: Any, length: int) -> tuple[int, int]:
    """First and last of the rows of a slice, as Python counts them. Raises a `ValueError` for anything else."""
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(f"Rows are taken as `[start:stop]`, got {rows!r}.")
    first, last, _ = rows.indices(length)
    return first, max(first, last)
