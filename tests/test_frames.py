"""Videos: how many frames they have, and that any frame is the one that decoding all of them gives."""

import pickle
import subprocess
import threading
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from diffusers_svi import frames as frames_module
from diffusers_svi.frames import open_video
from small_videos import numbers, ramp_video, write_numbered


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
    upright = open_video(rotated, "grey")
    assert upright.read([1]).shape == (1, 64, 48, 3) and upright.size == (64, 48)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(ValueError, match="nothing.mp4 cannot be read: .*No such file"):
        open_video(tmp_path / "nothing.mp4", "a")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 cannot be read as a video: "):
        open_video(tmp_path / "text.mp4", "a")
    messages = {"sound.mkv": "holds no video.", "sound.wav": "cannot be read as a video: it is none of mov, .*, hevc"}
    for name, message in messages.items():
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        with pytest.raises(ValueError, match=f"{name} {message}"):
            open_video(tmp_path / name, "a")


# Long groups of pictures, with frames that are decoded in another order than they are shown in: 40 frames each.
GROUPS = {"g": "40", "bf": "3", "sc_threshold": "0"}
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=40:min-keyint=40:bframes=3:scenecut=0"}
NO_GROUPS = {"x264-params": "intra-refresh=1:keyint=40"}


def write_moving(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rate: int = 8,
    faststart: bool = False,
) -> Path:
    """100 frames, no two of them alike. With `faststart` an mp4 file has its index at the start."""
    picture = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
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


@pytest.mark.parametrize("kind", ["cut", "zeros"])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("b.mp4", "libvpx-vp9"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.avi", "mpeg4"),
    ],
)
def test_a_damaged_tail_is_noticed(tmp_path, name, codec, kind):
    path = write_moving(tmp_path / name, codec, {"g": "10"}, faststart=True)
    content = path.read_bytes()
    for share in (0.5, 0.7, 0.9):
        kept = int(share * len(content))
        path.write_bytes(content[:kept] + (bytes(len(content) - kept) if kind == "zeros" else b""))
        with pytest.raises(ValueError, match=f"{name} (is damaged|cannot be read as a video): "):
            open_video(path, "damaged")


def is_noticed(path: Path) -> bool:
    try:
        open_video(path, "damaged")
    except ValueError as error:
        assert path.name in str(error)
        return True
    return False


def ffmpeg_notices(path: Path) -> bool:
    """If it decodes one frame after the other, and all that it can."""
    try:
        with av.open(str(path)) as container:
            (stream,) = container.streams.video
            stream.thread_type = "NONE"
            stream.codec_context.flags |= av.codec.context.Flags.output_corrupt
            return any(frame.is_corrupt for frame in container.decode(video=0))
    except av.FFmpegError:
        return True


