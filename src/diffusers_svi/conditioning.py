"""How a clip is conditioned on the one before: the *schemes*, used by inference and training alike.

A scheme turns what is known when a clip begins, [`Carried`], into the condition latents of the transformer, and says
which frames are told twice where clips meet.
"""

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, field, fields, replace
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
        last (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*):
            What the clip is to end with, in [-1, 1].
        anchor (`torch.Tensor` of shape `(batch, z_dim, 1, latent_height, latent_width)`, *optional*):
            The latent of `image`, if it has been encoded before.
    """

    image: torch.Tensor
    frames: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    last: torch.Tensor | None = None
    anchor: torch.Tensor | None = None


def _later(default: Any) -> Any:
    """A field that schemes have not always had: where it has its default, nothing tells of it."""
    return field(default=default, kw_only=True, metadata={"later": True})


def _told(scheme: "Scheme", of: Field) -> bool:
    return not of.metadata.get("later") or getattr(scheme, of.name) != of.default


@dataclass(frozen=True, repr=False)
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
    def has_anchor(self) -> bool:
        """Whether every clip, not only the first, is shown the film's own image."""
        return True

    @property
    @abstractmethod
    def overlap(self) -> int:
        """Frames shared by two consecutive clips."""

    def known_frames(self, is_first: bool) -> int:
        """Frames that the mask beside the condition latents marks, in the first clip of a film or in another."""
        return 1

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
            frames that are held: the first of the clip and, with `carried.last`, its last one.
        """
        if not expand_timesteps:
            return self._filled(vae, carried, num_frames)
        held = self._held(vae, carried)
        if carried.last is None:
            return held
        # What is held in place of the last latent frame is that of a picture that stands still.
        still = carried.last.unsqueeze(2).expand(-1, -1, 1 + TEMPORAL_FACTOR, -1, -1)
        return torch.cat([held, encode_video(vae, still)[:, :, -1:]], dim=2)

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
        return {"scheme": type(self).__name__, **self._values()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _values(self) -> dict[str, Any]:
        return {of.name: getattr(self, of.name) for of in fields(self) if _told(self, of)}


@dataclass(frozen=True, repr=False)
class PixelMotion(Scheme):
    r"""SVI 1.0 and 2.0: the last frames of the clip before are encoded again, followed by a padding.

    `y = VAE([last num_frames frames, padding])`. On TI2V-5B the frames are encoded alone and held. All clips but the
    last lose their last `num_frames` frames, which the next clip tells again.

    Args:
        num_frames (`int`, defaults to 1): Frames K carried from clip to clip, at least 1. On TI2V-5B, 1 + 4n.
        padding (`str`, defaults to `"zeros"`):
            What fills the rest of the clip before it is encoded: `"zeros"`, grey pixels (Film, Tom&Jerry, and plain
            Wan), or `"reference"`, the start image repeated (Shot and SVI 2.0).
        num_references (`int`, *optional*):
            With the padding `"reference"`, how many frames of it repeat the start image; grey pixels follow. All of
            them if not given.
        repeat_first (`bool`, defaults to `False`):
            Whether a film's first clip has the start image K times in front of the padding, instead of once.
        mask_frames (`str`, defaults to `"first"`):
            What the mask beside the condition latents marks: one frame, `"first"`, as the published LoRAs were
            trained, or `"all"` condition frames. Models with `expand_timesteps` have no such mask.

    The last three are options of the authors' scripts (`ref_pad_num`, `repeat_first_frame`, `ref_pad_cfg`) that no
    published LoRA was trained with.
    """

    num_frames: int = 1
    padding: str = "zeros"
    num_references: int | None = _later(None)
    repeat_first: bool = _later(False)
    mask_frames: str = _later("first")

    trims: ClassVar[Literal["tail", "head"]] = "tail"
    concatenates = True
    holds = True

    def __post_init__(self) -> None:
        check_count("num_frames", self.num_frames, 1)
        check_choice("padding", self.padding, ("zeros", "reference"))
        check_choice("mask_frames", self.mask_frames, ("first", "all"))
        if not isinstance(self.repeat_first, bool):
            raise ValueError(f"`repeat_first` must be `True` or `False`, got {self.repeat_first!r}.")
        if self.num_references is not None:
            check_count("num_references", self.num_references, 1)
            if self.padding != "reference":
                raise ValueError(
                    f"`num_references`={self.num_references} is for `padding`='reference', got {self.padding!r}."
                )

    @property
    def carried_frames(self) -> int:
        return self.num_frames

    @property
    def has_anchor(self) -> bool:
        return self.padding == "reference"

    @property
    def overlap(self) -> int:
        return self.num_frames

    def known_frames(self, is_first: bool) -> int:
        return self.num_frames if self.mask_frames == "all" and (self.repeat_first or not is_first) else 1

    def _filled(self, vae: AutoencoderKLWan, carried: Carried, num_frames: int) -> torch.Tensor:
        motion = self._motion(carried)
        rest = num_frames - motion.shape[2]
        count = 0
        if self.padding == "reference":
            count = rest if self.num_references is None else min(self.num_references, rest)
        references = carried.image.unsqueeze(2).expand(-1, -1, count, -1, -1)
        zeros = motion.new_zeros(*motion.shape[:2], rest - count, *motion.shape[3:])
        video = torch.cat([motion, references, zeros], dim=2)
        return encode_video(vae, video if carried.last is None else _ending(video, carried.last))

    def _held(self, vae: AutoencoderKLWan, carried: Carried) -> torch.Tensor:
        return encode_video(vae, self._motion(carried))

    def _motion(self, carried: Carried) -> torch.Tensor:
        motion = carried.image.unsqueeze(2) if carried.frames is None else carried.frames[:, :, -self.num_frames :]
        missing = self.num_frames - motion.shape[2]
        if self.repeat_first and missing > 0:
            motion = torch.cat([motion[:, :, :1].expand(-1, -1, missing, -1, -1), motion], dim=2)
        return motion

    def with_frames(self, condition_frames: int) -> "PixelMotion":
        check_count("condition_frames", condition_frames, 1)
        return replace(self, num_frames=condition_frames)

    def check(self, num_frames: int, expand_timesteps: bool) -> None:
        super().check(num_frames, expand_timesteps)
        if expand_timesteps and self.mask_frames == "all":
            raise ValueError(
                f"`conditioning`={self} on a model with `expand_timesteps=True`, which has no mask: leave out "
                "`mask_frames`."
            )
        if expand_timesteps and self.num_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(
                f"`conditioning`={self} on a model with `expand_timesteps=True` holds whole latent frames: "
                f"`num_frames` must be 1, 5, 9, ..., got {self.num_frames}."
            )


@dataclass(frozen=True, repr=False)
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
        anchor = encode_video(vae, carried.image.unsqueeze(2)) if carried.anchor is None else carried.anchor
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


@dataclass(frozen=True, repr=False)
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
        filled = F.pad(front, (0, 0, 0, 0, 0, num_latent_frames(num_frames) - front.shape[2]))
        if carried.last is None:
            return filled
        # source: the parent's condition for `last_image`, of which this is the last latent frame
        video = F.pad(carried.image.unsqueeze(2), (0, 0, 0, 0, 0, num_frames - 1))
        return _ending(filled, encode_video(vae, _ending(video, carried.last))[:, :, -1])


@dataclass(frozen=True, repr=False)
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


def _ending(video: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`video` with `last` in place of its last frame."""
    return torch.cat([video[:, :, :-1], last.unsqueeze(2)], dim=2)


def scheme_from_dict(values: dict[str, Any]) -> Scheme:
    """The scheme that `Scheme.to_dict` described. Raises a `ValueError` when there is no such scheme."""
    schemes = {scheme.__name__: scheme for scheme in (PixelMotion, LatentMotion, HeldLatents)}
    try:
        fields = dict(values)
        return schemes[fields.pop("scheme")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"No scheme of {sorted(schemes)} is described by {values!r}.") from error
