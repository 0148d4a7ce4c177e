"""Colours are matched: a cast is taken out of every frame, and what else happens in a clip stays."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from color_matcher import ColorMatcher

from diffusers_svi.color import METHODS, check_color_match, match_colors
from diffusers_svi.pixels import to_uint8


LEVEL = 2 / 255  # of 8 bits, on [-1, 1]


def make_clip(frames: int = 4, noise: float = 0.02) -> torch.Tensor:
    """Soft shapes in all colours that move, `(1, 3, frames, 32, 48)`, away from black and white."""
    y, x = np.mgrid[:32, :48] / 32
    time = np.arange(frames)[:, None, None]
    channels = [
        0.5 + 0.2 * np.sin(5 * x + time),
        0.4 + 0.15 * np.cos(4 * y + x + time),
        0.4 + 0.2 * np.sin(3 * x * y + time),
    ]
    pixels = np.stack(channels) + np.random.default_rng(0).normal(0, noise, (3, frames, 32, 48))
    return torch.tensor(pixels.clip(0.02, 0.98)[None] * 2 - 1, dtype=torch.float32)


def shown(clip: torch.Tensor) -> torch.Tensor:
    return to_uint8(clip[0, :, 0])


def cast(clip: torch.Tensor, matrix: list, offset: list) -> torch.Tensor:
    """An affine change of the colours, on [0, 1]."""
    moved = torch.einsum("ij,bjfhw->bifhw", torch.tensor(matrix), clip / 2 + 0.5)
    return (moved + torch.tensor(offset)[None, :, None, None, None]) * 2 - 1


def in_each_channel(clip: torch.Tensor) -> torch.Tensor:
    return cast(clip, [[0.9, 0.0, 0.0], [0.0, 1.05, 0.0], [0.0, 0.0, 0.95]], [0.03, -0.02, 0.02])


def between_channels(clip: torch.Tensor) -> torch.Tensor:
    return cast(clip, [[0.9, 0.05, 0.0], [0.02, 0.95, 0.03], [0.0, -0.04, 0.85]], [0.04, -0.02, 0.05])


def off(clip: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in levels of 8 bits."""
    return ((clip - other).abs().max() / LEVEL).item()


@pytest.mark.parametrize("method", METHODS)
def test_a_clip_that_agrees_stays_as_it_is(method):
    assert off(match_colors(make_clip(), shown(make_clip()), method), make_clip()) < 0.15


@pytest.mark.parametrize("method", ["mkl", "mvgd"])
def test_a_cast_of_each_channel_is_taken_out_of_every_frame(method):
    clip = make_clip()
    assert off(in_each_channel(clip), clip) > 10
    assert off(match_colors(in_each_channel(clip), shown(clip), method), clip) < 0.15


def test_pixel_by_pixel_any_affine_cast_is_taken_out():
    clip = make_clip()
    assert off(between_channels(clip), clip) > 12
    assert off(match_colors(between_channels(clip), shown(clip), "mvgd"), clip) < 0.5


@pytest.mark.parametrize(("method", "levels"), [("mkl", 0.8), ("reinhard", 1.0)])
def test_other_methods_take_most_of_it_out(method, levels):
    """Mean over pixels and frames, of 4.8 levels."""
    clip = make_clip()
    assert (between_channels(clip) - clip).abs().mean() / LEVEL > 4.7
    assert (match_colors(between_channels(clip), shown(clip), method) - clip).abs().mean() / LEVEL < levels


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_first_frame_has_the_colours_of_what_it_tells_again(method):
    clip = make_clip()
    matched = match_colors(between_channels(clip), shown(clip), method)[0, :, 0]
    for statistic in (torch.mean, torch.std):
        told, found = (statistic(frame, dim=(1, 2)) for frame in (clip[0, :, 0], matched))
        assert (told - found).abs().max() / LEVEL < (0.05 if method != "reinhard" else 1)


@pytest.mark.parametrize(("method", "levels"), [("mkl", 0.5), ("mvgd", 0.5), ("reinhard", 1.5)])
def test_it_is_the_map_of_the_package(method, levels):
    """Which takes noise for colour; that of `"reinhard"` goes back to RGB by a matrix that is rounded."""
    clip = between_channels(make_clip())
    frame, target = (clip[0, :, 0] / 2 + 0.5).double(), shown(make_clip()).double() / 255
    arrays = [pixels.permute(1, 2, 0).numpy().copy() for pixels in (frame, target)]
    expected = torch.from_numpy(ColorMatcher(method=method).transfer(*arrays, method)).permute(2, 0, 1)
    assert off(match_colors(clip, shown(make_clip()), method)[0, :, 0], expected * 2 - 1) < levels


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_sunset_stays_a_sunset(method):
    """A later frame that is redder by its own doing stays so, less the cast of the seam."""
    clip = make_clip()
    clip[0, 0, 2:] = (clip[0, 0, 2:] + 0.2).clamp(max=0.9)
    clip[0, 2, 2:] -= 0.15
    matched = match_colors(in_each_channel(clip), shown(clip), method)
    change, expected = (video[0, :, 3].mean((1, 2)) - video[0, :, 0].mean((1, 2)) for video in (matched, clip))
    assert (change - expected).abs().max() / LEVEL < (0.1 if method != "reinhard" else 4)
    assert expected[0] / LEVEL > 15 and expected[2] / LEVEL < -15


