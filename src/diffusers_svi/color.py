"""Colours of a clip matched to what it goes on from: the seam's shift is taken out, a sunset stays a sunset."""

import numpy as np
import torch


# By the names of the package `color-matcher`.
METHODS = ("none", "mkl", "mvgd", "reinhard")
# Colours that are nearer than this, four levels of 8 bits, are alike: it may as well be the noise of a model.
_NOISE = 4 / 255
# What is darker is moved as this is: there logarithms are far apart.
_DARK = 2 * _NOISE


def check_color_match(method: str) -> None:
    """Raise a `ValueError` if `method` is none that is offered, or the package for it is missing."""
    if not isinstance(method, str) or method not in METHODS:
        reason = ""
        if isinstance(method, str) and "hm" in method.split("-"):
            reason = (
                " A histogram of one frame says nothing of colours that come later in the clip: they would be cut off."
            )
        raise ValueError(f"`color_match` must be one of {METHODS}, got {method!r}.{reason}")
    if method != "none":
        try:
            import color_matcher  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"`color_match`={method!r} needs a package that is not installed: `pip install color-matcher`."
            ) from error


def match_colors(video: torch.Tensor, shown: torch.Tensor, method: str) -> torch.Tensor:
    """A clip with the colours of what its first frame tells again.

    The map of colours that takes frame 0 to `shown` is found by the package `color-matcher` and put on every frame: it
    is affine in RGB (`"mkl"`, `"mvgd"`) or in the logarithms of LMS (`"reinhard"`), so that one frame tells all of it,
    for the colours of the others too. What differs within frame 0 by a few of 255 levels at most, as in a dark frame
    or one without colour, is noise as well as colour: of that the contrast is left as it is.

    - `"mkl"`: moves mean and covariance (Monge-Kantorovich). What is where does not matter.
    - `"mvgd"`: the affine map that brings frame 0 nearest to `shown`, pixel by pixel. The better the two agree in
      what is where, the better it is; where they do not, it takes out contrast.
    - `"reinhard"`: moves mean and deviation of brightness and of two colour axes, each on its own.

    Args:
        video (`torch.Tensor` of shape `(1, 3, frames, height, width)`): The clip, finite, in [-1, 1].
        shown (`torch.Tensor` of shape `(3, height, width)`, uint8): The frame that frame 0 tells again.
        method (`str`): `"none"`, `"mkl"`, `"mvgd"` or `"reinhard"`.

    Returns:
        `torch.Tensor`: A new clip of the same shape, dtype and device, clipped to [-1, 1]; `video` itself for
        `"none"`. It is computed in float32, frame by frame.

    Raises:
        ValueError: as [`check_color_match`] does.
    """
    check_color_match(method)
    if method == "none":
        return video
    matrix, offset = (torch.from_numpy(part).to(video.device, torch.float32) for part in _fit(video, shown, method))
    matched = torch.empty_like(video)
    for number in range(video.shape[2]):
        pixels = _unit(video[0, :, number])
        moved = _moved(pixels, matrix, offset) if method != "reinhard" else _moved_in_lms(pixels, matrix, offset)
        matched[0, :, number] = (moved.clamp(0, 1) * 2 - 1).to(video.dtype)
    return matched


def _fit(video: torch.Tensor, shown: torch.Tensor, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrix `(3, 3)` and offset `(3,)` of the map from frame 0 to `shown`, of RGB or of the logarithms of LMS."""
    from color_matcher import ColorMatcher
    from color_matcher.reinhard_matcher import LMS_MAT, LMS_MAT_INV

    source, target = (
        pixels.double().permute(1, 2, 0).cpu().numpy() for pixels in (_unit(video[0, :, 0]), shown / 255)
    )
    if method == "reinhard":
        source, target = (pixels.clip(_DARK, 1) for pixels in (source, target))
    # The same noise on both. Without it a frame of one colour, or without colour, has no map, and one that is nearly
    # so has the contrast of its own noise, which the rest of the clip would get.
    noise = np.random.default_rng(0).uniform(-_NOISE, _NOISE, source.shape)
    source, target = source + noise, target + noise
    # It takes its solver from here alone, and writes into what it is given.
    result = ColorMatcher(method=method).transfer(source.copy(), target.copy(), method).reshape(-1, 3)
    source = source.reshape(-1, 3)
    if method == "reinhard":
        source = np.log10(source @ LMS_MAT.T)
        # Its inverse is rounded: undone, its own steps are affine.
        result = np.log10(result @ np.linalg.inv(LMS_MAT_INV).T)
    known = np.hstack([source, np.ones((len(source), 1))])
    solution = np.linalg.lstsq(known, result)[0]
    return solution[:3].T, solution[3]


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to [0, 1], in float32."""
    return pixels.float() / 2 + 0.5


def _moved(colours: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Colours `(3, height, width)` through an affine map."""
    return torch.einsum("ij,jhw->ihw", matrix, colours) + offset[:, None, None]


def _moved_in_lms(pixels: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The same for RGB in [0, 1] and a map of the logarithms of LMS."""
    from color_matcher.reinhard_matcher import LMS_MAT

    lms = torch.from_numpy(LMS_MAT).to(pixels)
    before = torch.einsum("ij,jhw->ihw", lms, pixels.clamp(_DARK, 1))
    after = 10 ** _moved(before.log10(), matrix, offset).clamp(max=1)  # more is white in any case
    # As a change of the pixels, so that the dark ones are not lifted.
    return pixels + torch.einsum("ij,jhw->ihw", lms.inverse(), after - before)
