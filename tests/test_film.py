"""A film in one file: the same bytes whatever happened on the way."""

import contextlib
import io
import os
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from conftest import CLIP, seeded
from diffusers_svi import ChainState, Clip, FilmWriter, HeldLatents, LatentMotion, PixelMotion
from diffusers_svi.boxes import boxes
from diffusers_svi.film import read_clips


SCHEMES = (PixelMotion(5), LatentMotion(1))
NUM_FRAMES, SIZE = 13, 32


def make_clips(scheme, num_clips: int, finished: bool = True, first: int = 0) -> list[Clip]:
    """Clips of a chain, each with a brightness of its own; `finished` where no other clip follows the last one."""
    image = torch.zeros(1, 3, SIZE, SIZE)
    state, clips = ChainState(scheme, NUM_FRAMES, image), []
    for index in range(num_clips):
        video = torch.full((1, 3, NUM_FRAMES, SIZE, SIZE), 0.2 * index - 0.8)
        video += torch.linspace(0, 0.15, NUM_FRAMES).view(1, 1, -1, 1, 1)
        after = state.after(torch.zeros(1, 16, 4, 4, 4), video, made_with={"vae": "0"})
        is_last = finished and index == num_clips - 1
        cut = slice(0 if index == 0 or scheme.trims == "tail" else scheme.overlap, None)
        if scheme.trims == "tail" and not is_last:
            cut = slice(0, NUM_FRAMES - scheme.overlap)
        frames = (video[0, :, cut].movedim(0, -1).numpy() / 2 + 0.5).astype(np.float32)
        clips.append(Clip(index, f"prompt {index}", frames, state.start, after))
        state = after
    return clips[first:]


def write(path: Path, clips: list[Clip], **options) -> bytes:
    with FilmWriter(path, fps=8, **options) as film:
        for clip in clips:
            film.append(clip)
    return path.read_bytes()


