"""Strong augmentation of the frames that a clip begins with: SVI 2.0 trains against their small defects so."""

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import torch

from ..pixels import from_uint8, to_pil, to_uint8


def augment(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Strong augmentation of condition frames, `(3, n, height, width)` in [-1, 1]; the same for all of them.

    Colour jitter with probability 0.7: brightness, contrast and saturation by 0.7 to 1.3, hue by up to a tenth of the
    circle. Gaussian blur with probability 0.5, of 0.1 to 2 pixels at a short side of 480. A change of sharpness with
    probability 0.5, between smooth (0) and twice as sharp.
    """
    jitter, blur, sharpen = rng.random(3) < (0.7, 0.5, 0.5)
    factors, hue = rng.uniform(0.7, 1.3, size=3), rng.uniform(-0.1, 0.1)
    radius, sharpness = rng.uniform(0.1, 2.0) * min(frames.shape[2:]) / 480, rng.uniform(0.0, 2.0)
    if not (jitter or blur or sharpen):
        return frames
    pictures = []
    for frame in to_uint8(frames).unbind(1):
        picture = to_pil(frame)
        if jitter:
            for enhance, factor in zip(("Brightness", "Contrast", "Color"), factors, strict=True):
                picture = getattr(PIL.ImageEnhance, enhance)(picture).enhance(factor)
            hsv = np.array(picture.convert("HSV"))
            hsv[..., 0] = (hsv[..., 0].astype(int) + round(hue * 256)) % 256
            picture = PIL.Image.fromarray(hsv, mode="HSV").convert("RGB")
        if blur:
            picture = picture.filter(PIL.ImageFilter.GaussianBlur(radius))
        if sharpen:
            picture = PIL.ImageEnhance.Sharpness(picture).enhance(sharpness)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return from_uint8(torch.stack(pictures, dim=1))
