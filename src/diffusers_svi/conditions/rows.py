"""What conditions of any kind have in common: rows, one a film frame, that are taken as `[start:stop]`."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


# Files of rows that were computed before: an array, which may stay on disk, or one tensor.
ROW_FILES = (".npy", ".safetensors")


class Rows(Protocol):
    """A condition of a film: `len(...)` rows, and `[start:stop]` of them; rows may be computed when they are due."""

    @property
    def fingerprint(self) -> str:
        """What it is made of, shortly."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any:
        """A tensor or an array."""


def read_rows(path: str | os.PathLike, argument: str) -> np.ndarray | torch.Tensor:
    """The rows in a file, one of `ROW_FILES`, never of a pickle.

    Args:
        path: An .npy file, which is mapped into memory, or a safetensors file with one tensor.
        argument (`str`): What it was given as, for messages.

    Raises:
        ValueError: if it cannot be read, or holds something else.
    """
    try:
        if Path(path).suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`{argument}`={os.fspath(path)!r} cannot be read as rows: {error} Write one array by `np.save`, or one "
            "tensor by `safetensors.torch.save_file`."
        ) from error
    if len(tensors) != 1:
        raise ValueError(f"`{argument}`={os.fspath(path)!r} must hold one tensor, got {sorted(tensors)}.")
    return next(iter(tensors.values()))


def bounds(rows: Any, length: int) -> tuple[int, int]:
    """First and last of the rows of a slice, as Python counts them. Raises a `ValueError` for anything else."""
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ValueError(f"Rows are taken as `[start:stop]`, got {rows!r}.")
    first, last, _ = rows.indices(length)
    return first, max(first, last)
