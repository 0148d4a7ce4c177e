"""A sound as a film follows it: one row a frame, as the published preprocessing gives them, of any length."""

import sys
import tracemalloc
import wave
from pathlib import Path

import av
import numpy as np
import pyloudnorm
import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from diffusers_svi.conditions import audio as audio_module
from diffusers_svi.conditions import voice as voice_module
from diffusers_svi.conditions.audio import CONTEXT, KEPT, WINDOW, AudioFeatures, open_audio
from diffusers_svi.conditions.voice import Voice
from small_videos import write_numbered


def make_model(**config) -> Wav2Vec2Model:
    """A small one of the kind of wav2vec2-base, in float64, so that what differs differs by more than rounding."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    position = {"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2Model(Wav2Vec2Config(conv_dim=(8,) * 7, **small, **position, **config)).eval().double()


@pytest.fixture(scope="module")
def model() -> Wav2Vec2Model:
    return make_model()


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise in bursts over a hum, with pauses; float32, at 16 kHz."""
    time = np.arange(round(seconds * 16000)) / 16000
    noise = 0.1 * np.random.default_rng(seed).standard_normal(len(time))
    bursts = np.sin(2 * np.pi * 1.3 * time) ** 2 * (np.sin(2 * np.pi * 0.11 * time) > -0.5)
    return (noise * bursts + 0.01 * np.sin(2 * np.pi * 200 * time)).astype(np.float32)


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.1) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path: Path, samples: np.ndarray, rate: int) -> Path:
    """16 bits a sample, `(samples,)` or `(samples, channels)`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype(np.int16).tobytes())
    return path


def published(model: Wav2Vec2Model, voice: Voice, frames: int, do_normalize: bool = True) -> torch.Tensor:
    """All rows at once: normalised, convolved, interpolated, encoded, and the layers' outputs stacked."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    samples = voice.samples(0, voice.num_samples).astype(np.float64)
    heard = extractor(samples, sampling_rate=16000, return_tensors="pt").input_values.double()
    with torch.no_grad():
        convolved = model.feature_extractor(heard)
        rows = F.interpolate(convolved, size=frames, mode="linear", align_corners=True).transpose(1, 2)
        hidden, _ = model.feature_projection(rows)
        hidden = model.encoder.layer_norm(hidden + model.encoder.pos_conv_embed(hidden))
        layers = []
        for layer in model.encoder.layers:
            hidden = layer(hidden)
            layers.append(hidden[0])
    return torch.stack(layers, 1).float()


def test_a_sine_has_the_loudness_it_is_known_to_have():
    """997 Hz at full scale are -3.01 LUFS."""
    assert abs(Voice((tone(997, 2, 16000, 1.0), 16000)).loudness + 3.01) < 0.1
    assert abs(Voice((tone(997, 2, 16000, 0.01), 16000)).loudness + 43.01) < 0.1


