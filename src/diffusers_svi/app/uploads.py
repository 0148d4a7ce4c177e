"""Pictures that people send: bounded in size and kind before anything is decoded."""

import os
from pathlib import Path

import PIL.Image

from ..start_image import MAX_ASPECT, MIN_SIDE, read_image


MAX_MEGABYTES = 20
MAX_PIXELS = 40_000_000
# As PIL calls them.
KINDS = ("PNG", "JPEG", "WEBP")


def read_upload(path: str | os.PathLike) -> PIL.Image.Image:
    """The picture in a file of unknown origin, upright and in RGB.

    Raises:
        ValueError: in words for who sent it, if it is too large, of another kind, damaged, or cannot begin a film.
    """
    if Path(path).stat().st_size > MAX_MEGABYTES * 1_000_000:
        raise ValueError(f"The picture is larger than {MAX_MEGABYTES} MB. Save it smaller, as JPEG say.")
    try:
        picture = PIL.Image.open(path, formats=KINDS)
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError("This is no PNG, JPEG or WebP picture.") from error
    with picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"The picture has {width} x {height} pixels. Make it smaller: {MAX_PIXELS / 1e6:.0f} million at most."
            )
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"The picture has {width} x {height} pixels: too small or too narrow for a film.")
        try:
            upright = read_image(picture)
        except ValueError as error:
            if "transparent" in str(error):
                raise ValueError(
                    "The picture has transparent parts, which have no colour. Save it with a background."
                ) from error
            raise ValueError("The picture is damaged, or its colours are not known. Save it anew.") from error
    assert isinstance(upright, PIL.Image.Image)
    return upright
