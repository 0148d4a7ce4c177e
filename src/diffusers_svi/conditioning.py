"""How a clip is conditioned on the one before: the *schemes*, used by inference and training alike.

A scheme turns what is known when a clip begins, [`Carried`], into the condition latents of the transformer, and says
which frames are told twice where clips meet.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .checks import check_choice, check_count
from .wan import TEMPORAL_FACTOR, encode_video, num_latent_frames


@dataclass(frozen=True)
class Carried:
    """What is known when a clip begins.

    Args:
        image (`torch.Tensor` of shape `(batch, 3, height, width)`):
            The film's own start image or reference, in [-1, 1].
        frames (`torch.Tensor` of shape `(batch, 3, k, height, width)`, *optional*):
            The last frames of the clip before, oldest first, in [-1, 1]. `None` for the first clip.
        latents (`torch.Tensor` of shape `(batch, z_dim, m, latent_height, latent_width)`, *optional*):
            Its last latent frames as the sampler left them, normalised. `None` for the first clip.
    """

    image: torch.Tensor
    frames: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class Scheme(ABC):
    """Base of the schemes."""

    # Which frames of the overlap are dropped: "tail" drops the end of every clip but the last, which the next clip
    # tells again; "head" drops the beginning of every clip but the first.
    trims: ClassVar[Literal["tail", "head"]]
    # Whether the scheme fits models that concatenate the condition on channels, and models with `expand_timesteps`.
    concatenates: ClassVar[bool] = False
    holds: ClassVar[bool] = False

    @property
    def carried_frames(self) -> int:
        """Frames of the clip before that are encoded again."""
        return 0

    @property
    def carried_latents(self) -> int:
        """Latent frames of the clip before that are taken over as they are."""
        return 0

    @property
    @abstractmethod
    def overlap(self) -> int:
        """Frames shared by two consecutive clips."""

    def condition(
        self, vae: AutoencoderKLWan, carried: Carried, num_frames: int, expand_timesteps: bool
    ) -> torch.Tensor:
        """The condition of a clip, normalised latents.

        Args:
            vae (`AutoencoderKLWan`): The model's.
            carried (`Carried`): What is known when the clip begins.
            num_frames (`int`): Frames of the clip, 1 + 4n.
            expand_timesteps (`bool`): Whether the model holds latents in place of the clip's first (TI2V-5B).

        Returns:
            `(batch, z_dim, latent_frames, latent_height, latent_width)`; with `expand_timesteps` only the latent
            frames that are held.
        """
        return self._held(vae, carried) if expand_timesteps else self._filled(vae, carried, num_frames)

    def _filled(self, vae: AutoencoderKLWan, carried: Carried, num_frames: int) -> torch.Tensor:
        """The condition latents of all frames, for models that concatenate them."""
        raise NotImplementedError

    def _held(self, vae: AutoencoderKLWan, carried: Carried) -> torch.Tensor:
        """The latents for the first places of the clip, for models that hold them."""
        raise NotImplementedError

    @abstractmethod
    def with_frames(self, condition_frames: int) -> "Scheme":
        """The same scheme carrying `condition_frames` frames from clip to clip."""

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

    def to_dict(self) -> dict[str, Any]:
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

    trims: ClassVar[Literal["tail", "head"]] = "tail"
    concatenates = True
    holds = True

    def __post_init__(self) -> None:
        check_count("num_frames", self.num_frames, 1)
        check_choice("padding", self.padding, ("zeros", "reference"))

    @property
    def carried_frames(self) -> int:
        return self.num_frames

    @property
    def overlap(self) -> int:
        return self.num_frames

    def _filled(self, vae: AutoencoderKLWan, carried: Carried, num_frames: int) -> torch.Tensor:
        motion = self._motion(carried)
        rest = num_frames - motion.shape[2]
        if self.padding == "reference":
            padding = carried.image.unsqueeze(2).expand(-1, -1, rest, -1, -1)
        else:
            padding = motion.new_zeros(*motion.shape[:2], rest, *motion.shape[3:])
        return encode_video(vae, torch.cat([motion, padding], dim=2))

    def _held(self, vae: AutoencoderKLWan, carried: Carried) -> torch.Tensor:
        return encode_video(vae, self._motion(carried))

    def _motion(self, carried: Carried) -> torch.Tensor:
        return carried.image.unsqueeze(2) if carried.frames is None else carried.frames[:, :, -self.num_frames :]

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

    trims: ClassVar[Literal["tail", "head"]] = "head"

    def __post_init__(self) -> None:
        check_count("num_latents", self.num_latents, 0)

    @property
    def carried_latents(self) -> int:
        return self.num_latents

    @property
    def overlap(self) -> int:
        return 1 + TEMPORAL_FACTOR * self.num_latents

    def _front(self, vae: AutoencoderKLWan, carried: Carried) -> torch.Tensor:
        anchor = encode_video(vae, carried.image.unsqueeze(2))
        if carried.latents is None or self.num_latents == 0:
            return anchor
        return torch.cat([anchor, carried.latents[:, :, -self.num_latents :].to(anchor)], dim=2)

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

    def _filled(self, vae: AutoencoderKLWan, carried: Carried, num_frames: int) -> torch.Tensor:
        front = self._front(vae, carried)
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

    def _held(self, vae: AutoencoderKLWan, carried: Carried) -> torch.Tensor:
        return self._front(vae, carried)


def scheme_from_dict(values: dict[str, Any]) -> Scheme:
    """The scheme that `Scheme.to_dict` described. Raises a `ValueError` when there is no such scheme."""
    schemes = {scheme.__name__: scheme for scheme in (PixelMotion, LatentMotion, HeldLatents)}
    try:
        fields = dict(values)
        return schemes[fields.pop("scheme")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"No scheme of {sorted(schemes)} is described by {values!r}.") from error
