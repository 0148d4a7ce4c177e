"""What a run needs around it, looked for before anything is loaded: folders that can be written, trackers."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from filelock import FileLock, Timeout


LOCK = ".lock"


@contextmanager
def own_folder(argument: str, folder: str | os.PathLike) -> Iterator[None]:
    """Make a folder and keep other runs out of it. The lock goes with the process, however that ends.

    Args:
        argument (`str`): What the folder was given as, for messages.
        folder: To be made if there is none.

    Raises:
        ValueError: if it cannot be written, or another run has it.
    """
    check_writable(argument, folder)
    lock = FileLock(Path(folder) / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"`{argument}`={os.fspath(folder)!r} is used by another run, which goes on: wait for its end, or give "
            "another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_writable(argument: str, folder: str | os.PathLike) -> None:
    """Make a folder if there is none, and raise a `ValueError` unless files can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(b" ")
    except OSError as error:
        raise ValueError(
            f"`{argument}`: nothing can be written to {os.fspath(folder)!r} ({error}). Give a folder on a disk with "
            "room that you may write to."
        ) from error


def check_file_writable(argument: str, file: str | os.PathLike) -> None:
    """Raise a `ValueError` unless a file can be written, that is there or not; what it holds is left alone."""
    check_writable(argument, Path(file).absolute().parent)
    there = Path(file).exists()
    try:
        with open(file, "ab"):
            pass
        if not there:
            Path(file).unlink()
    except OSError as error:
        raise ValueError(
            f"`{argument}`: {os.fspath(file)!r} cannot be written ({error}). Give another file."
        ) from error


def check_trackers(report_to: str) -> None:
    """Raise a `ValueError` unless `report_to` is "none", "all", or a tracker of accelerate that is installed."""
    if report_to in ("none", "all"):
        return
    if report_to not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join((*LOGGER_TYPE_TO_CLASS, "all", "none"))
        raise ValueError(f"`--report_to` must be one of {known}, got {report_to!r}.")
    if report_to not in map(str, get_available_trackers()):
        raise ValueError(
            f"`--report_to {report_to}` needs {report_to}, which is not installed: `pip install {report_to}`, or "
            "`--report_to none`."
        )
