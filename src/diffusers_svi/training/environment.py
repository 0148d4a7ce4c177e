"""What a run needs around it, looked for before anything is loaded: a folder of its own that can be written."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
