r"""The restorative target: the velocity that also leads a flawed sample back, and errors that need no bank.

With clean latents x_0, flawed ones x'_0 and the same noise, the clean and the flawed sample are

    x = (1 - sigma) x_0 + sigma eps,        x' = (1 - sigma) x'_0 + sigma eps.

The model sees x' and is to predict

    V = (eps - x_0) + alpha (x' - x).

A step of one stride from x' ends at x' - sigma V. With alpha = 1 / sigma that is x_0; with alpha = 0, the recycled
velocity of SVI, it is x_0 + (x' - x), which leaves (1 - sigma) of the error.

source: EverAnimate. Its alpha is a bell over the timesteps, its x'_0 the model's own one-step prediction.
"""

import torch

from ..flow import like
from .objective import clean_side_error, loss_weights, recycled_velocity


def restoration_weights(num_train_timesteps: int = 1000, shift: float = 5.0) -> torch.Tensor:
    r"""alpha of every training timestep t of the shifted schedule, `(num_train_timesteps,)` float64, in [0, 1].

    alpha(t) = exp(-2 ((t - N / 2) / N)^2), its range over the schedule stretched to [0, 1]: the bell that losses are
    weighted with, on another scale.
    """
    weights = loss_weights(num_train_timesteps, shift)
    return weights / weights.max()


def restorative_velocity(
    clean: torch.Tensor, flawed: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """V, of the shape of `clean`; where `flawed` is `clean`, the recycled velocity.

    Args:
        clean, flawed (`torch.Tensor` of shape `(batch, ...)`): x_0 and x'_0.
        noise (`torch.Tensor` of their shape): eps, as it was injected into.
        sigma (`torch.Tensor` of shape `(batch,)`): Noise levels, in (0, 1].
        alpha (`torch.Tensor` of shape `(batch,)`): How much of x' - x is to be led back, of a whole step.
    """
    moved = like(1 - sigma, clean) * (flawed - clean)
    return recycled_velocity(clean, noise) + like(alpha, clean) * moved


def self_error(
    prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """x'_0 - x_0 where x'_0 is what a velocity predicted at the clean sample leads to in one step.

    Args:
        prediction (`torch.Tensor` of shape `(batch, ...)`): v_hat, at x.
        clean, noise (`torch.Tensor` of its shape): x_0 and eps.
        sigma (`torch.Tensor` of shape `(batch,)`): Noise levels.
    """
    return clean_side_error(prediction - recycled_velocity(clean, noise), sigma)
