"""The world of svi-tiny: a small torus in which everything that can happen is told by the prompt.

A frame shows one *scene* (a landscape of 64 x 64 pixels that closes on itself left to right) and at most one *sprite*.
The scene is scrolled by the camera; the sprite moves on the screen and wraps around its edges. Scenes, shapes, colours
and sizes come from finite sets and every change follows a fixed timetable, so for every frame of a film of any length
it is known what is right: `advance` gives the state, `render` the pixels, `caption` the words.

All of a film lies in one *light*, a factor for each of red, green and blue. It is the one thing that no prompt tells
and nobody can know by heart: a chain of clips has to hand it on, and where it loses some of it, colours shift.

Coordinates are pixels, x to the right and y down, both modulo `SIZE`. Time is counted in frames.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np


SIZE = 64
CLIP_FRAMES = 17
FPS = 8

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (250, 226, 40),
    "blue": (36, 60, 214),
    "green": (20, 160, 60),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = {"small": 7.0, "large": 11.0}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_EDGES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
SCENES = ("blue sky", "green meadow", "yellow desert", "purple night", "orange dusk", "grey city")

SPRITE_SPEED = 1.5  # pixels a frame
LIGHT = (0.7, 1.0)  # range of the light's factors
PAN_SPEED = 1  # pixels a frame; whole, so that a scrolled scene is never resampled
CHANGE_FRAMES = (2, 10)  # a change of colour, shape or scene begins and ends at these frames of its action
TRAVEL_FRAMES = 12  # frames to enter, to leave, or to pan to another scene; an action lasts at least this long


@dataclass(frozen=True)
class Sprite:
    """A sprite on the screen. `progress` in [0, 1] is how far it has changed into `next_shape` or `next_colour`.

    `scale` is how large it is beside others of its size; no prompt tells, a voice may.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    next_shape: str | None = None
    next_colour: str | None = None
    progress: float = 0.0
    wraps: bool = True
    scale: float = 1.0

    @property
    def radius(self) -> float:
        """In pixels."""
        return SIZES[self.size] * self.scale

    @property
    def rgb(self) -> np.ndarray:
        """Colour in [0, 255], shape `(3,)`."""
        rgb = np.array(COLOURS[self.colour], dtype=np.float64)
        if self.next_colour is not None:
            rgb += self.progress * (np.array(COLOURS[self.next_colour]) - rgb)
        return rgb


@dataclass(frozen=True)
class State:
    """What one frame shows, in what light.

    `reveal` is how `next_scene` takes over: "fade", or from the "left" or "right".
    """

    scene: str
    offset: int
    sprite: Sprite | None = None
    next_scene: str | None = None
    reveal: str | None = None
    progress: float = 0.0
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def settled(self) -> bool:
        """Whether nothing is half way through a change."""
        sprite = self.sprite
        return self.next_scene is None and (
            sprite is None or (sprite.next_shape is None and sprite.next_colour is None and sprite.wraps)
        )


@dataclass(frozen=True)
class Action:
    """What one prompt asks for: the sprite's motion, the camera's, and at most one change.

    Args:
        motion (`str`, defaults to `"still"`): "still", a direction, "enters" or "leaves".
        side (`str`, *optional*): the side the sprite enters from or leaves to.
        pan (`str`, *optional*): "left" or "right", where the camera turns.
        sprite (`Sprite`, *optional*): who enters.
        colour, shape, scene (`str`, *optional*): what the sprite or the scene changes to.
    """

    motion: str = "still"
    side: str | None = None
    pan: str | None = None
    sprite: Sprite | None = None
    colour: str | None = None
    shape: str | None = None
    scene: str | None = None


def advance(state: State, action: Action, frame: int) -> State:
    """The state `frame` frames after `action` began in the settled `state`. `frame=0` is `state` itself."""
    if frame == 0:
        return state
    start, end = CHANGE_FRAMES
    change = min(max((frame - start) / (end - start), 0.0), 1.0)
    travel = min(frame / TRAVEL_FRAMES, 1.0)

    scene, offset, next_scene, reveal, scene_progress = state.scene, state.offset, None, None, 0.0
    if action.scene is not None and action.pan is not None:
        # The camera turns once around the old scene while the new one slides in behind it.
        turn = round(SIZE * travel)
        offset = (offset + DIRECTIONS[action.pan][0] * turn) % SIZE
        next_scene, reveal, scene_progress = action.scene, action.pan, turn / SIZE
    else:
        if action.pan is not None:
            offset = (offset + DIRECTIONS[action.pan][0] * PAN_SPEED * frame) % SIZE
        if action.scene is not None and change > 0:
            next_scene, reveal, scene_progress = action.scene, "fade", change
    if scene_progress == 1:
        scene, next_scene, reveal, scene_progress = next_scene, None, None, 0.0

    sprite = _advance_sprite(state.sprite, action, frame, change, travel)
    return State(scene, offset, sprite, next_scene, reveal, scene_progress, state.light)


