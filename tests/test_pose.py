"""Pose pictures: skeletons as DWPose draws them, and videos and pictures of them, at a film's size, one a frame."""

import json
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_svi.conditions.pose import open_pose
from diffusers_svi.conditions.skeleton import draw_skeleton
from small_videos import numbers, write_numbered


# A person who stands, in a picture of 320 x 240 (height x width): 18 points and the toes.
STANDING = np.array(
    [
        *((120, 40), (120, 80), (90, 80), (80, 120), (70, 160), (150, 80), (160, 120), (170, 160)),
        *((105, 170), (103, 220), (100, 270), (135, 170), (137, 220), (140, 270)),
        *((112, 32), (128, 32), (104, 36), (136, 36), (150, 290), (90, 290)),
    ],
    np.float32,
)
SIZE = 320, 240
NO_HANDS = np.zeros((2, 21, 3), np.float32)


def person(shift: float = 0) -> np.ndarray:
    """`(20, 3)`, all of it seen, so many pixels to the right."""
    return np.concatenate([STANDING + np.array([shift, 0]), np.ones((20, 1))], 1).astype(np.float32)


def hand(x: float, y: float) -> np.ndarray:
    """`(21, 3)`: a wrist, and fingers that lie upon each other, to the right of it."""
    fingers = [(x + 20 * (1 + joint), y) for _ in range(5) for joint in range(4)]
    return np.array([(x, y, 1), *((*point, 1) for point in fingers)], np.float32)


def with_feet(body: np.ndarray) -> np.ndarray:
    """24 points, as DWPose finds them: either toe as two, and a heel that nobody draws."""
    left, right = body[18], body[19]
    apart = np.array([4, 2, 0], np.float32)
    return np.stack([*body[:18], left - apart, left + apart, 0 * left, right - apart, right + apart, 0 * right])


def as_body_25(body: np.ndarray) -> np.ndarray:
    """OpenPose's newer order, with a middle of the hips."""
    feet = with_feet(body)[18:]
    return np.stack([*body[:8], (body[8] + body[11]) / 2, *body[8:14], *body[14:18], *feet])


def frame_of(body: np.ndarray, hands: np.ndarray | None = None, **more) -> dict:
    one = {"pose_keypoints_2d": body.ravel().tolist(), "face_keypoints_2d": []}
    if hands is not None:
        one |= {f"hand_{side}_keypoints_2d": hands[n].ravel().tolist() for n, side in enumerate(("left", "right"))}
    return {"people": [one], **more}


CANVAS = {"canvas_height": SIZE[0], "canvas_width": SIZE[1]}


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_limbs_and_joints_have_the_colours_of_openpose():
    picture = draw_skeleton(person(), NO_HANDS, *SIZE, "openpose")
    assert picture.shape == (320, 240, 3) and picture.dtype == np.uint8
    colors = {
        (105, 80): (153, 0, 0),  # from the neck to the right shoulder
        (85, 100): (153, 102, 0),  # the right upper arm
        (120, 60): (0, 0, 153),  # from the neck to the nose
        (104, 195): (0, 153, 51),  # the right thigh
        (145, 280): (153, 0, 51),  # the left foot
        (95, 280): (102, 153, 153),  # the right foot
        (120, 40): (255, 0, 0),  # the nose
        (90, 80): (255, 170, 0),  # the right shoulder
        (160, 120): (0, 255, 0),  # the left elbow
        (90, 290): (255, 255, 0),  # the right toe
        (10, 10): (0, 0, 0),
    }
    assert {(x, y): tuple(picture[y, x].tolist()) for x, y in colors} == colors


def test_red_and_blue_are_exchanged_as_published_models_saw_them():
    published = draw_skeleton(person(), np.stack([hand(30, 20)] * 2), *SIZE)
    assert np.array_equal(
        published, draw_skeleton(person(), np.stack([hand(30, 20)] * 2), *SIZE, "openpose")[..., ::-1]
    )
    assert published[40, 120].tolist() == [0, 0, 255] and published[20, 30].tolist() == [255, 0, 0]


