"""The Euler schedule SVI was trained and published with, as a diffusers scheduler."""

from typing import Any

import numpy as np
import torch

# `SchedulerMixin` is here for diffusers: it loads the scheduler of a saved pipeline if that is among the scheduler's
# bases, and looks for it in the module that the scheduler comes from.
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401


class SVIEulerScheduler(FlowMatchEulerDiscreteScheduler):
    r"""`FlowMatchEulerDiscreteScheduler` on the grid of the authors' code.

    For N steps and shift s, with u_i = 1 - i / N for i = 0 ... N - 1:

        sigma_i = s * u_i / (1 + (s - 1) * u_i),  and 0 after the last.

    The stock scheduler lays its grid between end points that are shifted already and shifts it again: with s = 5 and
    N = 50 it ends at 0.0244 where this one ends at 0.0926.

    SVI was published with a shift of 5, while the configs of Wan's models say 3, which `from_config` takes over unless
    it is told otherwise:

        pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift=5.0)
    """

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "SVIEulerScheduler | tuple[SVIEulerScheduler, dict[str, Any]]":
        """As everywhere in diffusers; a `flow_shift` (UniPC, DPM++) is taken over as the `shift` it means.

        An argument `shift` or `flow_shift` comes before what `config` says.
        """
        if config is not None and "flow_shift" in config:
            config = {"num_train_timesteps": config["num_train_timesteps"], "shift": config["flow_shift"]}
        if "flow_shift" in kwargs:
            kwargs["shift"] = kwargs.pop("flow_shift")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the timesteps of a run. Without `sigmas` or `timesteps`, those of the equation above."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            # source: the authors' flow matching scheduler, linspace(1, 0, N + 1) without its end
            sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
