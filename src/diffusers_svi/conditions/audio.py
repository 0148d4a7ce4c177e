"""What wav2vec2 hears of a sound at every frame of a film: rows that are computed when they are asked for.

As published, with MultiTalk: the sound, mono, 16 kHz, at -23 LUFS, is brought to mean 0 and variance 1 over all of it
(`Wav2Vec2FeatureExtractor`), which takes its loudness out again, but for what keeps it from dividing by 0; it goes
through the convolutions of wav2vec2; what comes out is interpolated linearly, from the first to the last, to one row a
film frame; and the outputs of all layers of the encoder are stacked, `(rows, 12, 768)` for wav2vec2-base.

Sound of up to 80 seconds is encoded whole. A longer one is encoded in windows of 60 seconds, with 10 seconds on either
side that they do not keep, and these are the same whichever rows are asked for. Mean, variance, and the statistics of
the group norm in the first convolution are those of the whole sound, found beforehand, so that convolutions and
interpolation are the same as without windows. Attention is not: it looks at 80 seconds, and not at everything.

How much that is depends on the weights. Measured on 200 seconds and a small model with random weights, as root mean
square and as a share of the spread of all rows: 0.02% (in the worst row 0.03%) with weights as wav2vec2 initialises
them, which attend to everything a little, and 1.6% (30%) without the context; 1.3% (4%) with weights ten times as
large; 32% (85%) with 25 times as large ones, which attend to single places anywhere. The published weights were not
measured. A larger `window` makes longer sound exact, for more memory: attention of n rows looks at n x n.
"""

import hashlib
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from ..checks import check_number
from ..video import frame_rate
from .rows import ROW_FILES, bounds, read_rows
from .voice import BLOCK, RATE, SoundLike, Voice


# Frames a second of the published model.
FPS = 25
# Seconds of sound whose rows are kept of a window, and that it hears beside them, before and after.
WINDOW, CONTEXT = 60.0, 10.0
# Outputs of the convolutions that are computed at a time: of ten seconds.
CONVOLVED = 500
# Windows that are kept, so that a clip may lie across two.
KEPT = 2
# source: `Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm`
EPSILON = 1e-7

AudioLike = SoundLike | np.ndarray | torch.Tensor


class GivenFeatures:
    """Features that were computed before: `len(...)` rows, and `[start:stop]` of them, as [`AudioFeatures`] has them.

    Args:
        rows (`np.ndarray` or `torch.Tensor` of shape `(T, layers, channels)`):
            Floats; an array that is mapped into memory (`np.load(path, mmap_mode="r")`) stays on disk.

    Raises:
        ValueError: for another shape, none at all, or values that are no numbers.
    """

    def __init__(self, rows: np.ndarray | torch.Tensor):
        array = rows.detach().cpu().float().numpy() if isinstance(rows, torch.Tensor) else rows
        if array.ndim != 3 or not array.size or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                "`audio` as features must be floats of the shape (frames, layers, channels), (T, 12, 768) for "
                f"wav2vec2-base, got {tuple(rows.shape)} of {rows.dtype}. Pass a sound as `(array, rate)`."
            )
        digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
        for first in range(0, len(array), CONVOLVED):
            block = np.ascontiguousarray(array[first : first + CONVOLVED])
            if not np.isfinite(block).all():
                raise ValueError(f"`audio` has values that are no numbers, in one of the rows from {first} on.")
            digest.update(block.data)
        self._rows, self.fingerprint = array, digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        frames, layers, channels = self._rows.shape
        return frames, layers, channels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, last = bounds(rows, len(self))
        return torch.from_numpy(np.array(self._rows[first:last], np.float32))


