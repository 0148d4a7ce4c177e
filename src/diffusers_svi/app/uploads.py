"""Pictures, sounds and poses that people send: bounded in size and kind before anything is decoded."""

import os
from pathlib import Path

import PIL.Image

from ..conditions.following import CALLED, Following
from ..start_image import MAX_ASPECT, MIN_SIDE, read_image


MAX_MEGABYTES = 20
MAX_PIXELS = 40_000_000
# As PIL calls them.
KINDS = ("PNG", "JPEG", "WEBP")
# Of what a film follows: an hour of sound, uncompressed, and more.
MAX_FOLLOWED_MEGABYTES = 500
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
FOLLOWED = {"audio": (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", *VIDEOS), "pose": VIDEOS}


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


def read_followed(name: str, path: str | os.PathLike, fps: float) -> Following:
    """What a film is to follow, "audio" or "pose", in a file of unknown origin.

    Raises:
        ValueError: in words for who sent it, if it is too large, of another kind, damaged or too short.
    """
    path, called = Path(path), CALLED[name]
    if path.suffix.lower() not in FOLLOWED[name]:
        raise ValueError(f"The {called} must be a file of one of these kinds: {', '.join(FOLLOWED[name])}.")
    if path.stat().st_size > MAX_FOLLOWED_MEGABYTES * 1_000_000:
        raise ValueError(f"The file of the {called} is larger than {MAX_FOLLOWED_MEGABYTES} MB. Save it smaller.")
    try:
        return Following(name=name, path=path, fps=fps).read()
    except ValueError as error:
        raise ValueError(f"The {called} cannot be followed: {str(error).replace(str(path), path.name)}") from error
