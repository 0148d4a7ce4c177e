"""`Voice`: a sound as wav2vec2 was trained to hear it, mono, 16 kHz, of one loudness; on disk, however long it is."""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..checks import check_count
from ..sound import open_track


# Samples a second that wav2vec2 was trained with.
RATE = 16000
# Loudness of the published preprocessing, in LUFS, and what counts as silence (ITU-R BS.1770).
TARGET, SILENCE = -23.0, -70.0
# Samples that are resampled or measured at a time.
BLOCK = 60 * RATE
# Loudness is measured in blocks of 0.4 s, one every 0.1 s. So many that come before are measured too, and dropped, so
# that the filters are used to the sound; an even number, as `BLOCK` has, since halves are rounded to even ones.
GATE, STEP, RUN_UP = 4 * RATE // 10, RATE // 10, 10
# Samples of a file are at most so many a second, and at least.
LEAST_RATE, MOST_RATE = 4000, 768_000
MOST_CHANNELS = 64
# Floats may leave [-1, 1], as what was made louder does; what counts to 32,768 leaves it by more.
LOUDEST = 16.0

SoundLike = str | os.PathLike | tuple[np.ndarray | torch.Tensor, int]


class Voice:
    """A sound, mono, 16,000 samples a second, at -23 LUFS; an hour of it takes 230 MB of disk, and no memory.

    Channels are averaged, rates changed by FFmpeg's resampler, which keeps what is below 6.5 kHz to 0.1 dB. The
    loudness is measured over the whole sound as `pyloudnorm` measures it (ITU-R BS.1770-4), minute by minute. Silence
    and what is shorter than 0.4 seconds have none and stay as loud as they are.

    Args:
        audio: A sound file, or a video with sound, of which the first track is taken; or an array and its rate:
            `(samples,)` or `(samples, channels)`, floats in [-1, 1] or int16, and samples a second.

    Attributes:
        num_samples (`int`): How many it has at 16 kHz.
        loudness (`float`, *optional*): As it was given, in LUFS; `None` for silence.
        fingerprint (`str`): SHA-256 of the file, or of the array and its rate.

    Raises:
        ValueError: if it cannot be read, has no sound, or holds what is no number; if the array or its rate cannot be
            right, or `pyloudnorm` is not installed.
    """

    def __init__(self, audio: SoundLike):
        _check_meter()
        if isinstance(audio, tuple):
            array, rate = _check_array(audio)
            digest, blocks = _digest_array(array, rate), _from_array(array, rate)
        else:
            digest, blocks = "", _from_file(audio)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as features are asked for
        for block in blocks:
            if not np.isfinite(block).all():
                raise ValueError("`audio` has values that are no numbers (NaN or infinite). Write the sound anew.")
            self._file.write(np.ascontiguousarray(block, np.float32).tobytes())
        self.num_samples = self._file.tell() // 4
        self.fingerprint = digest or _digest_file(audio)
        self._gain = 1.0
        self.loudness = self._measure()
        if self.loudness is not None:
            self._gain = 10 ** ((TARGET - self.loudness) / 20)

    def samples(self, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last`, as far as there are, `(n,)` float32."""
        first, last = max(first, 0), min(last, self.num_samples)
        self._file.seek(4 * first)
        return np.frombuffer(self._file.read(4 * max(last - first, 0)), np.float32) * np.float32(self._gain)

    def _measure(self) -> float | None:
        """Loudness of all of it, in LUFS."""
        import pyloudnorm

        if self.num_samples < GATE:
            return None
        per_block, loudness = BLOCK // STEP, []
        for block in range(0, round((self.num_samples - GATE) / STEP) + 1, per_block):
            run_up = min(block, RUN_UP)
            meter = pyloudnorm.Meter(RATE)
            begin = (block - run_up) * STEP
            meter.integrated_loudness(self.samples(begin, (block + per_block - 1) * STEP + GATE).astype(float))
            loudness += meter.blockwise_loudness[run_up : run_up + per_block]
        return _gated(np.array(loudness))


def _check_meter() -> None:
    try:
        import pyloudnorm  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "`audio` needs a package that is not installed: `pip install pyloudnorm`, or the extra "
            "`diffusers_svi[talk]`. Features that were computed before need none."
        ) from error


def _gated(loudness: np.ndarray) -> float | None:
    """Of all blocks, without those that are silent, or 10 LU below the mean of the others; `None` if all are."""
    heard = loudness[loudness >= SILENCE]
    if not len(heard):
        return None
    return _mean(heard[heard > _mean(heard) - 10])


def _mean(loudness: np.ndarray) -> float:
    """Loudness of the mean power."""
    return 10 * math.log10((10 ** (loudness / 10)).mean())


def _from_file(path: Any) -> Iterator[np.ndarray]:
    import av

    with open_track(path) as (file, stream):
        resampler = av.AudioResampler(format="fltp", rate=RATE)
        for frame in file.decode(stream):
            yield from (piece.to_ndarray().mean(0) for piece in resampler.resample(frame))
        yield from (piece.to_ndarray().mean(0) for piece in resampler.resample(None))


def _from_array(array: np.ndarray, rate: int) -> Iterator[np.ndarray]:
    import av

    scale = 1 / 32768 if array.dtype == np.int16 else 1.0
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
    for first in range(0, len(array), BLOCK):
        block = array[first : first + BLOCK].reshape(len(array[first : first + BLOCK]), -1)
        mono = (block.mean(1, dtype=np.float64) * scale).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(frame))
    if len(array):
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))


def _check_array(audio: tuple[Any, ...]) -> tuple[np.ndarray, int]:
    if len(audio) != 2 or not isinstance(audio[0], (np.ndarray, torch.Tensor)):
        kinds = ", ".join(type(part).__name__ for part in audio)
        raise ValueError(f"`audio` as a tuple must be `(array, rate)`, got ({kinds}).")
    array = audio[0].detach().cpu().numpy() if isinstance(audio[0], torch.Tensor) else audio[0]
    rate = check_count("audio[1]", audio[1], LEAST_RATE, MOST_RATE)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= MOST_CHANNELS):
        raise ValueError(
            f"`audio` must have the shape (samples,) or (samples, channels), got {array.shape}. Transpose what is "
            "(channels, samples)."
        )
    if array.dtype != np.int16 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`audio` has values of type {array.dtype}: take floats in [-1, 1] or int16.")
    peak = max(array.max(), -array.min()) if array.size else 0
    if array.dtype != np.int16 and peak > LOUDEST:
        raise ValueError(
            f"`audio` has values up to {peak:g}: floats must be in [-1, 1]. Pass `array / 32768` for what was 16 bits."
        )
    return array, rate


def _digest_file(path: Any) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest_array(array: np.ndarray, rate: int) -> str:
    digest = hashlib.sha256(f"{array.shape} {array.dtype} {rate}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