def read(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_film_plays_as_its_frames(scheme, tmp_path):
    clips = make_clips(scheme, 4)
    write(tmp_path / "film.mp4", clips)
    frames, times = read(tmp_path / "film.mp4")
    expected = np.concatenate([clip.frames for clip in clips]) * 255
    assert len(frames) == scheme.film_length(4, NUM_FRAMES) and np.abs(frames - expected).max() < 4
    assert times == [number / 8 for number in range(len(frames))]


@pytest.mark.parametrize("scheme", [*SCHEMES, HeldLatents(0), PixelMotion(1)], ids=str)
@pytest.mark.parametrize("stops", [(1,), (1, 2, 3), (2, 2, 3)], ids=str)
def test_a_film_made_longer_is_the_longer_film(scheme, stops, tmp_path):
    """Stopped and finished: the frames that the last clip kept make room for the next one."""
    whole = write(tmp_path / "whole.mp4", make_clips(scheme, 4))
    done = 0
    for stop in (*stops, 4):
        film = FilmWriter(tmp_path / "film.mp4", fps=8)
        assert (film.state.num_clips if film.state else 0) == done
        for clip in make_clips(scheme, stop, first=done):
            film.append(clip)
        assert film.num_frames == scheme.film_length(stop, NUM_FRAMES) == len(read(film.path)[0])
        film.close()
        done = stop
    assert (tmp_path / "film.mp4").read_bytes() == whole


def killed(path: Path, clips: list[Clip], moment: str) -> None:
    """Append `clips` in this process, which dies at a moment of the last one."""
    from diffusers_svi import chain, files, growing

    writer = FilmWriter(path, fps=8)
    for clip in clips[:-1]:
        writer.append(clip)

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(file, place, content) -> None:
        file.truncate(place)
        file.seek(place)
        file.write(content[: len(content) // 2])
        die()

    match moment:
        case "before it is written":
            growing._write_end = die
        case "in the middle of it":
            growing._write_end = half
        case "before the state is written":
            growing.ChainState.save = die
        case "while the state is written":
            chain.save_file = lambda tensors, name, metadata: (name.write_bytes(b"half"), die())
        case "before the state has its name":
            files.os.replace = die
    writer.append(clips[-1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "moment",
    [
        "before it is written",
        "in the middle of it",
        "before the state is written",
        "while the state is written",
        "before the state has its name",
    ],
)
def test_a_kill_loses_no_finished_clip(scheme, finished, moment, tmp_path):
    """At any moment of the first clip or the third, after a film that was to go on or one that was finished."""
    whole = write(tmp_path / "whole.mp4", make_clips(scheme, 4))
    path = tmp_path / "film.mp4"
    for done in (0, 2):
        if done:
            write(path, make_clips(scheme, done, finished))
        process = get_context("fork").Process(
            target=killed, args=(path, make_clips(scheme, done + 1, first=done), moment)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if done:
            shown = 0
            # As a player does, which ends with what is cut off.
            with av.open(str(path)) as container, contextlib.suppress(av.InvalidDataError):
                for _ in container.decode(video=0):
                    shown += 1
            assert shown >= scheme.film_length(done, NUM_FRAMES) - scheme.overlap
        with FilmWriter(path, fps=8) as film:
            assert (film.state.num_clips if film.state else 0) == done
        for leftover in (path, Path(f"{path}.state")):
            if done == 0:
                leftover.unlink(missing_ok=True)
    assert write(path, make_clips(scheme, 4, first=2)) == whole


@pytest.mark.parametrize("finished", [False, True])
def test_a_full_disk_leaves_the_film_as_it_was(finished, tmp_path):
    write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 2, finished))
    before = (tmp_path / "film.mp4").read_bytes()
    script = """
from diffusers_svi import FilmWriter
from test_film import make_clips, PixelMotion
FilmWriter("film.mp4", fps=8).append(make_clips(PixelMotion(5), 3)[2])
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, len(before) + 100))

    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "File too large" in done.stderr.splitlines()[-1], done.stderr
    assert (tmp_path / "film.mp4").read_bytes() == before
    whole = write(tmp_path / "whole.mp4", make_clips(PixelMotion(5), 3))
    assert write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 3, first=2)) == whole


def test_a_clip_whose_state_could_not_be_written_can_be_appended_again(tmp_path, monkeypatch):
    clips = make_clips(PixelMotion(5), 3)
    whole = write(tmp_path / "whole.mp4", clips)

    def fail(*_, **__) -> None:
        raise OSError("no space left")

    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        film.append(clips[0])
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr("diffusers_svi.chain.save_file", fail)
            film.append(clips[1])
        assert film.num_frames == 8 and film.state is clips[0].state
        film.append(clips[1])
        film.append(clips[2])
    assert (tmp_path / "film.mp4").read_bytes() == whole


def test_how_its_clips_were_made_stands_in_the_film(tmp_path):
    write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 3))
    clips = read_clips(tmp_path / "film.mp4")
    assert [(clip["index"], clip["prompt"], clip["start"]) for clip in clips] == [
        (0, "prompt 0", 0),
        (1, "prompt 1", 8),
        (2, "prompt 2", 16),
    ]
    assert clips[0]["made_with"] == {"vae": "0"}
    (tmp_path / "other.mp4").write_bytes(b"text")
    with pytest.raises(ValueError, match="`path`=.*cannot be read as a film: it is no video"):
        read_clips(tmp_path / "other.mp4")


def test_every_fragment_has_a_number_and_a_time_of_its_own(tmp_path):
    content = write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 3))
    found = list(boxes(io.BytesIO(content)))
    kinds = [kind for kind, _, _ in found]
    assert kinds == ["ftyp", "moov", *("uuid", "moof", "mdat") * 3, "moof", "mdat"]
    fragments = [content[place : place + size] for kind, place, size in found if kind == "moof"]
    numbers = [struct.unpack(">I", box[box.index(b"mfhd") + 8 :][:4])[0] for box in fragments]
    assert numbers == sorted(set(numbers))


def test_an_ordinary_file_of_it(tmp_path):
    write(tmp_path / "film.mp4", make_clips(LatentMotion(1), 3))
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        film.finalize(tmp_path / "done.mp4")
        with pytest.raises(ValueError, match="is the film itself"):
            film.finalize(tmp_path / "film.mp4")
    with open(tmp_path / "done.mp4", "rb") as file:
        kinds = [kind for kind, _, _ in boxes(file)]
    assert kinds.index("moov") < kinds.index("mdat") and "moof" not in kinds
    ours, theirs = (read(tmp_path / name) for name in ("film.mp4", "done.mp4"))
    assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    with FilmWriter(tmp_path / "empty.mp4") as film, pytest.raises(ValueError, match="there is no clip yet"):
        film.finalize(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "film.avi"}, "`suffix of `path`` must be one of .*'.avi'"),
        ({"fps": -1}, "`fps` must be above 0, got -1"),
        ({"codec": "libvpx"}, "`codec` must be one of .*'libvpx'"),
        ({"crf": 99}, "`crf` must be a whole number of 0 to 51, got 99"),
        ({"pixel_format": "rgb24"}, "`pixel_format` must be one of"),
        ({"fps": 9}, "is a film with .*'fps': '8'.* but .*'fps': '9'.* is asked for"),
        ({"crf": 30}, "'crf': 18.* but .*'crf': 30"),
        ({"path": "other.mp4"}, "is a file without other.mp4.state beside it"),
        ({"path": "cut.mp4"}, "is not as it was written: its last clip, bytes"),
        ({"path": "gone.mp4"}, "`path`=.*gone.mp4' cannot be read"),
        ({"path": "state.mp4"}, "is the state of a chain, but of no film"),
        ({"path": "text.mp4"}, "is the state of a chain, but of no film"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    for name in ("film", "cut", "gone"):
        write(tmp_path / f"{name}.mp4", make_clips(PixelMotion(5), 2))
    content = bytearray((tmp_path / "cut.mp4").read_bytes())
    content[-900] ^= 1
    (tmp_path / "cut.mp4").write_bytes(content[:-800])
    (tmp_path / "gone.mp4").unlink()
    (tmp_path / "other.mp4").write_text("a film of somebody else's")
    make_clips(PixelMotion(5), 1)[0].state.save(tmp_path / "state.mp4.state")
    (tmp_path / "text.mp4.state").write_text("no tensors here")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    with pytest.raises(ValueError, match=message):
        FilmWriter(tmp_path / options.pop("path", "film.mp4"), **{"fps": 8, **options})
    assert {path: path.read_bytes() for path in before} == before
    # The lock is free again.
    FilmWriter(tmp_path / "film.mp4", fps=8).close()


def test_a_clip_that_is_not_the_next_one(tmp_path):
    clips = make_clips(PixelMotion(5), 3, finished=False)
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        film.append(clips[0])
        for clip, message in (
            (clips[2], "`clip` begins with frame 16, but the film has 8: it is not the next one"),
            (clips[0], "`clip` begins with frame 0, but the film has 8"),
            (replace(clips[1], frames=torch.zeros(16, 3, 4, 4)), "For latents see `decode_latents`"),
            (
                replace(clips[1], frames=np.zeros((8, 64, 64, 3))),
                "is .*64, 64.*, but the film is of 32 x 32",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                film.append(clip)
        film.append(clips[1])
    assert len(read(tmp_path / "film.mp4")[0]) == 16


def test_one_run_a_film(tmp_path):
    with FilmWriter(tmp_path / "film.mp4"), pytest.raises(ValueError, match="is being written by another run"):
        FilmWriter(tmp_path / "film.mp4")
    FilmWriter(tmp_path / "film.mp4").close()


def test_the_pipeline_writes_a_film_and_goes_on_with_it(i2v, image, tmp_path):
    def make(path: Path, num_clips: int) -> bytes:
        options = {"prompts": "a cat sits", "num_clips": num_clips, "generator": seeded(), **CLIP}
        with FilmWriter(path, fps=8) as film:
            for clip in i2v.stream(image=image, state=film.state, conditioning=PixelMotion(5), **options):
                film.append(clip)
        return path.read_bytes()

    whole = make(tmp_path / "whole.mp4", 3)
    for num_clips in (1, 3):
        stopped = make(tmp_path / "film.mp4", num_clips)
    assert stopped == whole and "transformer" in read_clips(tmp_path / "film.mp4")[0]["made_with"]
