"""Pieces of a film: a stretch of frames, encoded by itself, as bytes that are put behind those before."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType

import numpy as np

from .checks import check_choice, check_count
from .notes import CONTAINERS
from .sound import Sound
from .video import CONSTANT_RATE_FACTOR, encode_frames, frame_rate


# Codecs, and the pixel formats of each; the first is what it is used with unless another is asked for.
PIXEL_FORMATS = {
    "libx264": ("yuv420p", "yuv444p"),
    "libx265": ("yuv420p", "yuv444p"),
    "libsvtav1": ("yuv420p",),
    "ffv1": ("bgr0",),
}
LOSSLESS = ("ffv1",)


@dataclass(frozen=True)
class Form:
    """How a film is encoded. Pieces of one form go behind one another.

    Args:
        suffix (`str`): Of its file: which container it is.
        fps (`str`): Frames a second, a fraction.
        codec (`str`), crf (`int`, *optional*), pixel_format (`str`): As FFmpeg calls them.
        audio (`str`, *optional*): Digest of the file of its sound.
    """

    suffix: str
    fps: str
    codec: str
    crf: int | None
    pixel_format: str
    audio: str | None = None

    @classmethod
    def checked(cls, suffix: str, fps: float, codec: str, crf: int | None, pixel_format: str | None) -> "Form":
        """Raises a `ValueError` for what there is not, or does not go together."""
        check_choice("path.suffix", suffix, tuple(CONTAINERS))
        check_choice("codec", codec, tuple(PIXEL_FORMATS))
        if codec in LOSSLESS and suffix != ".mkv":
            raise ValueError(f"`codec`={codec!r} goes into an .mkv file, got `path` with the suffix {suffix!r}.")
        if codec in LOSSLESS and crf is not None:
            raise ValueError(f"`crf`={crf!r}: `codec`={codec!r} loses nothing, so there is no quality to choose.")
        if codec not in LOSSLESS:
            crf = CONSTANT_RATE_FACTOR if crf is None else check_count("crf", crf, 0, 51)
        pixel_format = PIXEL_FORMATS[codec][0] if pixel_format is None else pixel_format
        check_choice("pixel_format", pixel_format, PIXEL_FORMATS[codec])
        return cls(suffix, str(frame_rate(fps)), codec, crf, pixel_format)

    @property
    def container(self) -> ModuleType:
        return CONTAINERS[self.suffix]

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ValueError` unless pictures of that size can be encoded."""
        if self.pixel_format == "yuv420p" and (height % 2 or width % 2):
            raise ValueError(
                f"A film of {height} x {width} pixels cannot be written in yuv420p, which needs an even height and "
                "width. Crop or scale the frames, or choose `pixel_format='yuv444p'`."
            )

    def encode(
        self, frames: Iterable[np.ndarray], start: int, number: int, sound: Sound | None = None
    ) -> tuple[bytes, bytes]:
        """What begins a film of this form, and a piece of it.

        Args:
            frames (`Iterable[np.ndarray]` of shape `(height, width, 3)`, uint8): At least one.
            start (`int`): The film frame that they begin with.
            number (`int`): Of the piece; those of later ones are higher.
            sound (`Sound`, *optional*): Of the film, where the form has `audio`.
        """
        buffer = io.BytesIO()
        encode_frames(
            buffer,
            frames,
            Fraction(self.fps),
            self.codec,
            self.crf,
            self.pixel_format,
            container="matroska" if self.suffix == ".mkv" else "mp4",
            start=start,
            options=self.container.muxer_options(number),
            sound=sound,
        )
        return self.container.parts(buffer.getvalue())