ONE_COLOUR = {"black": -1.0, "white": 1.0, "grey": 0.3}


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("colour", ONE_COLOUR)
def test_frames_of_one_colour_are_shifted(method, colour):
    clip = torch.full((1, 3, 3, 32, 48), ONE_COLOUR[colour])
    told = to_uint8(clip[0, :, 0] * 0.9)
    matched = match_colors(clip, told, method)
    # Of what is darker than 8 levels, logarithms are not asked.
    levels = 9 if (method, colour) == ("reinhard", "black") else 1
    assert matched.isfinite().all() and off(matched, (told / 127.5 - 1)[None, :, None]) < levels
    # What comes later keeps its own difference.
    clip[0, :, 2] *= 0.5
    assert off(match_colors(clip, shown(clip), method), clip) < 0.5


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_dark_beginning_leaves_contrast_as_it_is(method):
    """Fading in: its noise, half a level, is not what the clip's contrast is to be measured by."""
    clip = make_clip()
    clip[0, :, 0] = -1 + 0.5 * LEVEL * torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0)).abs()
    black = torch.zeros(3, 32, 48, dtype=torch.uint8)
    matched = match_colors(clip, black, method)
    assert matched[0, :, 1].std() / clip[0, :, 1].std() > 0.97


@pytest.mark.parametrize("method", METHODS[1:])
def test_frames_without_colour_leave_colour_as_it_is(method):
    """A black-and-white beginning: what has colour later keeps it."""
    clip = make_clip()
    clip[0, :, 0] = clip[0, :1, 0]
    assert off(match_colors(clip, shown(clip), method), clip) < 1


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("told", [0, 128, 255])
def test_whatever_is_shown_the_pixels_are_finite(method, told):
    clip = make_clip()
    constant = torch.full((3, 32, 48), told, dtype=torch.uint8)
    noise = torch.randint(0, 256, (3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for video in (clip, torch.full_like(clip, -1.0), torch.cat([torch.full_like(clip[:, :, :1], 0.3), clip], dim=2)):
        for target in (constant, shown(clip), noise):
            matched = match_colors(video, target, method)
            assert matched.isfinite().all() and matched.abs().max() <= 1 and matched.shape == video.shape


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_same_comes_every_time_and_the_clip_is_left_alone(method):
    clip = between_channels(make_clip())
    before = clip.clone()
    matched = match_colors(clip, shown(make_clip()), method)
    assert matched.equal(match_colors(clip, shown(make_clip()), method)) and clip.equal(before)


def test_half_precision_stays_half_precision():
    clip = in_each_channel(make_clip()).bfloat16()
    matched = match_colors(clip, shown(make_clip()), "mkl")
    assert matched.dtype == torch.bfloat16 and off(matched.float(), make_clip()) < 2


def test_without_a_method_the_clip_is_handed_back():
    clip = make_clip()
    assert match_colors(clip, shown(clip), "none") is clip


@pytest.mark.parametrize("method", ["hm", "hm-mvgd-hm", "hm-mkl-hm"])
def test_histograms_are_refused_with_the_reason(method):
    message = (
        f"`color_match` must be one of .*'mkl', 'mvgd', 'reinhard'.*, got '{method}'. A histogram of one frame says"
    )
    with pytest.raises(ValueError, match=message):
        match_colors(make_clip(), shown(make_clip()), method)


@pytest.mark.parametrize("method", ["MKL", "lab", "", None, 1])
def test_a_method_that_is_not_known_is_refused(method):
    with pytest.raises(ValueError, match=f"`color_match` must be one of .* got {method!r}.$"):
        check_color_match(method)


def test_a_missing_package_is_named():
    code = """
import sys
sys.modules["color_matcher"] = None  # as if it were not installed
from diffusers_svi.color import check_color_match
check_color_match("none")
check_color_match("mkl")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: `color_match`='mkl' needs a package that is not installed: `pip install" in finished.stderr
