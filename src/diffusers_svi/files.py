"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path


UNFINISHED = ".unfinished"


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A place beside `path` to write to; when the block ends, what was written there is on disk under the name `path`.

    A crash leaves what was there before. So does an exception, which leaves nothing else behind.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        # Some writers replace the file by one that only its owner may read.
        with open(unfinished, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield unfinished
        unfinished.chmod(mode)
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_end(file: RawIOBase, place: int, content: bytes) -> None:
    """Make `content` what stands in an unbuffered `file` from `place` on, on disk."""
    file.truncate(place)
    file.seek(place)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until `path` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Not every file system knows it for folders.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