def flip_bits(content: bytes, count: int, rng: np.random.Generator) -> bytes:
    flipped = bytearray(content)
    # The index of an mp4 file is at its end.
    for place in rng.integers(len(content) // 10, len(content) * 8 // 10, size=count):
        flipped[place] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def test_flipped_bits_are_noticed(tmp_path):
    """In most files; FFmpeg conceals what they spoil."""
    path = write_moving(tmp_path / "a.mp4")
    content, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(20):
        path.write_bytes(flip_bits(content, 3, rng))
        noticed += is_noticed(path)
    assert noticed >= 12


def test_more_is_noticed_in_hevc_than_its_decoder_tells(tmp_path):
    path = write_moving(tmp_path / "a.mp4", "libx265", {"x265-params": "log-level=none"})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    told, noticed = set(), set()
    for index in range(40):
        path.write_bytes(flip_bits(content, 4, rng))
        told |= {index} if ffmpeg_notices(path) else set()
        noticed |= {index} if is_noticed(path) else set()
    assert noticed > told


def test_whatever_ffmpeg_notices_counts(tmp_path):
    """Also in the last frame, where several threads would miss it: a raw stream, cut in many places."""
    path, (y, x) = tmp_path / "a.h264", np.mgrid[:240, :416]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 416, 240, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(24):
            red = 128 + 100 * np.sin((x + 3 * index) / 17 + y / 29)
            green = 128 + 100 * np.sin(x / 23 - (y + 2 * index) / 11)
            pixels = np.stack([red, green, (x + y + 5 * index) % 256], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content, cuts = path.read_bytes(), 0
    for share in np.linspace(0.4, 0.98, 30):
        path.write_bytes(content[: int(share * len(content))])
        if ffmpeg_notices(path):
            cuts += 1
            assert is_noticed(path), share
    assert cuts > 20


@pytest.mark.parametrize(("name", "codec", "share"), [("a.mkv", "ffv1", 0.5), ("a.avi", "mpeg4", 0.9)])
def test_the_length_that_a_file_tells_is_that_of_its_frames(tmp_path, name, codec, share):
    """Nothing that is left is damaged."""
    path = write_moving(tmp_path / name, codec, {"g": "10"})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name} is damaged: it ends after [0-9.]+ of 12.5 seconds."):
        open_video(path, "cut")


def test_a_transport_stream_ends_with_a_whole_packet(tmp_path):
    path = write_moving(tmp_path / "a.ts", options={"g": "10"})
    content = path.read_bytes()
    path.write_bytes(b"".join(content[place : place + 188] + bytes(16) for place in range(0, len(content), 188)))
    assert open_video(path, "with error correction").num_frames == 100
    # What is left of the last frame can be decoded.
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.ts is damaged: its last packet is not whole."):
        open_video(path, "cut")


def cut_in_an_open_group(tmp_path: Path, **options: str) -> Path:
    """A film cut at a keyframe: frames shown before it need what is gone."""
    source, path = write_moving(tmp_path / "whole.mp4", options=OPEN_GROUPS), tmp_path / "cut.mp4"
    with av.open(str(source)) as whole, av.open(str(path), "w", options=options) as cut:
        (stream,) = whole.streams.video
        copied, begun = cut.add_stream_from_template(stream), False
        for packet in whole.demux(stream):
            begun = begun or (packet.is_keyframe and packet.pts > 0)
            if begun and packet.size:
                packet.stream = copied
                cut.mux(packet)
    return path


def test_frames_that_nothing_can_be_made_of_are_noticed(tmp_path):
    path = cut_in_an_open_group(tmp_path, use_editlist="0")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(decode_all(path)) == 60
    with pytest.raises(ValueError, match="cut.mp4 is damaged: about frame 1 something is missing or wrong."):
        open_video(path, "cut")
    # That the file itself hides them is no damage.
    path = cut_in_an_open_group(tmp_path)
    expected, video = decode_all(path), open_video(path, "cut")
    assert video.num_frames == len(expected) == 60
    for number in (0, 5, 45, 59):
        assert np.array_equal(video.read([number]), expected[[number]]), number


def test_sizes_that_change_are_noticed(tmp_path):
    small, large = (write_numbered(tmp_path / f"{size}.h264", 8, size, size).read_bytes() for size in (48, 64))
    (tmp_path / "a.h264").write_bytes(small + large)
    with pytest.raises(ValueError, match=r"a.h264 has frames of several sizes, \[\(48, 48\), \(64, 64\)\] \(width"):
        open_video(tmp_path / "a.h264", "grows")


def write_anamorphic(path: Path, picture: np.ndarray, aspect: Fraction) -> Path:
    """One grey picture, whose pixels are `aspect` times as wide as they are high."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"qp": "0"}
        stream.codec_context.sample_aspect_ratio = aspect
        pixels = np.repeat(picture[..., None], 3, axis=2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(16, 15), 68)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_circle_stays_a_circle(tmp_path, aspect, width, suffix):
    """Pixels that are not square: frames come out as wide as they are shown."""
    y, x = np.mgrid[:48, :64]
    inside = (y - 23.5) ** 2 + ((x - 31.5) * float(aspect)) ** 2 < (14 * min(1, float(aspect))) ** 2
    path = write_anamorphic(tmp_path / f"a{suffix}", 255 * inside.astype(np.uint8), aspect)
    (picture,) = open_video(path, "circle").read([0])
    assert picture.shape == (48, width, 3)
    white = picture[..., 1] > 127
    assert abs(white.any(axis=0).sum() - white.any(axis=1).sum()) <= 2
    assert white[23:25].all(axis=0).sum() == pytest.approx(28 * min(1, float(aspect)), abs=2)


def test_pixels_of_an_impossible_form(tmp_path):
    path = write_anamorphic(tmp_path / "a.mp4", np.zeros((48, 64), dtype=np.uint8), Fraction(8))
    with pytest.raises(ValueError, match="a.mp4 tells of pixels 8 times as wide as they are high: that is no video."):
        open_video(path, "wide")


def test_a_kind_without_decoder(tmp_path):
    path = write_numbered(tmp_path / "a.mp4", 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match="a.mp4 holds a video of a kind that FFmpeg has no decoder for."):
        open_video(path, "unknown")


def test_a_title_in_another_encoding_does_not_matter(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(write_numbered(tmp_path / "b.mkv", 3))) as source, av.open(str(path), "w") as target:
        target.metadata["title"] = "WHATEVER"
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copied
                target.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"WHATEVER", b"\xff" * 8))
    assert open_video(path, "a").num_frames == 3


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile inner/secret.mp4\n",
    "b.ffconcat": "ffconcat version 1.0\nfile {url}\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT10S" minBufferTime="PT1S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
}


@pytest.fixture
def requests_made():
    """The paths that a server is asked for, and where it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.paths.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        asked = SimpleNamespace(paths=[], port=server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield asked
        server.shutdown()


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_nothing_but_the_file_itself_is_opened(tmp_path, requests_made, name, suffix):
    """Of playlists neither files nor addresses, whatever they are called."""
    path, port = tmp_path / f"{name}{suffix}", requests_made.port
    (tmp_path / "inner").mkdir()
    write_numbered(tmp_path / "inner" / "secret.mp4", 3)
    path.write_text(PLAYLISTS[name].format(url=f"http://127.0.0.1:{port}/a.ts", port=port))
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as a video: "):
        open_video(path, "playlist")
    assert not requests_made.paths


def test_what_ffmpeg_would_open(tmp_path, requests_made):
    """The control: left alone it asks for what a playlist names."""
    path = tmp_path / "a.m3u8"
    path.write_text(PLAYLISTS["a.m3u8"].format(url=f"http://127.0.0.1:{requests_made.port}/a.ts"))
    with open(path, "rb") as file, pytest.raises(av.FFmpegError):
        av.open(file)
    assert requests_made.paths == ["/a.ts"]


def filtered(path: Path, fps: int) -> list[int]:
    """The numbers of the frames that FFmpeg's filter `fps` gives."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=stream), graph.add("fps", str(fps)), graph.add("buffersink"))
        graph.configure()
        pictures = []
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            with suppress(av.BlockingIOError, av.EOFError):
                while True:
                    pictures.append(graph.pull().to_ndarray(format="rgb24"))
    return numbers(np.stack(pictures))


UNEVEN = [0, 30, 70, 400, 410, 420, 430, 440, 900, 940, 1100, 1500, 1510, 1800]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [5, 16, 24])
@pytest.mark.parametrize("rate", [8, 12, 16, 25, 30, 64, None])
def test_resampled_frames_are_those_of_ffmpeg(tmp_path, rate, fps, suffix):
    options = {"rate": rate} if rate else {"milliseconds": UNEVEN}
    path = write_numbered(tmp_path / f"a{suffix}", 50, **options)
    expected, video = filtered(path, fps), open_video(path, "grey").resampled(fps)
    assert (video.num_frames, video.fps) == (len(expected), fps)
    assert numbers(video.read(list(range(video.num_frames)))) == expected


def test_a_resampled_video(tmp_path):
    """Numbers are those of its new frames; again at the same rate it is the same; another process can read it."""
    whole = open_video(write_numbered(tmp_path / "a.mp4", 50, rate=64), "grey")
    video = pickle.loads(pickle.dumps(whole.resampled(16)))
    # Each is the last of the four that are nearer to its tick than to another; of the first there are but two.
    assert numbers(video.read([3, 0, 11, 3])) == [13, 1, 45, 13]
    assert (video.num_frames, video.describe_length()) == (13, "13 frames at 16 a second")
    assert video.resampled(16) is video and video.fingerprint == whole.fingerprint
    assert whole.resampled(None) is whole and whole.describe_length() == "50 frames"
    with pytest.raises(ValueError, match=r"a.mp4 has no frames \[-1, 13\]; resampled it has only 13."):
        video.read([3, 13, -1])
    with pytest.raises(ValueError, match="ramp cannot be resampled to 16 frames a second: its frames have no times."):
        ramp_video().resampled(16)


def test_one_frame_remains_of_a_short_video(tmp_path):
    video = open_video(write_numbered(tmp_path / "a.mp4", 3, rate=64), "short").resampled(8)
    assert video.num_frames == 1 and numbers(video.read([0])) == [2]


@pytest.mark.parametrize(("name", "rate"), [("raw.h264", 8), ("fast.mkv", 4000)])
def test_without_timestamps_that_differ_rates_are_known_all_the_same(tmp_path, name, rate):
    video = open_video(write_moving(tmp_path / name, rate=rate), "moving")
    assert video.num_frames == 100 and video.resampled(rate // 4).num_frames in (25, 26)
    assert video.read([40]).shape == (1, 48, 64, 3)


@pytest.mark.parametrize(("name", "rate"), [("raw.h264", 8), ("fast.mkv", 4000)])
def test_without_timestamps_that_differ_all_frames_before_are_decoded(tmp_path, decoded, name, rate):
    """Once: there are none in a raw stream, and those of Matroska are in milliseconds."""
    path = write_moving(tmp_path / name, rate=rate)
    video = open_video(path, "moving")
    decoded.all = 0
    assert np.array_equal(video.read([70, 71]), decode_all(path)[[70, 71]]) and decoded.all == 72
