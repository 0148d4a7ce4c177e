"""`SVIBlocks`: films of Modular Diffusers are those of `SVIPipeline`, bit for bit."""

import numpy as np
import pytest
import torch

from conftest import CLIP, make_components, quiet, seeded
from diffusers_svi import (
    HeldLatents,
    LatentMotion,
    PixelMotion,
    SVIBlocks,
    SVIPipeline,
)


PROMPTS = ["a cat sits", "the dog jumps", "the cat sleeps"]
SCHEMES = {
    "wan2.1": [PixelMotion(1), PixelMotion(5, "reference"), LatentMotion(1)],
    "a14b": [PixelMotion(1, "reference"), LatentMotion(1)],
    "ti2v-5b": [PixelMotion(5), HeldLatents(1)],
    "i2v": [PixelMotion(1), LatentMotion(0)],
}


def modular(components):
    pipe = SVIBlocks().init_pipeline()
    pipe.update_components(**components)
    return quiet(pipe)


@pytest.mark.parametrize(
    ("kind", "scheme"), [(kind, scheme) for kind, schemes in SCHEMES.items() for scheme in schemes], ids=str
)
def test_a_film_is_that_of_the_pipeline(kind, scheme, image):
    components = make_components(kind)
    options = {"image": image, "prompts": PROMPTS, "negative_prompt": "bad", "conditioning": scheme, **CLIP}
    expected = quiet(SVIPipeline(**components))(**options, generator=seeded()).frames
    videos = modular(components)(**options, generator=seeded(), output="videos")
    assert np.array_equal(videos, expected)
