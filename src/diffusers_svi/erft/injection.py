"""What of a sample is corrupted with which errors: the switches, and where E_img comes from and goes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..checks import check_count, check_probability


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """How samples are corrupted. The defaults are those of SVI-Shot.

    Args:
        p_vid (`float`, defaults to 0.9): Share of the corrupted samples with an error in the clean latents.
        vid_sigmas (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Range of the noise levels at which samples take an error in the clean latents.
        p_noi (`float`, defaults to 0.01): Share with an error in the noise.
        p_img (`float`, defaults to 0.9): Share with an error in the condition.
        p_clean (`float`, defaults to 0.2): Share of all samples that are left clean.
        n_img (`int`, defaults to 3): Latent frames of the condition that take an error.
        first_img (`int`, defaults to 0):
            The first of them. With an anchor latent in front, 1 leaves it clean, as it is at inference.
        first_error (`int`, defaults to 0):
            The first latent frame of an error that may go there. Where the first latent frames are held clean, they
            have no errors.
        img_sigmas (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Range of the grids that the errors of conditions come from. Those of high sigma are large.
        img_scale (`tuple[float, float]`, defaults to `(1.0, 1.0)`): Range of a random factor on them.
        modulation (`float`, defaults to 0.0):
            Every error, of latents, noise or condition, is scaled by a random factor in [1 - m, 1 + m] of its own.

    Raises:
        ValueError: for a value out of its range.
    """

    p_vid: float = 0.9
    vid_sigmas: tuple[float, float] = (0.0, 1.0)
    p_noi: float = 0.01
    p_img: float = 0.9
    p_clean: float = 0.2
    n_img: int = 3
    first_img: int = 0
    first_error: int = 0
    img_sigmas: tuple[float, float] = (0.0, 1.0)
    img_scale: tuple[float, float] = (1.0, 1.0)
    modulation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p_vid", "p_noi", "p_img", "p_clean"):
            check_probability(name, getattr(self, name))
        for name, least in (("n_img", 1), ("first_img", 0), ("first_error", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("vid_sigmas", "img_sigmas"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(f"`{name}` must be a range within [0, 1], lower end first, got {(low, high)}.")
        low, high = self.img_scale
        if not 0 <= low <= high:
            raise ValueError(f"`img_scale` must be a range of factors, lower end first, got {self.img_scale}.")
        if not 0 <= self.modulation <= 1:
            raise ValueError(
                f"`modulation` must be in [0, 1], or the factors 1 - m to 1 + m turn errors round, got "
                f"{self.modulation}."
            )

    def draws(self, banked: bool) -> bool:
        """Whether errors of a bank are ever injected: those of the latents are from there if they are `banked`."""
        return self.p_clean < 1 and max(self.p_vid if banked else 0, self.p_noi, self.p_img) > 0


class Switches(NamedTuple):
    """What is done to every sample of a batch: four masks `(batch,)`. Where `clean`, the others are off."""

    clean: torch.Tensor
    vid: torch.Tensor
    noi: torch.Tensor
    img: torch.Tensor


def draw_switches(config: InjectionConfig, sigmas: torch.Tensor, generator: torch.Generator) -> Switches:
    """For samples at `sigmas`, `(batch,)`: `clean` with `p_clean`; else three switches, independent of each other."""
    draws = torch.rand(4, len(sigmas), generator=generator, dtype=torch.float64)
    clean = draws[0] < config.p_clean
    vid, noi, img = (draws[1:] < torch.tensor([[config.p_vid], [config.p_noi], [config.p_img]])) & ~clean
    low, high = config.vid_sigmas
    sigmas = sigmas.cpu()
    return Switches(clean, vid & (low <= sigmas) & (sigmas <= high), noi, img)


def draw_img_grids(
    config: InjectionConfig,
    grid_sigmas: torch.Tensor,
    filled: torch.Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """A grid for every sample, `(batch,)` int64, uniform over those in `img_sigmas` that hold errors; -1 if none does.

    Empty grids are passed over, so that `p_img` means the same for an expert of Wan 2.2 A14B, whose timesteps never
    reach the others, as for a model that fills them all.
    """
    low, high = config.img_sigmas
    shares = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    grids = ((grid_sigmas >= low) & (grid_sigmas <= high) & filled).nonzero().flatten()
    if len(grids) == 0:
        return torch.full((batch_size,), -1)
    return grids[(shares * len(grids)).long()]


def draw_factors(config: InjectionConfig, count: int, generator: torch.Generator) -> list[float]:
    """A factor for each of `count` errors, uniform in [1 - modulation, 1 + modulation]; nothing is drawn for 0."""
    if not config.modulation:
        return [1.0] * count
    # source: `error_modulate_factor` of the authors' training script
    shares = torch.rand(count, generator=generator, dtype=torch.float64)
    return (1 + config.modulation * (2 * shares - 1)).tolist()


def add_to_condition(
    condition: torch.Tensor, error: torch.Tensor, config: InjectionConfig, generator: torch.Generator
) -> torch.Tensor:
    """One condition `(z_dim, latent_frames, h, w)` with a run of latent frames of `error` on its `n_img` frames.

    The run begins anywhere in the error, from `first_error` on. A shorter condition takes as many frames as it has.
    """
    start, scale = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    available = error.shape[1] - config.first_error
    count = min(config.n_img, condition.shape[1] - config.first_img, available)
    if count < 1:
        return condition
    first = config.first_error + int(start * (available - count + 1))
    low, high = config.img_scale
    corrupted = condition.clone()
    corrupted[:, config.first_img : config.first_img + count] += (low + (high - low) * scale) * error[
        :, first : first + count
    ].to(condition)
    return corrupted
