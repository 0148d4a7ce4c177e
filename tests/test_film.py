"""A film in one file: the same bytes whatever happened on the way."""

import contextlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import weakref
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from conftest import CLIP, seeded
from diffusers_svi import ChainState, Clip, ClipSpec, FilmWriter, HeldLatents, LatentMotion, PixelMotion, matroska
from diffusers_svi import boxes as mp4
from diffusers_svi.boxes import boxes
from diffusers_svi.conditioning import scheme_from_dict
from diffusers_svi.data_uri import from_data_uri
from diffusers_svi.film import read_clips
from diffusers_svi.notes import MARK, note, read_notes
from diffusers_svi.recipe import read_recipe


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
    options = {"codec": "ffv1" if path.suffix == ".mkv" else "libx264", **options}
    with FilmWriter(path, fps=8, **options) as film:
        for clip in clips:
            film.append(clip)
    return path.read_bytes()


def read(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [
        ("mp4", "libx264", None),
        ("mp4", "libx264", "yuv444p"),
        ("mp4", "libx265", None),
        ("mkv", "libx264", None),
        ("mkv", "libx265", "yuv444p"),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_film_plays_as_its_frames(scheme, suffix, codec, pixel_format, tmp_path):
    clips, path = make_clips(scheme, 4), tmp_path / f"film.{suffix}"
    content = write(path, clips, codec=codec, pixel_format=pixel_format)
    frames, times = read(path)
    expected = np.concatenate([clip.frames for clip in clips]) * 255
    assert len(frames) == scheme.film_length(4, NUM_FRAMES) and np.abs(frames - expected).max() < 4
    # Matroska counts milliseconds.
    assert np.allclose(times, np.arange(len(frames)) / 8, atol=0 if suffix == "mp4" else 0.0006)
    path.unlink()
    Path(f"{path}.state").unlink()
    assert write(path, clips, codec=codec, pixel_format=pixel_format) == content


def test_a_film_of_av1_plays_as_its_frames(tmp_path):
    """In pictures of a size that its encoder takes."""
    image, clips = torch.zeros(1, 3, 64, 64), []
    for clip in make_clips(LatentMotion(1), 2):
        frames = clip.frames.repeat(2, 1).repeat(2, 2)
        clips.append(replace(clip, frames=frames, state=replace(clip.state, image=image)))
    write(tmp_path / "film.mp4", clips, codec="libsvtav1")
    frames, _ = read(tmp_path / "film.mp4")
    assert np.abs(frames - np.concatenate([clip.frames for clip in clips]) * 255).max() < 6


def test_ffv1_loses_nothing(tmp_path):
    noise = np.random.default_rng(0)
    clips = [
        replace(clip, frames=noise.integers(0, 256, (len(clip.frames), SIZE, SIZE, 3), np.uint8))
        for clip in make_clips(LatentMotion(1), 3)
    ]
    write(tmp_path / "film.mkv", clips)
    expected = np.concatenate([clip.frames for clip in clips])
    assert np.array_equal(read(tmp_path / "film.mkv")[0], expected)
    with FilmWriter(tmp_path / "film.mkv", fps=8, codec="ffv1") as film:
        film.finalize(tmp_path / "done.mkv")
    assert np.array_equal(read(tmp_path / "done.mkv")[0], expected)
    with open(tmp_path / "done.mkv", "rb") as file:
        kinds = [kind for kind, *_ in matroska.elements(file)]
    cues = 0x1C53BB6B
    assert kinds.index(cues) < kinds.index(matroska.CLUSTER)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("scheme", [*SCHEMES, HeldLatents(0), PixelMotion(1)], ids=str)
@pytest.mark.parametrize("stops", [(1,), (1, 2, 3), (2, 2, 3)], ids=str)
def test_a_film_made_longer_is_the_longer_film(scheme, stops, suffix, tmp_path):
    """Stopped and finished: the frames that the last clip kept make room for the next one."""
    whole = write(tmp_path / f"whole.{suffix}", make_clips(scheme, 4))
    done = 0
    for stop in (*stops, 4):
        film = FilmWriter(tmp_path / f"film.{suffix}", fps=8, codec="ffv1" if suffix == "mkv" else "libx264")
        assert (film.state.num_clips if film.state else 0) == done
        for clip in make_clips(scheme, stop, first=done):
            film.append(clip)
        assert film.num_frames == scheme.film_length(stop, NUM_FRAMES) == len(read(film.path)[0])
        film.close()
        done = stop
    assert (tmp_path / f"film.{suffix}").read_bytes() == whole


def in_form(frames: np.ndarray, form: str):
    pixels = (frames * 255).round().astype(np.uint8)
    return {
        "floats": frames,
        "uint8": pixels,
        "one by one": iter(list(pixels)),
        "tensor": torch.from_numpy(frames).movedim(-1, 1),
        "tensor of uint8": torch.from_numpy(pixels).movedim(-1, 1),
        "pictures": [PIL.Image.fromarray(frame) for frame in pixels],
    }[form]


@pytest.mark.parametrize("form", ["uint8", "one by one", "tensor", "tensor of uint8", "pictures"])
def test_frames_of_any_kind_make_the_same_film(form, tmp_path):
    clips = make_clips(PixelMotion(5), 3)
    whole = write(tmp_path / "whole.mp4", clips)
    others = [replace(clip, frames=in_form(clip.frames, form)) for clip in clips]
    assert write(tmp_path / "film.mp4", others) == whole


def test_a_clip_is_asked_for_its_frames_one_by_one(tmp_path):
    """Each is gone before the one after the next is made."""
    clip, gone = make_clips(PixelMotion(5), 1)[0], []

    def frames():
        last = None
        for frame in clip.frames:
            assert last is None or last() is None
            frame = frame.copy()
            gone.append(last := weakref.ref(frame))
            yield frame
            del frame

    write(tmp_path / "film.mp4", [replace(clip, frames=frames())])
    assert len(gone) == len(read(tmp_path / "film.mp4")[0]) == 13


def with_tails(clips: list[Clip], scheme) -> list[Clip]:
    """The clips of a film whose number nobody knew: each with the frames that the next one tells again."""
    ends = []
    for clip in clips:
        kept = clip.state.start - clip.start
        longer = make_clips(scheme, clip.index + 1)[-1]
        ends.append(replace(clip, frames=longer.frames[:kept], tail=longer.frames[kept:]))
    return ends


@pytest.mark.parametrize("form", ["floats", "pictures"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_tail_of_a_clip_is_the_films_until_the_next_one_tells_it(suffix, form, tmp_path):
    scheme = PixelMotion(5)
    clips = with_tails(make_clips(scheme, 3), scheme)
    clips = [replace(clip, frames=in_form(clip.frames, form), tail=in_form(clip.tail, form)) for clip in clips]
    for number in (1, 2, 3):
        stopped = write(tmp_path / f"film.{suffix}", clips[number - 1 : number])
        assert len(read(tmp_path / f"film.{suffix}")[0]) == scheme.film_length(number, NUM_FRAMES)
        assert stopped == write(tmp_path / f"whole{number}.{suffix}", make_clips(scheme, number))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_clip_of_which_all_is_told_again(suffix, tmp_path):
    """A video of no more frames than the first clip begins with: it is the film until that clip comes."""
    clips = make_clips(PixelMotion(5), 2)
    short = Clip(-1, None, clips[0].frames[:4], 0, ChainState(PixelMotion(5), NUM_FRAMES, clips[0].state.image))
    write(tmp_path / f"film.{suffix}", [short])
    assert len(read(tmp_path / f"film.{suffix}")[0]) == 4
    write(tmp_path / f"film.{suffix}", clips)
    ours, whole = (
        read(tmp_path / f"film.{suffix}"),
        (write(tmp_path / f"w.{suffix}", clips), read(tmp_path / f"w.{suffix}"))[1],
    )
    assert np.array_equal(ours[0], whole[0]) and ours[1] == whole[1]
    assert [clip["index"] for clip in read_clips(tmp_path / f"film.{suffix}")] == [-1, 0, 1]


def killed(path: Path, clips: list[Clip], moment: str, background: bool = False) -> None:
    """Append `clips` in this process, which dies at a moment of the last one."""
    from diffusers_svi import chain, files, growing

    codec = "ffv1" if path.suffix == ".mkv" else "libx264"
    writer = FilmWriter(path, fps=8, codec=codec, background=background)
    for clip in clips[:-1]:
        writer.append(clip)
    if background:
        writer._wait()

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(file, place, content) -> None:
        file.truncate(place)
        file.seek(place)
        file.write(content[: len(content) // 2])
        die()

    match moment:
        case "before it is written":
            growing.write_end = die
        case "in the middle of it":
            growing.write_end = half
        case "before the state is written":
            growing.ChainState.save = die
        case "while the state is written":
            chain.save_file = lambda tensors, name, metadata: (name.write_bytes(b"half"), die())
        case "before the state has its name":
            files.os.replace = die
    writer.append(clips[-1])
    writer.close()


def test_a_kill_in_the_background_loses_no_clip_that_is_on_disk(tmp_path):
    whole = write(tmp_path / "whole.mp4", make_clips(PixelMotion(5), 4))
    process = get_context("fork").Process(
        target=killed, args=(tmp_path / "film.mp4", make_clips(PixelMotion(5), 3), "in the middle of it", True)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        assert film.state.num_clips == 2
    assert write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 4, first=2)) == whole


@pytest.mark.parametrize(("scheme", "suffix"), [*((scheme, "mp4") for scheme in SCHEMES), (PixelMotion(5), "mkv")])
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
def test_a_kill_loses_no_finished_clip(scheme, suffix, finished, moment, tmp_path):
    """At any moment of the first clip or the third, after a film that was to go on or one that was finished."""
    whole = write(tmp_path / f"whole.{suffix}", make_clips(scheme, 4))
    path = tmp_path / f"film.{suffix}"
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
        with FilmWriter(path, fps=8, codec="ffv1" if suffix == "mkv" else "libx264") as film:
            assert (film.state.num_clips if film.state else 0) == done
        for leftover in (path, Path(f"{path}.state")):
            if done == 0:
                leftover.unlink(missing_ok=True)
    assert write(path, make_clips(scheme, 4, first=2)) == whole


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_full_disk_leaves_the_film_as_it_was(finished, background, tmp_path):
    write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 2, finished))
    before = (tmp_path / "film.mp4").read_bytes()
    script = f"""
from diffusers_svi import FilmWriter
from test_film import make_clips, PixelMotion
with FilmWriter("film.mp4", fps=8, background={background}) as film:
    film.append(make_clips(PixelMotion(5), 3)[2])
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


@pytest.mark.parametrize("done", [1, 2])
def test_a_state_that_cannot_be_written_leaves_the_film_as_it_was(done, tmp_path):
    """Those who come later find the frames that the next clip would have told again."""
    before = write(tmp_path / "film.mp4", make_clips(PixelMotion(5), done))
    # The writer meets a folder where its file is to be.
    unwritable = tmp_path / "film.mp4.state.unfinished"
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        unwritable.mkdir()
        with pytest.raises(OSError, match="unfinished"):
            film.append(make_clips(PixelMotion(5), 3)[done])
    assert (tmp_path / "film.mp4").read_bytes() == before
    unwritable.rmdir()
    whole = write(tmp_path / "whole.mp4", make_clips(PixelMotion(5), 3))
    assert write(tmp_path / "film.mp4", make_clips(PixelMotion(5), 3, first=done)) == whole


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
    with pytest.raises(ValueError, match="`path`=.*cannot be read as a film: it is no MP4"):
        read_clips(tmp_path / "other.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_that_begins_with_a_video(suffix, tmp_path):
    """Its frames are those of the video, of which the first clip tells the last again; stopped after it or not."""
    scheme, video = PixelMotion(5), np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8)
    begun = replace(
        ChainState(scheme, NUM_FRAMES, torch.zeros(1, 3, SIZE, SIZE)),
        frames=torch.from_numpy(video[-5:]).permute(3, 0, 1, 2)[None],
        start=15,
        continues=True,
    )
    clips = [Clip(-1, None, iter(video), 0, begun)]
    for clip in make_clips(scheme, 2):
        after = begun.after(torch.zeros(1, 16, 4, 4, 4), torch.zeros(1, 3, NUM_FRAMES, SIZE, SIZE))
        clips.append(replace(clip, start=begun.start, state=after))
        begun = after
    whole = write(tmp_path / f"whole.{suffix}", clips)
    clips[0] = replace(clips[0], frames=list(video))
    write(tmp_path / f"film.{suffix}", clips[:1])
    assert len(read(tmp_path / f"film.{suffix}")[0]) == 20
    assert write(tmp_path / f"film.{suffix}", clips[1:]) == whole
    frames, times = read(tmp_path / f"film.{suffix}")
    assert len(frames) == 15 + 8 + 13 and np.allclose(np.diff(times), 1 / 8, atol=0.001)
    if suffix == "mkv":
        assert np.array_equal(frames[:15], video[:15])
    assert [clip["index"] for clip in read_clips(tmp_path / f"film.{suffix}")] == [-1, 0, 1]


RECIPE = {"format": "diffusers_svi.recipe", "image": "data:image/png;base64,AAAA", "settings": {"seed": 1}}


def with_recipes(clips: list[Clip], *recipes: dict) -> list[Clip]:
    specs = [ClipSpec(clip.prompt, seed=clip.index) for clip in clips]
    told = zip(clips, specs, recipes, strict=True)
    return [replace(clip, spec=spec, recipe=recipe) for clip, spec, recipe in told]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_recipe_stands_in_the_film_once_and_again_where_it_changes(suffix, tmp_path):
    other = {**RECIPE, "settings": {"seed": 2}}
    clips = with_recipes(make_clips(PixelMotion(5), 4), RECIPE, RECIPE, other, other)
    whole = write(tmp_path / f"whole.{suffix}", clips)
    for first, last in ((0, 2), (2, 4)):
        made = with_recipes(make_clips(PixelMotion(5), last), *[clip.recipe for clip in clips[:last]])
        stopped = write(tmp_path / f"film.{suffix}", made[first:])
    assert stopped == whole and whole.count(b"diffusers_svi.recipe") == 2
    recipe = read_recipe(tmp_path / f"film.{suffix}")
    assert recipe.film == RECIPE and recipe.changes == {2: other}
    assert recipe.clips == [{"prompt": f"prompt {index}", "seed": index} for index in range(4)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_an_ordinary_file_has_the_recipe_in_its_comment(suffix, tmp_path):
    """With a start image of a megabyte."""
    large = {**RECIPE, "image": "data:image/png;base64," + "A" * 2**20, "name": '\u732b "quoted"\n'}
    clips = with_recipes(make_clips(PixelMotion(5), 2), large, large)
    write(tmp_path / f"film.{suffix}", clips)
    with FilmWriter(tmp_path / f"film.{suffix}", fps=8, codec="ffv1" if suffix == "mkv" else "libx264") as film:
        film.finalize(tmp_path / f"done.{suffix}")
    with av.open(str(tmp_path / f"done.{suffix}")) as file:
        told = {name.lower(): value for name, value in file.metadata.items()}["comment"]
    assert json.loads(told)["notes"][0]["recipe"] == large
    assert read_recipe(tmp_path / f"done.{suffix}") == read_recipe(tmp_path / f"film.{suffix}")
    assert read_clips(tmp_path / f"done.{suffix}") == read_clips(tmp_path / f"film.{suffix}")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_that_is_cut_anywhere_tells_the_clips_before_the_cut(suffix, tmp_path):
    content = write(tmp_path / f"film.{suffix}", make_clips(LatentMotion(1), 3))
    ends = [content.index(f"prompt {index}".encode()) for index in range(3)]
    for place in range(ends[0] + 200, len(content), 37):
        (tmp_path / f"cut.{suffix}").write_bytes(content[:place])
        told = [clip["index"] for clip in read_clips(tmp_path / f"cut.{suffix}")]
        least = [index for index, end in enumerate(ends) if end + 200 < place]
        assert told == list(range(len(told))) and len(least) <= len(told) <= len([end for end in ends if end < place])


@pytest.mark.parametrize("container", [mp4, matroska])
def test_a_note_longer_than_can_be_is_refused_before_it_is_read(container):
    content = container.note(MARK, b"a" * 100)
    assert list(container.notes(io.BytesIO(content), MARK, len(content))) == [b"a" * 100]
    with pytest.raises(ValueError, match="the note at byte 0 has .* bytes, more than"):
        list(container.notes(io.BytesIO(content), MARK, len(content) - 1))
    assert not list(container.notes(io.BytesIO(content), bytes(16), len(content)))


def test_a_recipe_that_is_too_long_for_a_comment_is_left_out_of_it_with_a_warning(tmp_path, caplog):
    large = {**RECIPE, "image": "A" * 2**24}
    write(tmp_path / "film.mp4", with_recipes(make_clips(PixelMotion(5), 1), large))
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        film.finalize(tmp_path / "done.mp4")
    assert "is left out of" in caplog.text and len(read(tmp_path / "done.mp4")[0]) == 13
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_recipe(tmp_path / "done.mp4")
    assert read_recipe(tmp_path / "film.mp4").film == large


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_notes_are_read_without_the_frames(suffix, tmp_path):
    """Of a film of a gigabyte, most of which is a hole in the file."""
    path = tmp_path / f"film.{suffix}"
    write(path, make_clips(LatentMotion(1), 1))
    with open(path, "ab") as file:
        size = 2**30
        head = (
            struct.pack(">I4s", size, b"mdat")
            if suffix == "mp4"
            else b"\xec" + (1 << 56 | size - 9).to_bytes(8, "big")
        )
        file.write(head)
        file.truncate(file.tell() + size - len(head))
        file.seek(0, 2)
        file.write(note({"index": 1}, mp4 if suffix == "mp4" else matroska))
    tracemalloc.start()
    notes = read_notes(path)
    assert [told["index"] for told in notes] == [0, 1] and tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


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
        ({"path": "film.avi"}, "`path.suffix` must be one of .*'.avi'"),
        ({"fps": -1}, "`fps` must be above 0, got -1"),
        ({"codec": "libvpx"}, "`codec` must be one of .*'libvpx'"),
        ({"crf": 99}, "`crf` must be a whole number of 0 to 51, got 99"),
        ({"pixel_format": "rgb24"}, "`pixel_format` must be one of"),
        ({"codec": "libsvtav1", "pixel_format": "yuv444p"}, "`pixel_format` must be one of .*'yuv420p'"),
        ({"codec": "ffv1"}, "`codec`='ffv1' goes into an .mkv file"),
        ({"path": "new.mkv", "codec": "ffv1", "crf": 18}, "`crf`=18: .* loses nothing"),
        ({"path": "none/film.mp4"}, "there is no folder"),
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
            (
                replace(clips[1], frames=[*clips[1].frames[:3], np.zeros((64, 64, 3))]),
                r"`clip.frames\[3\]` is .*64, 64",
            ),
            (replace(clips[1], frames=clips[1].frames[:7]), "`clip.frames` are 7, but the next clip begins 8"),
            (replace(clips[1], frames=[]), "at least one, got none"),
            (
                replace(clips[1], state=replace(clips[1].state, image=torch.zeros(1, 3, 64, 64))),
                "`clip` is of 64 x 64 pixels, but the film of 32 x 32",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                film.append(clip)
        film.append(clips[1])
    assert len(read(tmp_path / "film.mp4")[0]) == 16


def test_odd_sizes_are_said_before_anything_is_written(tmp_path):
    clip = make_clips(PixelMotion(5), 1)[0]
    clip = replace(clip, frames=clip.frames[:, :31], state=replace(clip.state, image=torch.zeros(1, 3, 31, 32)))
    with FilmWriter(tmp_path / "film.mp4", fps=8) as film:
        with pytest.raises(ValueError, match="A film of 31 x 32 pixels cannot be written in yuv420p"):
            film.append(clip)
        assert film.state is None and not (tmp_path / "film.mp4").exists()
    write(tmp_path / "full.mp4", [clip], pixel_format="yuv444p")
    write(tmp_path / "film.mkv", [clip])
    assert read(tmp_path / "full.mp4")[0].shape == read(tmp_path / "film.mkv")[0].shape == (13, 31, 32, 3)


def test_a_film_written_in_the_background_is_the_same(tmp_path):
    clips = make_clips(PixelMotion(5), 4)
    assert write(tmp_path / "film.mp4", clips, background=True) == write(tmp_path / "whole.mp4", clips)


def test_in_the_background_append_waits_for_the_clip_before_alone(tmp_path):
    """The first clip's frames come when the test says so: the state is that of the disk meanwhile."""
    clips, go = make_clips(PixelMotion(5), 3), threading.Event()

    def frames():
        assert go.wait(60)
        yield from clips[0].frames

    with FilmWriter(tmp_path / "film.mp4", fps=8, background=True) as film:
        film.append(replace(clips[0], frames=frames()))
        assert film.state is None and film.num_frames == 0
        go.set()
        film.append(clips[1])
        assert film.state is not None and film.num_frames in (8, 16)
        film.append(clips[2])
    assert film.num_frames == len(read(tmp_path / "film.mp4")[0]) == 29


def test_an_error_in_the_background_comes_with_the_next_clip_or_at_the_end(tmp_path):
    clips = make_clips(PixelMotion(5), 3)
    short = replace(clips[1], frames=clips[1].frames[:7])
    with FilmWriter(tmp_path / "film.mp4", fps=8, background=True) as film:
        film.append(clips[0])
        film.append(short)
        with pytest.raises(ValueError, match="`clip.frames` are 7"):
            film.append(clips[2])
        # Told once; the film goes on where it is.
        film.append(clips[1])
        film.append(clips[2])
    assert (tmp_path / "film.mp4").read_bytes() == write(tmp_path / "whole.mp4", clips)
    film = FilmWriter(tmp_path / "other.mp4", fps=8, background=True)
    film.append(replace(clips[0], frames=clips[0].frames[:7]))
    with pytest.raises(ValueError, match="`clip.frames` are 7"):
        film.close()
    FilmWriter(tmp_path / "other.mp4", fps=8).close()


def test_an_error_in_the_background_hides_no_other(tmp_path):
    clip = make_clips(PixelMotion(5), 1)[0]
    with pytest.raises(KeyError, match="mine") as caught, FilmWriter(tmp_path / "film.mp4", background=True) as film:
        film.append(replace(clip, frames=[]))
        raise KeyError("mine")
    assert "could not be written: `frames` must be RGB pictures" in caught.value.__notes__[0]


def test_finalize_waits_for_the_clip_in_the_background(tmp_path):
    clips = make_clips(PixelMotion(5), 2)
    with FilmWriter(tmp_path / "film.mp4", fps=8, background=True) as film:
        for clip in clips:
            film.append(clip)
        film.finalize(tmp_path / "done.mp4")
    assert len(read(tmp_path / "done.mp4")[0]) == 21


def test_one_run_a_film(tmp_path):
    with FilmWriter(tmp_path / "film.mp4"), pytest.raises(ValueError, match="is being written by another run"):
        FilmWriter(tmp_path / "film.mp4")
    FilmWriter(tmp_path / "film.mp4").close()


def test_where_no_file_can_be_is_said_at_once(tmp_path):
    with pytest.raises(OSError):
        FilmWriter("/proc/film.mp4")
    FilmWriter(tmp_path / "film.mp4").close()


def test_a_film_can_be_made_again_from_its_recipe(i2v, image, tmp_path):
    """The same bytes, but for where the noise comes from; all that is needed is the file and the model."""
    size = {name: CLIP[name] for name in ("height", "width")}
    specs = [
        "a cat sits",
        ClipSpec("the dog jumps", guidance_scale=3.0),
        ClipSpec("a cat sleeps", cut=image.rotate(90)),
    ]
    with FilmWriter(tmp_path / "film.mkv", fps=8, codec="ffv1") as film:
        options = {"seeds": [3, 4, 5], "negative_prompt": "bad", "num_frames": 9, "num_inference_steps": 2, **size}
        for clip in i2v.stream(image=image, prompts=specs, conditioning=PixelMotion(5), **options):
            film.append(clip)
        film.finalize(tmp_path / "done.mkv")
    recipe = read_recipe(tmp_path / "done.mkv")
    assert recipe == read_recipe(tmp_path / "film.mkv") and [clip["seed"] for clip in recipe.clips] == [3, 4, 5]
    settings = {
        name: value for name, value in recipe.film["settings"].items() if name != "noise" and value is not None
    }
    again = i2v(
        image=from_data_uri(recipe.film["image"]),
        prompts=[ClipSpec.from_dict(clip) for clip in recipe.clips],
        conditioning=scheme_from_dict(recipe.film["scheme"]),
        output_type="pil",
        **settings,
    ).frames[0]
    assert np.array_equal(read(tmp_path / "film.mkv")[0], np.stack(again))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_pipeline_goes_on_from_a_video_in_a_film(scheme, i2v, image, tmp_path):
    """Stopped after the video and after a clip, or not."""
    video = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), np.uint8)

    def make(path: Path, *stops: int) -> bytes:
        for stop in stops:
            with FilmWriter(path, fps=8, codec="ffv1") as film:
                if film.state is None:
                    film.append(Clip.from_video(video, scheme, CLIP["num_frames"], vae=i2v.vae))
                options = {"prompts": "a cat sits", "num_clips": stop, "generator": seeded(), **CLIP}
                for clip in i2v.stream(state=film.state, **options) if stop else ():
                    film.append(clip)
        return path.read_bytes()

    whole = make(tmp_path / "whole.mkv", 2)
    assert make(tmp_path / "film.mkv", 0, 1, 2) == whole
    frames, _ = read(tmp_path / "film.mkv")
    assert len(frames) == 14 + 2 * (9 - scheme.overlap)
    kept = 14 - (scheme.overlap if scheme.trims == "tail" else 0)
    assert np.array_equal(frames[:kept], video[:kept]) and len(read_recipe(tmp_path / "film.mkv").clips) == 2


def test_the_pipelines_tails_and_cuts_make_the_same_film_known_or_not(i2v, image, tmp_path):
    """A film of a list, and one of an iterator whose end nobody knows: the same bytes."""
    specs = ["a cat sits", ClipSpec("the dog jumps", cut=image.rotate(90)), "a cat sleeps"]
    contents = []
    for prompts in (specs, iter(specs)):
        path = tmp_path / f"{len(contents)}.mkv"
        options = {"image": image, "conditioning": PixelMotion(5), "generator": seeded(), "output_type": "pil", **CLIP}
        with FilmWriter(path, fps=8, codec="ffv1") as film:
            for clip in i2v.stream(prompts=prompts, **options):
                film.append(clip)
        contents.append(path.read_bytes())
    expected = i2v(prompts=specs, **{**options, "generator": seeded()}).frames[0]
    assert contents[0] == contents[1] and np.array_equal(read(path)[0], np.stack(expected))


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
