"""Errors of a known size, put on the pixels of a clip."""

import io
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch

from ..pixels import from_uint8, to_pil, to_uint8
from .kinds import Error


# Rec. 601, as JPEG and Pillow take it.
_GREY = (0.299, 0.587, 0.114)


def put_on_pixels(error: Error, video: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A clip with an error of any kind but those that need the model.

    Args:
        error (`Error`): Which.
        video (`torch.Tensor` of shape `(1, 3, frames, height, width)`): The clip, in [-1, 1].
        seed (`int`): Of the noise.

    Returns:
        `torch.Tensor`: Of the same shape, in [-1, 1].
    """
    if error.kind in _BY_FRAME:
        change = _BY_FRAME[error.kind]
        frames = [change(to_pil(frame), error.value) for frame in to_uint8(video)[0].unbind(1)]
        stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
        return from_uint8(stacked.permute(3, 0, 1, 2)[None])
    unit = video.float() / 2 + 0.5
    if error.kind == "noise":
        noise = torch.randn(unit.shape, generator=torch.Generator().manual_seed(seed))
        changed = unit + error.value * noise.to(unit)
    else:
        changed = _BY_VALUE[error.kind](unit, error.value)
    return changed.clamp(0, 1) * 2 - 1


def _cast(unit: torch.Tensor, size: float) -> torch.Tensor:
    return unit + size * unit.new_tensor([1, 0, -1]).view(1, 3, 1, 1, 1)


def _exposure(unit: torch.Tensor, size: float) -> torch.Tensor:
    return unit * (1 - size)


def _contrast(unit: torch.Tensor, size: float) -> torch.Tensor:
    return unit + size * (unit - unit.mean(dim=(1, 3, 4), keepdim=True))


def _saturation(unit: torch.Tensor, size: float) -> torch.Tensor:
    grey = (unit * unit.new_tensor(_GREY).view(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)
    return unit + size * (unit - grey)


def _blur(frame: PIL.Image.Image, size: float) -> PIL.Image.Image:
    return frame.filter(PIL.ImageFilter.GaussianBlur(size))


def _jpeg(frame: PIL.Image.Image, size: float) -> PIL.Image.Image:
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=int(size))
    return PIL.Image.open(file).convert("RGB")


_BY_VALUE: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "cast": _cast,
    "exposure": _exposure,
    "contrast": _contrast,
    "saturation": _saturation,
}
_BY_FRAME: dict[str, Callable[[PIL.Image.Image, float], PIL.Image.Image]] = {"blur": _blur, "jpeg": _jpeg}
