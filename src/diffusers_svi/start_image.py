"""The start image: in any of the forms people have one in, and as a film of a given size begins with it."""

import math
import struct
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from .checks import check_choice


logger = logging.get_logger(__name__)

RESIZE_MODES = ("stretch", "crop", "pad")
# What Wan's smaller models were made for, and the size of a film that nothing is said about.
DEFAULT_SIZE = 480, 832
# Pixels that an image must have on each side, and how many times one side may be as long as the other.
MIN_SIDE = 16
MAX_ASPECT = 16.0
# A change of aspect that nobody sees.
SEEN_CHANGE = 0.02
# Floats may leave [0, 1] by so much, as sharp edges do in an image that was resized; they are clipped.
OVERSHOOT = 0.1


def read_image(image: Any) -> PIL.Image.Image | torch.Tensor:
    """`image` as an upright picture.

    Args:
        image: One of
            - a `PIL.Image.Image` of any mode whose colours are known: RGB, grey, 16-bit grey, palettes, CMYK, ... The
              orientation in its EXIF is followed.
            - a `torch.Tensor` `(c, height, width)` or `(1, c, height, width)`, or an `np.ndarray` `(height, width)`,
              `(height, width, c)` or `(1, height, width, c)`, of c = 1, 3 or 4 channels: uint8, uint16, or floats in
              [0, 1]; floats that leave it by up to 0.1 are clipped.

    Returns:
        An RGB image, or for three channels of floats `(1, 3, height, width)` in [0, 1], which no 8 bits have rounded.

    Raises:
        ValueError: if it is none of these, is damaged, has transparent pixels, or is so small or narrow that it cannot
            be the first frame of a film.
    """
    if isinstance(image, PIL.Image.Image):
        picture: PIL.Image.Image | torch.Tensor = _upright(image)
    elif isinstance(image, torch.Tensor):
        tensor = image[0] if image.ndim == 4 and len(image) == 1 else image
        if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
            raise ValueError(
                "`image` as a tensor must be (3, height, width) or (1, 3, height, width), got "
                f"{tuple(image.shape)}. A film starts from one image."
            )
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        picture = _from_array(tensor.permute(1, 2, 0).numpy())
    elif isinstance(image, np.ndarray):
        array = image[0] if image.ndim == 4 and len(image) == 1 else image
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(
                f"`image` as an array must be (height, width, 3) or (1, height, width, 3), got {image.shape}. A film "
                "starts from one image."
            )
        picture = _from_array(array)
    else:
        raise ValueError(
            f"`image` must be a PIL image, a tensor or an array, got {type(image).__name__}. Use "
            "`diffusers.utils.load_image` for a path or an address."
        )
    height, width = size_of(picture)
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"`image` is {height} x {width} pixels (height x width): each side needs at least {MIN_SIDE}, and none "
            f"may be more than {MAX_ASPECT:g} times the other. Give a larger image, or a part of this one."
        )
    return picture


def size_of(picture: PIL.Image.Image | torch.Tensor) -> tuple[int, int]:
    """Height and width of what `read_image` gave."""
    if isinstance(picture, PIL.Image.Image):
        return picture.height, picture.width
    return picture.shape[-2], picture.shape[-1]


