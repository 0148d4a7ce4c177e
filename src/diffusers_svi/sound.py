"""The sound of a film, which a user gives as one file: of every stretch of frames its own part, encoded by itself.

What comes out for a stretch depends on the sound and on the stretch alone. Stretches that follow one another have
every sample once.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np


# What FFmpeg may take a file for: left to guess, it follows playlists to other files.
FORMATS = "wav,w64,aiff,caf,mp3,flac,ogg,aac,opus,ac3,avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
# Samples a second that AAC has.
RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
# Samples of a packet of AAC. A decoder needs the one before as well: the sound begins with one that is not heard.
PACKET = 1024
# Packets that are encoded before those of a stretch, and dropped, so that the encoder is used to the sound.
RUN_UP = 8
BITS_A_SECOND = 96_000


@contextmanager
def open_track(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """A file, opened by PyAV, and the first track of sound in it.

    Raises:
        ValueError: if it cannot be read, has no sound, or something in the block fails to.
    """
    import av

    try:
        with av.open(os.fspath(path), options={"format_whitelist": FORMATS}) as file:
            if not file.streams.audio:
                raise ValueError("there is no sound in it")
            yield file, file.streams.audio[0]
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ValueError(f"`audio`={os.fspath(path)!r} cannot be read as sound: {error}") from error


def sound_delay(path: str | os.PathLike) -> float:
    """Seconds by which the sound of a video begins after its picture; 0 for a file of sound alone.

    Raises:
        ValueError: if it cannot be read, or has no sound.
    """
    import av

    with open_track(path) as (file, sound):
        pictures = [
            stream for stream in file.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        begins = [float((stream.start_time or 0) * (stream.time_base or 0)) for stream in (sound, *pictures[:1])]
    return begins[0] - begins[-1]


class Sound:
    """The first track of sound in a file, decoded, on disk: 16 bits a sample, mono or stereo.

    Args:
        path: A sound file, or a video with sound; its first sample is the first.

    Raises:
        ValueError: if it cannot be read, or has no sound.
    """

    def __init__(self, path: str | os.PathLike):
        import av

        with open_track(path) as (file, stream):
            with open(path, "rb") as content:
                self.digest = hashlib.file_digest(content, "sha256").hexdigest()
            self.rate = stream.rate if stream.rate in RATES else 48000
            self.layout = "mono" if stream.channels == 1 else "stereo"
            self.channels = 1 if stream.channels == 1 else 2
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the film is written
            resampler = av.AudioResampler(format="s16", layout=self.layout, rate=self.rate)
            for frame in file.decode(stream):
                self._write(resampler.resample(frame))
            self._write(resampler.resample(None))
        self._length = self._file.tell() // (2 * self.channels)

    def samples(self, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` as `(last - first, channels)` int16; before and after the sound, silence."""
        samples = np.zeros((last - first, self.channels), np.int16)
        begin, end = max(first, 0), min(last, self._length)
        if begin < end:
            self._file.seek(2 * self.channels * begin)
            content = self._file.read(2 * self.channels * (end - begin))
            samples[begin - first : end - first] = np.frombuffer(content, np.int16).reshape(-1, self.channels)
        return samples

    def close(self) -> None:
        self._file.close()

    def _write(self, frames: list[Any]) -> None:
        for frame in frames:
            self._file.write(np.ascontiguousarray(frame.to_ndarray()).tobytes())


class Stretch:
    """The sound of a stretch of a film, as it is muxed: as AAC, or as it is in Matroska.

    Args:
        sound (`Sound`): All of it.
        output: The container that is written, to which nothing has been muxed.
        start (`Fraction`): When it begins, in seconds.
    """

    def __init__(self, sound: Sound, output: Any, start: Fraction):
        self._sound, self._is_aac = sound, output.format.name == "mp4"
        self._stream = output.add_stream("aac" if self._is_aac else "pcm_s16le", rate=sound.rate, layout=sound.layout)
        if self._is_aac:
            self._stream.bit_rate = BITS_A_SECOND * sound.channels
            # The other coder's quality depends on what it encoded long before.
            self._stream.codec_context.options = {"aac_coder": "fast"}
            self._first = -1 if start == 0 else math.ceil(start * sound.rate / PACKET)
            self._fed = self._first - RUN_UP
            self._ready: list[Any] = []
        else:
            self._first = math.ceil(start * sound.rate)

    def until(self, end: Fraction) -> Iterator[Any]:
        """The packets, from where it stands, of what begins before `end`, in seconds."""
        return self._packets(end) if self._is_aac else self._uncompressed(end)

    def _uncompressed(self, end: Fraction) -> Iterator[Any]:
        last = math.ceil(end * self._sound.rate)
        if last > self._first:
            yield from self._stream.encode(self._frame(self._first, last))
        self._first = last

    def _packets(self, end: Fraction) -> Iterator[Any]:
        last = math.ceil(end * self._sound.rate / PACKET)
        while self._first < last:
            while not self._ready:
                self._ready += self._stream.encode(self._frame(self._fed * PACKET, (self._fed + 1) * PACKET))
                self._fed += 1
            packet = self._ready.pop(0)
            if packet.pts >= self._first * PACKET:
                self._first += 1
                # The times of a file begin with 0, those that are heard with the packet after.
                packet.pts += PACKET
                packet.dts += PACKET
                yield packet

    def _frame(self, first: int, last: int) -> Any:
        import av

        samples = self._sound.samples(first, last)
        if self._is_aac:
            planes = np.ascontiguousarray(samples.T.astype(np.float32) / 32768)
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=self._sound.layout)
        else:
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=self._sound.layout)
        frame.sample_rate, frame.pts, frame.time_base = self._sound.rate, first, Fraction(1, self._sound.rate)
        return frame
