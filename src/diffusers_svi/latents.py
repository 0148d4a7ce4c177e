"""Between pixels and normalised latents, through a Wan VAE.

Pixels are `(batch, 3, frames, height, width)` in [-1, 1]. Latents are `(batch, z_dim, latent_frames, height / s,
width / s)` with `latent_frames = (frames - 1) / t + 1`, normalised by the VAE's `latents_mean` and `latents_std`
(s and t are the VAE's spatial and temporal factors, 8 and 4 for Wan 2.1).
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device


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
