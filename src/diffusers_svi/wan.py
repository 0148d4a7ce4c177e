"""What is to be known of Wan models: their latents, and how their transformers take a condition.

Pixels are `(batch, 3, frames, height, width)` in [-1, 1]. Latents are `(batch, z_dim, latent_frames, height / s,
width / s)` with `latent_frames = (frames - 1) / 4 + 1`, normalised by the VAE's `latents_mean` and `latents_std` (s is
the VAE's spatial factor, 8 for Wan 2.1 and 16 for TI2V-5B).

Two kinds of model read a condition. Those with concatenated channels (2.1 I2V, 2.2 I2V A14B) take condition latents of
all frames and a mask beside the noisy ones. TI2V-5B (`expand_timesteps`) has clean latents, *held*, in place of the
first latent frames, at timestep 0.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device


# Frames of a latent frame after the first. Every Wan VAE encodes in groups of four frames.
TEMPORAL_FACTOR = 4
# Of a prompt: what Wan was trained with.
MAX_TOKENS = 512


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of `num_frames = 1 + 4n` frames."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


def encode_video(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents of `video`: the mode of the posterior, `(z - mean) / std`.

    The VAE computes in its own dtype and on its own device; the latents come back in the dtype and on the device of
    `video`.
    """
    # source: WanImageToVideoPipeline.prepare_latents, whose order of operations this keeps to the last bit
    latents = vae.encode(video.to(device=get_module_execution_device(vae), dtype=vae.dtype)).latent_dist.mode()
    latents = latents.to(device=video.device, dtype=video.dtype)
    mean, inverse_std = _statistics(vae, latents)
    return (latents - mean) * inverse_std


def decode_video(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] of normalised `latents`, in the VAE's dtype and on its device."""
    # source: the end of WanImageToVideoPipeline.__call__
    latents = latents.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    mean, inverse_std = _statistics(vae, latents)
    return vae.decode(latents / inverse_std + mean, return_dict=False)[0]


def _statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    return mean, inverse_std


def known_mask(
    condition: torch.Tensor, known_frames: int | torch.Tensor = 1, last_is_known: bool = False
) -> torch.Tensor:
    """The mask beside `condition`: `(batch, 4, latent_frames, h, w)`, 1 on the first `known_frames` frames, else 0.

    A latent frame has a channel for each of its four frames; the first of a clip has all four for its one. One frame
    is marked whatever the number of condition frames, unless the scheme says otherwise: every published member of the
    SVI family is trained this way.

    Args:
        condition (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): Condition latents.
        known_frames (`int`, or `torch.Tensor` of shape `(batch,)`, defaults to 1): Frames, 0 or more.
        last_is_known (`bool`, defaults to `False`): Mark the last frame too, as the parent does for its `last_image`.
    """
    batch, _, latent_frames = condition.shape[:3]
    # The frame that each channel of each latent frame is for.
    frames = torch.arange(latent_frames * TEMPORAL_FACTOR) - (TEMPORAL_FACTOR - 1)
    frames = frames.clamp(min=0).view(latent_frames, TEMPORAL_FACTOR).T
    known = frames < torch.as_tensor(known_frames).cpu().view(-1, 1, 1)
    if last_is_known:
        known = known | (frames == frames.max())
    mask = known.to(condition)[..., None, None]
    return mask.expand(batch, -1, -1, *condition.shape[3:])


def pipeline_condition(
    condition: torch.Tensor,
    latent_frames: int,
    expand_timesteps: bool,
    known_frames: int = 1,
    last_is_known: bool = False,
) -> tuple[torch.Tensor, ...]:
    """What `WanImageToVideoPipeline.prepare_latents` returns behind the noise.

    Args:
        condition (`torch.Tensor` of shape `(batch, z_dim, n, h, w)`): As in [`transformer_inputs`].
        latent_frames (`int`): Of the clip.
        expand_timesteps (`bool`): Whether the model holds the condition in place of the first latent frames.
        known_frames (`int`, defaults to 1): As in [`known_mask`].
        last_is_known (`bool`, defaults to `False`):
            Whether the last latent frame of `condition` is for the last one of the clip.

    Returns:
        Mask and condition on channels, `(batch, 4 + z_dim, latent_frames, h, w)`; with `expand_timesteps`, the held
        latents, zeros between, `(batch, z_dim, latent_frames, h, w)`, and `(1, 1, latent_frames, h, w)`, 0 on them.
    """
    if not expand_timesteps:
        return (torch.cat([known_mask(condition, known_frames, last_is_known), condition], dim=1),)
    held = condition.shape[2] - last_is_known
    filled = F.pad(condition[:, :, :held], (0, 0, 0, 0, 0, latent_frames - held))
    mask = condition.new_ones(1, 1, latent_frames, *condition.shape[3:])
    mask[:, :, :held] = 0
    if last_is_known:
        filled[:, :, -1:], mask[:, :, -1:] = condition[:, :, -1:], 0
    return filled, mask


def transformer_inputs(
    noisy: torch.Tensor,
    condition: torch.Tensor,
    sigmas: torch.Tensor,
    patch_size: tuple[int, int, int],
    expand_timesteps: bool,
    known_frames: int | torch.Tensor = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What a Wan transformer takes: its hidden states and its timesteps.

    At inference the parent pipeline puts these together; training does it here.

    Args:
        noisy (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): Noisy latents.
        condition (`torch.Tensor` of shape `(batch, z_dim, n, h, w)`):
            `Scheme.condition`: with n = latent_frames, or with `expand_timesteps` the n held latent frames.
        sigmas (`torch.Tensor` of shape `(batch,)`): Noise levels.
        patch_size (`tuple[int, int, int]`): Of the transformer.
        expand_timesteps (`bool`): Whether the model holds the condition in place of the first latent frames.
        known_frames (`int`, or `torch.Tensor` of shape `(batch,)`, defaults to 1): As in [`known_mask`].

    Returns:
        `(batch, z_dim + 4 + z_dim, latent_frames, h, w)` and `(batch,)`; with `expand_timesteps`,
        `(batch, z_dim, latent_frames, h, w)` and `(batch, tokens)`, 0 on the held ones.
    """
    # source: the denoising loop of WanImageToVideoPipeline.__call__
    timesteps = 1000 * sigmas
    if not expand_timesteps:
        return torch.cat([noisy, known_mask(condition, known_frames), condition], dim=1), timesteps
    held = condition.shape[2]
    tokens = timesteps.view(-1, 1, 1).repeat(
        1, noisy.shape[2], noisy[0, 0, 0, :: patch_size[1], :: patch_size[2]].numel()
    )
    tokens[:, :held] = 0
    return torch.cat([condition, noisy[:, :, held:]], dim=2), tokens.flatten(1)
