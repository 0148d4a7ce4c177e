"""Banks on disk: written while training goes on, as of the moment the writing began, and never half.

The file is a safetensors file with a row for every error of every grid, grid by grid. It is written row by row, so a
bank larger than half of the memory can be saved, and a thread does it: an error that is overwritten before its row was
written is set aside first.
"""

import json
import os
import struct
import threading
from pathlib import Path

import torch
from safetensors import safe_open

from .bank import ErrorBank


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
# What must agree between a bank and the file it is to be filled from.
_LAYOUT = ("error_shape", "num_grids", "dtype", "owned", "metric")
# What a file that does not say so has.
_BEFORE = {"metric": '"residual"'}


class BankWriter:
    """Writes a bank to `path` in the background. Made by [`save_bank`]."""

    def __init__(self, bank: ErrorBank, path: Path):
        if bank.before_write is not None:
            raise RuntimeError("The bank is still being written; call `wait` on its writer first.")
        self._bank, self._path = bank, path
        self._slots = _slots(bank, bank.counts)
        self._pending = set(self._slots)
        self._set_aside: dict[int, dict[str, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._metadata = {
            **_layout(bank),
            "counts": json.dumps(bank.counts.tolist()),
            "taken": json.dumps(bank.taken.tolist()),
        }
        bank.before_write = self._keep
        self._thread = threading.Thread(target=self._run, name="error-bank-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the file is there. Raises what went wrong in writing it."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _keep(self, slot: int) -> None:
        with self._lock:
            if slot in self._pending and slot not in self._set_aside:
                self._set_aside[slot] = {name: rows[slot].clone() for name, rows in self._bank.tensors().items()}

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error
        finally:
            self._bank.before_write = None

    def _write(self) -> None:
        tensors = self._bank.tensors()
        header: dict[str, dict] = {"__metadata__": self._metadata}
        begins, end = {}, 0
        for name, rows in tensors.items():
            begin, end = end, end + len(self._slots) * rows[0].nbytes
            begins[name] = begin
            shape = [len(self._slots), *rows.shape[1:]]
            header[name] = {"dtype": _DTYPES[rows.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        unfinished = self._path.with_name(self._path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            for index, slot in enumerate(self._slots):
                with self._lock:
                    row = self._set_aside.pop(slot, None) or {
                        name: rows[slot].clone() for name, rows in tensors.items()
                    }
                    self._pending.discard(slot)
                for name, values in row.items():
                    file.seek(start + begins[name] + index * values.nbytes)
                    file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            file.truncate(start + end)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._path)


def save_bank(bank: ErrorBank, path: str | os.PathLike) -> BankWriter:
    """Begin to write the bank, as it is now, to a safetensors file. Training may go on; `wait` on what is returned.

    The file appears under its name when it is complete: after a crash there is either the whole file or none.
    """
    return BankWriter(bank, Path(path))


def load_bank(bank: ErrorBank, path: str | os.PathLike) -> None:
    """Fill `bank` from a file of [`save_bank`].

    Raises:
        ValueError: if the file holds errors of another shape, dtype, grids or metric, or more of them than the bank
            can take.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for name, value in _layout(bank).items():
            saved = metadata.get(name, _BEFORE.get(name))
            if saved != value:
                raise ValueError(
                    f"The error bank {os.fspath(path)!r} has {name} {saved}, but this run {value}: go on "
                    "with the settings, and the number of processes, that it was saved with."
                )
        counts = torch.tensor(json.loads(metadata["counts"]))
        if counts.max() > bank.config.capacity:
            raise ValueError(
                f"The error bank {os.fspath(path)!r} holds up to {int(counts.max())} errors a grid, but `capacity` is "
                f"{bank.config.capacity}."
            )
        rows = {name: file.get_slice(name) for name in bank.tensors()}
        for index, slot in enumerate(_slots(bank, counts)):
            for name, target in bank.tensors().items():
                target[slot] = rows[name][index]
    bank.counts.copy_(counts)
    bank.taken.copy_(torch.tensor(json.loads(metadata["taken"])))


def _slots(bank: ErrorBank, counts: torch.Tensor) -> list[int]:
    """The slots that hold errors when the grids hold `counts` of them, in the order of the file's rows."""
    return [first + place for grid, first in bank.first_slot.items() for place in range(int(counts[grid]))]


def _layout(bank: ErrorBank) -> dict[str, str]:
    config = bank.config
    values = (bank.error_shape, config.num_grids, config.dtype, list(bank.first_slot), config.metric)
    return {name: json.dumps(value) for name, value in zip(_LAYOUT, values, strict=True)}
