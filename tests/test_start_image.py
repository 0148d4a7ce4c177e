"""Start images as people have them: right, or refused with advice that works."""

import io
import logging
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from diffusers_svi.start_image import film_size, read_image, to_pixels


PROCESSOR = VideoProcessor(vae_scale_factor=8)
RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)
# Red rises to the right, green downwards: every way of lying is told from the others.
PICTURE = np.stack([np.tile(RAMP, (64, 1)), np.tile(RAMP[:, None], (1, 64)), np.full((64, 64), 60, np.uint8)], axis=-1)


def colours(image) -> np.ndarray:
    """What `read_image` makes of it, `(height, width, 3)` in 0 ... 255."""
    picture = read_image(image)
    if isinstance(picture, torch.Tensor):
        return picture[0].permute(1, 2, 0).numpy() * 255
    assert picture.mode == "RGB"
    return np.asarray(picture)


def saved(image: PIL.Image.Image, kind: str = "PNG", **options) -> PIL.Image.Image:
    """As opened from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return PIL.Image.open(buffer)


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(PICTURE),
        PICTURE,
        PICTURE[None],
        PICTURE.astype(np.uint16) * 257,
        (PICTURE / 255).astype(np.float64),
        np.dstack([PICTURE, np.full((64, 64), 255, np.uint8)]),
        torch.from_numpy(PICTURE).permute(2, 0, 1),
        torch.from_numpy(PICTURE).permute(2, 0, 1)[None],
        torch.from_numpy(PICTURE).permute(2, 0, 1) / 255,
        (torch.from_numpy(PICTURE).permute(2, 0, 1) / 255).double(),
        PIL.Image.fromarray(PICTURE).convert("RGBA"),
        saved(PIL.Image.fromarray(PICTURE).convert("RGBA")),
    ],
    ids=lambda image: f"{type(image).__name__} {getattr(image, 'dtype', getattr(image, 'mode', ''))}",
)
def test_forms_of_one_picture(image):
    assert np.abs(colours(image) - PICTURE).max() < 0.01


def test_bfloat16_is_as_near_as_it_can_be():
    image = (torch.from_numpy(PICTURE).permute(2, 0, 1) / 255).bfloat16()
    assert np.abs(colours(image) - PICTURE).max() < 1


def test_grey_pictures():
    grey = np.tile(RAMP, (64, 1))
    sixteen = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    swapped = PIL.Image.frombytes("I;16B", (64, 64), (grey.astype(">u2") * 257).tobytes())
    forms = [PIL.Image.fromarray(grey), sixteen, saved(sixteen), swapped, grey, grey[..., None], grey / 255]
    forms += [torch.from_numpy(grey)[None], (torch.from_numpy(grey) / 255)[None, None]]
    for image in forms:
        assert np.abs(colours(image) - grey[..., None]).max() < 0.01, image


def test_palettes_and_ink():
    palette = PIL.Image.fromarray(PICTURE).quantize(32)
    assert np.array_equal(colours(palette), np.asarray(palette.convert("RGB")))
    ink = PIL.Image.fromarray(PICTURE).convert("CMYK")
    assert np.abs(colours(ink).astype(int) - PICTURE).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_upright(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    # How the camera keeps a picture that is to be shown as `PICTURE`.
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turns |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    kept = PIL.Image.fromarray(PICTURE)
    if orientation in turns:
        kept = kept.transpose(PIL.Image.Transpose[turns[orientation]])
    assert np.array_equal(colours(saved(kept, exif=exif)), PICTURE)


@pytest.mark.parametrize("over", [0.0, 0.04])
def test_floats_slightly_out_of_range_are_clipped(over):
    image = torch.linspace(-over, 1 + over, 48 * 48).view(1, 48, 48).repeat(3, 1, 1)
    pixels = to_pixels(PROCESSOR, read_image(image), 48, 48)
    assert pixels.min() == -1 and pixels.max() == 1
    torch.testing.assert_close(pixels[0], image.clamp(0, 1) * 2 - 1)


TRANSPARENT = PIL.Image.fromarray(np.dstack([PICTURE, np.where(PICTURE[..., 0] > 127, 0, 255).astype(np.uint8)]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 64, 64) * 255, r"values from .* to 25\d.*: floats must be in \[0, 1\]. Pass `image / 255`"),
        (torch.rand(3, 64, 64) * 2 - 1, r"values from -.*`\(image \+ 1\) / 2` for -1 to 1"),
        (torch.full((3, 64, 64), float("nan")), "`image` has values from nan to nan"),
        (np.full((64, 64, 3), np.inf), "`image` has values from inf to inf"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "`image` has values of type int64: take uint8"),
        (np.zeros((64, 64, 3), bool), "`image` has values of type bool"),
        (torch.zeros(64, 64, 3), r"`image` as a tensor must be .* got \(64, 64, 3\)"),
        (np.zeros((3, 64, 64), np.uint8), r"`image` as an array must be .* got \(3, 64, 64\)"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"`image` as an array must be .* got \(2, 64, 64, 3\)"),
        (PIL.Image.new("RGB", (1, 1)), "`image` is 1 x 1 pixels .* each side needs at least 16"),
        (PIL.Image.new("RGB", (20000, 1)), "`image` is 1 x 20000 pixels"),
        (PIL.Image.new("RGB", (16, 300)), "`image` is 300 x 16 pixels .* more than 16 times the other"),
        (torch.zeros(3, 0, 0), "`image` is 0 x 0 pixels"),
        (PIL.Image.new("La", (64, 64)), "`image` of mode 'La' cannot be taken for RGB"),
        (TRANSPARENT, "`image` of mode 'RGBA' cannot be taken for RGB: it has transparent pixels"),
        (saved(TRANSPARENT.quantize(16)), "it has transparent pixels"),
        (np.asarray(TRANSPARENT), "it has transparent pixels"),
        ("kitten.png", "got str. Use `diffusers.utils.load_image` for a path"),
    ],
)
def test_what_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (TRANSPARENT, np.where(PICTURE[..., :1] > 127, 255, PICTURE)),
        (PIL.Image.fromarray(np.tile(RAMP, (64, 1)).astype(np.int32) * 257), np.tile(RAMP, (64, 1))[..., None]),
    ],
    ids=["transparent", "32 bits"],
)
def test_the_advice_works(image, expected):
    with pytest.raises(ValueError, match="`image = ") as error:
        read_image(image)
    advice = str(error.value).split("`image = ")[1].split("`")[0]
    names = {"PIL": PIL, "np": np, "image": image, "white": 65535}
    assert np.abs(colours(eval(advice, names)).astype(int) - expected).max() <= 1


def test_a_damaged_file(tmp_path):
    PIL.Image.fromarray(PICTURE).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    with pytest.raises(ValueError, match="`image` cannot be read: .* cut short or damaged"):
        read_image(PIL.Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((480, 832), (None, None), (480, 832)),
        ((960, 1664), (None, None), (480, 832)),
        ((832, 480), (None, None), (832, 480)),
        ((1080, 1920), (None, None), (464, 832)),
        ((600, 600), (None, None), (624, 624)),
        ((1080, 1920), (480, None), (480, 848)),
        ((1080, 1920), (None, 832), (464, 832)),
        ((1080, 1920), (320, 320), (320, 320)),
        ((20, 300), (None, None), (160, 2448)),
    ],
)
def test_the_size_of_a_film_follows_its_image(size, given, expected):
    height, width = film_size(PIL.Image.new("RGB", size[::-1]), *given, (16, 16))
    assert (height, width) == expected
    if given == (None, None):
        assert height * width <= 480 * 832 and height / width == pytest.approx(size[0] / size[1], rel=0.05)


def test_the_size_keeps_to_the_multiples_of_the_model():
    assert film_size(PIL.Image.new("RGB", (1920, 1080)), None, None, (32, 64)) == (448, 832)


def ball(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 5) ** 2
    return np.repeat(np.where(inside, 255, 90).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("form", [PIL.Image.fromarray, lambda array: torch.from_numpy(array).permute(2, 0, 1) / 255])
@pytest.mark.parametrize(("mode", "ratio", "edge"), [("stretch", 4.0, 90), ("crop", 1.0, 90), ("pad", 1.0, 0)])
def test_a_picture_of_another_aspect(form, mode, ratio, edge, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    pixels = to_pixels(PROCESSOR, read_image(form(ball(640, 320))), 128, 256, mode)
    levels = (pixels[0, 0] / 2 + 0.5) * 255
    assert levels.shape == (128, 256) and levels[64, 0] == pytest.approx(edge, abs=1)
    lit = levels > 172
    assert (lit.any(0).sum() / lit.any(1).sum()).item() == pytest.approx(ratio, rel=0.1)
    told = "640 x 320, the film 128 x 256 (height x width): its aspect changes by 300%" in caplog.text
    assert told == (mode == "stretch")


def test_stretching_is_the_parents():
    picture = PIL.Image.fromarray(PICTURE)
    assert torch.equal(to_pixels(PROCESSOR, picture, 32, 48), PROCESSOR.preprocess(picture, height=32, width=48))


def test_a_change_that_nobody_sees_is_not_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    to_pixels(PROCESSOR, PIL.Image.new("RGB", (842, 480)), 480, 832)
    assert not caplog.text
    to_pixels(PROCESSOR, PIL.Image.new("RGB", (860, 480)), 480, 832)
    assert "its aspect changes by 3%" in caplog.text and math.isclose(860 / 832, 1.03, abs_tol=0.005)
