"""Banks on disk: written while training goes on, as of the moment the writing began, and never half.

The file is a safetensors file with a row for every error of every grid, grid by grid. It is written row by row, so a
bank larger than half of the memory can be saved, and a thread does it: an error that is overwritten before its row was
written is set aside first. Its metadata holds checksums (CRC-32) of the rows and of itself, so that what was changed
on the disk is not taken for errors.
"""

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import UNFINISHED
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
        self.check()

    def check(self) -> None:
        """Raise what went wrong in writing it so far. Does not wait."""
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
        checksums = {**dict.fromkeys(tensors, 0), "metadata": _metadata_checksum(self._metadata)}
        unfinished = self._path.with_name(self._path.name + UNFINISHED)
        with open(unfinished, "wb") as file:
            # Checksums have a fixed width: when they are known, the header is written again in its place.
            file.write(_header(header, checksums))
            start = file.tell()
            for index, slot in enumerate(self._slots):
                with self._lock:
                    row = self._set_aside.pop(slot, None) or {
                        name: rows[slot].clone() for name, rows in tensors.items()
                    }
                    self._pending.discard(slot)
                for name, values in row.items():
                    content = _bytes(values)
                    checksums[name] = _checksum(content, checksums[name])
                    file.seek(start + begins[name] + index * values.nbytes)
                    file.write(content)
            file.truncate(start + end)
            file.seek(0)
            file.write(_header(header, checksums))
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
            can take; or if it is not what was written, which shows when all of it was read.
    """
    metadata = _read_metadata(path)
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
    for slot, row in zip(_slots(bank, counts), _read_rows(path), strict=True):
        for name, target in bank.tensors().items():
            target[slot] = row[name]
    bank.counts.copy_(counts)
    bank.taken.copy_(torch.tensor(json.loads(metadata["taken"])))


def check_bank(path: str | os.PathLike) -> None:
    """Raise a `ValueError` unless a file of [`save_bank`] is what was written. Reads all of it."""
    for _ in _read_rows(path):
        pass


def _read_rows(path: str | os.PathLike) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a bank, in their order. Raises a `ValueError` at the end if they are not those that were written."""
    metadata = _read_metadata(path)
    expected = json.loads(metadata["checksums"])
    checksums = {name: 0 for name in expected if name != "metadata"}
    try:
        with safe_open(path, framework="pt") as file:
            rows = {name: file.get_slice(name) for name in checksums}
            for index in range(sum(json.loads(metadata["counts"]))):
                row = {name: values[index] for name, values in rows.items()}
                checksums = {name: _checksum(_bytes(row[name]), value) for name, value in checksums.items()}
                yield row
    except (SafetensorError, IndexError) as error:
        raise ValueError(f"The error bank {os.fspath(path)!r} is damaged: {error}.") from error
    for name, value in checksums.items():
        if f"{value:08x}" != expected[name]:
            raise ValueError(f"The error bank {os.fspath(path)!r} is damaged: its {name} have another checksum.")


def _read_metadata(path: str | os.PathLike) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        expected = json.loads(metadata["checksums"])["metadata"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The error bank {os.fspath(path)!r} is damaged or no error bank: {error}.") from error
    if f"{_metadata_checksum(metadata):08x}" != expected:
        raise ValueError(f"The error bank {os.fspath(path)!r} is damaged: its metadata has another checksum.")
    return metadata


def _header(header: dict[str, dict], checksums: dict[str, int]) -> bytes:
    """The header of a safetensors file, with its length before it."""
    texts = json.dumps({name: f"{value:08x}" for name, value in checksums.items()})
    text = json.dumps({**header, "__metadata__": {**header["__metadata__"], "checksums": texts}}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _metadata_checksum(metadata: dict[str, str]) -> int:
    # The order in a header is nobody's business.
    known = {**_BEFORE, **{name: value for name, value in metadata.items() if name != "checksums"}}
    return _checksum(json.dumps(known, sort_keys=True).encode())


def _bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(content: bytes | memoryview, so_far: int = 0) -> int:
    return zlib.crc32(content, so_far)


def _slots(bank: ErrorBank, counts: torch.Tensor) -> list[int]:
    """The slots that hold errors when the grids hold `counts` of them, in the order of the file's rows."""
    return [first + place for grid, first in bank.first_slot.items() for place in range(int(counts[grid]))]


def _layout(bank: ErrorBank) -> dict[str, str]:
    config = bank.config
    values = (bank.error_shape, config.num_grids, config.dtype, list(bank.first_slot), config.metric)
    return {name: json.dumps(value) for name, value in zip(_LAYOUT, values, strict=True)}