def test_limbs_are_nine_pixels_wide_in_the_middle_and_taper():
    body = np.zeros((20, 3), np.float32)
    body[[2, 3]] = [(40, 100, 1), (140, 100, 1)]
    columns = draw_skeleton(body, NO_HANDS, 200, 200).any(-1)
    assert np.flatnonzero(columns[:, 90]).tolist() == list(range(96, 105))
    assert 4 <= columns[:, 55].sum() <= 7
    # A dot of a radius of four at its end.
    assert np.flatnonzero(columns[100]).tolist() == list(range(36, 145))


def test_hands_are_lines_between_blue_dots():
    picture = draw_skeleton(
        np.zeros((20, 3), np.float32), np.stack([hand(30, 20), hand(30, 90)]), 120, 140, "openpose"
    )
    for y in (20, 90):
        assert picture[y, 30].tolist() == picture[y, 70].tolist() == [0, 0, 255]
        # Of fingers upon each other the last is seen: edges 16 to 19 of 20.
        assert picture[y, 40].tolist() == [204, 0, 255] and picture[y, 60].tolist() == [255, 0, 230]
        assert picture[y - 3 : y + 4, 60].any(-1).sum() == 2


def test_what_has_a_score_of_three_tenths_is_not_seen():
    body = person()
    body[3, 2] = 0.3
    picture = draw_skeleton(body, NO_HANDS, *SIZE)
    assert not picture[100, 85].any() and not picture[120, 80].any() and not picture[140, 75].any()
    body[3, 2] = 0.31
    assert draw_skeleton(body, NO_HANDS, *SIZE)[120, 80].any()


@pytest.mark.parametrize(
    "layout", [lambda body: body, with_feet, as_body_25], ids=["20 points", "24 points", "25 points"]
)
def test_bodies_of_every_layout_are_the_same_person(layout, tmp_path):
    path = write_json(tmp_path / "a.json", [frame_of(layout(person()), **CANVAS)])
    (picture,) = open_pose(path, *SIZE)[:]
    assert np.array_equal(picture, draw_skeleton(person(), NO_HANDS, *SIZE))


def test_feet_beside_18_points_are_drawn_and_need_both_toes(tmp_path):
    feet = with_feet(person())
    frame = frame_of(feet[:18], **CANVAS)
    frame["people"][0]["foot_keypoints_2d"] = feet[18:].ravel().tolist()
    bare = frame_of(feet[:18], **CANVAS)
    feet[22, 2] = 0.1
    path = write_json(tmp_path / "a.json", [frame, bare, frame_of(feet, **CANVAS)])
    both, none, left = open_pose(path, *SIZE)[:]
    assert [bool(picture[290, 150].any()) for picture in (both, none, left)] == [True, False, True]
    assert [bool(picture[290, 90].any()) for picture in (both, none, left)] == [True, False, False]


def test_a_folder_a_list_and_an_npz_file_draw_the_same(tmp_path):
    bodies = np.stack([person(shift) for shift in range(12)])
    hands = np.stack([np.stack([hand(30, 20), hand(30, 200 + shift)]) for shift in range(12)])
    frames = [frame_of(body, pair, **CANVAS) for body, pair in zip(bodies, hands, strict=True)]
    for number, frame in enumerate(frames):
        write_json(tmp_path / "folder" / f"clip_{number}_keypoints.json", frame)
    write_json(tmp_path / "a.json", frames)
    np.savez(tmp_path / "a.npz", body=bodies, hands=hands, size=SIZE)
    expected = np.stack([draw_skeleton(body, pair, *SIZE) for body, pair in zip(bodies, hands, strict=True)])
    for name in ("folder", "a.json", "a.npz"):
        poses = open_pose(tmp_path / name, *SIZE)
        assert len(poses) == 12 and np.array_equal(poses[:], expected), name
        assert np.array_equal(poses[9:11], expected[9:11]) and poses[12:].shape == (0, 320, 240, 3)
    # Without hands there are none; in other colours they are.
    np.savez(tmp_path / "b.npz", body=bodies[:, :18])
    (bare,) = open_pose(tmp_path / "b.npz", *SIZE, keypoint_size=SIZE, colors="openpose")[3:4]
    without_toes = bodies[3].copy()
    without_toes[18:] = 0
    assert np.array_equal(bare, draw_skeleton(without_toes, NO_HANDS, *SIZE, "openpose"))


