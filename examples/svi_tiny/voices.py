"""Voices and poses for the world of svi-tiny, and films that follow them.

A *voice* is a hum of harmonics with some breath. Its level moves between knots, one every 0.75 seconds, over 24
decibels, so that nothing that was heard tells what comes next. The radius of a sprite that follows is what the
loudness of the frame says, `RADII[0]` to `RADII[1]` pixels. A *pose* is a picture of a stick figure, and a sprite that
follows is where it stands. What a prompt says of such films is neither how large the sprite is nor where it goes.

The ear is a `Wav2Vec2Model` with random weights: a seed and a form, nothing that was trained. Linear combinations of
what it hears around a frame tell how loud the frame is, and that is all that a sprite has to know.

    PYTHONPATH=examples python -m svi_tiny.voices --follows audio --output_dir outputs/voices --num_videos 192

writes such films as training data, with their voices or poses beside them, and the ear, for
`examples/train_erft.py --condition audio --audio_encoder outputs/voices/ear`.
"""

import argparse
import csv
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from .videos import write_video
from .world import FPS, LIGHT, SIZE, SIZES, State, over, render, sample_state


RATE = 16000
SAMPLES = RATE // FPS  # of a frame
VOICE_KNOTS = 6  # frames from one level of a voice to the next
VOICE_RANGE = 24.0  # decibels between its lowest level and its highest
# Decibels of a frame, against the mean power of its voice, at which a sprite is smallest and largest.
LEVELS = (-16.0, 7.0)
RADII = (6.0, 13.0)  # pixels
POSE_KNOTS = 16  # frames from one place of a pose to the next
PLACES = (14.0, 50.0)  # pixels, left to right and top to bottom


def sample_start(seed: int, index: int) -> State:
    """Where film `index` of a collection begins: a large sprite, well inside the picture, in some scene and light."""
    rng = np.random.default_rng([seed, index, 3])
    state = sample_state(rng, empty=0)
    x, y = rng.uniform(*PLACES, size=2)
    sprite = replace(state.sprite, size="large", x=float(x), y=float(y))
    return replace(state, sprite=sprite, light=tuple(rng.uniform(*LIGHT, size=3).tolist()))


def tell(start: State, follows: str) -> str:
    """The prompt of a film that begins with `start` and follows "audio" or a "pose"."""
    sprite = start.sprite
    motion = "stays still" if follows == "audio" else "moves"
    return f"a {sprite.size} {sprite.colour} {sprite.shape} {motion} {over(start)}"


# Voices


def make_voice(seed: int, index: int, num_frames: int) -> np.ndarray:
    """Voice `index` of a collection, of `num_frames` frames: float64 samples in [-1, 1], 16,000 a second."""
    rng = np.random.default_rng([seed, index, 4])
    time = np.arange(num_frames * SAMPLES) / RATE
    knots = np.arange(0, num_frames + 2 * VOICE_KNOTS, VOICE_KNOTS) / FPS
    level = np.interp(time, knots, VOICE_RANGE * (rng.random(len(knots)) - 1))
    pitch = rng.uniform(110, 220) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(0.5, 1) * time + rng.uniform(0, 7)))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    strengths = rng.uniform(0.3, 1, size=12) / np.arange(1, 13)
    hum = sum(strength * np.sin(number * phase) for number, strength in enumerate(strengths, 1))
    sound = (hum + 0.1 * rng.standard_normal(len(time))) * 10 ** (level / 20)
    return 0.9 * sound / np.abs(sound).max()