def _advance_sprite(sprite: Sprite | None, action: Action, frame: int, change: float, travel: float) -> Sprite | None:
    if action.motion == "enters":
        sprite = action.sprite
        if travel == 1:
            return replace(sprite, x=SIZE / 2, y=SIZE / 2)
        reach = (SIZE / 2 + SIZES[sprite.size] + 1) * (1 - travel)
        dx, dy = DIRECTIONS[action.side]
        return replace(sprite, x=SIZE / 2 + dx * reach, y=SIZE / 2 + dy * reach, wraps=False)
    if sprite is None:
        return None
    if action.motion == "leaves":
        if travel == 1:
            return None
        dx, dy = DIRECTIONS[action.side]
        out = SIZES[sprite.size] + 1
        target_x = sprite.x if dx == 0 else (-out if dx < 0 else SIZE + out)
        target_y = sprite.y if dy == 0 else (-out if dy < 0 else SIZE + out)
        return replace(
            sprite,
            x=sprite.x + travel * (target_x - sprite.x),
            y=sprite.y + travel * (target_y - sprite.y),
            wraps=False,
        )
    dx, dy = DIRECTIONS.get(action.motion, (0, 0))
    sprite = replace(
        sprite, x=(sprite.x + dx * SPRITE_SPEED * frame) % SIZE, y=(sprite.y + dy * SPRITE_SPEED * frame) % SIZE
    )
    if change == 1:
        return replace(sprite, colour=action.colour or sprite.colour, shape=action.shape or sprite.shape)
    if change > 0 and (action.colour or action.shape):
        return replace(sprite, next_colour=action.colour, next_shape=action.shape, progress=change)
    return sprite


def caption(state: State, action: Action) -> str:
    """The prompt of a clip that begins in `state` and shows `action`."""
    scene = over(state)
    if action.motion == "enters":
        who = f"a {action.sprite.size} {action.sprite.colour} {action.sprite.shape}"
        text = f"{who} enters from the {_EDGES[action.side]} {scene}"
    elif state.sprite is None:
        text = f"an empty {state.scene}"
    else:
        who = f"a {state.sprite.size} {state.sprite.colour} {state.sprite.shape}"
        if action.motion == "leaves":
            text = f"{who} leaves to the {_EDGES[action.side]} {scene}"
        elif action.motion == "still":
            text = f"{who} stays still {scene}"
        else:
            text = f"{who} moves {action.motion} {scene}"
    if action.colour is not None:
        text += f", it turns {action.colour}"
    if action.shape is not None:
        text += f", it becomes a {action.shape}"
    if action.pan is not None:
        text += f", the camera pans {action.pan}"
        if action.scene is not None:
            text += f" to {_a(action.scene)}"
    elif action.scene is not None:
        text += f", the scene fades to {_a(action.scene)}"
    return text


def over(state: State) -> str:
    """Of a prompt, what it says of the scene."""
    return f"over {_a(state.scene)}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def film(state: State, actions: list[Action], durations: list[int] | int = CLIP_FRAMES - 1) -> list[State]:
    """The states of a film: the start, then `durations[i]` frames of `actions[i]` each.

    A chain that keeps one condition frame spends `CLIP_FRAMES - 1` new frames on every prompt; one that keeps K frames
    spends `CLIP_FRAMES - K` on all but the first.
    """
    if isinstance(durations, int):
        durations = [durations] * len(actions)
    short = [d for d in durations if d < TRAVEL_FRAMES]
    if short:
        raise ValueError(
            f"`durations` must be at least {TRAVEL_FRAMES} frames, in which every change is over, got {short}."
        )
    states = [state]
    for action, duration in zip(actions, durations, strict=True):
        start = states[-1]
        states += [advance(start, action, frame) for frame in range(1, duration + 1)]
    return states


# Drawing


def render(states: State | list[State]) -> np.ndarray:
    """Pixels of one state `(SIZE, SIZE, 3)` or of several `(len, SIZE, SIZE, 3)`, uint8."""
    if isinstance(states, State):
        return np.round(_render(states)).astype(np.uint8)
    return np.stack([render(state) for state in states])


