"""Conditions as pipelines take them: rows, one a film frame, read when they are due."""

import hashlib
from typing import Any, Protocol

import torch


class Rows(Protocol):
    """A condition: `len(...)` rows, and `[start:stop]` of them as a tensor or an array; rows may stay on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


def fingerprint(rows: Rows) -> str:
    """Sixteen digits that tell a condition from any other: its own, or those of all its values."""
    own = getattr(rows, "fingerprint", None)
    if own is not None:
        return str(own)[:16]
    digest = hashlib.sha256()
    for row in range(len(rows)):
        values = torch.as_tensor(rows[row : row + 1]).cpu().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
