r"""Boundary errors: what the condition of a clip is off by when the model itself made the clip before.

A residual says what one step gets wrong. A chain's condition has the errors of all steps in it and, where frames are
encoded again, those of the VAE's round trip, which no residual holds. So now and then the clip before a training
sample is made, in a few steps, from the condition it really had; with y' what the scheme makes of its end, and y what
it makes of the true end, the error is y' - y. It is kept under the number of the sample it belongs to: an error of the
light, or of who is seen, says nothing to another sample.
"""

from collections.abc import Callable

import torch

from ..chain import carried_frames, carried_latents
from ..conditioning import Scheme
from ..flow import interpolate, shift_sigma
from ..latents import decode_video


def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    start: float,
    num_steps: int,
    shift: float,
) -> torch.Tensor:
    """Latents after `num_steps` Euler steps of the shifted schedule, from noise level `start` down to 0.

    Args:
        predict (`Callable`): From noisy latents and noise levels `(batch,)` to velocities.
        clean, noise (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`):
            Mixed at `start`: with less than 1 it decides how much of the true clip is kept.
        start (`float`): In (0, 1].
        num_steps (`int`): At least 1.
        shift (`float`): Of the schedule.
    """
    # The inverse of the shift says where on the schedule `start` lies.
    begin = start / (shift - (shift - 1) * start)
    sigmas = shift_sigma(torch.linspace(begin, 0, num_steps + 1, dtype=torch.float64), shift).tolist()
    levels = [clean.new_full((len(clean),), sigma) for sigma in sigmas]
    latents = interpolate(clean, noise, levels[0])
    for index in range(num_steps):
        latents = latents + (sigmas[index + 1] - sigmas[index]) * predict(latents, levels[index])
    return latents


def next_condition(
    vae, scheme: Scheme, image: torch.Tensor, latents: torch.Tensor, num_frames: int, expand_timesteps: bool
) -> torch.Tensor:
    """What `scheme` makes of the end of a clip, as `SVIPipeline` hands it to the next one.

    Args:
        image (`torch.Tensor` of shape `(batch, 3, height, width)` in [-1, 1]): The start or reference image.
        latents (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): Of the clip.
    """
    known = {"image": image}
    if scheme.carried_frames:
        frames = carried_frames(scheme, decode_video(vae, latents))
        known["frames"] = (frames.float() / 127.5 - 1).to(image)
    if scheme.carried_latents:
        known["latents"] = carried_latents(scheme, latents).to(image)
    if expand_timesteps:
        return scheme.held(vae, **known)
    return scheme.condition(vae, **known, num_frames=num_frames)
