"""Videos: how many frames they have, and that any frame is the one that decoding all of them gives."""

import pickle
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from diffusers_svi.training import frames as frames_module
from diffusers_svi.training.frames import open_video
from small_videos import numbers, write_numbered


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_video_is_counted_and_read(tmp_path, suffix):
    """Containers that do not tell how many frames they have are decoded; frames come in the order asked for."""
    path = write_numbered(tmp_path / f"a{suffix}", num_frames=12)
    video = open_video(path, "grey")
    assert (video.num_frames, video.caption, video.name) == (12, "grey", str(path))
    pixels = video.read([7, 0, 11, 7])
    assert pixels.shape == (4, 48, 64, 3) and pixels.dtype == np.uint8
    assert numbers(pixels) == [7, 0, 11, 7]
    with pytest.raises(ValueError, match="has no frames \\[12, 20\\]; only 12 can be decoded."):
        video.read([3, 20, 12])


def test_a_video_is_known_by_its_content(tmp_path):
    first, other = (write_numbered(tmp_path / name, frames) for name, frames in (("a.mp4", 12), ("b.mp4", 13)))
    copy = tmp_path / "c.mp4"
    copy.write_bytes(first.read_bytes())
    assert open_video(first, "a").fingerprint == open_video(copy, "c").fingerprint
    assert open_video(first, "a").fingerprint != open_video(other, "a").fingerprint


def test_a_rotated_video_is_turned_upright(tmp_path):
    import imageio_ffmpeg

    path, rotated = write_numbered(tmp_path / "a.mp4", 3), tmp_path / "b.mp4"
    arguments = ["-v", "error", "-display_rotation", "90", "-i", path, "-c", "copy", rotated]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], check=True)
    assert open_video(rotated, "grey").read([1]).shape == (1, 64, 48, 3)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(ValueError, match="nothing.mp4 cannot be read: .*No such file"):
        open_video(tmp_path / "nothing.mp4", "a")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 cannot be read as a video: "):
        open_video(tmp_path / "text.mp4", "a")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="sound.wav holds no video."):
        open_video(tmp_path / "sound.wav", "a")


# Long groups of pictures, with frames that are decoded in another order than they are shown in: 40 frames each.
GROUPS = {"g": "40", "bf": "3", "sc_threshold": "0"}
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=40:min-keyint=40:bframes=3:scenecut=0"}
NO_GROUPS = {"x264-params": "intra-refresh=1:keyint=40"}


def write_moving(path: Path, codec: str = "libx264", options: dict[str, str] | None = None, rate: int = 8) -> Path:
    """100 frames, no two of them alike."""
    picture = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = options or GROUPS
        for index in range(100):
            pixels = np.roll(picture, index, axis=1)
            pixels[:, :8] = 2 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def decoded(monkeypatch) -> SimpleNamespace:
    """Counts the frames that FFmpeg decodes."""
    counter = SimpleNamespace(all=0)

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                counter.all += 1
                yield frame

    open_stream = frames_module._open_stream

    @contextmanager
    def counting(source, name):
        with open_stream(source, name) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(frames_module, "_open_stream", counting)
    return counter


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("a.mp4", GROUPS, 14),
        ("a.mkv", GROUPS, 14),
        ("a.ts", GROUPS, 16),
        ("open.mp4", OPEN_GROUPS, 14),
        ("open.ts", OPEN_GROUPS, 16),
    ],
)
def test_only_frames_from_the_keyframe_before_are_decoded(tmp_path, decoded, name, options, most):
    """They are those that decoding everything gives, bit for bit; so they are after a trip to another process."""
    path = write_moving(tmp_path / name, options=options)
    expected = decode_all(path)
    video = pickle.loads(pickle.dumps(open_video(path, "moving")))
    assert video.num_frames == len(expected) == 100
    for wanted in (range(80, 92), range(40, 52), [5, 85, 45], [39], [40], [99, 0], range(36, 44), [61, 50, 50]):
        decoded.all = 0
        assert np.array_equal(video.read(list(wanted)), expected[list(wanted)]), wanted
        if min(wanted) >= 40 and max(wanted) % 40 < 12:
            assert decoded.all <= most
    decoded.all = 0
    video.read([5, 85])
    assert decoded.all <= 6 + 6 + 2
    decoded.all = 0
    video.read([39])
    assert decoded.all == 40


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("refreshed.mp4", "libx264", NO_GROUPS),
        ("refreshed.ts", "libx264", NO_GROUPS),
        ("raw.h264", "libx264", GROUPS),
        ("a.avi", "mpeg4", {"g": "20", "bf": "2"}),
        ("a.mpg", "mpeg2video", {"g": "5", "bf": "2"}),
    ],
)
def test_where_seeking_misleads_frames_are_the_right_ones_all_the_same(tmp_path, name, codec, options):
    """No keyframes but the first, no timestamps, or guessed ones: in MPEG-PS they differ after seeking."""
    path = write_moving(tmp_path / name, codec, options)
    expected, video = decode_all(path), open_video(path, "moving")
    assert video.num_frames == 100
    for wanted in ([90, 91], list(range(38, 46)), *([number] for number in range(100))):
        assert np.array_equal(video.read(wanted), expected[wanted]), wanted


def test_frames_are_found_again_in_a_file_that_was_cut_off(tmp_path):
    """As many as can be decoded are counted, and read."""
    path = write_moving(tmp_path / "a.ts")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    expected, video = decode_all(path), open_video(path, "moving")
    assert 50 < video.num_frames == len(expected) < 100
    last = [video.num_frames - 1, 45]
    assert np.array_equal(video.read(last), expected[last])


def test_frames_that_nothing_can_be_made_of_are_not_counted_as_the_first(tmp_path):
    """A film cut at a keyframe in an open group: frames shown before it need what is gone."""
    source, path = write_moving(tmp_path / "whole.mp4", options=OPEN_GROUPS), tmp_path / "cut.mp4"
    with av.open(str(source)) as whole, av.open(str(path), "w", options={"use_editlist": "0"}) as cut:
        (stream,) = whole.streams.video
        copied, begun = cut.add_stream_from_template(stream), False
        for packet in whole.demux(stream):
            begun = begun or (packet.is_keyframe and packet.pts > 0)
            if begun and packet.size:
                packet.stream = copied
                cut.mux(packet)
    expected, video = decode_all(path), open_video(path, "cut")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(expected) == 60
    for number in (0, 5, 45, 59):
        assert np.array_equal(video.read([number]), expected[[number]]), number


@pytest.mark.parametrize(("name", "rate"), [("raw.h264", 8), ("fast.mkv", 4000)])
def test_without_timestamps_that_differ_all_frames_before_are_decoded(tmp_path, decoded, name, rate):
    """Once: there are none in a raw stream, and those of Matroska are in milliseconds."""
    path = write_moving(tmp_path / name, rate=rate)
    video = open_video(path, "moving")
    decoded.all = 0
    assert np.array_equal(video.read([70, 71]), decode_all(path)[[70, 71]]) and decoded.all == 72
