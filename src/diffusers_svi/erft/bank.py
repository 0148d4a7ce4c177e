"""`ErrorBank`: the replay memory of a model's own one-step errors, sorted by timestep."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

from ..checks import check_choice, check_count
from .storage import DTYPES, PART, make_storage, slot_bytes, squared_distance


REPLACEMENTS = ("l2", "random", "fifo")
METRICS = ("residual", "clean")
# In a full grid at most so many errors, the nearest by their sketches, are compared in full ...
CANDIDATES = 16
# ... unless a sketch tells, by so many standard deviations, that one is further away than the nearest.
DEVIATIONS = 5


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """How large an [`ErrorBank`] is and how it is kept.

    Args:
        num_grids (`int`, defaults to 50): Timesteps that errors are sorted by: those of a schedule of so many steps.
        capacity (`int`, defaults to 500): Errors a grid holds.
        replacement (`str`, defaults to `"l2"`):
            What a new error replaces in a full grid: the nearest ("l2"), any ("random"), or the oldest ("fifo").
        metric (`str`, defaults to `"residual"`):
            What the nearest is nearest by: the residual r ("residual"), or the error on the clean side, sigma * r
            ("clean"): the errors of a grid are of neighbouring sigmas.
        dtype (`str`, defaults to `"bfloat16"`): "float32", "bfloat16" or "int8" (a scale for every 128 values).
        byte_budget (`int`, *optional*): Bytes the bank may take; lowers `capacity` to what fits.
        path (`str`, *optional*): A file to keep the errors in, mapped into memory, instead of memory itself.

    Raises:
        ValueError: for a value out of its range.
    """

    num_grids: int = 50
    capacity: int = 500
    replacement: str = "l2"
    metric: str = "residual"
    dtype: str = "bfloat16"
    byte_budget: int | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_grids", "capacity", "byte_budget"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_choice("replacement", self.replacement, REPLACEMENTS)
        check_choice("metric", self.metric, METRICS)
        check_choice("dtype", self.dtype, DTYPES)

    def num_bytes(self, error_shape: tuple[int, ...], num_grids: int | None = None) -> int:
        """Bytes a bank of such errors takes when it is full; of `num_grids` of its grids only, if given."""
        size = math.prod(error_shape)
        per_error = slot_bytes(size, self.dtype) + 4 * _sketch_size(size)
        return (self.num_grids if num_grids is None else num_grids) * self.capacity * per_error

    def fitted(self, error_shape: tuple[int, ...], num_grids: int | None = None) -> "BankConfig":
        """This configuration with `capacity` lowered to `byte_budget`, if the machine has room for it.

        Raises:
            ValueError: if not even one error a grid fits the budget, or the bank does not fit the machine; the message
                says what would.
        """
        return self.shared_by([error_shape], num_grids)[0]

    def shared_by(
        self,
        error_shapes: Sequence[tuple[int, ...]],
        num_grids: int | None = None,
        taken: int = 0,
        num_processes: int = 1,
    ) -> list["BankConfig"]:
        """As [`fitted`], for a bank of each of `error_shapes`: together they keep to budget and machine.

        All have the same capacity, for that is what a bank is worth; those of large errors take more. With several,
        each has a file of its own, `<path>-<shape>`. So many bytes as are `taken` are for others, if they are not yet
        in use; and of `num_processes` on this machine each has its share of the room.
        """
        num_grids = self.num_grids if num_grids is None else num_grids
        row = sum(replace(self, capacity=1).num_bytes(shape, num_grids) for shape in error_shapes)
        capacity = self.capacity if self.byte_budget is None else min(self.capacity, self.byte_budget // row)
        if capacity < 1:
            shapes = f" in each of {len(error_shapes)} banks" if len(error_shapes) > 1 else ""
            raise ValueError(
                f"`byte_budget`={self.byte_budget} holds no error: one for each of {num_grids} grids{shapes} takes "
                f"{row} bytes in {self.dtype}."
            )
        configs = [replace(self, path=path) for path in self._paths(error_shapes)]
        free, where = self._free_bytes()
        free = free // num_processes + sum(config._taken_bytes() for config in configs) - taken
        if capacity * row > free:
            smaller = f"a `capacity` of at most {free // row}" if free >= row else "fewer `num_grids`"
            banks = "banks" if len(error_shapes) > 1 else "bank"
            shapes = " and ".join(str(tuple(shape)) for shape in error_shapes)
            each = f" for each of {num_processes} processes" if num_processes > 1 else ""
            raise ValueError(
                f"The error {banks} would take {_gigabytes(capacity * row)} ({num_grids} grids of {capacity} errors "
                f"{shapes} in {self.dtype}), but {where} has {_gigabytes(free)} free{each}. What would fit: "
                f"{smaller}, a smaller `dtype`, or a `path` on a larger disk."
            )
        return [replace(config, capacity=capacity, byte_budget=None) for config in configs]

    def _paths(self, error_shapes: Sequence[tuple[int, ...]]) -> list[str | None]:
        if self.path is None or len(error_shapes) == 1:
            return [self.path] * len(error_shapes)
        return [f"{self.path}-{shape_name(shape)}" for shape in error_shapes]

    def _free_bytes(self) -> tuple[int, str]:
        if self.path is None:
            return psutil.virtual_memory().available, "memory"
        folder = Path(self.path).absolute().parent
        folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
        return shutil.disk_usage(folder).free, f"the disk of {os.fspath(self.path)!r}"

    def _taken_bytes(self) -> int:
        """Of the files of an earlier run, which are written over."""
        files = [Path(self.path), Path(f"{self.path}.scales")] if self.path is not None else []
        return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


class StoredError(NamedTuple):
    """A residual r = v_hat - V, `error_shape` float32, and the sigma it was made at."""

    residual: torch.Tensor
    sigma: float


class ErrorBank:
    r"""Replay memory of residuals r = v_hat - V, each with its sigma, in grids of neighbouring timesteps.

    Both memories of the published method are readings of it: `-sigma * r` is the error on the clean side, and
    `(1 - sigma) * r` the one on the noise side.

    In a full grid the default replacement looks for the stored error nearest in L2. Large errors are compared by short
    sketches of them first: restacking and comparing all of a grid, as published, takes seconds at the size of real
    videos.

    Args:
        error_shape (`tuple[int, ...]`): Shape of one error, without the batch.
        grid_sigmas (`torch.Tensor` of shape `(num_grids,)`): Every grid's sigma; an error belongs to the nearest.
        config (`BankConfig`): Size and form. Its `capacity` is lowered to the `byte_budget`.
        owned (`list[int]`, *optional*, defaults to all): The grids that are kept here; the others stay empty.

    Raises:
        ValueError: if the machine has no room for it.
    """

    # Whether all processes share one bank.
    shared = False

    def __init__(
        self,
        error_shape: tuple[int, ...],
        grid_sigmas: torch.Tensor,
        config: BankConfig,
        owned: list[int] | None = None,
    ):
        if grid_sigmas.shape != (config.num_grids,):
            raise ValueError(f"`grid_sigmas` must be ({config.num_grids},), got {tuple(grid_sigmas.shape)}.")
        owned = list(range(config.num_grids)) if owned is None else owned
        self.config = config = config.fitted(error_shape, len(owned))
        self.error_shape = tuple(error_shape)
        self.grid_sigmas = grid_sigmas.detach().double().cpu()
        self.size = math.prod(error_shape)
        self.first_slot = {grid: config.capacity * index for index, grid in enumerate(owned)}
        num_slots = config.capacity * len(owned)
        self.storage = make_storage(num_slots, self.size, config.dtype, config.path)
        self.slot_sigmas = torch.zeros(num_slots)
        self.counts = torch.zeros(config.num_grids, dtype=torch.int64)
        # Errors each grid has ever taken: the place of the oldest follows from it.
        self.taken = torch.zeros(config.num_grids, dtype=torch.int64)
        self.sketch = _Sketch(self.size, num_slots)
        # Called with every slot that is about to be overwritten.
        self.before_write: Callable[[int], None] | None = None

    def synchronize(self) -> None:
        """Learn what other processes have: nothing, for a bank of one process."""

    def filled(self) -> torch.Tensor:
        """Which grids hold an error, `(num_grids,)` bool."""
        return self.counts > 0

    def num_bytes(self) -> int:
        """Bytes it takes when it is full."""
        return self.config.num_bytes(self.error_shape, len(self.first_slot))

    def bytes_to_come(self) -> int:
        """Bytes that it has not taken yet, of the disk or, where it is still empty, of the memory."""
        return max(0, self.num_bytes() - self.config._taken_bytes())

    def describe(self) -> str:
        """What it takes, in a line."""
        config, num_grids = self.config, len(self.first_slot)
        where = "memory" if config.path is None else f"the file {config.path!r}"
        return (
            f"Error bank: {num_grids} grids of {config.capacity} errors {self.error_shape} in {config.dtype}, "
            f"{_gigabytes(self.num_bytes())} of {where} when full."
        )

    def nearest_grid(self, sigmas: torch.Tensor) -> torch.Tensor:
        """The grid of every sigma, `(batch,)` int64."""
        return nearest_grid(sigmas, self.grid_sigmas)

    def add(
        self, residuals: torch.Tensor, sigmas: torch.Tensor, keep: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Take the residuals `(batch, *error_shape)` of samples at `sigmas` `(batch,)`, those that `keep` marks."""
        for index, grid in enumerate(self.nearest_grid(sigmas).tolist()):
            if keep[index]:
                self.put(grid, residuals[index], float(sigmas[index]), generator)

    def put(self, grid: int, residual: torch.Tensor, sigma: float, generator: torch.Generator) -> int:
        """Take one residual into `grid` and return its place there."""
        error = residual.detach().reshape(-1).to(device="cpu", dtype=torch.float32)
        compared = error * sigma if self.config.metric == "clean" else error
        sketch = self.sketch.of(compared)
        place = int(self.counts[grid])
        if place == self.config.capacity:
            place = self._victim(grid, compared, sketch, generator)
        slot = self.first_slot[grid] + place
        # Read once: a writer that finishes takes it away at any moment.
        before_write = self.before_write
        if before_write is not None:
            before_write(slot)
        self.storage.write(slot, error)
        self.slot_sigmas[slot] = sigma
        self.sketch.rows[slot] = sketch
        self.counts[grid] = max(int(self.counts[grid]), place + 1)
        self.taken[grid] += 1
        return place

    def get(self, grid: int, place: int) -> StoredError:
        """The error at a place of a grid."""
        slot = self.first_slot[grid] + place
        return StoredError(self.storage.read(slot).view(self.error_shape), float(self.slot_sigmas[slot]))

    def draw(self, grids: torch.Tensor, generator: torch.Generator) -> list[StoredError | None]:
        """An error at random from each of `grids` `(n,)`; `None` where the grid is empty or -1."""
        # One number a request, asked or not: what is drawn elsewhere does not depend on how full the bank is.
        shares = torch.rand(len(grids), generator=generator, dtype=torch.float64)
        places = choose_places(grids.tolist(), shares.tolist(), self.counts)
        return [None if place is None else self.get(*place) for place in places]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is kept a slot, one row each: what a snapshot has to copy."""
        return {**self.storage.tensors, "sketches": self.sketch.rows, "sigmas": self.slot_sigmas}

    def _victim(self, grid: int, error: torch.Tensor, sketch: torch.Tensor, generator: torch.Generator) -> int:
        """The place that a new error of a full grid takes; `error` is what the metric compares."""
        capacity = self.config.capacity
        if self.config.replacement == "random":
            return int(torch.randint(capacity, (), generator=generator))
        if self.config.replacement == "fifo":
            return int(self.taken[grid]) % capacity
        first = self.first_slot[grid]
        estimates, nearest = self.sketch.distances(sketch, first, capacity).topk(
            min(CANDIDATES, capacity), largest=False
        )
        places: list[int] = nearest[estimates <= estimates[0] * (1 + DEVIATIONS * self.sketch.deviation)].tolist()
        victim, smallest = places[0], math.inf
        for place in places if len(places) > 1 else []:
            scale = float(self.slot_sigmas[first + place]) if self.config.metric == "clean" else 1.0
            distance = squared_distance(self.storage, first + place, error, smallest, scale)
            if distance < smallest:
                victim, smallest = place, distance
        return victim


def nearest_grid(sigmas: torch.Tensor, grid_sigmas: torch.Tensor) -> torch.Tensor:
    """Of every sigma `(batch,)`, the index of the nearest of `grid_sigmas` `(num_grids,)`: `(batch,)` int64."""
    return (sigmas.double().cpu().unsqueeze(1) - grid_sigmas.double()).abs().argmin(dim=1)


def reached_grids(sigmas: torch.Tensor, grid_sigmas: torch.Tensor) -> list[int]:
    """The grids that errors at any of `sigmas` `(n,)` go to."""
    return nearest_grid(sigmas, grid_sigmas).unique().tolist()


def shape_name(shape: tuple[int, ...]) -> str:
    """Of errors, in names of files: "16x21x60x104"."""
    return "x".join(map(str, shape))


def choose_places(grids: list[int], shares: list[float], counts: torch.Tensor) -> list[tuple[int, int] | None]:
    """Grid and place of every request: `share` in [0, 1) of the way through its grid, which holds `counts` errors.

    `None` where the grid is empty or -1.
    """
    return [
        (grid, int(share * int(counts[grid]))) if grid >= 0 and counts[grid] > 0 else None
        for grid, share in zip(grids, shares, strict=True)
    ]


class _Sketch:
    """A short linear image of every error, of which the squared distances are those of the errors on average.

    Every value is given a random sign and added to one of m sums (a count sketch): one pass over the error. The
    relative standard deviation of a squared distance is at most sqrt(2 / m), 1.6% for large errors (m = 8192), if no
    sum has more than its share of the squares.
    """

    def __init__(self, size: int, num_slots: int):
        # Always the same signs: sketches of one bank are compared after a restart.
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        self.signs = signs.float() * 2 - 1
        self.rows = torch.zeros(num_slots, _sketch_size(size))
        # Of a squared distance, relative, at most.
        self.deviation = math.sqrt(2 / self.rows.shape[1])

    def of(self, error: torch.Tensor) -> torch.Tensor:
        sketch = torch.zeros(self.rows.shape[1])
        length = self._per_part() * len(sketch)
        for values, signs in zip(error.split(length), self.signs.split(length), strict=True):
            values = F.pad(values * signs, (0, -len(values) % len(sketch)))
            sketch += values.view(-1, len(sketch)).sum(dim=0)
        return sketch

    def distances(self, sketch: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Estimates of the squared distances to the errors in `count` slots, `(count,)`."""
        rows = self.rows[first : first + count].split(self._per_part())
        return torch.cat([(part - sketch).square().sum(dim=1) for part in rows])

    def _per_part(self) -> int:
        return max(1, (PART - 1) // self.rows.shape[1])


def _sketch_size(size: int) -> int:
    return min(8192, max(256, math.ceil(size / 16)))


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