def test_a_frame_without_people_is_black_and_of_several_the_first_is_drawn(tmp_path, caplog):
    crowd = frame_of(person(), **CANVAS)
    crowd["people"] += frame_of(person(40))["people"]
    path = write_json(tmp_path / "a.json", [{"people": [], **CANVAS}, crowd])
    with caplog.at_level(logging.WARNING):
        nobody, first = open_pose(path, *SIZE)[:]
    assert not nobody.any() and np.array_equal(first, draw_skeleton(person(), NO_HANDS, *SIZE))
    assert f"1 frames show several people, frame 1 of {path} first. The first is drawn." in caplog.text


@pytest.mark.parametrize(
    ("mode", "height", "width", "place"),
    [
        ("pad", 160, 120, (51, 110)),
        ("pad", 320, 480, (223, 220)),
        ("crop", 320, 480, (206, 280)),
        ("crop", 160, 240, (103, 140)),
        ("stretch", 320, 480, (206, 220)),
        ("stretch", 160, 240, (103, 110)),
    ],
)
def test_skeletons_are_brought_to_the_size_of_the_film(mode, height, width, place, tmp_path):
    """Where the right knee is; its dot is as large as ever."""
    np.savez(tmp_path / "a.npz", body=person()[None], size=SIZE)
    (picture,) = open_pose(tmp_path / "a.npz", height, width, resize_mode=mode, colors="openpose")[:]
    assert picture.shape == (height, width, 3)
    found = np.argwhere((picture == (0, 255, 255)).all(-1))
    assert tuple(found.mean(0)) == place[::-1] and found.min(0).tolist() == [place[1] - 4, place[0] - 4]


def test_keypoints_may_be_shares_of_the_picture(tmp_path):
    shares = person()
    shares[:, :2] /= 512
    path = write_json(tmp_path / "a.json", [frame_of(shares)])
    (picture,) = open_pose(path, 512, 512, keypoint_size=(1, 1))[:]
    assert np.array_equal(picture, draw_skeleton(person(), NO_HANDS, 512, 512))
    with pytest.raises(
        ValueError, match="all keypoints of frame 0 .* lie between 0 and 1, in a picture of \\(320, 240\\)"
    ):
        open_pose(write_json(tmp_path / "b.json", [frame_of(shares, **CANVAS)]), *SIZE)


def test_a_video_is_shown_frame_by_frame_and_at_the_rate_of_the_film(tmp_path):
    path = write_numbered(tmp_path / "a.mkv", num_frames=40, rate=8)
    poses = open_pose(path, 48, 64)
    assert len(poses) == 40 and poses[:].shape == (40, 48, 64, 3) and poses[:].dtype == np.uint8
    assert numbers(poses[7:12]) == [7, 8, 9, 10, 11]
    assert numbers(open_pose(path, 48, 64, fps=4)[:4]) == [0, 2, 4, 6]
    assert numbers(open_pose(path, 48, 64, fps=16)[:4]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("mode", "done", "black", "shown"),
    [
        ("pad", "black is added", (0, 31), (31, 31)),
        ("crop", "their sides are cut off", None, (31, 5)),
        ("stretch", "they are distorted", None, (5, 5)),
    ],
)
def test_pictures_of_another_aspect_are_fitted_and_it_is_told(mode, done, black, shown, tmp_path, caplog):
    pixels = np.full((1, 48, 96, 3), 200, np.uint8)
    with caplog.at_level(logging.WARNING):
        (picture,) = open_pose(pixels, 64, 64, resize_mode=mode)[:]
    assert f"`pose` has pictures of 48 x 96, the film 64 x 64 (height x width): {done}" in caplog.text
    assert picture.shape == (64, 64, 3) and (picture[shown] == 200).all()
    assert black is None or not picture[black].any()
    assert (picture == 0).all(-1).any() == (mode == "pad")


def test_nothing_is_told_of_pictures_of_the_same_aspect(caplog):
    with caplog.at_level(logging.WARNING):
        poses = open_pose(np.full((2, 50, 100, 3), 7, np.uint8), 32, 64)
    assert poses[:].shape == (2, 32, 64, 3) and (poses[:] == 7).all() and not caplog.text


def test_pictures_in_a_folder_are_taken_by_their_numbers(tmp_path):
    for number in range(1, 13):
        PIL.Image.new("RGB", (32, 16), (number, 0, 0)).save(tmp_path / f"pose2d_{number}.png")
    (tmp_path / ".hidden").touch()
    poses = open_pose(tmp_path, 16, 32)
    assert poses[:][:, 0, 0, 0].tolist() == list(range(1, 13))
    assert poses[-2:][:, 0, 0, 0].tolist() == [11, 12]


