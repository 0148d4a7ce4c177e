"""Voices and poses of the world of svi-tiny, and the films that follow them."""

import csv

import av
import conditions
import numpy as np
import pytest
import torch

from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.voice import Voice
from diffusers_svi.frames import open_video
from svi_tiny import voices, world
from svi_tiny.tracker import radius_of, track


START = world.State("green meadow", 5, world.Sprite("circle", "red", "large", 20.0, 36.0), light=(0.8, 0.9, 1.0))


def test_a_voice_is_the_same_again_and_no_other():
    voice, again, other = (voices.make_voice(0, index, 17) for index in (3, 3, 4))
    assert np.array_equal(voice, again) and not np.array_equal(voice, other)
    assert voice.shape == (17 * 2000,) and np.abs(voice).max() == pytest.approx(0.9)


def test_loudness_is_power_in_decibels_on_a_line():
    """Four frames of amplitudes 1, 1, 0.3 and 0, of mean power 2.09 / 4 of the first."""
    tone = np.sin(2 * np.pi * 100 * np.arange(voices.SAMPLES) / voices.RATE)
    heard = voices.loudness(np.concatenate([tone, tone, 0.3 * tone, 1e-9 * tone]))
    levels = 10 * np.log10(np.array([1, 1, 0.09]) * 4 / 2.09)
    assert heard[:3] == pytest.approx((levels + 16) / 23) and heard[3] == 0


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_sprite_is_seen_as_large_as_its_voice_is_loud(shape):
    sprite = world.Sprite(shape, "white", "large", 30.0, 30.0)
    voice = voices.make_voice(1, 0, 17)
    states = voices.follow_voice(world.State("purple night", 3, sprite), voice)
    seen = [radius_of(shape, observed.area) for observed in track(world.render(states))]
    assert seen == pytest.approx(6 + 7 * voices.loudness(voice), abs=0.1)
    assert np.ptp(seen) > 1.5 and states[0].sprite.scale == pytest.approx(seen[0] / 11, abs=0.01)


