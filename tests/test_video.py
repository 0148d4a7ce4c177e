import io
import resource
import signal
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_svi.video import encode_frames, save_video


def make_frames(num_frames: int = 7, height: int = 32, width: int = 48) -> np.ndarray:
    """A brightness of its own for every frame, and for each of its halves."""
    frames = np.zeros((num_frames, height, width, 3), np.float32)
    frames += np.linspace(0.2, 0.6, num_frames)[:, None, None, None]
    frames[:, :, width // 2 :] += 0.2
    return frames


def read(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames) / 255, float(container.streams.video[0].average_rate)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("form", ["np", "pt", "bf16", "pil", "uint8", "pt uint8", "one by one"])
def test_what_is_written_is_what_is_read(tmp_path, suffix, form):
    frames = make_frames()
    pixels = (frames * 255).round().astype(np.uint8)
    given = {
        "np": frames,
        "uint8": pixels,
        "pt uint8": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "one by one": iter(frames),
        "pt": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "bf16": torch.from_numpy(frames).permute(0, 3, 1, 2).bfloat16(),
        "pil": [PIL.Image.fromarray(frame) for frame in pixels],
    }[form]
    save_video(tmp_path / f"film.{suffix}", given, fps=12.5)
    back, rate = read(tmp_path / f"film.{suffix}")
    assert rate == 12.5 and back.shape == frames.shape and np.abs(back - frames).max() < 0.03


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("film.avi", make_frames(), 16, "`path.suffix` must be one of .*, got '.avi'"),
        ("film.mp4", make_frames(), 0, "`fps` must be above 0, got 0"),
        ("film.mp4", make_frames(), float("nan"), "`fps` must be a finite number, got nan"),
        ("film.mp4", make_frames(0), 16, "at least one, got none"),
        ("film.mp4", make_frames(height=33), 16, r"of even height and width, .* the first is \(33, 48, 3\)"),
        ("film.mp4", torch.zeros(2, 16, 3, 4, 4), 16, "For latents see `decode_latents`"),
        ("film.mp4", (make_frames() * 255).astype(np.int32), 16, "`frames` must be RGB pictures"),
        ("film.mp4", [PIL.Image.new("RGB", (32, 32)), PIL.Image.new("RGB", (32, 64))], 16, "of one size"),
    ],
)
def test_what_is_refused(tmp_path, name, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        save_video(tmp_path / name, frames, fps)
    assert not any(tmp_path.iterdir())


def test_frames_are_asked_for_one_by_one(tmp_path):
    """Each is gone before the one after the next is made."""
    gone = []

    def frames():
        last = None
        for frame in make_frames(12):
            assert last is None or last() is None
            frame = frame.copy()
            gone.append(last := weakref.ref(frame))
            yield frame
            del frame

    save_video(tmp_path / "film.mp4", frames())
    assert len(gone) == len(read(tmp_path / "film.mp4")[0]) == 12


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path):
    """In a process that may not write files of more than 20 kB."""
    save_video(tmp_path / "film.mp4", make_frames())
    before = (tmp_path / "film.mp4").read_bytes()
    noise = "np.random.default_rng(0).random((60, 128, 128, 3))"
    script = f"import numpy as np; from diffusers_svi import save_video; save_video('film.mp4', {noise})"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1 and "File too large" in done.stderr.splitlines()[-1]
    assert (tmp_path / "film.mp4").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1"])
def test_the_same_frames_are_the_same_bytes(codec):
    """Whatever threads an encoder has."""
    noise = np.random.default_rng(0).integers(256, size=(60, 8, 8, 3), dtype=np.uint8)
    frames = noise.repeat(12, 1).repeat(12, 2)

    def encoded() -> bytes:
        content = io.BytesIO()
        options = {"movflags": "empty_moov+frag_keyframe"}
        encode_frames(content, iter(frames), Fraction(16), codec, options=options)
        return content.getvalue()

    contents = {encoded() for _ in range(5)}
    assert len(contents) == 1
    # Where there is AVX-512, x264's tree is not the same in every run.
    assert codec != "libx264" or b" mbtree=0 " in contents.pop()
