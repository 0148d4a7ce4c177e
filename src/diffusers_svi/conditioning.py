"""How a clip is conditioned on the one before: the *schemes*, used by inference and training alike.

A scheme turns what is known when a clip begins into the condition latents of the transformer, and says which frames
are told twice where clips meet. What is known is

- `image`, the chain's own start image or reference, `(batch, 3, height, width)` in [-1, 1];
- `frames`, the last frames of the clip before, oldest first, `(batch, 3, k, height, width)` in [-1, 1];
- `latents`, the last latent frames of the clip before as the sampler left them, normalised,
  `(batch, z_dim, m, latent_height, latent_width)`.

The last two are `None` for the first clip, which is conditioned on the image alone.

Two kinds of Wan model read a condition. Those with concatenated channels (2.1, 2.2 A14B) take `condition` and
`first_frame_mask` beside the noisy latents. TI2V-5B (`expand_timesteps`) takes `held`: clean latents that stand in for
the first latent frames at timestep 0.
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .checks import check_count
from .latents import encode_video


# Frames of a latent frame after the first. Every Wan VAE encodes in groups of four frames.
TEMPORAL_FACTOR = 4


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of `num_frames = 1 + 4n` frames."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


def first_frame_mask(condition: torch.Tensor) -> torch.Tensor:
    """The mask beside `condition`: `(batch, 4, latent_frames, h, w)`, 1 on the first latent frame and 0 elsewhere.

    It marks one frame whatever the number of condition frames: every member of the SVI family is trained this way.
    """
    mask = condition.new_zeros(condition.shape[0], TEMPORAL_FACTOR, *condition.shape[2:])
    mask[:, :, 0] = 1
    return mask


def transformer_inputs(
    noisy: torch.Tensor,
    condition: torch.Tensor,
    sigmas: torch.Tensor,
    patch_size: tuple[int, int, int],
    expand_timesteps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What a Wan transformer takes: its hidden states and its timesteps.

    At inference the parent pipeline puts these together; training does it here.

    Args:
        noisy (`torch.Tensor` of shape `(batch, z_dim, latent_frames, h, w)`): Noisy latents.
        condition (`torch.Tensor` of shape `(batch, z_dim, n, h, w)`):
            `Scheme.condition`, with n = latent_frames; with `expand_timesteps`, `Scheme.held`.
        sigmas (`torch.Tensor` of shape `(batch,)`): Noise levels.
        patch_size (`tuple[int, int, int]`): Of the transformer.
        expand_timesteps (`bool`): Whether the model holds the condition in place of the first latent frames.

    Returns:
        `(batch, z_dim + 4 + z_dim, latent_frames, h, w)` and `(batch,)`; with `expand_timesteps`,
        `(batch, z_dim, latent_frames, h, w)` and `(batch, tokens)`, 0 on the held ones.
    """
    # source: the denoising loop of WanImageToVideoPipeline.__call__
    timesteps = 1000 * sigmas
    if not expand_timesteps:
        return torch.cat([noisy, first_frame_mask(condition), condition], dim=1), timesteps
    held = condition.shape[2]
    tokens = timesteps.view(-1, 1, 1).repeat(
        1, noisy.shape[2], noisy[0, 0, 0, :: patch_size[1], :: patch_size[2]].numel()
    )
    tokens[:, :held] = 0
    return torch.cat([condition, noisy[:, :, held:]], dim=2), tokens.flatten(1)