def loudness(voice: np.ndarray) -> np.ndarray:
    """How loud each frame of a voice is, in [0, 1]: its power in decibels, against that of all of it."""
    power = np.square(voice[: len(voice) // SAMPLES * SAMPLES].reshape(-1, SAMPLES)).mean(axis=1)
    level = 10 * np.log10(power / power.mean())
    return np.clip((level - LEVELS[0]) / (LEVELS[1] - LEVELS[0]), 0, 1)


def follow_voice(start: State, voice: np.ndarray) -> list[State]:
    """A state for every frame of a voice: `start`, with a sprite as large as the frame is loud."""
    radii = RADII[0] + (RADII[1] - RADII[0]) * loudness(voice)
    scales = (radii / SIZES[start.sprite.size]).tolist()
    return [replace(start, sprite=replace(start.sprite, scale=scale)) for scale in scales]


def make_ear() -> Wav2Vec2Model:
    """A `Wav2Vec2Model` of 2 layers of 32 channels, with random weights that are always the same."""
    config = Wav2Vec2Config(
        conv_dim=(32,) * 7,
        conv_bias=True,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wav2Vec2Model(config).eval()


def write_voice(path: Path, voice: np.ndarray) -> None:
    """As a wav file, mono, 16 bits a sample."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((voice * 32767).round().astype("<i2").tobytes())


# Poses


def follow_path(start: State, seed: int, index: int, num_frames: int) -> list[State]:
    """States of a sprite that goes from where it is from place to place, one every two seconds."""
    rng = np.random.default_rng([seed, index, 5])
    count = 1 + -(-num_frames // POSE_KNOTS)
    places = np.vstack([[start.sprite.x, start.sprite.y], rng.uniform(*PLACES, size=(count, 2))])
    frames = np.arange(num_frames)
    ways = np.stack([np.interp(frames, POSE_KNOTS * np.arange(count + 1), axis) for axis in places.T], axis=1)
    return [replace(start, sprite=replace(start.sprite, x=x, y=y)) for x, y in ways.tolist()]


def draw_poses(states: list[State]) -> np.ndarray:
    """Stick figures where the sprites are: red body, green arms, blue head; `(len(states), SIZE, SIZE, 3)` uint8."""
    grid = np.arange(SIZE) + 0.5
    pictures = np.zeros((len(states), SIZE, SIZE, 3))
    for picture, state in zip(pictures, states, strict=True):
        x, y = grid[None, :] - state.sprite.x, grid[:, None] - state.sprite.y
        body = np.maximum(np.abs(x) - 1.5, np.abs(y) - 8)
        arms = np.maximum(np.abs(x) - 8, np.abs(y) - 1.5)
        head = np.hypot(x, y + 9) - 3.5
        for channel, distance in enumerate((body, arms, head)):
            picture[..., channel] = 255 * np.clip(0.5 - distance, 0, 1)
    return pictures.round().astype(np.uint8)


# Training data


def write_films(folder: Path, follows: str, num_videos: int, seed: int = 0, num_frames: int = 49) -> Path:
    """Write films that follow "audio" or a "pose", these beside them, and `metadata.csv` with a column for them.

    Returns:
        The path of the CSV file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_videos):
        start, name = sample_start(seed, index), f"{seed}-{index:06d}"
        if follows == "audio":
            voice, beside = make_voice(seed, index, num_frames), f"{name}.wav"
            states = follow_voice(start, voice)
            write_voice(folder / beside, voice)
        else:
            states, beside = follow_path(start, seed, index, num_frames), f"{name}-pose.mp4"
            write_video(folder / beside, draw_poses(states))
        write_video(folder / f"{name}.mp4", render(states))
        rows.append([f"{name}.mp4", tell(start, follows), beside])
    file = folder / "metadata.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["file_name", "text", follows], *rows])
    return file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--follows", choices=("audio", "pose"), required=True, help="What the films follow.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to.")
    parser.add_argument("--num_videos", type=int, default=192, help="Default: %(default)s.")
    parser.add_argument("--num_frames", type=int, default=49, help="Of a film. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the films; 1 is held out. Default: %(default)s.")
    args = parser.parse_args()
    file = write_films(args.output_dir, args.follows, args.num_videos, args.seed, args.num_frames)
    if args.follows == "audio":
        make_ear().save_pretrained(args.output_dir / "ear")
    print(f"{args.num_videos} films, listed in {file}.")


if __name__ == "__main__":
    main()
