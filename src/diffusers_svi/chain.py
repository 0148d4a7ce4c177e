"""What is carried from clip to clip, and how clips become one film."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checks import check_count
from .conditioning import Carried, Scheme, scheme_from_dict
from .files import written_whole
from .pixels import from_uint8, to_uint8
from .source_video import SourceVideo, VideoLike, open_source_video
from .wan import TEMPORAL_FACTOR, encode_video


FORMAT = "diffusers_svi.chain"
# More clips than anyone has made: what a file tells beyond it is damage.
MAX_CLIPS = 10**7


@dataclass(frozen=True)
class ChainState:
    """All that the next clip needs: the state of a chain between two clips.

    A chain taken up from a saved state gives the same clips, bit for bit, as one that was never stopped.

    Args:
        conditioning (`Scheme`): How the clips are chained.
        num_frames (`int`): Frames of every clip.
        image (`torch.Tensor` of shape `(1, 3, height, width)`): The start image in [-1, 1], float32.
        frames (`torch.Tensor` of shape `(1, 3, K, height, width)`, *optional*):
            The last frames of the clip before, uint8. `None` before the first clip and if latents are carried.
        latents (`torch.Tensor` of shape `(1, z_dim, m, latent_height, latent_width)`, *optional*):
            The last latents of the clip before, float32. `None` before the first clip and if frames are carried.
        anchor (`torch.Tensor` of shape `(1, 3, height, width)`, *optional*):
            What has taken the place of `image` since, by a cut or a new anchor; as `image`.
        num_clips (`int`, defaults to 0): Clips made so far.
        start (`int`, defaults to 0): Where the next clip begins in the film: it replaces the frames from this one on.
        continues (`bool`, defaults to `False`): Whether the next clip goes on from what was before, or begins anew.
        generator (`torch.Tensor`, *optional*): State of the `generator` after those clips, if there is one.
        made_with (`dict[str, str]`, *optional*):
            What the last clip was made with, by name: fingerprints of models and LoRAs, and settings.
    """

    conditioning: Scheme
    num_frames: int
    image: torch.Tensor
    frames: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    anchor: torch.Tensor | None = None
    num_clips: int = 0
    start: int = 0
    continues: bool = False
    generator: torch.Tensor | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> torch.Tensor:
        """The image that clips are shown: the start image, or what has taken its place."""
        return self.image if self.anchor is None else self.anchor

    @property
    def told_again(self) -> torch.Tensor:
        """The frames that the next clip tells again, of a scheme that trims tails: `(1, 3, K, height, width)` uint8.

        K is 0 where nothing goes on, and for other schemes.
        """
        if self.frames is None or self.conditioning.trims != "tail":
            return torch.empty(1, 3, 0, *self.image.shape[-2:], dtype=torch.uint8)
        return self.frames

    @property
    def shown(self) -> torch.Tensor:
        """What the next clip begins with, `(1, 3, height, width)` uint8: what CLIP sees, and its first frame tells."""
        # source: the image that CLIP sees is the first, oldest condition frame
        return to_uint8(self.reference) if self.frames is None else self.frames[:, :, 0]

    def carried(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Carried:
        """What is known when the next clip begins."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        frames = None if self.frames is None else from_uint8(self.frames.to(device), dtype)
        return Carried(self.reference.to(device=device, dtype=dtype), frames, moved(self.latents))

    def cut(self, image: torch.Tensor) -> "ChainState":
        """The state in which a new shot begins with `image`, `(1, 3, height, width)` in [-1, 1].

        What the clip before told last, nobody tells again: it stays in the film.
        """
        start = self.start + self.told_again.shape[2]
        return replace(self, anchor=image, frames=None, latents=None, start=start, continues=False)

    def after(
        self,
        latents: torch.Tensor,
        video: torch.Tensor | None = None,
        generator: torch.Tensor | None = None,
        made_with: Mapping[str, str] | None = None,
    ) -> "ChainState":
        """The state after one more clip.

        Args:
            latents (`torch.Tensor` of shape `(1, z_dim, latent_frames, latent_height, latent_width)`):
                The clip as the sampler left it.
            video (`torch.Tensor` of shape `(1, 3, num_frames, height, width)`, *optional*):
                The same decoded, in [-1, 1]; needed where the scheme carries frames.
            generator (`torch.Tensor`, *optional*): State of the generator of the noise.
            made_with (`dict[str, str]`, *optional*): What the clip was made with.
        """
        scheme, last_frames, last_latents = self.conditioning, None, None
        if scheme.carried_frames:
            assert video is not None
            # source: the authors' code hands the condition frames over as images of 8 bits a channel. It cuts decimals
            # off, which makes every hand-over darker by 0.44 levels on average; `to_uint8` takes the nearest.
            last_frames = to_uint8(video[:, :, -scheme.carried_frames :]).cpu()
        if scheme.carried_latents:
            # A copy: a view would keep the latents of the whole clip.
            last = latents[:, :, -scheme.carried_latents :]
            last_latents = last.to(device="cpu", dtype=torch.float32, copy=True)
        # Of a clip that begins anew, a scheme that trims heads leaves the head.
        new = self.num_frames - (scheme.overlap if self.continues or scheme.trims == "tail" else 0)
        return replace(
            self,
            frames=last_frames,
            latents=last_latents,
            num_clips=self.num_clips + 1,
            start=self.start + new,
            continues=True,
            generator=generator,
            made_with=made_with or {},
        )

    def save(self, path: str | os.PathLike, notes: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file. A crash while writing leaves the file that was there before.

        Args:
            path: Where to.
            notes (`dict[str, str]`, *optional*): What else is to stand in its metadata, for [`read_notes`].
        """
        tensors = {name: value.contiguous() for name, value in self._tensors().items() if value is not None}
        metadata = {
            "format": FORMAT,
            "conditioning": json.dumps(self.conditioning.to_dict()),
            "num_frames": str(self.num_frames),
            "num_clips": str(self.num_clips),
            "start": str(self.start),
            "continues": json.dumps(self.continues),
            "made_with": json.dumps(dict(self.made_with)),
        }
        metadata = {**(notes or {}), **metadata}
        with written_whole(path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ChainState":
        """Read what `save` wrote. Raises a `ValueError` if `path` is not such a file, or is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its metadata has no `format` {FORMAT!r}")
                state = cls(
                    conditioning=scheme_from_dict(json.loads(metadata["conditioning"])),
                    num_frames=int(metadata["num_frames"]),
                    num_clips=int(metadata["num_clips"]),
                    start=int(metadata["start"]),
                    continues=json.loads(metadata["continues"]),
                    made_with=json.loads(metadata.get("made_with", "{}")),
                    **{name: file.get_tensor(name) for name in file.keys()},
                )
            state._check()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`path`={str(path)!r} is not a chain state ({error}). Give a file that `ChainState.save` wrote."
            ) from error
        return state

    @classmethod
    def from_video(
        cls,
        video: VideoLike | SourceVideo,
        conditioning: Scheme,
        num_frames: int = 81,
        *,
        vae: AutoencoderKLWan | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int | None = None,
    ) -> "ChainState":
        """The state from which a film goes on from a video: what it ends with is carried on, and shown as reference.

        Where latents are carried, the end is encoded for them, with one latent frame more before it.

        Args:
            video: A file, or frames: `np.ndarray` `(n, height, width, 3)`, `torch.Tensor` `(n, 3, height, width)`,
                both in [0, 1] or uint8, or a list of `PIL.Image.Image`.
            conditioning (`Scheme`): How the film is chained, such as the `lora_conditioning` of a pipeline.
            num_frames (`int`, defaults to 81): Of the clips to come.
            vae (`AutoencoderKLWan`, *optional*): The pipeline's; needed where the scheme carries latents.
            height, width (`int`, *optional*):
                Of the film; by default the video's own, rounded down to multiples of 16. What does not fit is scaled,
                and cut at the sides.
            fps (`int`, *optional*): Of the film, for a file of another rate; its own frames if not given.

        Returns:
            `ChainState`: `num_clips` is 0, and `start` counts the frames of the video, those that the first clip
            tells again left out.

        Raises:
            ValueError: if the video cannot be read or is too short for the scheme, or `vae` is missing.
        """
        source = open_source_video(video, height, width, fps)
        latents = conditioning.carried_latents
        needed = 1 + TEMPORAL_FACTOR * latents if latents else max(conditioning.carried_frames, 1)
        if source.num_frames < needed:
            raise ValueError(
                f"`video` has {source.num_frames} frames, but {conditioning} goes on from {needed}. Take a longer one."
            )
        if latents and vae is None:
            raise ValueError(f"{conditioning} carries latents: pass `vae`, the pipeline's, to encode the video's end.")

        def end(count: int) -> torch.Tensor:
            frames = np.stack(list(source.frames(source.num_frames - count)))
            return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]

        # Many videos begin in black: what is there when the film goes on is the better reference.
        image = from_uint8(end(1)[:, :, 0])
        state = cls(conditioning, num_frames, image, start=source.num_frames, continues=True)
        if not latents:
            frames = end(conditioning.carried_frames) if conditioning.carried_frames else None
            return replace(state, frames=frames, start=state.start - state.conditioning.carried_frames)
        context = min(needed + TEMPORAL_FACTOR, 1 + (source.num_frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR)
        with torch.no_grad():
            encoded = encode_video(vae, from_uint8(end(context)))
        return replace(state, latents=encoded[:, :, -latents:].cpu().clone())

    def _check(self) -> None:
        """Raise a `ValueError` unless the parts belong together, as those that `after` makes do."""
        check_count("num_clips", self.num_clips, 0, MAX_CLIPS)
        check_count("num_frames", self.num_frames, 1)
        check_count("start", self.start, 0, MAX_CLIPS * self.num_frames)
        if not isinstance(self.continues, bool) or (self.num_clips > 0 and not self.continues):
            raise ValueError(f"`continues` is {self.continues} after {self.num_clips} clips")
        if self.num_frames % TEMPORAL_FACTOR != 1 or self.conditioning.overlap >= self.num_frames:
            raise ValueError(f"clips of `num_frames`={self.num_frames} cannot be chained by {self.conditioning}")
        if not isinstance(self.made_with, dict) or not all(isinstance(v, str) for v in self.made_with.values()):
            raise ValueError("`made_with` is no dictionary of texts")
        height, width = self.image.shape[-2:] if self.image.ndim == 4 else (0, 0)
        began, scheme = self.continues, self.conditioning
        for name, image in {"image": self.image, "anchor": self.reference}.items():
            _check_tensor(name, image, torch.float32, (1, 3, height, width))
            if image.abs().max() > 1:
                raise ValueError(f"`{name}` leaves [-1, 1]")
        frames = (1, 3, scheme.carried_frames, height, width) if began and scheme.carried_frames else None
        _check_tensor("frames", self.frames, torch.uint8, frames)
        size = self.latents.shape if self.latents is not None and self.latents.ndim == 5 else (0,) * 5
        latents = (1, size[1], scheme.carried_latents, *size[3:]) if began and scheme.carried_latents else None
        _check_tensor("latents", self.latents, torch.float32, latents)
        if latents is not None and (height * size[4] != width * size[3] or height % size[3]):
            raise ValueError(f"`latents` are {size[3]} x {size[4]} for an `image` of {height} x {width}")
        state = self.generator
        _check_tensor("generator", state, torch.uint8, None if state is None else (state.numel(),))

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        names = "image", "anchor", "frames", "latents", "generator"
        return {name: getattr(self, name) for name in names}


def read_notes(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a file that `ChainState.save` wrote."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _check_tensor(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    """Raise a `ValueError` unless `tensor` is finite and of that type and shape, or `None` where that is `None`."""
    found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    if found != (None if shape is None else (shape, dtype)) or 0 in (shape or ()):
        raise ValueError(f"`{name}` is {found}, where {'nothing' if shape is None else f'{shape}, {dtype}'} belongs")
    if tensor is not None and not tensor.isfinite().all():
        raise ValueError(f"`{name}` holds values that are not finite")


def kept_frames(conditioning: Scheme, num_frames: int, is_first: bool, is_last: bool) -> slice:
    """Which frames of a clip belong to the film: the overlap with a neighbour is cut from one of the two."""
    if conditioning.trims == "tail":
        return slice(0, num_frames if is_last else num_frames - conditioning.overlap)
    return slice(0 if is_first else conditioning.overlap, num_frames)


def joined(
    parts: Iterable, output_type: str, shape: tuple[int | None, int, int]
) -> np.ndarray | torch.Tensor | list[PIL.Image.Image]:
    """The film of `shape` (frames, height, width) out of what its clips add to it, in the memory of the film alone.

    Where nobody knows how many frames there will be, the parts are joined at the end.
    """
    if output_type == "pil":
        return list(itertools.chain.from_iterable(parts))
    if output_type == "latent":
        latents = list(parts)
        return torch.stack(latents) if latents else torch.empty(0)
    length, *size = shape
    if length is None:
        arrays = list(parts)
        length, parts = sum(map(len, arrays)), arrays
    film, filled = None, 0
    for part in parts:
        needed = filled + len(part)
        if film is None or needed > len(film):  # the first, or cuts make the film longer than told
            full = (max(length, needed), *part.shape[1:])
            longer = part.new_empty(full) if output_type == "pt" else np.empty(full, part.dtype)
            if film is not None:
                longer[:filled] = film[:filled]
            film = longer
        film[filled:needed] = part
        filled = needed
    if film is None:  # interrupted in the first clip
        return torch.empty(0, 3, *size) if output_type == "pt" else np.empty((0, *size, 3), np.float32)
    return film[:filled]
