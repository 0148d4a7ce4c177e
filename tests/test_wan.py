"""Latents in and out of a Wan VAE, and what a Wan transformer is given beside them."""

import pytest
import torch

from conftest import CLIP, make_vae, seeded
from diffusers_svi import PixelMotion
from diffusers_svi.wan import (
    decode_video,
    encode_video,
    known_mask,
    num_latent_frames,
    pipeline_condition,
    transformer_inputs,
)


def test_latent_frames():
    assert [num_latent_frames(n) for n in (1, 5, 9, 17, 81)] == [1, 2, 3, 5, 21]


def test_latents_are_normalised():
    vae = make_vae().requires_grad_(False)
    video = torch.rand(2, 3, 5, 32, 32, generator=seeded()) * 2 - 1
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents = encode_video(vae, video)
    torch.testing.assert_close(latents, (vae.encode(video).latent_dist.mode() - mean) / std)
    torch.testing.assert_close(decode_video(vae, latents), vae.decode(latents * std + mean).sample)


def test_latents_come_back_in_the_dtype_of_the_pixels():
    vae = make_vae().requires_grad_(False)
    assert encode_video(vae, torch.zeros(1, 3, 1, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert decode_video(vae, torch.zeros(1, 16, 1, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_mask_marks_the_first_latent_frame_only():
    mask = known_mask(torch.randn(2, 16, 5, 4, 4))
    assert mask.shape == (2, 4, 5, 4, 4)
    assert torch.equal(mask[:, :, 0], torch.ones(2, 4, 4, 4))
    assert mask[:, :, 1:].abs().max() == 0


@pytest.mark.parametrize("known_frames", [1, 2, 5, 7, 17])
def test_the_mask_marks_as_many_frames_as_are_known(known_frames):
    """Frame by frame: four channels of the first latent frame are frame 0, those of the others a frame each."""
    mask = known_mask(torch.randn(2, 16, 5, 4, 4), known_frames)
    assert mask.shape == (2, 4, 5, 4, 4) and torch.equal(mask, mask[:1, :, :, :1, :1].expand_as(mask))
    for latent_frame in range(5):
        frames = [0] * 4 if latent_frame == 0 else range(4 * latent_frame - 3, 4 * latent_frame + 1)
        assert mask[0, :, latent_frame, 0, 0].tolist() == [float(frame < known_frames) for frame in frames]


def test_every_sample_of_a_batch_has_its_own_mask():
    condition = torch.randn(3, 16, 5, 4, 4)
    mask = known_mask(condition, torch.tensor([5, 1, 2]))
    for sample, known_frames in enumerate((5, 1, 2)):
        assert torch.equal(mask[sample], known_mask(condition, known_frames)[0])
    hidden, _ = transformer_inputs(condition, condition, torch.ones(3), (1, 2, 2), False, torch.tensor([5, 1, 2]))
    assert torch.equal(hidden[:, 16:20], mask)
    assert torch.equal(pipeline_condition(condition, 5, False, 5)[0][:, :4], known_mask(condition, 5))


def test_the_clips_of_a_film_have_the_mask_of_their_scheme(i2v, image):
    """One frame in the first clip, five in the second; with the first frame repeated five in both."""
    seen = []
    i2v.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][:1]), with_kwargs=True
    )
    options = {**CLIP, "num_inference_steps": 1, "guidance_scale": 1.0, "num_clips": 2}
    for scheme in (PixelMotion(5, mask_frames="all"), PixelMotion(5, mask_frames="all", repeat_first=True)):
        i2v(image, "a cat", conditioning=scheme, generator=seeded(), output_type="latent", **options)
    marked = [known_mask(hidden, frames) for hidden, frames in zip(seen, (1, 5, 5, 5), strict=True)]
    assert all(torch.equal(hidden[:, 16:20], mask) for hidden, mask in zip(seen, marked, strict=True))


def test_a_condition_on_channels():
    condition = torch.randn(1, 16, 5, 4, 4)
    (both,) = pipeline_condition(condition, 5, expand_timesteps=False)
    assert torch.equal(both[:, :4], known_mask(condition)) and torch.equal(both[:, 4:], condition)


@pytest.mark.parametrize("held", [1, 2])
def test_a_condition_that_is_held(held):
    condition = torch.randn(1, 48, held, 4, 4)
    filled, mask = pipeline_condition(condition, 5, expand_timesteps=True)
    assert torch.equal(filled[:, :, :held], condition) and filled.shape == (1, 48, 5, 4, 4)
    assert filled[:, :, held:].abs().max() == 0
    assert mask.shape == (1, 1, 5, 4, 4)
    assert mask[0, 0, :, 0, 0].tolist() == [0.0] * held + [1.0] * (5 - held) and mask.std(dim=(3, 4)).max() == 0


@pytest.mark.parametrize("held", [0, 1, 3])
def test_held_tokens_are_at_timestep_0(held):
    """A token for every patch of 1 x 2 x 2."""
    noisy, condition = torch.randn(2, 48, 5, 4, 6), torch.randn(2, 48, held, 4, 6)
    hidden, timesteps = transformer_inputs(noisy, condition, torch.tensor([0.5, 1.0]), (1, 2, 2), True)
    assert torch.equal(hidden[:, :, :held], condition) and torch.equal(hidden[:, :, held:], noisy[:, :, held:])
    for row, timestep in zip(timesteps.tolist(), (500.0, 1000.0), strict=True):
        assert row == [0.0] * held * 6 + [timestep] * (5 - held) * 6


def test_training_puts_together_what_the_pipeline_does(pipe, image):
    """The inputs of the transformer at the first step of a clip, taken apart and put together again."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"], kwargs["timestep"])), with_kwargs=True
    )
    pipe(image, "a cat", generator=seeded(), output_type="latent", **CLIP)
    hook.remove()
    hidden_states, timesteps = seen[0]
    expand = pipe.config.expand_timesteps
    z_dim = pipe.vae.config.z_dim
    noisy, condition = (
        (hidden_states, hidden_states[:, :, :1]) if expand else hidden_states.split([z_dim + 4, z_dim], 1)
    )
    sigmas = timesteps.flatten()[-1:] / 1000
    inputs = transformer_inputs(noisy[:, :z_dim], condition, sigmas, pipe.transformer.config.patch_size, expand)
    torch.testing.assert_close(inputs[0], hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(inputs[1], timesteps.to(inputs[1]))
