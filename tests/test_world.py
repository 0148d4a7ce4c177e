import csv
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffusers_svi.pixels import from_uint8
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import open_folder, usable_videos
from svi_tiny import world
from svi_tiny.tracker import displacement, track
from svi_tiny.videos import write_videos
from svi_tiny.world import Action, Sprite, State, caption, film, render


EXAMPLES = Path(__file__).parents[1] / "examples"
BALL = State("blue sky", 0, Sprite("circle", "red", "small", 20, 30))


def story(seed: int, setting: str = "creative", num_clips: int = 4):
    rng = np.random.default_rng(seed)
    state = world.sample_state(rng)
    return state, world.sample_actions(rng, state, num_clips, setting)


def test_the_same_seed_gives_the_same_film():
    for setting in ("creative", "consistent"):
        films = [render(film(*story(3, setting))) for _ in range(2)]
        assert np.array_equal(*films)
    assert not np.array_equal(render(film(*story(3))), render(film(*story(4))))


def test_a_film_continues_where_a_clip_ends():
    """Whatever happens, the state after a clip is one from which the next can start: a film has no seams."""
    for seed in range(200):
        state, actions = story(seed)
        states = film(state, actions)
        assert len(states) == 1 + 4 * 16
        assert all(states[16 * i].settled for i in range(5))
        for i, action in enumerate(actions):
            assert film(states[16 * i], [action])[1:] == states[16 * i + 1 : 16 * i + 17]


def test_actions_may_be_as_short_as_the_longest_change():
    state, actions = story(0)
    assert all(states.settled for states in film(state, actions, 12)[::12])
    with pytest.raises(ValueError, match=r"`durations` must be at least 12 frames"):
        film(state, actions, 11)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action("left"), "a small red circle moves left over a blue sky"),
        (Action(), "a small red circle stays still over a blue sky"),
        (
            Action("up", pan="right", colour="green"),
            "a small red circle moves up over a blue sky, it turns green, the camera pans right",
        ),
        (Action(shape="cross"), "a small red circle stays still over a blue sky, it becomes a cross"),
        (
            Action(scene="orange dusk"),
            "a small red circle stays still over a blue sky, the scene fades to an orange dusk",
        ),
        (
            Action(pan="left", scene="grey city"),
            "a small red circle stays still over a blue sky, the camera pans left to a grey city",
        ),
        (Action("leaves", side="up"), "a small red circle leaves to the top over a blue sky"),
    ],
)
def test_captions_tell_what_happens(action, text):
    assert caption(BALL, action) == text


def test_captions_of_empty_scenes():
    empty = State("orange dusk", 3)
    assert caption(empty, Action(pan="left")) == "an empty orange dusk, the camera pans left"
    enters = Action("enters", side="left", sprite=Sprite("cross", "white", "large", 32, 32))
    assert caption(empty, enters) == "a large white cross enters from the left over an orange dusk"


@pytest.mark.parametrize(
    ("motion", "dx", "dy"), [("left", -24, 0), ("right", 24, 0), ("up", 0, -24), ("down", 0, 24), ("still", 0, 0)]
)
def test_motion_is_what_the_prompt_says(motion, dx, dy):
    first, last = track(render(film(BALL, [Action(motion)]))[[0, -1]])
    np.testing.assert_allclose(displacement(first, last), (dx, dy), atol=0.1)


def test_changes_end_in_what_the_prompt_says():
    def after(action, state=BALL):
        return film(state, [action])[-1]

    assert after(Action(colour="green")).sprite.colour == "green"
    assert after(Action(shape="cross")).sprite.shape == "cross"
    assert after(Action(scene="grey city")).scene == "grey city"
    assert after(Action(pan="left", scene="grey city")) == State("grey city", 0, BALL.sprite)
    assert after(Action(pan="right")).offset == 16
    assert after(Action("leaves", side="left")).sprite is None
    sprite = Sprite("cross", "white", "large", 32, 32)
    assert after(Action("enters", side="down", sprite=sprite), State("blue sky", 0)).sprite == sprite


def test_a_sprite_enters_from_outside_and_leaves_completely():
    sprite = Sprite("square", "black", "large", 32, 32)
    for side in world.DIRECTIONS:
        entering = film(State("blue sky", 0), [Action("enters", side=side, sprite=sprite)])
        assert np.array_equal(render(entering[0]), render(State("blue sky", 0)))
        assert 0 < world.coverage(entering[3].sprite).sum() < world.coverage(sprite).sum()
        leaving = film(State("blue sky", 0, sprite), [Action("leaves", side=side)])
        assert world.coverage(leaving[11].sprite).sum() < 0.5 * world.coverage(sprite).sum()
        assert np.array_equal(render(leaving[12]), render(State("blue sky", 0)))


