"""The sound of a film: at the time of its frames, without a gap or a seam, the same bytes whenever it is written."""

import signal
import wave
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest

from diffusers_svi import FilmWriter, LatentMotion, PixelMotion
from diffusers_svi.sound import Sound
from test_film import NUM_FRAMES, make_clips


# Clips of half a second: never a whole number of packets.
FPS = 16
SCHEMES = (PixelMotion(5), LatentMotion(1))


def make_sound(path: Path, seconds: float, rate: int = 48000, channels: int = 2) -> np.ndarray:
    """A tone that climbs, with noise and a click every half second; what no shift of it equals."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time)
    tone += 0.02 * np.random.default_rng(0).standard_normal(len(time))
    tone[:: rate // 2] += 0.4
    samples = (np.stack([tone, 0.5 * tone][:channels], 1) * 32767).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return samples


def write(path: Path, clips, audio: Path | None) -> bytes:
    with FilmWriter(path, fps=FPS, audio=audio, codec="ffv1" if path.suffix == ".mkv" else "libx264") as film:
        for clip in clips:
            film.append(clip)
    return path.read_bytes()


def read(path: Path) -> tuple[np.ndarray, list[float]]:
    """The samples of a film as `(length, channels)` in [-1, 1], and the times of its pieces of sound."""
    with av.open(str(path)) as file:
        frames = list(file.decode(audio=0))
        times = [frame.time for frame in frames]
    samples = np.concatenate(
        [
            frame.to_ndarray().reshape(-1, frame.samples)
            if frame.format.is_planar
            else frame.to_ndarray().reshape(frame.samples, -1).T
            for frame in frames
        ],
        1,
    ).T
    return (samples / 32768 if samples.dtype == np.int16 else samples), times


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rate", "channels"), [(48000, 2), (44100, 1), (16000, 1)])
def test_the_sound_of_an_mp4_is_in_time_and_has_no_seams(scheme, rate, channels, tmp_path):
    """Not one sample off, from the first on, and at the seams of clips as near as everywhere else."""
    expected = make_sound(tmp_path / "a.wav", 4, rate, channels) / 32768
    write(tmp_path / "film.mp4", make_clips(scheme, 5), tmp_path / "a.wav")
    heard, times = read(tmp_path / "film.mp4")
    assert times[0] == 0 and np.allclose(np.diff(times), 1024 / rate, atol=1e-5)
    seconds = scheme.film_length(5, NUM_FRAMES) / FPS
    assert seconds <= len(heard) / rate < seconds + 1024 / rate and heard.shape[1] == channels
    length = round(seconds * rate)
    errors = {
        shift: np.abs(heard[2048 + shift : length - 2048 + shift] - expected[2048 : length - 2048]).mean()
        for shift in (-1024, -1, 0, 1, 1024)
    }
    assert min(errors, key=errors.get) == 0
    error = np.abs(heard[:length] - expected[:length])
    usual = error.mean()
    assert usual < 0.02 and error[:2048].mean() < 2 * usual
    for clip in make_clips(scheme, 5)[1:]:
        seam = round(clip.start / FPS * rate)
        assert error[seam - 1024 : seam + 1024].mean() < 1.5 * usual


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_sound_of_an_mkv_is_kept(scheme, tmp_path):
    expected = make_sound(tmp_path / "a.wav", 4)
    write(tmp_path / "film.mkv", make_clips(scheme, 5), tmp_path / "a.wav")
    heard, times = read(tmp_path / "film.mkv")
    length = round(scheme.film_length(5, NUM_FRAMES) / FPS * 48000)
    assert np.array_equal(heard * 32768, expected[:length]) and times[0] == 0
    assert np.allclose(times, np.arange(len(times)) / FPS, atol=0.001)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_film_with_sound_that_was_stopped_ends_with_the_same_bytes(scheme, suffix, tmp_path):
    make_sound(tmp_path / "a.wav", 1.4)
    whole = write(tmp_path / f"whole.{suffix}", make_clips(scheme, 4), tmp_path / "a.wav")
    for first, stop in ((0, 1), (1, 3), (3, 4)):
        stopped = write(tmp_path / f"film.{suffix}", make_clips(scheme, stop, first=first), tmp_path / "a.wav")
    assert stopped == whole


def write_what_is_missing(path: Path, clips, audio: Path, background: bool) -> None:
    codec = "ffv1" if path.suffix == ".mkv" else "libx264"
    with FilmWriter(path, fps=FPS, audio=audio, codec=codec, background=background) as film:
        for clip in clips[film.state.num_clips if film.state else 0 :]:
            film.append(clip)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_that_is_killed_again_and_again_ends_with_the_same_bytes(suffix, background, tmp_path):
    """At moments that come as they come, a little later each time, until one run comes to the end."""
    make_sound(tmp_path / "a.wav", 4)
    clips = make_clips(PixelMotion(5), 6, finished=False)
    whole = write(tmp_path / f"whole.{suffix}", clips, tmp_path / "a.wav")
    arguments = (tmp_path / f"film.{suffix}", clips, tmp_path / "a.wav", background)
    kills = 0
    while True:
        process = get_context("fork").Process(target=write_what_is_missing, args=arguments)
        process.start()
        process.join(0.02 * (1 + kills))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 0 and arguments[0].read_bytes() == whole


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_after_a_short_sound_comes_silence(suffix, tmp_path):
    make_sound(tmp_path / "a.wav", 0.7)
    write(tmp_path / f"film.{suffix}", make_clips(LatentMotion(1), 4), tmp_path / "a.wav")
    heard, _ = read(tmp_path / f"film.{suffix}")
    assert len(heard) >= 37 / 16 * 48000
    assert np.abs(heard[:33000]).mean() > 0.1 and np.abs(heard[36000:]).max() < 0.001


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_an_ordinary_file_of_a_film_has_its_sound(suffix, tmp_path):
    make_sound(tmp_path / "a.wav", 4)
    clips = make_clips(LatentMotion(1), 4)
    write(tmp_path / f"film.{suffix}", clips, tmp_path / "a.wav")
    with FilmWriter(
        tmp_path / f"film.{suffix}", fps=FPS, audio=tmp_path / "a.wav", codec="ffv1" if suffix == "mkv" else "libx264"
    ) as film:
        film.finalize(tmp_path / f"done.{suffix}")
    (ours, _), (theirs, times) = read(tmp_path / f"film.{suffix}"), read(tmp_path / f"done.{suffix}")
    assert np.array_equal(ours, theirs) and times[0] == 0


@pytest.mark.parametrize(
    ("suffix", "codec", "layout"),
    [
        ("mp3", "mp3", "stereo"),
        ("flac", "flac", "mono"),
        ("mp4", "aac", "stereo"),
        ("ogg", "libopus", "stereo"),
        ("wav", "pcm_s24le", "5.1"),
    ],
)
def test_sounds_of_many_kinds_are_read_in_time(suffix, codec, layout, tmp_path):
    """A tone after a second of silence, found where it begins."""
    samples = np.zeros((48000 * 2, 1), np.int16)
    samples[48000:, 0] = 20000 * np.sin(np.arange(48000) / 10)
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as output:
        stream = output.add_stream(codec, rate=48000, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.repeat(channels, 1).reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts = 48000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    heard = np.abs(Sound(tmp_path / f"a.{suffix}").samples(0, 96000)[:, 0].astype(int))
    assert heard[:47500].max() < 1000 < 10000 < heard[48100:48600].max()
    assert 47950 < np.argmax(heard > 5000) < 48050


def test_what_is_resampled_and_what_is_not(tmp_path):
    for rate, expected in ((44100, 44100), (11025, 11025), (37000, 48000)):
        make_sound(tmp_path / "a.wav", 1, rate)
        sound = Sound(tmp_path / "a.wav")
        assert sound.rate == expected and np.abs(sound.samples(0, expected)[-100:]).max() > 1000
        assert not sound.samples(expected + 50, expected + 150).any()


def test_what_is_refused(tmp_path):
    clips = make_clips(LatentMotion(1), 2)
    make_sound(tmp_path / "a.wav", 1)
    make_sound(tmp_path / "b.wav", 2)
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "list.wav").write_text("#EXTM3U\n#EXTINF:1,\na.wav\n#EXT-X-ENDLIST\n")
    write(tmp_path / "mute.mp4", clips, None)
    write(tmp_path / "film.mp4", clips, tmp_path / "a.wav")
    for name, audio, message in (
        ("film.mp4", "b.wav", "is a film with .*'audio': '.* is asked for"),
        ("film.mp4", None, "'audio': '.*'audio': None} is asked for"),
        ("mute.mp4", "a.wav", "'audio': None}, but .*'audio': '"),
        ("new.mp4", "text.wav", "`audio`=.*text.wav' cannot be read as sound"),
        ("new.mp4", "list.wav", "`audio`=.*list.wav' cannot be read as sound"),
        ("new.mp4", "mute.mp4", "`audio`=.*mute.mp4' cannot be read as sound: there is no sound in it"),
        ("new.mp4", "none.wav", "`audio`=.*none.wav' cannot be read as sound"),
    ):
        with pytest.raises(ValueError, match=message):
            FilmWriter(tmp_path / name, fps=FPS, audio=None if audio is None else tmp_path / audio)
    write(tmp_path / "film.mp4", make_clips(LatentMotion(1), 3, first=2), tmp_path / "a.wav")
