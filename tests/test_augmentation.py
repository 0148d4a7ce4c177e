"""Augmentation, pinned by what each change does to known pictures."""

import colorsys
from typing import NamedTuple

import numpy as np
import pytest
import torch

from diffusers_svi.training.augmentation import augment
from diffusers_svi.training.cache import fingerprint


def test_condition_frames_are_augmented_alike():
    frame = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rng = np.random.default_rng(0)
    results = [augment(frame.expand(-1, 3, -1, -1), rng) for _ in range(20)]
    assert all(torch.equal(result, result[:, :1].expand_as(result)) for result in results)
    assert len({fingerprint(result.numpy().tobytes()) for result in results}) > 15


class Drawn(NamedTuple):
    jitter: bool
    blur: bool
    sharpen: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float
    radius: float
    sharpness: float


def drawn(seed: int) -> Drawn:
    """What is drawn for a seed, in this order."""
    rng = np.random.default_rng(seed)
    switches = [rng.random() < share for share in (0.7, 0.5, 0.5)]
    ranges = [(0.7, 1.3)] * 3 + [(-0.1, 0.1), (0.1, 2.0), (0.0, 2.0)]
    return Drawn(*switches, *(rng.uniform(*ends) for ends in ranges))


def seeds(jitter: bool, blur: bool, sharpen: bool, count: int = 6) -> list[int]:
    """The first seeds for which just this is done."""
    return [seed for seed in range(200) if drawn(seed)[:3] == (jitter, blur, sharpen)][:count]


def augmented(picture: np.ndarray, seed: int) -> np.ndarray:
    """A picture `(height, width, 3)` in 0 ... 255 after augmentation, as floats."""
    frames = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(1).float() / 127.5 - 1
    return ((augment(frames, np.random.default_rng(seed))[:, 0] + 1) * 127.5).permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("seed", seeds(True, False, False))
def test_colours_change_by_what_is_drawn(seed):
    values = drawn(seed)
    grey = augmented(np.full((16, 16, 3), 120.0), seed)
    assert grey.mean() == pytest.approx(120 * values.brightness, abs=1.5)
    halves = np.full((16, 16, 3), 80.0)
    halves[:, 8:] = 160
    assert np.ptp(augmented(halves, seed)) == pytest.approx(80 * values.brightness * values.contrast, abs=3)
    red, green, blue = augmented(np.broadcast_to(np.array([120.0, 90, 60]), (16, 16, 3)).copy(), seed)[0, 0]
    spread = 60 * values.brightness * values.contrast * values.saturation
    assert max(red, green, blue) - min(red, green, blue) == pytest.approx(spread, abs=3)
    # The hue of (120, 90, 60) is a twelfth of the circle; a step of 8 bits in such a colour is a hundredth.
    turned = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0] - 1 / 12
    assert (turned + 0.5) % 1 - 0.5 == pytest.approx(values.hue, abs=0.012)


@pytest.mark.parametrize("short_side", [240, 720])
@pytest.mark.parametrize("seed", seeds(False, True, False))
def test_the_blur_grows_with_the_picture(seed, short_side):
    """Its standard deviation, from an edge: what is drawn is that of a picture whose short side is 480."""
    edge = np.zeros((short_side, short_side + 20, 3))
    edge[:, short_side // 2 :] = 255
    profile = np.diff(augmented(edge, seed)[short_side // 2, :, 0]) / 255
    places = np.arange(len(profile)) - (short_side // 2 - 1)
    variance = (profile * places**2).sum() - (profile * places).sum() ** 2
    assert profile.sum() == pytest.approx(1)
    assert np.sqrt(variance) == pytest.approx(drawn(seed).radius * short_side / 480, rel=0.05, abs=0.03)


@pytest.mark.parametrize("seed", seeds(False, False, True))
def test_sharpness_goes_away_from_a_smooth_picture(seed):
    picture = np.full((9, 9, 3), 100.0)
    picture[4, 4] = 152
    # Smooth is 5 parts of the pixel and one of each neighbour.
    smooth = np.array([100 + 52 / 13, 100 + 5 * 52 / 13])
    expected = smooth + drawn(seed).sharpness * (np.array([100, 152]) - smooth)
    assert augmented(picture, seed)[4, 3:5, 0] == pytest.approx(expected, abs=1.01)


def test_how_often_something_is_done():
    frame = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rng = np.random.default_rng(1)
    untouched = sum(torch.equal(augment(frame, rng), frame) for _ in range(2000))
    # Within five standard deviations of 2000 draws at 0.3 * 0.5 * 0.5.
    assert abs(untouched - 150) < 59