def test_a_line_through_what_the_ear_hears_tells_how_loud_a_frame_is():
    def heard(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows around every frame, as the modules are given them, and loudness."""
        voice = voices.make_voice(seed, index, 49)
        rows = open_audio((voice.astype(np.float32), voices.RATE), voices.make_ear(), world.FPS)[:].flatten(1).numpy()
        padded = np.pad(rows, ((2, 2), (0, 0)), mode="edge")
        return np.hstack([*(padded[shift : shift + 49] for shift in range(5)), np.ones((49, 1))]), voices.loudness(
            voice
        )

    rows, loud = (np.concatenate(parts) for parts in zip(*(heard(0, index) for index in range(24)), strict=True))
    line = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ loud)
    told = [np.corrcoef(rows @ line, loud)[0, 1] for rows, loud in (heard(1, index) for index in range(4))]
    assert min(told) > 0.9


def test_the_ear_is_always_the_same_and_disturbs_no_chance():
    torch.manual_seed(7)
    ears = [voices.make_ear() for _ in range(2)]
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert drawn == torch.rand(1)
    assert all(torch.equal(*pair) for pair in zip(*(ear.state_dict().values() for ear in ears), strict=True))
    assert not ears[0].training


def test_a_path_begins_where_the_sprite_is_and_stays_in_the_picture():
    states = voices.follow_path(START, 0, 0, 49)
    places = np.array([(state.sprite.x, state.sprite.y) for state in states])
    assert places.shape == (49, 2) and places[0] == pytest.approx([20, 36])
    assert places.min() >= 14 and places.max() <= 50
    # From knot to knot in a straight line.
    assert np.diff(places[:17], n=2, axis=0) == pytest.approx(0, abs=1e-9)
    assert np.abs(np.diff(places[15:18], n=2, axis=0)).max() > 0.1


def test_a_pose_stands_where_the_sprite_is():
    (picture,) = voices.draw_poses([START])
    rows, columns = np.nonzero(picture[..., 0])
    assert columns.mean() + 0.5 == pytest.approx(20) and rows.mean() + 0.5 == pytest.approx(36)
    arms = np.nonzero(picture[..., 1])
    assert np.ptp(arms[1]) == 15 and np.ptp(arms[0]) <= 3
    assert np.nonzero(picture[..., 2])[0].mean() + 0.5 == pytest.approx(27)


def test_films_are_written_with_their_voices_beside_them(tmp_path):
    file = voices.write_films(tmp_path, "audio", 1, num_frames=17)
    header, row = csv.reader(file.read_text().splitlines())
    start = voices.sample_start(0, 0)
    assert header == ["file_name", "text", "audio"] and row == [
        "0-000000.mp4",
        voices.tell(start, "audio"),
        "0-000000.wav",
    ]
    assert "stays still" in row[1]
    assert Voice(tmp_path / row[2]).num_samples == 17 * 2000
    with av.open(tmp_path / row[2]) as sound:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in sound.decode(audio=0)]) / 32767
    assert samples == pytest.approx(voices.make_voice(0, 0, 17), abs=1e-4)
    video = open_video(tmp_path / row[0], "")
    wanted = world.render(voices.follow_voice(start, voices.make_voice(0, 0, 17)))
    assert np.abs(video.read(list(range(17))).astype(float) - wanted).mean() < 4


def test_films_are_written_with_their_poses_beside_them(tmp_path):
    file = voices.write_films(tmp_path, "pose", 1, num_frames=17)
    header, row = csv.reader(file.read_text().splitlines())
    states = voices.follow_path(voices.sample_start(0, 0), 0, 0, 17)
    assert header[2] == "pose" and "moves over" in row[1]
    for name, wanted in ((row[0], world.render(states)), (row[2], voices.draw_poses(states))):
        seen = open_video(tmp_path / name, "").read(list(range(17)))
        assert np.abs(seen.astype(float) - wanted).mean() < 4


# The benchmark


def shown(follows: str, num_films: int = 3, num_clips: int = 2) -> tuple[np.ndarray, list[list[world.State]]]:
    """What is seen, in every second frame, of films that follow exactly, and what they should show."""
    films = [conditions.truth(follows, index, num_clips) for index in range(num_films)]
    sprites = [[state.sprite for state in film[::2]] for film in films]
    return np.array([[(sprite.radius, sprite.x, sprite.y) for sprite in film] for film in sprites]), films


def test_films_that_follow_their_voice_have_full_marks_and_fail_against_others():
    figures = conditions.summarize("audio", *shown("audio"))
    assert figures["correlation"]["curve"] == [1, 1] and figures["radius_error"]["curve"] == [0, 0]
    assert figures["kept"]["value"] == pytest.approx(1) and figures["found"]["curve"] == [1, 1]
    assert abs(figures["correlation_shuffled"]["at"]["1"]["value"]) < 0.6
    assert figures["radius_error_shuffled"]["at"]["1"]["value"] > 1


def test_what_is_kept_is_the_correlation_of_the_last_five_clips_over_that_of_the_first():
    seen, films = shown("audio", num_clips=11)
    wanted = seen[:, 49:, 0].copy()
    seen[:, 49:, 0] += seen[..., 0].std() * np.random.default_rng(0).standard_normal((3, 40))
    # How large a film's sprite is altogether is not in it.
    seen[0, :, 0] += 3
    figures = conditions.summarize("audio", seen, films)
    last = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(seen[:, 49:, 0], wanted, strict=True)])
    assert figures["kept"]["value"] == pytest.approx(last) and 0.5 < last < 0.9
    assert figures["correlation"]["at"]["1"]["value"] == pytest.approx(1)
    halves = figures["kept_halves"]
    assert halves["first"] == pytest.approx(1) and last < halves["second"] == halves["value"] < 1
    assert figures["radius_error"]["at"]["1"]["value"] == pytest.approx(1)


def test_figures_are_of_five_clips_within_the_film():
    assert conditions.around(1, 50) == slice(0, 5) and conditions.around(10, 50) == slice(7, 12)
    assert conditions.around(50, 50) == slice(45, 50) and conditions.around(1, 2) == slice(0, 5)


def test_films_that_follow_their_poses_are_where_they_stand_the_short_way_around():
    seen, films = shown("pose")
    figures = conditions.summarize("pose", seen, films)
    assert figures["distance"]["curve"] == [0, 0] and figures["distance_shuffled"]["at"]["1"]["value"] > 5
    seen[..., 1:] += (61, 68)
    assert conditions.summarize("pose", seen, films)["distance"]["curve"] == pytest.approx([5, 5])


def test_a_sprite_that_is_lost_counts_as_no_radius_and_half_the_picture():
    for follows, figure in (("audio", "radius_error"), ("pose", "distance")):
        seen, films = shown(follows)
        radius = seen[:, 1:, 0].mean()
        seen[:, 1:] = (0, np.nan, np.nan)
        figures = conditions.summarize(follows, seen, films)
        lost = {"audio": radius, "pose": 32}[follows]
        assert figures["found"]["curve"] == [0, 0] and figures[figure]["curve"] == pytest.approx([lost] * 2, abs=1e-4)
        if follows == "audio":
            assert figures["correlation"]["curve"] == [0, 0]
