"""Flow matching, in diffusers' convention: sigma = 1 is pure noise, and the velocity points from clean to noise.

    x_sigma = (1 - sigma) * x_0 + sigma * eps        v = d x_sigma / d sigma = eps - x_0

The paper of SVI writes t = 1 - sigma and the negative velocity. In all functions `sigma` is one number a sample,
`(batch,)`, and the samples have any shape `(batch, ...)`.
"""

import torch


def interpolate(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noisy sample `(1 - sigma) * clean + sigma * noise`."""
    sigma = like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity `noise - clean`, the same at every sigma."""
    return noise - clean


def shifted_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    r"""The schedule of `num_steps` steps, float64, from 1 downwards without the final 0.

    u_i = 1 - i / N,  sigma_i = s * u_i / (1 + (s - 1) * u_i).
    """
    return shift_sigma(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, shift)


def shift_sigma(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels `u` in [0, 1], moved towards noise: `shift * u / (1 + (shift - 1) * u)`."""
    return shift * u / (1 + (shift - 1) * u)


def like(sigma: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`sigma` in the dtype and on the device of `sample`, shaped to be broadcast over it."""
    return sigma.to(sample).view(-1, *(1,) * (sample.ndim - 1))
