"""`ConditionDropout`: how a batch in training reaches the modules for audio or poses, and when it is without them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..checks import check_probability
from .windows import WINDOW, pose_pictures, windows_of


# Shares of samples without audio or pose, and of samples without image.
# source: the authors' training of SVI-Talk; that of SVI-Dance leaves poses out with 0.05, and of the others with 0.1
PUBLISHED_SHARES = {"audio": (0.1, 0.0), "pose": (1 - 0.95 * 0.9, 0.1)}


class Followed(NamedTuple):
    """What the transformer is given of a batch, and which of its samples have no image, `(batch,)`."""

    attention_kwargs: dict[str, Any]
    no_image: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ConditionDropout:
    """What the samples of a batch hear or see.

    Audio that is left out is zeros, as in guidance. Of poses nothing is added to the film then, as by a model without
    modules; black pictures would be another thing.

    Args:
        kind (`str`): "audio" or "pose".
        window (`int`, defaults to 5): Rows of audio that a frame hears.
        p_no_condition (`float`, defaults to 0.0): Share of samples whose audio or pose is left out.
        p_no_image (`float`, defaults to 0.0): Share of samples without image, whatever else they have.

    Raises:
        ValueError: for a share out of [0, 1].
    """

    kind: str
    window: int = WINDOW
    p_no_condition: float = 0.0
    p_no_image: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p_no_condition", "p_no_image"):
            check_probability(name, getattr(self, name))

    def choose(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Followed:
        """What a batch follows; two numbers are drawn for every sample."""
        rows = batch[self.kind]
        draws = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
        left_out, no_image = draws[0] < self.p_no_condition, draws[1] < self.p_no_image
        if self.kind == "audio":
            windows = torch.stack([windows_of(own, self.window) for own in rows])
            return Followed({"audio": blank(left_out, windows)}, no_image)
        weight = (~left_out).to(rows.device).float()
        return Followed({"pose": pose_pictures(rows), "pose_weight": weight}, no_image)


def blank(which: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` `(batch, ...)`, zeros in the samples `which`, `(batch,)`."""
    return torch.where(which.to(values.device).view(-1, *[1] * (values.ndim - 1)), torch.zeros_like(values), values)
