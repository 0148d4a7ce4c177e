import numpy as np
import pytest
import torch

from diffusers_svi.pixels import from_uint8, to_pil, to_uint8


def test_every_level_comes_back():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = from_uint8(levels)
    assert pixels.dtype == torch.float32 and pixels[0] == -1 and pixels[255] == 1
    torch.testing.assert_close(pixels, torch.arange(256) / 255 * 2 - 1, rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(pixels), levels)


@pytest.mark.parametrize(("value", "level"), [(-1.5, 0), (1.5, 255), (0.0, 128), (-0.9965, 0), (0.0039, 128)])
def test_the_nearest_level_within_the_range(value, level):
    assert to_uint8(torch.tensor(value)).item() == level


def test_the_dtype_asked_for():
    assert from_uint8(torch.tensor([128], dtype=torch.uint8), torch.float64).item() == 128 / 127.5 - 1
    assert to_uint8(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [255]


def test_an_image():
    pixels = torch.randint(256, (3, 4, 6), dtype=torch.uint8)
    image = to_pil(pixels)
    assert image.size == (6, 4) and image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
