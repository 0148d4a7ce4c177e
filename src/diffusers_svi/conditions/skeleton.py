"""A skeleton, drawn as DWPose draws it: body with toes, and hands, without a face, on black.

Limbs are ellipses, joints dots, in OpenPose's colours; all in pixels of the picture, whatever its size, so that a
small one has thick limbs.

The authors' scripts draw in RGB and write with OpenCV, which takes it for BGR: in the pose pictures that SVI-Dance and
UniAnimate make for training, red and blue are exchanged, a right shoulder is blue. So it is drawn here. This is read
in their code; it was not tried with their weights.
"""

import colorsys
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw

from ..checks import check_choice


# Points of a body, OpenPose's 18 in their order and the toes of the left and the right foot, and of a hand.
BODY, HAND = 20, 21
# A point counts as seen if its score is above this.
SEEN = 0.3
# Joints that limbs lie between: shoulders, arms, legs, head, feet.
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
    *((13, 18), (10, 19)),
)
# Each finger begins at the wrist.
FINGERS = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, HAND))
# Pixels: half the width of a limb, the radius of a dot, the width of a finger.
LIMB, DOT, FINGER = 4, 4, 2
# How bright limbs are beside their joints.
DIMMED = 0.6
# As what they were drawn: as the published models saw them, and as they look in OpenPose.
COLORS = ("published", "openpose")


def _hue(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(share, 1, 1))
    return red, green, blue


# Of a joint, and of the limb of the same number.
BODY_COLORS = (*(_hue(joint / 18) for joint in range(18)), (170, 255, 255), (255, 255, 0))
FINGER_COLORS = tuple(_hue(edge / len(FINGERS)) for edge in range(len(FINGERS)))
HAND_DOT = (0, 0, 255)


def draw_skeleton(body: np.ndarray, hands: np.ndarray, height: int, width: int, colors: str = COLORS[0]) -> np.ndarray:
    """A picture of one person.

    Args:
        body (`np.ndarray` of shape `(20, 3)`):
            x and y in pixels of the picture, and score, in OpenPose's order: nose, neck, right shoulder, elbow, wrist,
            left ones, right hip, knee, ankle, left ones, right and left eye, right and left ear, left and right toes.
        hands (`np.ndarray` of shape `(2, 21, 3)`): The same of both hands: wrist, then each finger from its root.
        height, width (`int`): Of the picture.
        colors (`str`, defaults to `"published"`):
            With red and blue exchanged, as the published models saw them, or `"openpose"`.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8, RGB.

    Raises:
        ValueError: for other `colors`.
    """
    check_choice("colors", colors, COLORS)
    image = PIL.Image.new("RGB", (width, height))
    pencil = PIL.ImageDraw.Draw(image)
    seen = body[:, 2] > SEEN
    for (start, end), color in zip(LIMBS, BODY_COLORS, strict=False):
        if seen[start] and seen[end]:
            pencil.polygon(_ellipse(body[start, :2], body[end, :2]), fill=color)
    image = image.point(lambda value: int(value * DIMMED))
    pencil = PIL.ImageDraw.Draw(image)
    for joint in np.flatnonzero(seen):
        _dot(pencil, body[joint], BODY_COLORS[joint])
    for hand in hands:
        seen = hand[:, 2] > SEEN
        for (start, end), color in zip(FINGERS, FINGER_COLORS, strict=True):
            if seen[start] and seen[end]:
                line = [(int(x), int(y)) for x, y in hand[[start, end], :2]]
                pencil.line(line, fill=color, width=FINGER)
        for joint in np.flatnonzero(seen):
            _dot(pencil, hand[joint], HAND_DOT)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[..., ::-1]) if colors == "published" else pixels.copy()


def _ellipse(start: np.ndarray, end: np.ndarray) -> list[tuple[float, float]]:
    """Corners of a limb, five degrees apart."""
    (x, y), length = (start + end) / 2, math.dist(start, end)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    corners = []
    for turn in np.linspace(0, 2 * math.pi, 72, endpoint=False):
        along, across = int(length / 2) * math.cos(turn), LIMB * math.sin(turn)
        corners.append(
            (
                int(x) + along * math.cos(angle) - across * math.sin(angle),
                int(y) + along * math.sin(angle) + across * math.cos(angle),
            )
        )
    return corners


def _dot(pencil: PIL.ImageDraw.ImageDraw, point: np.ndarray, color: tuple[int, int, int]) -> None:
    x, y = int(point[0]), int(point[1])
    pencil.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=color)
