"""Reading the world of svi-tiny back from pixels: which scene in what light, which sprite, where.

The scenes, shapes, colours and sizes of the world are finite, so a frame is read by comparing it with what could be
there. On frames drawn by `world.render` the answer is exact; on generated frames the distances to the best answer are
what a drift benchmark measures.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from .world import COLOURS, SCENES, SHAPES, SIZE, SIZES, Sprite, State, coverage, scene_pixels


# A pixel belongs to a sprite if it is this far from the scene in some channel (of 255) ...
SPRITE_CONTRAST = 40
# ... and there is a sprite if it covers at least this many pixels (the smallest, a small cross, covers 120).
SPRITE_AREA = 30
# Differences beyond this (of 255) count the same when scenes are compared: a sprite must not decide.
OUTLIER = 60
# What light is looked for in: beyond that of the world, since chains drift.
LIGHT_RANGE = (0.4, 1.5)


@dataclass(frozen=True)
class Observation:
    """What a frame shows.

    Args:
        scene (`str`): The nearest scene.
        offset (`int`): How far the camera is turned, in pixels.
        light (`tuple[float, float, float]`): Factors on red, green and blue.
        background_error (`float`):
            Mean absolute difference to that scene outside the sprite, of the range [0, 1]; in the true light, if
            `track` was told, else in the one that is seen.
        found (`bool`): Whether there is a sprite. Without one the rest is `None`.
        shape, colour, size (`str`): The nearest of each.
        x, y (`float`): Its position in pixels.
        rgb (`tuple[float, float, float]`): The sprite's colour in [0, 255], without that light.
        radius (`float`): In pixels, from the area the sprite covers, if that is the shape.
        area (`float`): What it covers, in pixels.
        overlap (`float`): Intersection over union with the nearest sprite drawn there, in [0, 1].
    """

    scene: str
    offset: int
    light: tuple[float, float, float]
    background_error: float
    found: bool
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    x: float | None = None
    y: float | None = None
    rgb: tuple[float, float, float] | None = None
    radius: float | None = None
    area: float | None = None
    overlap: float | None = None


def track(frames: np.ndarray, light: tuple[float, float, float] | None = None) -> list[Observation]:
    """Read every frame of a video `(frames, SIZE, SIZE, 3)`, uint8 or float in [0, 1], in true `light` if known."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"`frames` must be (frames, {SIZE}, {SIZE}, 3), got {frames.shape}.")
    scale = 1.0 if frames.dtype == np.uint8 else 255.0
    return [_observe(frame.astype(np.float32) * scale, light) for frame in frames]


def displacement(first: Observation, last: Observation) -> tuple[float, float]:
    """How far the sprite moved from one observation to the other, in pixels, the short way around the torus."""
    dx, dy = last.x - first.x, last.y - first.y
    return (dx + SIZE / 2) % SIZE - SIZE / 2, (dy + SIZE / 2) % SIZE - SIZE / 2


def radius_of(shape: str, area: float) -> float:
    """Radius in pixels of a sprite that covers `area` pixels."""
    return SIZES["large"] * float(np.sqrt(area / _drawn(shape, "large")[0]))


def sprite_mask(state: State) -> np.ndarray:
    """Pixels that the sprite of `state` touches, `(SIZE, SIZE)` boolean."""
    return np.zeros((SIZE, SIZE), bool) if state.sprite is None else coverage(state.sprite) > 0


