"""`ErrorRecycler`: injection, objective and bank in the order a training step needs them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.utils import gather

from ..checks import check_probability
from .bank import ErrorBank
from .injection import InjectionConfig, Switches, add_to_condition, draw_factors, draw_img_grids, draw_switches
from .objective import clean_side_error, noise_side_error


@dataclass(frozen=True, kw_only=True)
class RecyclerConfig:
    """When errors are banked.

    Args:
        clean_buffer_update_prob (`float`, defaults to 0.1):
            Share of the clean samples whose errors are banked: too many of them dilute the memory.
        buffer_warmup_iter (`int`, defaults to 50):
            First steps in which every process banks the errors of all. Afterwards each banks its own.

    Raises:
        ValueError: for a value out of its range.
    """

    clean_buffer_update_prob: float = 0.1
    buffer_warmup_iter: int = 50

    def __post_init__(self) -> None:
        check_probability("clean_buffer_update_prob", self.clean_buffer_update_prob)
        if not isinstance(self.buffer_warmup_iter, int) or self.buffer_warmup_iter < 0:
            raise ValueError(f"`buffer_warmup_iter` must be a whole number, got {self.buffer_warmup_iter!r}.")


class Injected(NamedTuple):
    """A batch with errors in it: x~_0, eps~ and y~, each of the shape it came in, and the switches."""

    latents: torch.Tensor
    noise: torch.Tensor
    condition: torch.Tensor
    switches: Switches


class ErrorRecycler:
    r"""Injects errors of the bank into samples, and banks the errors the model then makes.

        injected = recycler.inject(latents, noise, condition, sigmas)
        noisy = interpolate(injected.latents, injected.noise, sigmas)
        prediction = model(noisy, injected.condition, ...)
        target = recycled_velocity(latents, injected.noise)
        loss = erft_loss(prediction, target, weights).mean()
        recycler.recycle(prediction - target, sigmas, injected.switches)

    Every sample has its own timestep, grid, and switches. All randomness comes from one generator of its own.

    Args:
        bank (`ErrorBank`): The replay memory.
        injection (`InjectionConfig`): How samples are corrupted.
        config (`RecyclerConfig`): When errors are banked.
        seed (`int`): Of its generator. Give every process another.
    """

    def __init__(self, bank: ErrorBank, injection: InjectionConfig, config: RecyclerConfig, seed: int):
        self.bank = bank
        self.injection = injection
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0

    def inject(
        self, latents: torch.Tensor, noise: torch.Tensor, condition: torch.Tensor, sigmas: torch.Tensor
    ) -> Injected:
        """Corrupt a batch.

        Args:
            latents, noise (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): x_0 and eps.
            condition (`torch.Tensor` of shape `(batch, z_dim, n, h, w)`):
                The condition latents y, or the held latents of TI2V-5B; without the mask.
            sigmas (`torch.Tensor` of shape `(batch,)`): Noise levels.
        """
        self.bank.synchronize()
        switches = draw_switches(self.injection, len(latents), self.generator)
        grids = self.bank.nearest_grid(sigmas)
        img_grids = draw_img_grids(
            self.injection, self.bank.grid_sigmas, self.bank.filled(), len(latents), self.generator
        )
        wanted = [
            torch.where(switch, grid, -1)
            for switch, grid in ((switches.vid, grids), (switches.noi, grids), (switches.img, img_grids))
        ]
        errors = self.bank.draw(torch.cat(wanted), self.generator)
        factors = draw_factors(self.injection, len(errors), self.generator)
        latents, noise, condition = latents.clone(), noise.clone(), condition.clone()
        for index, error in enumerate(errors):
            if error is None:
                continue
            memory, sample = divmod(index, len(latents))
            residual = error.residual.unsqueeze(0).to(latents.device) * factors[index]
            sigma = torch.tensor([error.sigma])
            if memory == 0:
                latents[sample] += clean_side_error(residual, sigma)[0]
            elif memory == 1:
                noise[sample] += noise_side_error(residual, sigma)[0]
            else:
                condition[sample] = add_to_condition(
                    condition[sample], clean_side_error(residual, sigma)[0], self.injection, self.generator
                )
        return Injected(latents, noise, condition, switches)

    @torch.no_grad()
    def recycle(self, residuals: torch.Tensor, sigmas: torch.Tensor, switches: Switches) -> None:
        """Bank the residuals `(batch, z_dim, latent_frames, h, w)` of the predictions at `sigmas`."""
        draws = torch.rand(len(residuals), generator=self.generator, dtype=torch.float64)
        keep = ~switches.clean | (draws < self.config.clean_buffer_update_prob)
        if self.step < self.config.buffer_warmup_iter and not self.bank.shared:
            residuals, sigmas = gather(residuals.detach().contiguous()), gather(sigmas.contiguous())
            keep = gather(keep.to(residuals.device)).cpu()
        self.bank.add(residuals.detach(), sigmas, keep, self.generator)
        self.step += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Generator and step, as tensors; the bank is saved on its own, by `save_bank`."""
        return {"generator": self.generator.get_state(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])