class Scheme:
    """Base of the schemes; see the module's docstring for the meaning of `image`, `frames` and `latents`."""

    # Which frames of the overlap are dropped: "tail" drops the end of every clip but the last, which the next clip
    # tells again; "head" drops the beginning of every clip but the first.
    trims: ClassVar[str]
    # Whether the scheme fits models that concatenate the condition on channels, and models with `expand_timesteps`.
    concatenates: ClassVar[bool] = False
    holds: ClassVar[bool] = False

    # What it takes over from the clip before: so many frames, encoded again, or so many latent frames as they are.
    carried_frames: ClassVar[int] = 0
    carried_latents: ClassVar[int] = 0

    @property
    def overlap(self) -> int:
        """Frames shared by two consecutive clips."""
        raise NotImplementedError

    def condition(self, vae, image, frames=None, latents=None, *, num_frames: int) -> torch.Tensor:
        """Normalised condition latents of a clip, `(batch, z_dim, latent_frames, latent_height, latent_width)`."""
        raise NotImplementedError

    def held(self, vae, image, frames=None, latents=None) -> torch.Tensor:
        """Normalised latents for the first places of a clip, `(batch, z_dim, n, latent_height, latent_width)`."""
        raise NotImplementedError

    def with_frames(self, condition_frames: int) -> "Scheme":
        """The same scheme carrying `condition_frames` frames from clip to clip."""
        raise NotImplementedError

    def check(self, num_frames: int, expand_timesteps: bool) -> None:
        """Raise a `ValueError` unless clips of `num_frames` frames can be chained this way by such a model."""
        if expand_timesteps and not self.holds:
            raise ValueError(
                f"`conditioning`={self} needs a model that takes its condition on channels (Wan 2.1 I2V, Wan 2.2 I2V "
                "A14B), but this pipeline has `expand_timesteps=True` (Wan 2.2 TI2V-5B). Use `HeldLatents` or "
                "`PixelMotion`."
            )
        if not expand_timesteps and not self.concatenates:
            raise ValueError(
                f"`conditioning`={self} needs a model with `expand_timesteps=True` (Wan 2.2 TI2V-5B), but this "
                "pipeline takes its condition on channels. Use `LatentMotion` or `PixelMotion`."
            )
        if self.overlap >= num_frames:
            raise ValueError(
                f"`conditioning`={self} re-tells {self.overlap} frames, which leaves nothing new in a clip of "
                f"`num_frames`={num_frames}. Use fewer condition frames or longer clips."
            )

    def film_length(self, num_clips: int, num_frames: int) -> int:
        """Frames of a film of `num_clips` clips of `num_frames` frames: overlaps count once."""
        return num_clips * num_frames - (num_clips - 1) * self.overlap

    def to_dict(self) -> dict:
        """As plain values, for the metadata of a file. `scheme_from_dict` is its inverse."""
        return {"scheme": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class PixelMotion(Scheme):
    r"""SVI 1.0 and 2.0: the last frames of the clip before are encoded again, followed by a padding.

    `y = VAE([last num_frames frames, padding])`. On TI2V-5B the frames are encoded alone and held. All clips but the
    last lose their last `num_frames` frames, which the next clip tells again.

    Args:
        num_frames (`int`, defaults to 1): Frames K carried from clip to clip, at least 1. On TI2V-5B, 1 + 4n.
        padding (`str`, defaults to `"zeros"`):
            What fills the rest of the clip before it is encoded: `"zeros"`, grey pixels (Film, Tom&Jerry, and plain
            Wan), or `"reference"`, the start image repeated (Shot and SVI 2.0).
    """

    num_frames: int = 1
    padding: str = "zeros"

    trims = "tail"
    concatenates = True
    holds = True

    def __post_init__(self):
        check_count("num_frames", self.num_frames, 1)
        if self.padding not in ("zeros", "reference"):
            raise ValueError(f"`padding` must be 'zeros' or 'reference', got {self.padding!r}.")

    @property
    def carried_frames(self) -> int:
        return self.num_frames

    @property
    def overlap(self) -> int:
        return self.num_frames

    def condition(self, vae, image, frames=None, latents=None, *, num_frames: int) -> torch.Tensor:
        motion = self._motion(image, frames)
        rest = num_frames - motion.shape[2]
        if self.padding == "reference":
            padding = image.unsqueeze(2).expand(-1, -1, rest, -1, -1)
        else:
            padding = motion.new_zeros(*motion.shape[:2], rest, *motion.shape[3:])
        return encode_video(vae, torch.cat([motion, padding], dim=2))

    def held(self, vae, image, frames=None, latents=None) -> torch.Tensor:
        return encode_video(vae, self._motion(image, frames))

    def _motion(self, image: torch.Tensor, frames: torch.Tensor | None) -> torch.Tensor:
        return image.unsqueeze(2) if frames is None else frames[:, :, -self.num_frames :]

    def with_frames(self, condition_frames: int) -> "PixelMotion":
        check_count("condition_frames", condition_frames, 1)
        return replace(self, num_frames=condition_frames)

    def check(self, num_frames: int, expand_timesteps: bool) -> None:
        super().check(num_frames, expand_timesteps)
        if expand_timesteps and self.num_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(
                f"`conditioning`={self} on a model with `expand_timesteps=True` holds whole latent frames: "
                f"`num_frames` must be 1, 5, 9, ..., got {self.num_frames}."
            )


@dataclass(frozen=True)
class _AnchorAndMotion(Scheme):
    num_latents: int = 1

    trims = "head"

    def __post_init__(self):
        check_count("num_latents", self.num_latents, 0)

    @property
    def carried_latents(self) -> int:
        return self.num_latents

    @property
    def overlap(self) -> int:
        return 1 + TEMPORAL_FACTOR * self.num_latents

    def _front(self, vae: AutoencoderKLWan, image: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        anchor = encode_video(vae, image.unsqueeze(2))
        if latents is None or self.num_latents == 0:
            return anchor
        return torch.cat([anchor, latents[:, :, -self.num_latents :].to(anchor)], dim=2)

    def with_frames(self, condition_frames: int) -> "Scheme":
        check_count("condition_frames", condition_frames, 1)
        if condition_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(
                f"`condition_frames` of {type(self).__name__} counts the anchor's frame and {TEMPORAL_FACTOR} frames "
                f"for every motion latent: it must be 1, 5, 9, ..., got {condition_frames}."
            )
        return replace(self, num_latents=condition_frames // TEMPORAL_FACTOR)


@dataclass(frozen=True)
class LatentMotion(_AnchorAndMotion):
    r"""SVI 2.0 Pro: an anchor latent and the last latents of the clip before; no frame is ever encoded twice.

    `y = [VAE(image), last num_latents latents of the clip before, zero-valued latents]` on time. Every clip but the
    first loses its first `1 + 4 * num_latents` frames.

    Args:
        num_latents (`int`, defaults to 1): Motion latents carried from clip to clip; 0 leaves the anchor alone.
    """

    concatenates = True

    def condition(self, vae, image, frames=None, latents=None, *, num_frames: int) -> torch.Tensor:
        front = self._front(vae, image, latents)
        return F.pad(front, (0, 0, 0, 0, 0, num_latent_frames(num_frames) - front.shape[2]))


@dataclass(frozen=True)
class HeldLatents(_AnchorAndMotion):
    r"""TI2V-5B: the anchor latent and the last latents of the clip before are held, clean, at timestep 0.

    They take the first `1 + num_latents` latent frames of the clip and are put back at every step. Every clip but the
    first loses its first `1 + 4 * num_latents` frames.

    Args:
        num_latents (`int`, defaults to 1): Motion latents carried from clip to clip; 0 leaves the anchor alone.
    """

    holds = True

    def held(self, vae, image, frames=None, latents=None) -> torch.Tensor:
        return self._front(vae, image, latents)


def scheme_from_dict(values: dict) -> Scheme:
    """The scheme that `Scheme.to_dict` described. Raises a `ValueError` when there is no such scheme."""
    schemes = {scheme.__name__: scheme for scheme in (PixelMotion, LatentMotion, HeldLatents)}
    try:
        fields = dict(values)
        return schemes[fields.pop("scheme")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"No scheme of {sorted(schemes)} is described by {values!r}.") from error