@pytest.mark.parametrize("seconds", [0.4, 3, 61.25, 130.05])
def test_loudness_measured_by_the_minute_is_that_of_the_whole(seconds):
    samples = speech(seconds)
    voice = Voice((samples, 16000))
    assert voice.loudness == pytest.approx(
        pyloudnorm.Meter(16000).integrated_loudness(samples.astype(float)), abs=1e-6
    )
    heard = voice.samples(0, voice.num_samples).astype(float)
    assert pyloudnorm.Meter(16000).integrated_loudness(heard) == pytest.approx(-23, abs=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_tone_keeps_its_frequency_and_its_time(rate, tmp_path):
    path = write(tmp_path / "a.wav", np.stack([tone(440, 2, rate), tone(440, 2, rate, 0.05)], 1), rate)
    voice = Voice(path)
    heard, expected = voice.samples(0, 99999), tone(440, 2, 16000)
    assert len(heard) == voice.num_samples == 32000
    error = np.abs(heard / heard[500:-500].std() - expected / expected[500:-500].std())
    assert error[500:-500].max() < 0.002


def test_what_is_above_8_khz_is_not_folded_back():
    voice = Voice((tone(440, 2, 48000, 0.01) + tone(11000, 2, 48000, 1.0), 48000))
    heard = voice.samples(0, 32000)
    spectrum = np.abs(np.fft.rfft(heard[2000:-2000] * np.hanning(28000)))
    assert np.argmax(spectrum) == 440 * 28000 // 16000
    assert spectrum[5000 * 28000 // 16000] < 0.01 * spectrum.max()


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mp3", "mp3"), ("ogg", "libopus")])
def test_sounds_of_many_kinds_are_heard_in_time(suffix, codec, tmp_path):
    """A tone after a second of silence begins after a second."""
    samples = np.concatenate([np.zeros(48000), tone(440, 1, 48000, 0.5)]).astype(np.float32)
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as output:
        stream = output.add_stream(codec, rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([samples] * 2), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    heard = np.abs(Voice(tmp_path / f"a.{suffix}").samples(0, 32000))
    assert 15960 < np.argmax(heard > 0.2 * heard.max()) < 16040


@pytest.mark.parametrize("kind", ["int16", "float32", "tensor"])
def test_an_array_is_heard_as_its_file_is(kind, tmp_path):
    """Channels are averaged."""
    samples = np.stack([speech(1.5, 1), speech(1.5, 2)], 1)
    file = Voice(write(tmp_path / "a.wav", samples, 22050))
    integers = (samples * 32767).astype(np.int16)
    floats = (integers / 32768).astype(np.float32)
    array = Voice(({"int16": integers, "float32": floats, "tensor": torch.from_numpy(floats)}[kind], 22050))
    assert file.num_samples == array.num_samples
    np.testing.assert_allclose(file.samples(0, 99999), array.samples(0, 99999), atol=1e-5)


def test_silence_stays_silent_and_has_features(model):
    voice = Voice((np.zeros(16000), 16000))
    assert voice.loudness is None and not voice.samples(0, 16000).any()
    rows = AudioFeatures(voice, model)[:]
    assert rows.shape == (25, 3, 16) and torch.isfinite(rows).all()


def test_a_sound_too_short_for_the_meter_is_heard(model):
    voice = Voice((speech(0.3), 16000))
    assert voice.loudness is None
    np.testing.assert_array_equal(voice.samples(0, 4800), speech(0.3))
    torch.testing.assert_close(AudioFeatures(voice, model)[:], published(model, voice, 7), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("seconds", "fps", "frames"), [(3.01, 25, 75), (2, 16, 32), (7.77, 30, 233), (2, 23.976, 47)])
def test_features_are_those_of_the_published_preprocessing(model, seconds, fps, frames):
    voice = Voice((speech(seconds), 16000))
    rows = AudioFeatures(voice, model, fps)
    assert rows.shape == (frames, 3, 16) and len(rows) == frames
    assert rows[:].dtype == torch.float32
    torch.testing.assert_close(rows[:], published(model, voice, frames), atol=2e-6, rtol=0)


def test_at_50_frames_a_second_features_are_those_of_transformers(model):
    """Where there are as many frames as outputs of the convolutions there is nothing to interpolate."""
    voice = Voice((speech(4.01), 16000))
    heard = Wav2Vec2FeatureExtractor()(voice.samples(0, 99999), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        states = model(heard.double(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        AudioFeatures(voice, model, 50)[:], torch.stack(states[1:], 2)[0].float(), atol=1e-5, rtol=0
    )


def test_models_with_layer_norms_are_encoded_as_transformers_does():
    """As wav2vec2-large has them; the last layer's output is normalised."""
    model = make_model(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    voice = Voice((speech(4.01), 16000))
    heard = Wav2Vec2FeatureExtractor()(voice.samples(0, 99999), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        output = model(heard.double(), output_hidden_states=True)
    rows = AudioFeatures(voice, model, 50)[:]
    torch.testing.assert_close(rows[:, 0], output.hidden_states[1][0].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[:, -1], output.last_hidden_state[0].float(), atol=1e-5, rtol=0)


def test_the_feature_extractor_says_whether_sound_is_normalised(model):
    voice = Voice((speech(1) + 0.05, 16000))
    plain = AudioFeatures(voice, model, feature_extractor=Wav2Vec2FeatureExtractor(do_normalize=False))[:]
    torch.testing.assert_close(plain, published(model, voice, 25, do_normalize=False), atol=2e-6, rtol=0)
    assert not torch.allclose(plain, AudioFeatures(voice, model)[:], atol=1e-3)


def test_loudness_makes_no_difference_to_features(model):
    """Normalisation takes it out again."""
    loud, quiet = (AudioFeatures(Voice((speech(2) * gain, 16000)), model)[:] for gain in (1, 0.01))
    torch.testing.assert_close(loud, quiet, atol=1e-4, rtol=0)


def without_attention() -> Wav2Vec2Model:
    """A model of which every part looks at what is near."""
    model = make_model(conv_bias=True)
    for layer in model.encoder.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
    return model


def test_in_windows_all_but_attention_is_exact():
    """Group norm, normalisation and interpolation are those of the whole sound, whatever a window holds of it."""
    model, voice = without_attention(), Voice((speech(31.3) * np.linspace(0.1, 1, 500800, dtype=np.float32), 16000))
    rows = AudioFeatures(voice, model, window=4, context=2)
    torch.testing.assert_close(rows[:], published(model, voice, 782), atol=2e-6, rtol=0)


def test_in_windows_attention_makes_the_difference(model):
    """Tolerance: a thousandth of the spread, at windows of 10 seconds, with random weights; without context, much."""
    voice = Voice((speech(40), 16000))
    expected = published(model, voice, 1000)
    errors = {
        context: ((AudioFeatures(voice, model, window=10, context=context)[:] - expected) ** 2).mean().sqrt()
        / expected.std()
        for context in (0, 5)
    }
    assert errors[5] < 0.001 < 0.01 < errors[0]


def test_what_a_window_hears_is_encoded_whole(model):
    """Sound of 80 seconds is, as it comes; here a tenth of that."""
    assert WINDOW + 2 * CONTEXT == 80
    voice = Voice((speech(8), 16000))
    rows = AudioFeatures(voice, model, window=WINDOW / 10, context=CONTEXT / 10)
    torch.testing.assert_close(rows[:], published(model, voice, 200), atol=2e-6, rtol=0)


def test_a_row_is_the_same_whatever_is_asked_for(model):
    """Across windows, in any order, one at a time, and as Python counts."""
    voice = Voice((speech(12.5), 16000))
    whole = AudioFeatures(voice, model, window=2, context=1)[:]
    rows = AudioFeatures(voice, model, window=2, context=1)
    assert torch.equal(rows[240:260], whole[240:260]) and torch.equal(rows[45:160], whole[45:160])
    assert torch.equal(rows[49:50], whole[49:50]) and torch.equal(rows[-3:], whole[-3:])
    assert len(rows._spans) == KEPT
    assert rows[300:999].shape == (12, 3, 16) and rows[400:].shape == rows[5:5].shape == (0, 3, 16)


def test_memory_does_not_grow_with_the_sound(model, tmp_path, monkeypatch):
    """What is in memory of four times as much sound is as much, but for a tenth."""
    monkeypatch.setattr(voice_module, "BLOCK", 2 * 16000)
    monkeypatch.setattr(audio_module, "BLOCK", 2 * 16000)
    peaks = []
    for seconds in (8, 32):
        path = write(tmp_path / "a.wav", speech(seconds), 16000)
        tracemalloc.start()
        rows = AudioFeatures(Voice(path), model, window=2, context=1)
        for first in range(0, 25 * seconds, 20):
            assert len(rows[first : first + 20]) == 20
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_features_that_were_computed_before_are_taken(tmp_path):
    array = np.random.default_rng(0).standard_normal((9, 3, 4)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    for given in (array, torch.from_numpy(array), np.load(tmp_path / "a.npy", mmap_mode="r")):
        rows = open_audio(given)
        assert rows.shape == (9, 3, 4) and len(rows) == 9 and rows[2:4].dtype == torch.float32
        np.testing.assert_array_equal(rows[2:4].numpy(), array[2:4].astype(np.float32))
        assert open_audio(rows) is rows


def test_a_sound_is_known_by_its_content(model, tmp_path):
    first, again, other = (write(tmp_path / f"{n}.wav", speech(1, n // 2), 16000) for n in (0, 1, 2))
    prints = [open_audio(path, model).fingerprint for path in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]
    arrays = [open_audio((speech(1), rate), model).fingerprint for rate in (16000, 16000, 8000)]
    assert arrays[0] == arrays[1] != arrays[2]
    features = np.zeros((2, 3, 4), np.float32)
    assert open_audio(features).fingerprint != open_audio(features + 1).fingerprint


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ((np.zeros(100), 16000), "`audio` is 0.006 seconds long, which is less than a frame"),
        ((np.zeros(0), 16000), "`audio` is 0.000 seconds long"),
        ((np.full(16000, np.nan), 16000), "`audio` has values that are no numbers"),
        ((np.zeros(16000), 16), "`audio\\[1\\]` must be a whole number of 4000 to 768000, got 16"),
        ((16000, np.zeros(16000)), "`audio` as a tuple must be `\\(array, rate\\)`, got \\(int, ndarray\\)"),
        ((np.zeros((2, 16000)), 16000), "must have the shape .* got \\(2, 16000\\). Transpose"),
        ((np.zeros(16000, np.int32), 16000), "`audio` has values of type int32"),
        ((np.full(16000, 3000.0), 16000), "`audio` has values up to 3000: .*`array / 32768`"),
        (np.zeros(16000), "`audio` as features must be floats of the shape .*Pass a sound as `\\(array, rate\\)`"),
        (np.zeros((0, 12, 768)), "`audio` as features must be"),
        (np.full((3, 2, 2), np.inf), "`audio` has values that are no numbers, in one of the rows from 0 on"),
        (5, "`audio` must be a path, .* got int"),
    ],
)
def test_sounds_that_cannot_be_followed(model, audio, message):
    with pytest.raises(ValueError, match=message):
        open_audio(audio, model)


def test_files_that_are_no_sound(model, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    write(tmp_path / "empty.wav", np.zeros(0), 16000)
    messages = {
        "text.wav": "`audio`=.*text.wav' cannot be read as sound",
        "none.wav": "`audio`=.*none.wav' cannot be read as sound",
        "empty.wav": "`audio` is 0.000 seconds long",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            open_audio(tmp_path / name, model)


def test_a_video_without_sound_is_refused(model, tmp_path):
    mute = write_numbered(tmp_path / "mute.mp4", 4)
    with pytest.raises(ValueError, match="`audio`=.*mute.mp4' cannot be read as sound: there is no sound in it"):
        open_audio(mute, model)


def test_models_that_cannot_hear(model):
    sound = (speech(1), 16000)
    with pytest.raises(ValueError, match="`audio` is a sound: pass an `audio_encoder`"):
        open_audio(sound)
    with pytest.raises(ValueError, match="`audio_encoder` must be a `Wav2Vec2Model`, got Linear"):
        open_audio("not_even_looked_for.wav", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`feature_extractor` is for 8000 samples a second"):
        open_audio(sound, model, feature_extractor=Wav2Vec2FeatureExtractor(sampling_rate=8000))
    with pytest.raises(ValueError, match="`fps` must be above 0, got 0"):
        open_audio(sound, model, 0)
    with pytest.raises(ValueError, match="`context` must be at least 0 seconds, got -1"):
        AudioFeatures(Voice(sound), model, context=-1)
    with pytest.raises(ValueError, match="Rows are taken as `\\[start:stop\\]`, got 3"):
        open_audio(sound, model)[3]
    with pytest.raises(ValueError, match="`audio_encoder` is offloaded layer by layer"):
        open_audio(sound, make_model().to("meta"))
    with pytest.raises(ValueError, match="`audio_encoder` is training"):
        open_audio(sound, make_model().train())


def test_without_the_meter_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    with pytest.raises(ValueError, match="`pip install pyloudnorm`"):
        Voice((speech(1), 16000))
    assert len(open_audio(np.zeros((2, 3, 4)))) == 2
