"""What a measurement begins with: images and videos, each with a prompt."""

import hashlib
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..clip_pipeline import ClipPipeline
from ..inputs import check_size
from ..pixels import from_uint8, to_uint8
from ..source_video import open_source_video
from ..start_image import RESIZE_MODES, read_image, to_pixels


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A clip before, and what the clip after it is to show.

    Args:
        name (`str`): For people, such as its file.
        prompt (`str`): Of the clip that is made.
        seed (`int`): Of its noise.
        image (`PIL.Image.Image`, *optional*): The clip before stands still and shows this.
        video (`Path`, *optional*): A file whose first frames are the clip before.
        fps (`int`, *optional*): That the video is brought to; its own frames if not given.
    """

    name: str
    prompt: str
    seed: int
    image: PIL.Image.Image | None = None
    video: Path | None = None
    fps: int | None = None

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            raise ValueError(f"The sample {self.name!r} needs either `image` or `video`.")

    def check(self, num_frames: int) -> None:
        """Raise a `ValueError` unless there is a clip of `num_frames` frames to go on from."""
        if self.image is not None:
            read_image(self.image)
            return
        assert self.video is not None
        found = open_source_video(self.video, fps=self.fps).num_frames
        if found < num_frames:
            rate = "" if self.fps is None else f" at {self.fps} a second"
            raise ValueError(
                f"The video {self.name!r} has {found} frames{rate}, but a clip has {num_frames}: take a longer one, "
                "or a smaller `num_frames`."
            )

    def told(self) -> str:
        """All of it in a line, to be compared: the picture by its digest."""
        if self.image is not None:
            pixels = self.image.convert("RGB")
            content = hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes())
        else:
            assert self.video is not None
            with open(self.video, "rb") as file:
                content = hashlib.file_digest(file, "sha256")
        rate = "" if self.fps is None else f", {self.fps} fps"
        return f"{self.name} {content.hexdigest()[:16]}{rate}, seed {self.seed}: {self.prompt}"

    def clip_before(self, pipe: ClipPipeline, settings: dict[str, Any]) -> torch.Tensor:
        """The clip before, `(1, 3, num_frames, height, width)` in [-1, 1], of values that 8 bits hold.

        Args:
            pipe: Whose sizes it is to have.
            settings (`dict`): `num_frames`, and if given `height`, `width` and `resize_mode`.
        """
        num_frames = settings["num_frames"]
        height, width = settings.get("height"), settings.get("width")
        if self.video is not None:
            source = open_source_video(self.video, fps=self.fps)
            # Of the whole frame, not of what is left of it when its sides are multiples of 16.
            picture = PIL.Image.fromarray(np.asarray(source.read([0])[0]))
            height, width = _size(pipe, picture, height, width)
            frames = np.stack(list(islice(replace(source, height=height, width=width).frames(), num_frames)))
            return from_uint8(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
        assert self.image is not None
        still = read_image(self.image)
        mode = settings.get("resize_mode", RESIZE_MODES[0])
        pixels = to_pixels(pipe.video_processor, still, *_size(pipe, still, height, width), mode)
        return from_uint8(to_uint8(pixels)).unsqueeze(2).expand(-1, -1, num_frames, -1, -1)


def _size(pipe: ClipPipeline, picture: Any, height: int | None, width: int | None) -> tuple[int, int]:
    return check_size(pipe, height, width, picture, None)
