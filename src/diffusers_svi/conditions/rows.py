"""What conditions of any kind have in common: rows, one a film frame, that are taken as `[start:stop]`."""

from typing import Any, Protocol


class Rows(Protocol):
    """A condition of a film: `len(...)` rows, and `[start:stop]` of them; rows may be computed when they are due."""

    @property
    def fingerprint(self) -> str:
        """What it is made of, shortly."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any:
        """A tensor or an array."""


def bounds(rows: Any, length: int) -> tuple[int, int]:
    """First and last of the rows of a slice, as Python counts them. Raises a `ValueError` for anything else."""
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(f"Rows are taken as `[start:stop]`, got {rows!r}.")
    first, last, _ = rows.indices(length)
    return first, max(first, last)
