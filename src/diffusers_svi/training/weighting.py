"""How often noise levels are trained and what they count: as published, or by a scheme of diffusers' scripts."""

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ..checks import check_choice
from ..erft import loss_weights
from ..flow import shifted_sigmas


SCHEMES = ("svi", "none", "sigma_sqrt", "cosmap", "logit_normal", "mode")
# So many draws stand for a density.
POOL = 100_000


def timestep_pool(
    scheme: str, num_timesteps: int = 1000, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> torch.Tensor:
    """Indices into the schedule, from noise downwards, each as often as the density of `scheme` has it.

    One of them at random is a draw from it. All are in it once, but for "logit_normal" and "mode".

    Raises:
        ValueError: for another `scheme`.
    """
    check_choice("weighting_scheme", scheme, SCHEMES)
    if scheme not in ("logit_normal", "mode"):
        return torch.arange(num_timesteps)
    generator = torch.Generator().manual_seed(0)
    draws = compute_density_for_timestep_sampling(
        scheme, POOL, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale, generator=generator
    )
    return (draws * num_timesteps).long().clamp(0, num_timesteps - 1).sort().values


def timestep_weights(scheme: str, num_timesteps: int = 1000, shift: float = 5.0) -> torch.Tensor:
    """What the loss at every noise level counts, `(num_timesteps,)` float64: the bell of [`loss_weights`] for "svi".

    Raises:
        ValueError: for another `scheme`.
    """
    check_choice("weighting_scheme", scheme, SCHEMES)
    if scheme == "svi":
        return loss_weights(num_timesteps, shift)
    return compute_loss_weighting_for_sd3(scheme, shifted_sigmas(num_timesteps, shift)).double()
