"""Films that go on from a video."""

import av
import numpy as np
import PIL.Image
import pytest
import torch

from conftest import CLIP, make_components, quiet
from diffusers_svi import ChainState, Clip, FilmWriter, HeldLatents, LatentMotion, PixelMotion, SVIPipeline, save_video
from diffusers_svi.source_video import open_source_video
from diffusers_svi.wan import encode_video


SEEDS = {"seeds": [3, 1, 4], **CLIP}


@pytest.fixture
def frames() -> np.ndarray:
    """20 of 32 x 32 pixels, uint8."""
    coarse = np.random.default_rng(0).integers(256, size=(20, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(PIL.Image.fromarray(frame).resize((32, 32))) for frame in coarse])


def film_from(pipe, frames, scheme) -> list[Clip]:
    first = Clip.from_video(frames, scheme, 9, vae=pipe.vae)
    return [first, *pipe.stream(prompts=["a cat sits", "the dog jumps"], state=first.state, **SEEDS)]


@pytest.mark.parametrize("scheme", [PixelMotion(5), LatentMotion(1), LatentMotion(0)], ids=str)
def test_frames_are_counted_from_the_video_on(i2v, frames, scheme):
    first, *clips = film_from(i2v, frames, scheme)
    overlap = scheme.overlap
    again = 5 if scheme == PixelMotion(5) else 0
    assert (first.index, first.start, len(list(first.frames))) == (-1, 0, 20)
    assert [clip.start for clip in clips] == [20 - again, 29 - again - overlap]
    assert sum(len(clip.frames) for clip in clips) + 20 - again == 20 + 2 * (9 - overlap)
    assert [clip.index for clip in clips] == [0, 1]


def test_the_last_frames_are_carried_on_as_those_of_a_clip(i2v, frames):
    """As in a chain whose clip before was the video."""
    state = ChainState.from_video(frames, PixelMotion(5), 9)
    assert np.array_equal(state.frames[0].permute(1, 2, 3, 0).numpy(), frames[-5:])
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    chained = ChainState(PixelMotion(5), 9, video[:, :, 0]).after(torch.zeros(1, 16, 5, 4, 4), video)
    assert torch.equal(state.frames, chained.frames) and state.start == 15
    torch.testing.assert_close(state.image, video[:, :, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "context"), [(20, 9), (8, 5), (9, 9)])
def test_the_end_is_encoded_where_latents_are_carried(i2v, frames, count, context):
    video = torch.from_numpy(frames[:count]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = encode_video(i2v.vae, video[:, :, -context:])[:, :, -1:]
    state = ChainState.from_video(frames[:count], LatentMotion(1), 9, vae=i2v.vae)
    torch.testing.assert_close(state.latents, expected, rtol=0, atol=1e-5)
    assert state.continues and state.frames is None and state.start == count


def test_every_kind_of_model_goes_on(kind, pipe, frames):
    scheme = {"ti2v-5b": HeldLatents(1), "a14b": LatentMotion(1)}.get(kind, PixelMotion(5, "reference"))
    *_, last = film_from(pipe, frames, scheme)
    assert last.index == 1 and np.isfinite(last.frames).all()


def test_frames_may_be_given_in_any_form(frames):
    forms = {
        "floats": frames / 255,
        "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2) / 255,
        "images": [PIL.Image.fromarray(frame) for frame in frames],
    }
    for name, form in forms.items():
        assert np.array_equal(np.stack(list(open_source_video(form).frames())), frames), name


def test_a_file_is_brought_to_size_and_rate(tmp_path, frames):
    big = [PIL.Image.fromarray(frame).resize((70, 50)) for frame in frames]
    save_video(tmp_path / "clip.mp4", big, fps=20)
    source = open_source_video(tmp_path / "clip.mp4")
    assert (source.num_frames, source.height, source.width) == (20, 48, 64)
    source = open_source_video(tmp_path / "clip.mp4", 32, 32, fps=10)
    shapes = {frame.shape for frame in source.frames(4)}
    assert source.num_frames == 10 and shapes == {(32, 32, 3)} and len(list(source.frames(4))) == 6


def test_a_film_file_begins_with_the_video(i2v, tmp_path, frames):
    save_video(tmp_path / "clip.mp4", frames, fps=16)
    options = {"prompts": ["a cat sits", "the dog jumps"], **SEEDS}

    def make(path, stop_after):
        with FilmWriter(path) as film:
            if film.state is None:
                film.append(Clip.from_video(tmp_path / "clip.mp4", PixelMotion(5), 9))
            for clip in i2v.stream(state=film.state, **options):
                film.append(clip)
                if clip.index == stop_after:
                    return

    make(tmp_path / "whole.mp4", None)
    make(tmp_path / "stopped.mp4", 0)
    make(tmp_path / "stopped.mp4", None)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "stopped.mp4").read_bytes()
    with av.open(str(tmp_path / "whole.mp4")) as film:
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(decoded) == 20 - 5 + 9 - 5 + 9
    given = np.stack(list(open_source_video(tmp_path / "clip.mp4").frames()))[:15]
    assert np.abs(np.stack(decoded[:15]).astype(float) - given).mean() < 6


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"conditioning": PixelMotion(5)}, "has 4 frames, but .* goes on from 5"),
        (4, {"conditioning": LatentMotion(1)}, "has 4 frames, but .* goes on from 5"),
        (9, {"conditioning": LatentMotion(1)}, "carries latents: pass `vae`"),
        (0, {"conditioning": PixelMotion(1)}, "must have frames of at least 16 x 16 pixels, got 0"),
        (9, {"conditioning": PixelMotion(1), "height": 8}, "`height` must be a whole number of at least 16"),
    ],
)
def test_videos_that_cannot_be_gone_on_from(frames, count, options, message):
    with pytest.raises(ValueError, match=message):
        ChainState.from_video(frames[:count], num_frames=9, **options)


def test_a_file_that_is_no_video(tmp_path):
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        ChainState.from_video(tmp_path / "clip.mp4", PixelMotion(1))


def test_a_video_of_another_size_goes_on():
    pipe = quiet(SVIPipeline(**make_components("ti2v-5b")))
    frames = np.random.default_rng(0).random((12, 64, 96, 3))
    first = Clip.from_video(frames, HeldLatents(1), 9, vae=pipe.vae, height=64, width=64)
    (clip,) = pipe.stream(prompts=["a cat sits"], state=first.state, **{**SEEDS, "height": 64, "width": 64})
    assert clip.frames.shape == (4, 64, 64, 3) and clip.start == 12
