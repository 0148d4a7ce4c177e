"""Latents in and out of a Wan VAE, and what a Wan transformer is given beside them."""

import pytest
import torch

from conftest import CLIP, make_vae, seeded
from diffusers_svi.wan import (
    decode_video,
    encode_video,
    first_frame_mask,
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
    mask = first_frame_mask(torch.randn(2, 16, 5, 4, 4))
    assert mask.shape == (2, 4, 5, 4, 4)
    assert torch.equal(mask[:, :, 0], torch.ones(2, 4, 4, 4))
    assert mask[:, :, 1:].abs().max() == 0


def test_a_condition_on_channels():
    condition = torch.randn(1, 16, 5, 4, 4)
    (both,) = pipeline_condition(condition, 5, expand_timesteps=False)
    assert torch.equal(both[:, :4], first_frame_mask(condition)) and torch.equal(both[:, 4:], condition)


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
