"""How the errors of a bank are kept: as floats or in 8 bits, in memory or in a file mapped into it.

The storage is allocated once. Slots are written, and read as copies, one at a time, flat and in float32. What is
stored lies in `tensors`, one row a slot, so that a snapshot can copy rows without knowing the form.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F


FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES = (*FLOAT_DTYPES, "int8")
# Values that share a scale in the 8-bit form.
BLOCK = 128
# Values worked on at a time, a multiple of BLOCK: they stay in the processor's cache, and torch takes them in one
# thread, which on a busy machine is much faster than many short parallel loops.
PART = 2**15


def slot_bytes(size: int, dtype: str) -> int:
    """Bytes of one error of `size` values."""
    if dtype == "int8":
        return math.ceil(size / BLOCK) * (BLOCK + 4)
    return size * FLOAT_DTYPES[dtype].itemsize


def make_storage(num_slots: int, size: int, dtype: str, path: str | None = None) -> "FloatStorage | Int8Storage":
    """Storage of `num_slots` errors of `size` values each, in memory, or in the file `path`."""
    if dtype == "int8":
        return Int8Storage(num_slots, size, path)
    return FloatStorage(num_slots, size, FLOAT_DTYPES[dtype], path)


def squared_distance(
    storage: "FloatStorage | Int8Storage",
    slot: int,
    error: torch.Tensor,
    limit: float = math.inf,
    scale: float = 1.0,
) -> float:
    """From a stored error, times `scale`, to `error`, flat, in float32.

    It is given up, for what it has come to, once beyond `limit`.
    """
    total = 0.0
    for index, part in enumerate(error.split(PART)):
        first = index * PART
        stored = storage.read(slot, first, first + len(part))
        total += float(torch.dist(stored if scale == 1 else stored * scale, part)) ** 2
        if total > limit:
            break
    return total


class FloatStorage:
    """Errors in a floating point type: float32 exactly, bfloat16 with a relative error of 2^-9 at most."""

    def __init__(self, num_slots: int, size: int, dtype: torch.dtype, path: str | None = None):
        self.tensors = {"values": _allocate((num_slots, size), dtype, path)}

    def write(self, slot: int, error: torch.Tensor) -> None:
        self.tensors["values"][slot] = error

    def read(self, slot: int, first: int = 0, last: int | None = None) -> torch.Tensor:
        return self.tensors["values"][slot, first:last].to(torch.float32, copy=True)


class Int8Storage:
    r"""Errors in 8 bits: in blocks of 128 values q = round(127 x / s) with s = max |x|, s in float32.

    The root mean square error of the reconstruction is 0.6% of that of normally distributed errors: a step is s / 127,
    s is 2.8 standard deviations on average, and rounding errors are uniform, of step / sqrt(12).
    """

    def __init__(self, num_slots: int, size: int, path: str | None = None):
        self.size, blocks = size, math.ceil(size / BLOCK)
        self.tensors = {
            "values": _allocate((num_slots, blocks, BLOCK), torch.int8, path),
            "scales": _allocate((num_slots, blocks), torch.float32, path and f"{path}.scales"),
        }

    def write(self, slot: int, error: torch.Tensor) -> None:
        values, scales = self.tensors["values"][slot], self.tensors["scales"][slot]
        blocks = F.pad(error, (0, values.numel() - self.size)).view(-1, BLOCK)
        torch.amax(blocks.abs(), dim=1, out=scales)
        # A block of zeros has no scale to divide by.
        values[:] = (blocks * (127 / scales.clamp_min(1e-30)).unsqueeze(1)).round()

    def read(self, slot: int, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Values `first`, a multiple of `BLOCK`, to `last`."""
        last = self.size if last is None else last
        blocks = slice(first // BLOCK, math.ceil(last / BLOCK))
        values, scales = self.tensors["values"][slot, blocks], self.tensors["scales"][slot, blocks]
        return (values.float() * (scales / 127).unsqueeze(1)).flatten()[: last - first]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, path: str | None) -> torch.Tensor:
    if path is None:
        # Pages are taken from the machine when they are first written: an empty bank costs nothing yet.
        return torch.empty(shape, dtype=dtype)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
