"""Pixels as they are kept, uint8, and as models take them, floats in [-1, 1]; of any shape."""

import PIL.Image
import torch


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to the nearest of 0 ... 255; what lies outside is clipped."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_uint8(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """From 0 ... 255, resized ones of any value between too, to [-1, 1], in `dtype`."""
    return pixels.to(dtype) / 127.5 - 1


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    """An image out of `(3, height, width)` uint8."""
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