def _render(state: State) -> np.ndarray:
    image = scene_pixels(state.scene, state.offset)
    if state.next_scene is not None:
        new = scene_pixels(state.next_scene, state.offset)
        if state.reveal == "fade":
            image = image + state.progress * (new - image)
        else:
            shown = round(SIZE * state.progress)
            columns = slice(0, shown) if state.reveal == "left" else slice(SIZE - shown, SIZE)
            image = image.copy()
            image[:, columns] = new[:, columns]
    if state.sprite is not None:
        alpha = coverage(state.sprite)[..., None]
        image = image + alpha * (state.sprite.rgb - image)
    return image * state.light


def coverage(sprite: Sprite) -> np.ndarray:
    """How much of each pixel the sprite covers, `(SIZE, SIZE)` in [0, 1]."""
    grid = np.arange(SIZE) + 0.5
    dx, dy = grid[None, :] - sprite.x, grid[:, None] - sprite.y
    if sprite.wraps:
        dx, dy = (dx + SIZE / 2) % SIZE - SIZE / 2, (dy + SIZE / 2) % SIZE - SIZE / 2
    dx, dy = np.broadcast_arrays(dx, dy)
    distance = _signed_distance(sprite.shape, sprite.radius, dx, dy)
    if sprite.next_shape is not None:
        other = _signed_distance(sprite.next_shape, sprite.radius, dx, dy)
        distance = distance + sprite.progress * (other - distance)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _signed_distance(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside (exact near the edges, which is where it is used)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y)) / np.sqrt(2) - 0.8 * radius
    if shape == "triangle":
        # Three half planes, tip up; centred so that its centroid is the sprite's position.
        inner = 0.64 * radius
        return np.maximum.reduce([y - inner, 0.866 * np.abs(x) - 0.5 * y - inner])
    if shape == "cross":
        bar, reach = 0.36 * radius, radius
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - reach)
        across = np.maximum(np.abs(x) - reach, np.abs(y) - bar)
        return np.minimum(upright, across)
    raise ValueError(f"`shape` must be one of {SHAPES}, got {shape!r}.")


def scene_pixels(scene: str, offset: int = 0) -> np.ndarray:
    """A scene seen by a camera turned `offset` pixels to the right, `(SIZE, SIZE, 3)` float in [0, 255]."""
    return np.roll(_scene(scene), -offset, axis=1)


@cache
def _scene(scene: str) -> np.ndarray:
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    turn = 2 * np.pi * x / SIZE

    def gradient(top, bottom):
        share = (y / SIZE)[..., None]
        return (1 - share) * np.array(top, dtype=np.float64) + share * np.array(bottom, dtype=np.float64)

    def paint(image, mask, colour):
        return image + np.clip(mask, 0, 1)[..., None] * (np.array(colour, dtype=np.float64) - image)

    def below(height):
        return y - height + 0.5

    def disc(centre_x, centre_y, radius_x, radius_y, softness):
        dx = (x - centre_x + SIZE / 2) % SIZE - SIZE / 2
        return (1 - np.hypot(dx / radius_x, (y - centre_y) / radius_y)) / softness

    if scene == "blue sky":
        image = gradient((92, 150, 214), (146, 190, 226))
        for cx, cy, rx, ry in ((10, 16, 13, 6), (40, 40, 15, 7), (54, 10, 7, 4), (18, 54, 8, 4)):
            image = paint(image, disc(cx, cy, rx, ry, 0.5), (198, 214, 230))
        return image
    if scene == "green meadow":
        image = gradient((190, 214, 190), (172, 206, 168))
        image = paint(image, below(28 + 6 * np.sin(turn) + 3 * np.sin(2 * turn + 1)), (134, 182, 112))
        return paint(image, below(46 + 4 * np.sin(2 * turn + 2) + 2 * np.sin(3 * turn)), (104, 152, 84))
    if scene == "yellow desert":
        image = gradient((232, 214, 172), (224, 200, 150))
        image = paint(image, below(24 + 7 * np.sin(turn + 2)), (214, 184, 124))
        return paint(image, below(42 + 6 * np.sin(turn) + 4 * np.cos(2 * turn)), (192, 156, 98))
    if scene == "purple night":
        image = gradient((74, 56, 110), (110, 84, 142))
        for cx, cy in ((6, 8), (22, 20), (35, 6), (50, 15), (59, 30), (14, 36), (41, 31), (28, 48), (55, 50), (5, 57)):
            image = paint(image, disc(cx, cy, 2.5, 2.5, 0.8), (196, 182, 214))
        return image
    if scene == "orange dusk":
        image = gradient((168, 100, 110), (232, 160, 104))
        image = paint(image, disc(44, 34, 9, 9, 0.15), (242, 196, 132))
        return paint(image, below(50 + 3 * np.sin(2 * turn) + 2 * np.sin(3 * turn + 1)), (132, 84, 84))
    if scene == "grey city":
        image = gradient((170, 176, 190), (190, 193, 200))
        for left, width, top in ((2, 10, 30), (14, 8, 18), (24, 12, 38), (38, 9, 24), (49, 12, 33)):
            mask = np.minimum(np.minimum(x - left + 0.5, left + width - x + 0.5), below(top))
            image = paint(image, mask, (136, 140, 152))
        return paint(image, below(54), (110, 112, 120))
    raise ValueError(f"`scene` must be one of {SCENES}, got {scene!r}.")