def test_a_light_may_be_one_of_eight():
    told = [world.sample_story(0, index, eight_lights=True) for index in range(200)]
    lights = {state.light for state, _ in told}
    assert lights == set(itertools.product(world.LIGHT, repeat=3))
    # Nothing else of a film is another, and its light is the nearest of them.
    for index, (state, actions) in enumerate(told[:20]):
        plain, plain_actions = world.sample_story(0, index)
        assert replace(state, light=plain.light) == plain and actions == plain_actions
        assert max(abs(a - b) for a, b in zip(state.light, plain.light, strict=True)) <= 0.15


def test_a_film_has_one_light_that_no_prompt_tells():
    state, actions = world.sample_story(0, 5, 3)
    assert all(world.LIGHT[0] <= factor <= world.LIGHT[1] for factor in state.light)
    assert {frame.light for frame in film(state, actions)} == {state.light} != {world.sample_story(0, 6)[0].light}
    unlit = replace(state, light=(1.0, 1.0, 1.0))
    np.testing.assert_allclose(render(state), render(unlit) * state.light, atol=1)
    assert caption(state, actions[0]) == caption(unlit, actions[0])


def test_sprites_wrap_around_the_screen():
    centred = render(State("blue sky", 0, Sprite("triangle", "white", "large", 32, 32)))
    wrapped = render(State("blue sky", 0, Sprite("triangle", "white", "large", 0, 0)))
    difference = np.roll(wrapped.astype(int) - render(State("blue sky", 0)), (32, 32), axis=(0, 1))
    where = world.coverage(Sprite("triangle", "white", "large", 32, 32)) == 1
    assert (np.abs(difference).sum(axis=-1) > 0)[where].all()
    assert (centred[where] == 250).all()


def test_the_tracker_reads_the_world_exactly():
    for seed in range(60):
        states = film(*world.sample_story(seed, 0))[::4]
        for truth, seen in zip(states, track(render(states)), strict=True):
            if not truth.settled:
                continue
            assert (seen.scene, seen.offset, seen.found) == (truth.scene, truth.offset, truth.sprite is not None)
            assert seen.background_error < 0.003
            np.testing.assert_allclose(seen.light, truth.light, atol=0.01)
            if truth.sprite is None:
                continue
            sprite = truth.sprite
            assert (seen.shape, seen.colour, seen.size) == (sprite.shape, sprite.colour, sprite.size)
            np.testing.assert_allclose(seen.rgb, sprite.rgb, atol=2)
            dx = (seen.x - sprite.x + 32) % 64 - 32
            dy = (seen.y - sprite.y + 32) % 64 - 32
            assert (
                np.hypot(dx, dy) < 0.15
                and seen.overlap > 0.95
                and abs(seen.radius / world.SIZES[sprite.size] - 1) < 0.02
            )


def test_the_tracker_measures_what_is_wrong():
    frame = render(BALL)
    (clean,) = track(frame[None])
    darker = np.clip(frame[None].astype(int) - 20, 0, 255).astype(np.uint8)
    (seen,) = track(darker, light=(1, 1, 1))
    assert seen.background_error == pytest.approx(20 / 255, abs=0.005) and seen.scene == "blue sky"
    dimmed = (frame[None] * [0.5, 0.8, 1.0]).round().astype(np.uint8)
    (seen,), (against,) = track(dimmed), track(dimmed, light=(1, 1, 1))
    assert seen.light == pytest.approx((0.5, 0.8, 1.0), abs=0.01) and seen.background_error < 0.005
    assert seen.colour == against.colour == "red" and seen.rgb == pytest.approx(BALL.sprite.rgb, abs=2)
    assert against.background_error == pytest.approx((0.5 * 120 + 0.2 * 175) / 3 / 255, abs=0.02)
    assert against.rgb == pytest.approx(BALL.sprite.rgb * [0.5, 0.8, 1.0], abs=2)
    (as_float,) = track(frame[None] / 255.0)
    assert as_float == clean
    recoloured = BALL.sprite.__class__("circle", "yellow", "small", 20, 30)
    (seen,) = track(render(State("blue sky", 0, recoloured))[None])
    assert seen.colour == "yellow" and seen.overlap > 0.95
    (gone,) = track(render(State("blue sky", 0))[None])
    assert not gone.found and gone.shape is None
    with pytest.raises(ValueError, match=r"`frames` must be \(frames, 64, 64, 3\), got \(64, 64, 3\)"):
        track(frame)


