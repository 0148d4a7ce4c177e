r"""The objective of error-recycling fine-tuning and the errors it leaves behind.

With clean latents x_0, noise eps, and what was injected into them, x~_0 = x_0 + E_vid and eps~ = eps + E_noi, the
model sees x~ = (1 - sigma) x~_0 + sigma eps~ and is to predict the *recycled velocity*

    V = eps~ - x_0,

which leads to the clean latents whatever was injected. Its residual r = v_hat - V, integrated one step in either
direction from the same x~, is an error at either end:

    clean side:  (x~ - sigma v_hat) - (x~ - sigma V) = -sigma r
    noise side:  (x~ + (1 - sigma) v_hat) - (x~ + (1 - sigma) V) = (1 - sigma) r
"""

import torch

from ..flow import like, shifted_sigmas, velocity


def recycled_velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """V: from the noise, as it was injected into, to the latents, as they were before."""
    return velocity(clean, noise)


def clean_side_error(residual: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What is wrong with the one-step prediction of the clean latents: `-sigma * residual`."""
    return -like(sigma, residual) * residual


def noise_side_error(residual: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What is wrong with the one-step prediction of the noise: `(1 - sigma) * residual`."""
    return (1 - like(sigma, residual)) * residual


def loss_weights(num_train_timesteps: int = 1000, shift: float = 5.0) -> torch.Tensor:
    r"""w of every training timestep t of the shifted schedule, `(num_train_timesteps,)` float64, of mean 1.

    w(t) = exp(-2 ((t - N / 2) / N)^2) minus its minimum over the schedule, scaled to mean 1.
    """
    timesteps = num_train_timesteps * shifted_sigmas(num_train_timesteps, shift)
    weights = torch.exp(-2 * ((timesteps - num_train_timesteps / 2) / num_train_timesteps) ** 2)
    weights = weights - weights.min()
    return weights / weights.mean()


def erft_loss(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`weight * mean((prediction - target)^2)` of every sample, `(batch,)` float32.

    Args:
        prediction, target (`torch.Tensor` of shape `(batch, ...)`): Velocities.
        weight (`torch.Tensor` of shape `(batch,)`): w(sigma) of every sample.
        mask (`torch.Tensor`, *optional*): Broadcast to the velocities; only where it is 1 does the error count.
    """
    squares = (prediction.float() - target.float()).square()
    if mask is None:
        return weight.float() * squares.flatten(1).mean(dim=1)
    mask = mask.to(squares).expand_as(squares)
    return weight.float() * (squares * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)