def film_size(
    picture: PIL.Image.Image | torch.Tensor, height: int | None, width: int | None, multiples: tuple[int, int]
) -> tuple[int, int]:
    r"""Height and width of a film that begins with `picture`, where they are not given.

    With neither, that of the picture's aspect whose area is that of 480 x 832; with one, the other follows the aspect.
    Both are rounded down to their `multiples`.
    """
    own_height, own_width = size_of(picture)
    aspect = own_height / own_width
    area = math.prod(DEFAULT_SIZE)
    # source: `WanImageToVideoPipeline`'s example, which rounds before it takes the multiple
    wanted_height = math.sqrt(area * aspect) if width is None else width * aspect
    wanted_width = math.sqrt(area / aspect) if height is None else height / aspect
    given = (height, wanted_height, multiples[0]), (width, wanted_width, multiples[1])
    height, width = (
        max(round(wanted) // multiple, 1) * multiple if value is None else value for value, wanted, multiple in given
    )
    return height, width


def to_pixels(
    processor: VaeImageProcessor,
    picture: PIL.Image.Image | torch.Tensor,
    height: int,
    width: int,
    resize_mode: str = "stretch",
) -> torch.Tensor:
    """The first frame of a film, `(1, 3, height, width)` in [-1, 1], float32.

    Args:
        processor (`VaeImageProcessor`): The pipeline's.
        picture: What `read_image` gave.
        height, width (`int`): Of the film.
        resize_mode (`str`, defaults to `"stretch"`):
            What happens to a picture of another aspect: `"stretch"` distorts it, as the parent pipeline does, with a
            warning where that can be seen; `"crop"` cuts off what does not fit, on both sides; `"pad"` adds black.

    Raises:
        ValueError: for another `resize_mode`.
    """
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    own_height, own_width = size_of(picture)
    if isinstance(picture, torch.Tensor) and (own_height, own_width) != (height, width):
        picture = PIL.Image.fromarray(_to_8_bits(picture[0].permute(1, 2, 0).numpy()))
    if isinstance(picture, PIL.Image.Image) and resize_mode != "stretch":
        resize = PIL.ImageOps.fit if resize_mode == "crop" else PIL.ImageOps.pad
        picture = resize(picture, (width, height), method=PIL.Image.Resampling.LANCZOS)
    change = (own_height * width) / (own_width * height)
    if resize_mode == "stretch" and max(change, 1 / change) > 1 + SEEN_CHANGE:
        logger.warning(
            f"`image` is {own_height} x {own_width}, the film {height} x {width} (height x width): its aspect changes "
            f"by {max(change, 1 / change) - 1:.0%}. Leave out `height` and `width` to keep it, or pass "
            '`resize_mode="crop"` or `"pad"`.'
        )
    return processor.preprocess(picture, height=height, width=width).to("cpu", torch.float32)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """An RGB image, the right way up."""
    try:
        image.load()
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return PIL.Image.fromarray(_to_8_bits(np.asarray(image).astype(np.uint16))).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(
                f"mode {image.mode!r} does not say which value is white. Say so: `image = "
                "PIL.Image.fromarray((np.asarray(image) * (255 / white)).clip(0, 255).astype('uint8'))`, with `white` "
                "65535 for a picture of 16 bits"
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                raise ValueError(
                    "it has transparent pixels, which have no colour of their own. Lay it on a ground: `image = "
                    "PIL.Image.alpha_composite(PIL.Image.new('RGBA', image.size, 'white'), "
                    "image.convert('RGBA')).convert('RGB')`"
                )
        return image.convert("RGB")
    except (OSError, EOFError, SyntaxError, struct.error) as error:
        raise ValueError(f"`image` cannot be read: {error}. The file may be cut short or damaged.") from error
    except ValueError as error:
        raise ValueError(f"`image` of mode {image.mode!r} cannot be taken for RGB: {error}.") from error


def _from_array(array: np.ndarray) -> PIL.Image.Image | torch.Tensor:
    """A picture out of `(height, width, c)`."""
    is_float = np.issubdtype(array.dtype, np.floating)
    if not is_float and array.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"`image` has values of type {array.dtype}: take uint8 or uint16, or floats in [0, 1]. What counts to 255 "
            "may be given as `image / 255`."
        )
    if is_float:
        least, most = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not (least >= -OVERSHOOT and most <= 1 + OVERSHOOT):
            raise ValueError(
                f"`image` has values from {least:g} to {most:g}: floats must be in [0, 1]. Pass `image / 255` for 0 "
                "to 255, `(image + 1) / 2` for -1 to 1."
            )
    if is_float and array.shape[2] == 3:
        floats = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        return floats.clamp(0, 1).permute(2, 0, 1)[None]
    pixels = _to_8_bits(array)
    return _upright(PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    """From floats in [0, 1], 16 bits or 8, to 8 bits: the nearest."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    scaled = array / 257 if array.dtype == np.uint16 else array.astype(np.float64).clip(0, 1) * 255
    return scaled.round().astype(np.uint8)
