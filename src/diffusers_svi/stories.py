"""Stories: start images with prompts, one folder each, as the authors of SVI keep what they test with."""

import os
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from diffusers.utils import load_image

from .clips import ClipSpec
from .prompts import load_prompts
from .start_image import read_image


PROMPTS = "prompt.txt"
# What the start image is called, where it is called anything in particular; in this order.
START_IMAGES = ("frame.jpg", "frame.png")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Story:
    """What a film begins with and is to show, for `image` and `prompts` of the pipeline.

    Args:
        name (`str`): Of its folder.
        image (`PIL.Image.Image`): The start image.
        prompts (`list[str | ClipSpec]`): As [`load_prompts`] reads them.
    """

    name: str
    image: PIL.Image.Image
    prompts: list[str | ClipSpec]


def load_stories(folder: str | os.PathLike) -> list[Story]:
    """Read a folder of stories, or one that is a story itself.

    A story is a folder with prompts in `prompt.txt` and a start image: `frame.jpg`, or `frame.png`, or the only JPEG
    or PNG file. Other files, and folders whose names begin with a dot, are passed over.

    source: `--data_root` of `test_svi.py` and `find_reference_image` in the authors' repository, whose folders in
    `data/toy_test` are of this kind. What the script guesses is refused here: which of several images it is, and
    what to show where there are no prompts.

    Args:
        folder (`str` or `os.PathLike`): Of the stories.

    Returns:
        `list[Story]`: In the order of their names; at least one.

    Raises:
        ValueError: if there is no story, or one of them lacks its prompts or its one start image, or has one that no
            film can begin with.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"`folder`={str(folder)!r} is no folder. Name one that holds a folder for every story.")
    if (root / PROMPTS).exists():
        return [_story(root)]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(
            f"`folder`={str(folder)!r} holds no stories: make a folder for each, with {PROMPTS} and {START_IMAGES[0]}."
        )
    return [_story(path) for path in folders]


def _story(folder: Path) -> Story:
    if not (folder / PROMPTS).exists():
        raise ValueError(f"`folder`: {folder} has no {PROMPTS}. Write one, with a prompt a line.")
    return Story(folder.resolve().name, _start_image(folder), load_prompts(folder / PROMPTS))


def _start_image(folder: Path) -> PIL.Image.Image:
    path = next((folder / name for name in START_IMAGES if (folder / name).exists()), None)
    if path is None:
        images = sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
        if len(images) != 1:
            found = ", ".join(image.name for image in images) or "none"
            raise ValueError(f"`folder`: {folder} must have one start image, got {found}. Call it {START_IMAGES[0]}.")
        path = images[0]
    try:
        picture = load_image(str(path))
        read_image(picture)
    except (OSError, ValueError) as error:
        raise ValueError(f"`folder`: no film can begin with {path}: {error}") from error
    return picture
