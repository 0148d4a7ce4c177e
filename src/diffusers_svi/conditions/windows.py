"""Which frames of a condition a clip is given: frame n of the film hears and sees frame n."""

import math

import torch

from ..chain import ChainState
from ..conditioning import Scheme
from ..wan import TEMPORAL_FACTOR
from .rows import Rows


# Rows of audio that a frame hears, as published.
WINDOW = 5


def first_frame(state: ChainState) -> int:
    """The film frame that the first frame of the clip after `state` is, told again or not."""
    scheme = state.conditioning
    return state.start - (scheme.overlap if state.continues and scheme.trims == "head" else 0)


def clips_to_cover(length: int, scheme: Scheme, num_frames: int, state: ChainState | None = None) -> int:
    """Clips of the shortest film of at least `length` frames, those before `state` included.

    Args:
        length (`int`): Frames of the film, those of a video that it begins with included.
        scheme (`Scheme`): How its clips are chained.
        num_frames (`int`): Frames of a clip.
        state (`ChainState`, *optional*): What it goes on from.
    """
    made, told, new = 0, 0, num_frames - scheme.overlap
    if state is not None:
        made, told = state.num_clips, first_frame(state)
    if state is not None and state.continues:
        return made + max(0, math.ceil((length - told - scheme.overlap) / new))
    return made + 1 + max(0, math.ceil((length - told - num_frames) / new))


def film_rows(rows: Rows, first: int, count: int, loop: bool = False) -> torch.Tensor:
    """The rows of a condition for `count` film frames from `first` on.

    Beyond its ends the row at the end holds; with `loop`, it begins again.
    """
    length = len(rows)
    if not loop:
        wanted = torch.arange(first, first + count).clamp(0, length - 1)
        start = int(wanted[0])
        return torch.as_tensor(rows[start : int(wanted[-1]) + 1])[wanted - start]
    pieces, start = [], first % length
    while count > 0:
        pieces.append(torch.as_tensor(rows[start : start + count]))
        count, start = count - len(pieces[-1]), 0
    return torch.cat(pieces)


def audio_windows(features: Rows, first: int, num_frames: int, window: int = WINDOW) -> torch.Tensor:
    """What each frame of a clip hears: the rows around its own.

    Args:
        features (`Rows` of the shape `(frames, layers, channels)`): Of all of the film, a row a frame.
        first (`int`): The film frame that the clip begins with.
        num_frames (`int`): Frames of the clip.
        window (`int`, defaults to 5): Rows, an odd number: as many before a frame as behind it.

    Returns:
        `(num_frames, window, layers, channels)`. Beyond the ends of the film the row at the end holds.
    """
    return windows_of(heard_rows(features, first, num_frames, window), window)


def heard_rows(features: Rows, first: int, num_frames: int, window: int = WINDOW) -> torch.Tensor:
    """The rows that the frames of a clip hear together, `(num_frames + window - 1, layers, channels)`."""
    return film_rows(features, first - window // 2, num_frames + window - 1)


def windows_of(rows: torch.Tensor, window: int = WINDOW) -> torch.Tensor:
    """What each frame hears, out of the rows that [`heard_rows`] gave: `(num_frames, window, layers, channels)`."""
    return rows[torch.arange(len(rows)).unfold(0, window, 1)]


def pose_pictures(rows: torch.Tensor) -> torch.Tensor:
    """What a transformer sees of poses `(..., frames, height, width, 3)` uint8: `(..., 3, frames, height, width)`."""
    return rows.movedim(-1, -4).float() / 255


def latent_windows(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each latent frame hears, out of what its frames do.

    Of its four frames, the first is heard with the rows before it, the last with those behind it, and those between
    alone: with windows of 5, 3 + 2 + 3 rows.

    Args:
        windows (`torch.Tensor` of shape `(batch, 1 + 4n, window, layers, channels)`): As [`audio_windows`] gives them.

    Returns:
        That of the first latent frame, `(batch, 1, window, layers, channels)`, and of the others, `(batch, n, window +
        3, layers, channels)`.
    """
    # source: MultiTalk's grouping of audio embeddings
    middle = windows.shape[2] // 2
    groups = windows[:, 1:].unflatten(1, (-1, TEMPORAL_FACTOR))
    before, between, behind = groups[:, :, 0, : middle + 1], groups[:, :, 1:-1, middle], groups[:, :, -1, middle:]
    return windows[:, :1], torch.cat([before, between, behind], dim=2)
