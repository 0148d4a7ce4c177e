"""The pipeline on an image and prompts nobody here made, at the size people use. Skipped where the data is not."""

import os
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import load_image

from conftest import make_components, make_vae, quiet, seeded
from diffusers_svi import PixelMotion, SVIPipeline, load_prompts


REAL = Path(os.environ.get("SVI_REAL_DATA", Path(__file__).parents[2] / "shared" / "data" / "real"))

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")


def test_the_authors_prompt_file():
    (prompt,) = load_prompts(REAL / "boat" / "prompt.txt")
    assert prompt.startswith("A sleek white motor yacht") and prompt.endswith("clear blue sky.")


@pytest.mark.parametrize("scheme", [PixelMotion(5)], ids=str)
def test_a_film_of_the_boat_at_480p(scheme):
    # The same factors of 8 and 4, a quarter of the work: the first factor of 2 is a rearrangement.
    vae = make_vae(patch_size=2, in_channels=12, out_channels=12, dim_mult=[1, 1, 1], temperal_downsample=[True, True])
    pipe = quiet(SVIPipeline(**{**make_components("wan2.1"), "vae": vae}))
    clips = list(
        pipe.stream(
            image=load_image(str(REAL / "boat" / "frame.jpg")),
            prompts=load_prompts(REAL / "boat" / "prompt.txt"),
            num_clips=2,
            conditioning=scheme,
            height=480,
            width=832,
            num_frames=17,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=seeded(),
            output_type="pt",
        )
    )
    assert [clip.frames.shape for clip in clips] == [(17 - scheme.overlap, 3, 480, 832), (17, 3, 480, 832)]
    assert clips[0].state.frames.shape == (1, 3, scheme.num_frames, 480, 832)
    assert all(np.isfinite(clip.frames.numpy()).all() for clip in clips)