class AudioFeatures:
    """Features of a sound: `len(...)` rows, and `[start:stop]` of them as `(n, layers, channels)` float32.

    As many rows as there are whole frames in the sound. A row is the same to the bit, whichever others are asked for.

    Args:
        voice (`Voice`): The sound.
        audio_encoder (`Wav2Vec2Model`): On any device, in evaluation mode; as published in float32.
        fps (`float`, defaults to 25): Frames a second of the film.
        feature_extractor (`Wav2Vec2FeatureExtractor`, *optional*):
            The encoder's; of it, only whether it normalises the sound is of interest. It does if not given.
        window, context (`float`, default to 60 and 10): Seconds that a window keeps, and hears beside these.

    Raises:
        ValueError: if the sound is shorter than a frame, the encoder is of another kind or training, or the feature
            extractor is for another rate.
    """

    def __init__(
        self,
        voice: Voice,
        audio_encoder: Wav2Vec2Model,
        fps: float = FPS,
        feature_extractor: Wav2Vec2FeatureExtractor | None = None,
        window: float = WINDOW,
        context: float = CONTEXT,
    ):
        _check_encoder(audio_encoder, feature_extractor)
        rate, self._voice, self._model = frame_rate(fps), voice, audio_encoder
        config = audio_encoder.config
        kernels, strides = config.conv_kernel, config.conv_stride
        self._hop = int(np.prod(strides))
        # Samples that one output of the convolutions looks at.
        self._field = 1 + sum((kernel - 1) * int(np.prod(strides[:layer])) for layer, kernel in enumerate(kernels))
        self._num_rows = num_rows(voice, fps)
        self._num_convolved = (voice.num_samples - self._field) // self._hop + 1
        if self._num_rows < 1 or self._num_convolved < 1:
            raise ValueError(
                f"`audio` is {voice.num_samples / RATE:.3f} seconds long, which is less than a frame at "
                f"{float(rate):g} a second, or than the {self._field / RATE:.3f} seconds that wav2vec2 looks at."
            )
        lengths = {"window": (window, 1), "context": (context, 0)}
        self._window, self._context = (
            max(round(_check_length(name, seconds) * rate), least) for name, (seconds, least) in lengths.items()
        )
        normalises = feature_extractor is None or feature_extractor.do_normalize
        self._mean, self._scale = _moments(voice) if normalises else (0.0, 1.0)
        self._statistics = self._group_statistics() if config.feat_extract_norm == "group" else None
        self._spans: dict[int, torch.Tensor] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._num_rows, self._model.config.num_hidden_layers, self._model.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sound, as it was given."""
        return self._voice.fingerprint

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, last = bounds(rows, len(self))
        parts = [torch.zeros(0, *self.shape[1:])]
        while first < last:
            stop = min(last, (first // self._window + 1) * self._window)
            begin = self._span_of(first)
            parts.append(self._span(begin)[first - begin : stop - begin])
            first = stop
        return torch.cat(parts)

    @property
    def _span_length(self) -> int:
        """Rows that are encoded together."""
        return self._window + 2 * self._context

    def _span_of(self, row: int) -> int:
        """The first row that is encoded together with one: at the ends there is as much sound on the other side."""
        wanted = row // self._window * self._window - self._context
        return max(0, min(wanted, self._num_rows - self._span_length))

    def _span(self, begin: int) -> torch.Tensor:
        if begin not in self._spans:
            kept = list(self._spans.items())[1 - KEPT :]
            self._spans = dict([*kept, (begin, self._encode(begin, min(begin + self._span_length, self._num_rows)))])
        return self._spans[begin]

    @torch.no_grad()
    def _encode(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last`, from the sound of these alone, `(n, layers, channels)`."""
        # Where each row lies between two outputs of the convolutions, in whole numbers.
        places = torch.arange(first, last) * (self._num_convolved - 1)
        steps = max(self._num_rows - 1, 1)
        before, share = places // steps, (places % steps) / steps
        begin, end = int(before[0]), min(int(before[-1]) + 2, self._num_convolved)
        convolved = torch.cat(
            [self._convolve(start, min(start + CONVOLVED, end)) for start in range(begin, end, CONVOLVED)]
        )
        before = (before - begin).to(convolved.device)
        after, share = (before + 1).clamp(max=len(convolved) - 1), share.to(convolved)[:, None]
        rows = (1 - share) * convolved[before] + share * convolved[after]
        hidden, _ = self._model.feature_projection(rows[None])
        return _layers_of(self._model.encoder, hidden)

    def _heard(self, first: int, last: int) -> np.ndarray:
        """Samples as the model hears them, float64."""
        return (self._voice.samples(first, last).astype(np.float64) - self._mean) * self._scale

    def _convolve(self, first: int, last: int) -> torch.Tensor:
        """Outputs `first` to `last` of the convolutions, `(n, channels)`."""
        samples = self._heard(self._hop * first, self._hop * (last - 1) + self._field)
        layers = self._model.feature_extractor.conv_layers
        hidden = torch.from_numpy(samples)[None, None].to(layers[0].conv.weight)
        for number, layer in enumerate(layers):
            if number == 0 and self._statistics is not None:
                mean, variance = (values.to(hidden) for values in self._statistics)
                norm = layer.layer_norm
                hidden = F.batch_norm(layer.conv(hidden), mean, variance, norm.weight, norm.bias, eps=norm.eps)
                hidden = layer.activation(hidden)
            else:
                hidden = layer(hidden)
        return hidden[0].T

    def _group_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Mean and variance of every channel of the first convolution over the whole sound, float64.

        Of what it computes of a stretch of samples p, w·p + b, they are w·E[p] + b and w·Cov[p]·w: the moments of ten
        samples tell all.
        """
        convolution = self._model.feature_extractor.conv_layers[0].conv
        kernel, stride = convolution.kernel_size[0], convolution.stride[0]
        count = (self._voice.num_samples - kernel) // stride + 1
        total, squares = np.zeros(kernel), np.zeros((kernel, kernel))
        for first in range(0, count, BLOCK // stride):
            last = min(first + BLOCK // stride, count)
            samples = self._heard(stride * first, stride * (last - 1) + kernel)
            stretches = np.lib.stride_tricks.sliding_window_view(samples, kernel)[::stride]
            total += stretches.sum(0)
            squares += stretches.T @ stretches
        mean = total / count
        covariance = squares / count - np.outer(mean, mean)
        weight = convolution.weight.detach().double().cpu().numpy()[:, 0]
        bias = 0 if convolution.bias is None else convolution.bias.detach().double().cpu().numpy()
        variance = np.einsum("ck,kl,cl->c", weight, covariance, weight).clip(0)
        return torch.from_numpy(weight @ mean + bias), torch.from_numpy(variance)


def num_rows(voice: Voice, fps: float = FPS) -> int:
    """As many rows as there are whole frames in a sound, at `fps` of them a second."""
    rate = frame_rate(fps)
    return voice.num_samples * rate.numerator // (RATE * rate.denominator)


def open_audio(
    audio: AudioLike | AudioFeatures | GivenFeatures,
    audio_encoder: Wav2Vec2Model | None = None,
    fps: float = FPS,
    feature_extractor: Wav2Vec2FeatureExtractor | None = None,
) -> AudioFeatures | GivenFeatures:
    """What a film follows of a sound: `len(...)` rows, one a film frame, and `[start:stop]` of them.

    Args:
        audio: A file or `(array, rate)`, see [`Voice`]; or its features, one row a film frame, which are taken as they
            are, also from an .npy or safetensors file, see [`read_rows`]. What was opened before is handed back.
        audio_encoder (`Wav2Vec2Model`, *optional*): Needed for a sound.
        fps (`float`, defaults to 25): Frames a second of the film.
        feature_extractor (`Wav2Vec2FeatureExtractor`, *optional*): The encoder's; normalises if not given.

    Raises:
        ValueError: if it cannot be read, or can be no sound; if the encoder is missing, training, or of another kind.
    """
    if isinstance(audio, (AudioFeatures, GivenFeatures)):
        return audio
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        return GivenFeatures(audio)
    if not isinstance(audio, (str, os.PathLike, tuple)):
        raise ValueError(
            f"`audio` must be a path, `(array, rate)`, or features (frames, layers, channels), got "
            f"{type(audio).__name__}."
        )
    if not isinstance(audio, tuple) and os.path.splitext(audio)[1].lower() in ROW_FILES:
        return GivenFeatures(read_rows(audio, "audio"))
    if audio_encoder is None:
        raise ValueError("`audio` is a sound: pass an `audio_encoder`, a `Wav2Vec2Model`, or the sound's features.")
    # Before the sound is read, which may take long.
    _check_encoder(audio_encoder, feature_extractor)
    frame_rate(fps)
    return AudioFeatures(Voice(audio), audio_encoder, fps, feature_extractor)


def _check_encoder(audio_encoder: Wav2Vec2Model, feature_extractor: Wav2Vec2FeatureExtractor | None) -> None:
    if not isinstance(audio_encoder, Wav2Vec2Model):
        raise ValueError(f"`audio_encoder` must be a `Wav2Vec2Model`, got {type(audio_encoder).__name__}.")
    if audio_encoder.training:
        raise ValueError("`audio_encoder` is training: with dropout no features are the same. Call its `eval()`.")
    if any(weight.is_meta for weight in audio_encoder.parameters()):
        raise ValueError("`audio_encoder` is offloaded layer by layer, its weights are not there. Keep it in memory.")
    if feature_extractor is not None and feature_extractor.sampling_rate != RATE:
        raise ValueError(
            f"`feature_extractor` is for {feature_extractor.sampling_rate} samples a second, but sounds are read at "
            f"{RATE}."
        )


def _check_length(name: str, seconds: float) -> float:
    if check_number(name, seconds) < 0:
        raise ValueError(f"`{name}` must be at least 0 seconds, got {seconds!r}.")
    return seconds


def _moments(voice: Voice) -> tuple[float, float]:
    """Mean of all samples, and what brings them to variance 1."""
    total, squares = 0.0, 0.0
    for first in range(0, voice.num_samples, BLOCK):
        samples = voice.samples(first, first + BLOCK).astype(np.float64)
        total, squares = total + float(samples.sum()), squares + float(samples @ samples)
    mean = total / voice.num_samples
    return mean, (max(squares / voice.num_samples - mean**2, 0) + EPSILON) ** -0.5


def _layers_of(encoder: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What each layer of the encoder gives for `(1, n, channels)`: `(n, layers, channels)`, float32, on the CPU."""
    outputs: list[torch.Tensor] = []

    def keep(layer: Any, given: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

    hooks = [layer.register_forward_hook(keep) for layer in encoder.layers]
    try:
        # Some encoders normalise what comes last.
        last = encoder(hidden)[0][0].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([*outputs[:-1], last], 1)
