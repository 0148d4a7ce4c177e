"""Pixels as they are kept, uint8, and as models take them, floats in [-1, 1]; of any shape."""

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


# What the image encoder of Wan 2.1 is shown of a frame: the square in the middle, as its processor cuts it out, or
# all of it, squeezed by `squash`.
CLIP_RESIZES = ("crop", "squash")


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to the nearest of 0 ... 255; what lies outside is clipped."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_uint8(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """From 0 ... 255, resized ones of any value between too, to [-1, 1], in `dtype`."""
    return pixels.to(dtype) / 127.5 - 1


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    """An image out of `(3, height, width)` uint8."""
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def squash(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The whole of an RGB image on `size` x `size` pixels: what CLIP sees in the authors' code."""
    # source: `encode_image` of the authors' code interpolates without antialiasing
    pixels = from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
    return to_pil(to_uint8(F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False))[0])
