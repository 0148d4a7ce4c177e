"""What is carried from clip to clip, and how clips become one film."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .conditioning import Carried, Scheme, scheme_from_dict
from .pixels import from_uint8, to_uint8


FORMAT = "diffusers_svi.chain"


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
        num_clips (`int`, defaults to 0): Clips made so far.
        generator (`torch.Tensor`, *optional*): State of the `generator` after those clips, if there is one.
    """

    conditioning: Scheme
    num_frames: int
    image: torch.Tensor
    frames: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    num_clips: int = 0
    generator: torch.Tensor | None = None

    @property
    def start(self) -> int:
        """Where the next clip begins in the film: its frames replace those from this one on."""
        if self.num_clips == 0:
            return 0
        length = self.conditioning.film_length(self.num_clips, self.num_frames)
        return length - self.conditioning.overlap if self.conditioning.trims == "tail" else length

    def carried(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Carried:
        """What is known when the next clip begins."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        frames = None if self.frames is None else from_uint8(self.frames.to(device), dtype)
        return Carried(self.image.to(device=device, dtype=dtype), frames, moved(self.latents))

    def after(
        self, latents: torch.Tensor, video: torch.Tensor | None = None, generator: torch.Tensor | None = None
    ) -> "ChainState":
        """The state after one more clip.

        Args:
            latents (`torch.Tensor` of shape `(1, z_dim, latent_frames, latent_height, latent_width)`):
                The clip as the sampler left it.
            video (`torch.Tensor` of shape `(1, 3, num_frames, height, width)`, *optional*):
                The same decoded, in [-1, 1]; needed where the scheme carries frames.
            generator (`torch.Tensor`, *optional*): State of the generator of the noise.
        """
        scheme, last_frames, last_latents = self.conditioning, None, None
        if scheme.carried_frames:
            assert video is not None
            # source: the authors' code hands the condition frames over as images of 8 bits a channel
            last_frames = to_uint8(video[:, :, -scheme.carried_frames :]).cpu()
        if scheme.carried_latents:
            # A copy: a view would keep the latents of the whole clip.
            last = latents[:, :, -scheme.carried_latents :]
            last_latents = last.to(device="cpu", dtype=torch.float32, copy=True)
        return replace(
            self, frames=last_frames, latents=last_latents, num_clips=self.num_clips + 1, generator=generator
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. A crash while writing leaves the file that was there before."""
        tensors = {name: value.contiguous() for name, value in self._tensors().items() if value is not None}
        metadata = {
            "format": FORMAT,
            "conditioning": json.dumps(self.conditioning.to_dict()),
            "num_frames": str(self.num_frames),
            "num_clips": str(self.num_clips),
        }
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ChainState":
        """Read what `save` wrote. Raises a `ValueError` if `path` is not such a file."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its metadata has no `format` {FORMAT!r}")
                return cls(
                    conditioning=scheme_from_dict(json.loads(metadata["conditioning"])),
                    num_frames=int(metadata["num_frames"]),
                    num_clips=int(metadata["num_clips"]),
                    **{name: file.get_tensor(name) for name in file.keys()},
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`path`={str(path)!r} is not a chain state ({error}). Give a file that `ChainState.save` wrote."
            ) from error

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        return {"image": self.image, "frames": self.frames, "latents": self.latents, "generator": self.generator}


def kept_frames(conditioning: Scheme, num_frames: int, is_first: bool, is_last: bool) -> slice:
    """Which frames of a clip belong to the film: the overlap with a neighbour is cut from one of the two."""
    if conditioning.trims == "tail":
        return slice(0, num_frames if is_last else num_frames - conditioning.overlap)
    return slice(0 if is_first else conditioning.overlap, num_frames)