@pytest.mark.parametrize("form", ["floats", "tensor", "images"])
def test_frames_may_be_given_in_any_form(form):
    pixels = np.random.default_rng(0).integers(256, size=(5, 16, 32, 3), dtype=np.uint8)
    given = {
        "floats": pixels / 255,
        "tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255,
        "images": [PIL.Image.fromarray(frame) for frame in pixels],
    }[form]
    poses = open_pose(given, 16, 32)
    assert np.array_equal(poses[:], pixels) and open_pose(poses, 16, 32) is poses
    assert poses.fingerprint == open_pose(pixels, 16, 32).fingerprint
    assert poses.fingerprint != open_pose(pixels[::-1].copy(), 16, 32).fingerprint


def test_poses_are_known_by_what_is_shown(tmp_path):
    video = write_numbered(tmp_path / "a.mkv", num_frames=8)
    np.savez(tmp_path / "a.npz", body=person()[None], size=SIZE)
    prints = [
        open_pose(tmp_path / name, 48, width, **options).fingerprint
        for name, width, options in (
            *(("a.mkv", 64, {}), ("a.mkv", 64, {"fps": 4}), ("a.mkv", 48, {}), ("a.mkv", 48, {"resize_mode": "crop"})),
            *(("a.npz", 36, {}), ("a.npz", 36, {"colors": "openpose"}), ("a.npz", 36, {"keypoint_size": (640, 480)})),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert open_pose(video, 48, 64).fingerprint == prints[0]


def test_pictures_are_decoded_when_they_are_asked_for(tmp_path):
    """Memory is that of what is asked for; a picture that is damaged meanwhile is noticed."""
    rng = np.random.default_rng(0)
    for number in range(40):
        PIL.Image.fromarray(rng.integers(256, size=(96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{number:03}.png")
    tracemalloc.start()
    poses = open_pose(tmp_path, 96, 96)
    for number in range(40):
        poses[number : number + 1]
    assert tracemalloc.get_traced_memory()[1] < 40 * 96 * 96 * 3 / 2
    tracemalloc.stop()
    (tmp_path / "039.png").write_bytes((tmp_path / "039.png").read_bytes()[:500])
    assert len(poses[:39]) == 39
    with pytest.raises(ValueError, match="`pose`: .*039.png cannot be read as a picture"):
        poses[39:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold a list of OpenPose's frames, at least one"),
        ({"people": []}, "must hold a list of OpenPose's frames"),
        ([[1, 2]], "`pose`: frame 0 of .* is no frame of OpenPose"),
        ([frame_of(person())], "does not say how large the pictures were .*`keypoint_size=\\(height, width\\)`"),
        ([frame_of(person()[:17], **CANVAS)], "has 17 points of a body; there are layouts of \\[18, 20, 24, 25\\]"),
        ([frame_of(person(), hand(0, 0)[None, :9].repeat(2, 0), **CANVAS)], "has 9 points of the left hand, not 21"),
        (
            [{"people": [{"pose_keypoints_2d": [1, 2]}], **CANVAS}],
            "`pose_keypoints_2d` of frame 0 .* is no list of x, y",
        ),
        ([{"people": [7], **CANVAS}], "`pose_keypoints_2d` of frame 0 .* is no list of x, y"),
        ([frame_of(person(), canvas_height="x", canvas_width=9)], "`canvas_height of frame 0 .* whole number"),
        ([frame_of(person() * np.nan, **CANVAS)], "frame 0 .* has keypoints that are no numbers"),
        (
            [frame_of(person(), **CANVAS), frame_of(person(), **{**CANVAS, "canvas_width": 99})],
            "frame 1 .* has a canvas of \\(320, 99\\) \\(height, width\\), those before of \\(320, 240\\)",
        ),
    ],
)
def test_json_that_is_no_keypoints(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_pose(write_json(tmp_path / "a.json", content), *SIZE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"body": np.array([{}], dtype=object)}, "cannot be read as keypoints: .*allow_pickle=False"),
        ({"bodies": np.zeros((1, 18, 3))}, "must hold `body`, .* got \\['bodies'\\]"),
        ({"body": np.zeros((1, 18, 3)), "faces": np.zeros(1)}, "must hold `body`, .* got \\['body', 'faces'\\]"),
        ({"body": np.zeros((1, 17, 3))}, "`body` in .* must be .* got \\(1, 17, 3\\)"),
        ({"body": np.zeros((2, 18, 3)), "hands": np.zeros((1, 2, 21, 3))}, "`hands` in .* must be \\(2, 2, 21, 3\\)"),
        ({"body": np.zeros((2, 18, 3)), "size": np.zeros(3)}, "`size` in .* must be height and width"),
        ({"body": np.zeros((2, 18, 3))}, "does not say how large the pictures were"),
        ({"body": np.full((1, 18, 3), np.inf), "size": SIZE}, "frame 0 of .* has keypoints that are no numbers"),
    ],
)
def test_npz_files_that_are_no_keypoints(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_pose(tmp_path / "a.npz", *SIZE)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "must hold pictures .* but holds nothing"),
        (["1.png", "2.json"], "must hold pictures .* and nothing else, but holds 1.png, 2.json."),
        (["1.png", "notes.txt"], "must hold pictures .* but holds 1.png, notes.txt."),
        (["1.png", "2.png", "4.png"], "each one more than that before, but 4.png comes after 2.png"),
        (["a1.png", "b1.png"], "each one more than that before, but b1.png comes after a1.png"),
        (["a.png", "b.png"], "must tell the numbers of frames"),
    ],
)
def test_folders_that_are_no_poses(names, message, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        open_pose(tmp_path, *SIZE)


@pytest.mark.parametrize(
    ("pose", "options", "message"),
    [
        (np.zeros((0, 8, 8, 3)), {}, "`pose` must be a path, frames .* at least one"),
        (7, {}, "`pose` must be a path, frames .* got int"),
        (np.zeros((2, 8, 8, 4)), {}, "`pose` must be RGB pictures of one size, but frame 0 is \\(8, 8, 4\\)"),
        (np.full((2, 8, 8, 3), 255.0), {}, "`pose` has values from 255 to 255 in frame 0, not in \\[0, 1\\]"),
        (np.full((2, 8, 8, 3), np.nan), {}, "`pose` has values from nan to nan in frame 0"),
        (
            [PIL.Image.new("RGB", (8, 8)), PIL.Image.new("RGB", (8, 9))],
            {},
            "of one size, but frame 1 is \\(9, 8, 3\\)",
        ),
        (np.zeros((1, 8, 8, 3)), {"resize_mode": "fit"}, "`resize_mode` must be one of"),
        (np.zeros((1, 8, 8, 3)), {"colors": "red"}, "`colors` must be one of \\('published', 'openpose'\\)"),
        (np.zeros((1, 8, 8, 3)), {"height": 0}, "`height` must be a whole number of at least 1"),
        (np.zeros((1, 8, 8, 3)), {"fps": 0.5}, "`fps` must be a whole number of at least 1"),
        (np.zeros((1, 8, 8, 3)), {"keypoint_size": 5}, "`keypoint_size` must be `\\(height, width\\)`, got 5"),
        (np.zeros((1, 8, 8, 3)), {"keypoint_size": (0, 5)}, "`keypoint_size\\[0\\]` must be a whole number"),
    ],
)
def test_poses_that_cannot_be_followed(pose, options, message):
    with pytest.raises(ValueError, match=message):
        open_pose(pose, **{"height": 8, "width": 8, **options})


def test_files_that_are_no_poses(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.npz").write_text("no archive")
    folder = tmp_path / "folder"
    folder.mkdir()
    PIL.Image.new("RGB", (8, 8)).save(folder / "1.png")
    PIL.Image.new("RGB", (8, 9)).save(folder / "2.png")
    messages = {
        "a.mp4": "a.mp4 cannot be read as a video",
        "none.mp4": "none.mp4 cannot be read: .*No such file",
        "a.json": "a.json cannot be read as JSON",
        "none.json": "none.json cannot be read as JSON",
        "a.npz": "a.npz' cannot be read as keypoints",
        "folder": "its pictures are of several sizes \\(height, width\\), first seen in .*2.png",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            open_pose(tmp_path / name, 8, 8)
    PIL.Image.new("RGBA", (8, 8)).save(folder / "2.png")
    with pytest.raises(ValueError, match="2.png has transparent pixels"):
        open_pose(folder, 8, 8)
