"""`Following`: how a batch in training reaches the modules for audio or poses, and when it does without them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..checks import check_probability
from .windows import pose_pictures, windows_of


# Published shares of samples: those without audio or pose, and those without pose and image.
# source: the authors' training of SVI-Talk and SVI-Dance
PUBLISHED_SHARES = {"audio": (0.1, 0.0), "pose": (0.05, 0.1)}


class Followed(NamedTuple):
    """What the transformer is given of a batch, and which of its samples have no image, `(batch,)`."""

    attention_kwargs: dict[str, Any]
    no_image: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Following:
    """What the samples of a batch hear or see.

    Args:
        kind (`str`): "audio" or "pose".
        window (`int`, defaults to 5): Rows of audio that a frame hears.
        p_no_condition (`float`, defaults to 0.0): Share of samples whose audio or pose is zeros.
        p_no_image (`float`, defaults to 0.0): Share of the others that have no image either: neither.

    Raises:
        ValueError: for a share out of [0, 1], or shares of more than 1 together.
    """

    kind: str
    window: int = 5
    p_no_condition: float = 0.0
    p_no_image: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p_no_condition", "p_no_image"):
            check_probability(name, getattr(self, name))
        if self.p_no_condition + self.p_no_image > 1:
            raise ValueError(
                f"`p_no_condition`={self.p_no_condition} and `p_no_image`={self.p_no_image} are shares of the same "
                "samples: together they must not exceed 1."
            )

    def choose(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Followed:
        """What a batch follows; one number is drawn for every sample."""
        rows = batch[self.kind]
        draws = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        no_image = draws < self.p_no_image
        left_out = (draws < self.p_no_image + self.p_no_condition).to(rows.device)
        if self.kind == "audio":
            given = torch.stack([windows_of(own, self.window) for own in rows])
        else:
            given = pose_pictures(rows)
        return Followed({self.kind: blank(left_out, given)}, no_image)


def blank(which: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` `(batch, ...)`, zeros in the samples `which`, `(batch,)`."""
    return torch.where(which.to(values.device).view(-1, *[1] * (values.ndim - 1)), torch.zeros_like(values), values)