def test_unknown_names():
    with pytest.raises(ValueError, match="`scene` must be one of"):
        render(State("pink moon", 0))
    with pytest.raises(ValueError, match="`shape` must be one of"):
        render(State("blue sky", 0, Sprite("star", "red", "small", 0, 0)))
    with pytest.raises(ValueError, match="`setting` must be 'creative' or 'consistent'"):
        world.sample_actions(np.random.default_rng(0), BALL, 3, "wild")


def read_back(file: Path) -> tuple[list[str], list[np.ndarray]]:
    """Captions and frames of the videos that a CSV file lists."""
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["Video Title", "Video Description", "Video URL", "Download URL", "Filename"]
    videos = []
    for row in rows:
        with av.open(str(file.parent / row["Filename"])) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    return [row["Video Description"] for row in rows], videos


def test_films_as_videos(tmp_path):
    """The layout of the authors' training data: a folder of mp4 files and a CSV with their columns."""
    file = write_videos(tmp_path, num_videos=3, seed=0, num_clips=2)
    assert file == tmp_path / f"{tmp_path.name}.csv"
    captions, videos = read_back(file)
    assert len(videos) == 3
    for index, (text, video) in enumerate(zip(captions, videos, strict=True)):
        state, actions = world.sample_story(seed=0, index=index, num_clips=2)
        states = film(state, actions)
        assert video.shape == (33, 64, 64, 3) and np.abs(video.astype(int) - render(states)).mean() < 2
        assert text == "; then ".join((caption(state, actions[0]), caption(states[16], actions[1])))
    before = (tmp_path / "0-000000.mp4").read_bytes()
    write_videos(tmp_path, num_videos=3, seed=0, num_clips=2)
    assert (tmp_path / "0-000000.mp4").read_bytes() == before


def test_a_consistent_film_tells_its_one_action_once(tmp_path):
    (text,), (video,) = read_back(write_videos(tmp_path, num_videos=1, num_clips=3, setting="consistent"))
    state, (action, *_) = world.sample_story(0, 0, 3, "consistent")
    assert text == caption(state, action) and len(video) == 49


@pytest.mark.parametrize(("before", "retold", "num_clips"), [(0, 1, 1), (1, 1, 2), (17, 1, 3), (0, 5, 2), (13, 5, 3)])
def test_clips_with_what_is_before_them(tmp_path, before, retold, num_clips):
    """A clip re-tells `retold` frames of the action before its own, and its caption tells its own alone."""
    captions, videos = read_back(write_videos(tmp_path, num_videos=2, before=before, retold=retold))
    for index, (text, video) in enumerate(zip(captions, videos, strict=True)):
        state, actions = world.sample_story(0, index, num_clips)
        states = film(state, actions, 17 - retold)
        assert len(video) == before + 17
        assert np.abs(video.astype(int) - render(states[-(before + 17) :])).mean() < 2
        start = len(states) - 1 - (17 - retold)
        assert text == caption(states[start], actions[-1])


@pytest.mark.parametrize(("before", "retold"), [(-1, 1), (0, 0), (0, 6)])
def test_clips_that_cannot_be(tmp_path, before, retold):
    with pytest.raises(ValueError, match="`before` must be at least 0 and `retold` from 1 to 5"):
        write_videos(tmp_path, num_videos=1, before=before, retold=retold)


def test_the_command_writes_what_the_trainer_reads(tmp_path):
    command = [sys.executable, "-m", "svi_tiny.videos", f"--output_dir={tmp_path / 'world'}", "--num_videos=2"]
    options = ["--seed=3", "--setting=consistent", "--before=1", "--eight_lights"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout == f"2 videos, listed in {tmp_path / 'world' / 'world.csv'}.\n"
    layout = SampleLayout(num_frames=17, height=64, width=64, reference="before", center_crop=True)
    videos, skipped = usable_videos(open_folder(tmp_path / "world"), layout)
    assert len(videos) == 2 and not skipped
    sample = Samples(videos, layout, seed=0)[1]
    state, actions = world.sample_story(3, 1, 2, "consistent", eight_lights=True)
    states = film(state, actions)
    truth = from_uint8(torch.from_numpy(render(states[15:]))).permute(3, 0, 1, 2)
    assert (sample["reference"] - truth[:, 0]).abs().mean() < 0.03
    assert sample["video"].shape == (3, 17, 64, 64) and (sample["video"] - truth[:, 1:]).abs().mean() < 0.03
    assert sample["caption"] == caption(states[16], actions[1])
