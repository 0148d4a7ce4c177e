"""How a film holds up, from its pixels alone: no weights, no truth."""

import numpy as np


def sharpness(frame: np.ndarray) -> float:
    """Root mean square difference of neighbouring pixels of a frame `(height, width, 3)`.

    Unlike the mean difference, it falls when edges blur.
    """
    return float(np.sqrt(sum(np.square(np.diff(frame, axis=axis)).mean() for axis in (0, 1))))


def drift_figures(clips: list[np.ndarray]) -> dict[str, list[float]]:
    """How far the last frame of every clip is from that of the first: in colour, contrast and sharpness.

    Args:
        clips (`list[np.ndarray]` of shape `(frames, height, width, 3)` in [0, 1]): Of one film.
    """
    last = [clip[-1] for clip in clips]
    sharpnesses = [sharpness(frame) for frame in last]
    return {
        "colour_shift": [float(np.abs(f.mean(axis=(0, 1)) - last[0].mean(axis=(0, 1))).mean()) for f in last],
        "contrast_kept": [float(f.std() / max(last[0].std(), 1e-6)) for f in last],
        "sharpness_kept": [s / max(sharpnesses[0], 1e-6) for s in sharpnesses],
    }