def _observe(frame: np.ndarray, true_light: tuple[float, float, float] | None) -> Observation:
    scene, offset, light = _nearest_scene(frame)
    background = scene_pixels(scene, offset)
    true_light = light if true_light is None else np.asarray(true_light)
    error = np.abs(frame - background * true_light).mean(axis=-1) / 255
    frame = frame / light
    residual = frame - background
    distance = np.abs(residual).max(axis=-1)
    mask = distance > SPRITE_CONTRAST
    if mask.sum() < SPRITE_AREA:
        return Observation(scene, offset, tuple(light.tolist()), float(error.mean()), False)

    # The colour is read where the sprite surely is: the pixels that differ most from the scene.
    rgb = np.median(frame[mask & (distance >= np.median(distance[mask]))], axis=0)
    step = rgb - background
    alpha = np.clip((residual * step).sum(axis=-1) / np.maximum((step * step).sum(axis=-1), 1.0), 0, 1)
    # Traces of the scene's own error far from the sprite would pull the centroid.
    alpha = np.where(_grown(mask), alpha, 0)
    overlap, sprite = max(
        ((_overlap(alpha, coverage(sprite)), sprite) for sprite in _candidates(alpha)),
        key=lambda candidate: candidate[0],
    )
    outside = ~_grown(mask)
    return Observation(
        scene,
        offset,
        tuple(light.tolist()),
        float(error[outside].mean()) if outside.any() else 1.0,
        True,
        shape=sprite.shape,
        colour=min(COLOURS, key=lambda colour: np.abs(rgb - COLOURS[colour]).sum()),
        size=sprite.size,
        x=sprite.x,
        y=sprite.y,
        rgb=tuple((rgb * light / true_light).tolist()),
        radius=float(SIZES[sprite.size] * np.sqrt(alpha.sum() / _drawn(sprite.shape, sprite.size)[0])),
        area=float(alpha.sum()),
        overlap=float(overlap),
    )


def _nearest_scene(frame: np.ndarray) -> tuple[str, int, np.ndarray]:
    """Scene, offset and light."""

    def distances(views: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # A median, so that the sprite does not decide on the light.
        lights = np.clip(np.median(frame / views, axis=(1, 2)), *LIGHT_RANGE)
        return np.minimum(np.abs(views * lights[:, None, None] - frame), OUTLIER).mean(axis=(1, 2, 3)), lights

    # Every fourth pixel settles the few that come into question, all pixels decide.
    few = np.argsort(distances(_views()[:, ::4, ::4], frame[::4, ::4])[0])[:12]
    exact, lights = distances(_views()[few], frame)
    best = int(np.argmin(exact))
    return SCENES[few[best] // SIZE], int(few[best] % SIZE), lights[best]


@lru_cache(maxsize=1)
def _views() -> np.ndarray:
    """Every scene at every offset, `(scenes * SIZE, SIZE, SIZE, 3)`."""
    return np.stack([scene_pixels(scene, offset) for scene in SCENES for offset in range(SIZE)]).astype(np.float32)


def _candidates(alpha: np.ndarray) -> list[Sprite]:
    """Every shape and size, where its centroid would be that of `alpha`."""
    x, y = _centroid(alpha, axis=0), _centroid(alpha, axis=1)
    candidates = []
    for shape in SHAPES:
        for size in SIZES:
            _, dx, dy = _drawn(shape, size)
            candidates.append(Sprite(shape, "red", size, (x - dx) % SIZE, (y - dy) % SIZE))
    return candidates


@cache
def _drawn(shape: str, size: str) -> tuple[float, float, float]:
    """Area of a sprite in pixels, and how far its centroid lies from its position."""
    alpha = coverage(Sprite(shape, "red", size, SIZE / 2, SIZE / 2))
    return float(alpha.sum()), _centroid(alpha, axis=0) - SIZE / 2, _centroid(alpha, axis=1) - SIZE / 2


def _centroid(alpha: np.ndarray, axis: int) -> float:
    """On the torus: the mean angle of the pixels' centres."""
    weights = alpha.sum(axis=axis)
    angles = 2 * np.pi * (np.arange(SIZE) + 0.5) / SIZE
    return float(np.angle((weights * np.exp(1j * angles)).sum()) / (2 * np.pi) * SIZE % SIZE)


def _overlap(alpha: np.ndarray, other: np.ndarray) -> float:
    return float(np.minimum(alpha, other).sum() / np.maximum(alpha, other).sum())


def _grown(mask: np.ndarray) -> np.ndarray:
    """`mask` and the pixels around it, on the torus."""
    rows = mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0)
    return rows | np.roll(rows, 1, 1) | np.roll(rows, -1, 1)
