"""`ErrorRecycler`: injection, objective and bank in the order a training step needs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.utils import gather

from ..checks import check_probability
from .bank import ErrorBank, StoredError
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
    Samples of several shapes come in batches of one shape, and every shape has a bank: no error of one meets another.

    Args:
        bank (`ErrorBank` or `Sequence[ErrorBank]`):
            The replay memory, or one for every shape of samples. None, `[]`, where nothing is injected but errors that
            are handed to `inject`: then nothing is banked.
        injection (`InjectionConfig`): How samples are corrupted.
        config (`RecyclerConfig`): When errors are banked.
        seed (`int`): Of its generator. Give every process another.
    """

    def __init__(
        self, bank: ErrorBank | Sequence[ErrorBank], injection: InjectionConfig, config: RecyclerConfig, seed: int
    ):
        self.banks = {one.error_shape: one for one in ([bank] if isinstance(bank, ErrorBank) else bank)}
        self.injection = injection
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0

    @property
    def bank(self) -> ErrorBank:
        """The bank, where there is only one."""
        (bank,) = self.banks.values()
        return bank

    def bank_of(self, samples: torch.Tensor) -> ErrorBank:
        """The bank for a batch `(batch, *error_shape)`. Raises a `ValueError` if there is none of that shape."""
        shape = tuple(samples.shape[1:])
        if shape not in self.banks:
            there_are = f"only for {', '.join(map(str, self.banks))}" if self.banks else "nor for any others"
            raise ValueError(f"There is no error bank for samples {shape}, {there_are}.")
        return self.banks[shape]

    def num_errors(self) -> int:
        """How many errors this process keeps."""
        return sum(int(bank.counts.sum()) for bank in self.banks.values())

    def inject(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        condition: torch.Tensor,
        sigmas: torch.Tensor,
        own: torch.Tensor | None = None,
    ) -> Injected:
        """Corrupt a batch.

        Args:
            latents, noise (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): x_0 and eps.
            condition (`torch.Tensor` of shape `(batch, z_dim, n, h, w)`):
                The condition latents y, or the held latents of TI2V-5B; without the mask.
            sigmas (`torch.Tensor` of shape `(batch,)`): Noise levels.
            own (`torch.Tensor` of the shape of `latents`, *optional*):
                Errors of the latents, sample by sample, in place of the bank's: see [`self_error`].
        """
        bank = self.bank_of(latents) if self.banks or self.injection.draws(own is None) else None
        if bank is not None:
            bank.synchronize()
        switches = draw_switches(self.injection, sigmas, self.generator)
        if bank is None:
            errors: list[StoredError | None] = [None] * (3 * len(latents))
        else:
            errors = self._drawn(bank, sigmas, switches._replace(vid=switches.vid & (own is None)))
        factors = draw_factors(self.injection, len(errors), self.generator)
        latents, noise, condition = latents.clone(), noise.clone(), condition.clone()
        for index, error in enumerate(errors):
            memory, sample = divmod(index, len(latents))
            if memory == 0 and own is not None and switches.vid[sample]:
                latents[sample] += own[sample] * factors[index]
            if error is None:
                continue
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

    def _drawn(self, bank: ErrorBank, sigmas: torch.Tensor, switches: Switches) -> list[StoredError | None]:
        """Errors for the latents of all samples, their noise, and their conditions, where `switches` ask for one."""
        grids = bank.nearest_grid(sigmas)
        img_grids = draw_img_grids(self.injection, bank.grid_sigmas, bank.filled(), len(sigmas), self.generator)
        wanted = [
            torch.where(switch, grid, -1)
            for switch, grid in ((switches.vid, grids), (switches.noi, grids), (switches.img, img_grids))
        ]
        return bank.draw(torch.cat(wanted), self.generator)

    @torch.no_grad()
    def recycle(self, residuals: torch.Tensor, sigmas: torch.Tensor, switches: Switches) -> None:
        """Bank the residuals `(batch, z_dim, latent_frames, h, w)` of the predictions at `sigmas`."""
        if not self.banks:
            return
        bank = self.bank_of(residuals)
        draws = torch.rand(len(residuals), generator=self.generator, dtype=torch.float64)
        keep = ~switches.clean | (draws < self.config.clean_buffer_update_prob)
        if self.step < self.config.buffer_warmup_iter and not bank.shared:
            residuals, sigmas = gather(residuals.detach().contiguous()), gather(sigmas.contiguous())
            keep = gather(keep.to(residuals.device)).cpu()
        bank.add(residuals.detach(), sigmas, keep, self.generator)
        self.step += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Generator and step, as tensors; banks are saved on their own, by `save_bank`."""
        return {"generator": self.generator.get_state(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])
