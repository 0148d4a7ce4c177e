r"""A world of vectors, small enough for statistics: clips on a surface whose equation is known.

A clip is 8 latent frames of 16 numbers, `(16, 8, 1, 1)` as a transformer of Wan's form takes them. Every frame is a
point of a two-dimensional surface, a fixed random embedding of two angles. One moves at one of five speeds, which the
prompt tells; the other is that of one of eight identities, which no prompt tells: only the frame that a clip begins
with does. So two things can be lost in a chain, and both can be measured exactly: the surface, and the identity.
"""

import math
from dataclasses import dataclass

import torch


CHANNELS, FRAMES, IDENTITIES = 16, 8, 8
TEXT_DIM = 16
# Radians a frame; a prompt stands for one of them.
SPEEDS = torch.tensor([-0.25, -0.12, 0.0, 0.12, 0.25])
# Of the embedding, which is the same in every run.
WORLD_SEED = 7
# Points of the surface that a frame is compared with, for each identity.
ANGLES = 720


@dataclass(frozen=True)
class Clips:
    """Clips and what is true of them.

    Args:
        latents (`torch.Tensor` of shape `(n, CHANNELS, FRAMES, 1, 1)`): The clips.
        angles (`torch.Tensor` of shape `(n,)`): Of their first frames, in radians.
        identities, prompts (`torch.Tensor` of shape `(n,)`, int64): Which of `IDENTITIES`, and which of `SPEEDS`.
    """

    latents: torch.Tensor
    angles: torch.Tensor
    identities: torch.Tensor
    prompts: torch.Tensor


class World:
    """The surface, and clips on it. Over the surface the numbers of a frame have mean 0 and deviation 0.9."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(WORLD_SEED)
        self._inner = torch.randn(4, 64, generator=generator) * 1.2
        self._bias = torch.randn(64, generator=generator)
        self._outer = torch.randn(64, CHANNELS, generator=generator) / 8
        angles, identities = torch.rand(2, 20000, generator=generator) * 2 * math.pi
        points = self._embed(angles, identities)
        self._mean, self._deviation = points.mean(0), points.std()
        self.texts = torch.randn(len(SPEEDS), 1, TEXT_DIM, generator=generator)
        self._grid_angles = torch.arange(ANGLES) * 2 * math.pi / ANGLES
        grid = self.points(self._grid_angles[:, None], torch.arange(IDENTITIES)[None])
        self._grid = grid.reshape(-1, CHANNELS)

    def points(self, angles: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Points of the surface, `(..., CHANNELS)`; identities between whole numbers lie on it too."""
        embedded = self._embed(*torch.broadcast_tensors(angles, identities * 2 * math.pi / IDENTITIES))
        return (embedded - self._mean) / self._deviation

    def clips(self, count: int, generator: torch.Generator) -> Clips:
        """Clips at random."""
        angles = torch.rand(count, generator=generator) * 2 * math.pi
        identities = torch.randint(IDENTITIES, (count,), generator=generator)
        prompts = torch.randint(len(SPEEDS), (count,), generator=generator)
        path = angles[:, None] + SPEEDS[prompts][:, None] * torch.arange(FRAMES)
        frames = self.points(path, identities[:, None])
        return Clips(frames.permute(0, 2, 1)[..., None, None].contiguous(), angles, identities, prompts)

    def nearest(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far frames `(n, CHANNELS)` are from the surface, root mean square, and the nearest point's identity."""
        distances, places = torch.cdist(frames, self._grid).min(dim=1)
        return distances / math.sqrt(CHANNELS), places % IDENTITIES

    def errors(self, kind: str, clips: Clips, generator: torch.Generator) -> torch.Tensor:
        """Errors of size 1 (root mean square) for the first frames of clips, `(n, CHANNELS)`.

        Args:
            kind (`str`):
                `"off"` the surface, at right angles to it; along it towards another `"identity"`, or another
                `"angle"`.
            clips (`Clips`): Which.
            generator (`torch.Generator`): Of the directions off the surface, and of the sign of those along it.
        """
        angles, identities = clips.angles.clone().requires_grad_(), clips.identities.float().requires_grad_()
        tangents = torch.autograd.functional.jacobian(
            lambda a, i: self.points(a, i).sum(0), (angles, identities)
        )  # each (CHANNELS, n)
        along = {name: tangent.T for name, tangent in zip(("angle", "identity"), tangents, strict=True)}
        if kind == "off":
            basis = torch.linalg.qr(torch.stack([along["angle"], along["identity"]], dim=2)).Q
            drawn = torch.randn(len(angles), CHANNELS, generator=generator)
            direction = drawn - (basis @ (basis.mT @ drawn[..., None]))[..., 0]
        else:
            sign = torch.randint(2, (len(angles), 1), generator=generator) * 2.0 - 1
            direction = along[kind] * sign
        return direction / direction.square().mean(1, keepdim=True).sqrt()

    def _embed(self, angles: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        circles = torch.stack([angles.cos(), angles.sin(), identities.cos(), identities.sin()], dim=-1)
        return torch.tanh(circles @ self._inner + self._bias) @ self._outer