# Chance


def sample_state(rng: np.random.Generator, empty: float = 0.1) -> State:
    """A settled state at random; without a sprite with probability `empty`."""
    scene, offset = _pick(rng, SCENES), int(rng.integers(SIZE))
    if rng.random() < empty:
        return State(scene, offset)
    x, y = rng.integers(4 * SIZE, size=2) / 4
    return State(scene, offset, _sample_sprite(rng, float(x), float(y)))


def sample_action(rng: np.random.Generator, state: State) -> Action:
    """Something that can happen in `state`, at random: half of the time a motion alone, else with one change."""
    pan = _pick(rng, ("left", "right")) if rng.random() < 0.4 else None
    if state.sprite is None:
        if rng.random() < 0.7:
            sprite = _sample_sprite(rng, SIZE / 2, SIZE / 2)
            return Action("enters", side=_pick(rng, DIRECTIONS), sprite=sprite, pan=pan)
        motion, changes = "still", ("nothing", "fade", "pan")
    else:
        motion = _pick(rng, ("still", *DIRECTIONS, *DIRECTIONS))
        changes = ("nothing", "colour", "shape", "fade", "pan", "leave")
    change = changes[0] if rng.random() < 0.5 else _pick(rng, changes[1:])
    if change == "colour":
        return Action(motion, pan=pan, colour=_pick(rng, COLOURS, state.sprite.colour))
    if change == "shape":
        return Action(motion, pan=pan, shape=_pick(rng, SHAPES, state.sprite.shape))
    if change == "fade":
        return Action(motion, scene=_pick(rng, SCENES, state.scene))
    if change == "pan":
        return Action(motion, pan=_pick(rng, ("left", "right")), scene=_pick(rng, SCENES, state.scene))
    if change == "leave":
        return Action("leaves", side=_pick(rng, DIRECTIONS), pan=pan)
    return Action(motion, pan=pan)


def sample_actions(rng: np.random.Generator, state: State, num_clips: int, setting: str = "creative") -> list[Action]:
    """`num_clips` actions from `state` on: a new one each ("creative"), or one motion held ("consistent")."""
    if setting == "consistent":
        pan = _pick(rng, ("left", "right")) if rng.random() < 0.4 else None
        return [Action(_pick(rng, ("still", *DIRECTIONS, *DIRECTIONS)), pan=pan)] * num_clips
    if setting != "creative":
        raise ValueError(f"`setting` must be 'creative' or 'consistent', got {setting!r}.")
    actions = []
    for _ in range(num_clips):
        actions.append(sample_action(rng, state))
        state = advance(state, actions[-1], TRAVEL_FRAMES)
    return actions


def sample_story(
    seed: int, index: int, num_clips: int = 1, setting: str = "creative", eight_lights: bool = False
) -> tuple[State, list[Action]]:
    """Where film `index` of a collection begins and what happens in its clips: the same whatever was drawn before.

    With `eight_lights` every factor of the light is one of the two ends of `LIGHT`, and not any between.
    """
    rng = np.random.default_rng([seed, index])
    state = sample_state(rng)
    light = np.random.default_rng([seed, index, 1]).uniform(*LIGHT, size=3)
    if eight_lights:
        light = np.where(light < np.mean(LIGHT), *LIGHT)
    state = replace(state, light=tuple(light.tolist()))
    return state, sample_actions(rng, state, num_clips, setting)


def _sample_sprite(rng: np.random.Generator, x: float, y: float) -> Sprite:
    return Sprite(_pick(rng, SHAPES), _pick(rng, COLOURS), _pick(rng, SIZES), x, y)


def _pick(rng: np.random.Generator, options, but: str | None = None) -> str:
    options = [option for option in options if option != but]
    return options[rng.integers(len(options))]
