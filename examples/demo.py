"""Make a long film with svi-tiny, the model in this repository, and look at it; then see how films of one scene last.

    python examples/demo.py --output_dir outputs/demo

Writes `film.mp4`, which browsers play, and `contact_sheet.png` with a row for every clip. Then one prompt is told for
50 clips by svi-tiny as it is and with a LoRA that was trained by error recycling, from one image and with the same
noise: `comparison.png`. A sprite follows a voice in `talk.mp4`, which has the sound; `talk.png` shows how loud that is
and how large the sprite. At last, measured before, what error recycling does where it can be counted:
`recycling.png`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm

from diffusers_svi import LatentMotion, PixelMotion, SVIPipeline, save_video
from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.talk_pipeline import SVITalkPipeline
from svi_tiny import voices, world
from svi_tiny.tracker import radius_of, track


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SVI_TINY = Path(__file__).parent / "svi_tiny"
RECYCLING = Path(__file__).parents[1] / "docs" / "results" / "recycling"
SCHEMES = {"pixel": PixelMotion(num_frames=1), "latent": LatentMotion(num_latents=1)}
HELD_OUT_SEED = 1  # svi-tiny was trained on films of seed 0
# A pixel of the film's file is so many: players want colours at half the size.
ENLARGED = 4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Where the film goes.")
    parser.add_argument("--num_clips", type=int, default=8, help="Clips of 17 frames, two seconds each.")
    parser.add_argument("--story", type=int, default=5, help="Which story of the world to tell.")
    parser.add_argument(
        "--setting",
        choices=["creative", "consistent"],
        default="creative",
        help="A new prompt for every clip, or one.",
    )
    parser.add_argument("--conditioning", choices=sorted(SCHEMES), default="pixel", help="How clips are chained.")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="Denoising steps a clip.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--compare_clips", type=int, default=50, help="Clips of the comparison; 0: none is made.")
    parser.add_argument("--compare_story", type=int, default=5, help="Which story's start it begins with.")
    parser.add_argument("--talk_clips", type=int, default=4, help="Clips of the film that follows a voice; 0: none.")
    return parser.parse_args()


def clip_options(args: argparse.Namespace) -> dict[str, Any]:
    """How svi-tiny makes the clips of a film."""
    return {
        "height": world.SIZE,
        "width": world.SIZE,
        "num_frames": world.CLIP_FRAMES,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(args.seed),
    }


def contact_sheet(rows: list[tuple[str, np.ndarray]], path: Path, columns: int = 6) -> None:
    """One row of frames for every clip, under its prompt."""
    figure, axes = plt.subplots(len(rows), figsize=(columns * 1.5, len(rows) * 1.75), squeeze=False, layout="tight")
    for axis, (title, frames) in zip(axes[:, 0], rows, strict=True):
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        gaps = np.pad(chosen, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
        axis.imshow(np.hstack(gaps), interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


class Story:
    """A story of the world that svi-tiny was not trained on, and its film, clip by clip."""

    def __init__(self, number: int, num_clips: int, setting: str, args: argparse.Namespace):
        state, actions = world.sample_story(HELD_OUT_SEED, number, num_clips, setting)
        states = world.film(state, actions)
        self.image = PIL.Image.fromarray(world.render(state))
        self.prompts = [world.caption(states[16 * clip], action) for clip, action in enumerate(actions)]
        self.args = args

    def tell(self, pipe: SVIPipeline, **options):
        return pipe.stream(image=self.image, prompts=self.prompts, **clip_options(self.args), **options)


def enlarged(frames: np.ndarray) -> np.ndarray:
    """`(frames, height, width, 3)`, each pixel a square of `ENLARGED`."""
    return frames.repeat(ENLARGED, 1).repeat(ENLARGED, 2)


def make_film(pipe: SVIPipeline, args: argparse.Namespace) -> None:
    rows, film, sheet = [], args.output_dir / "film.mp4", args.output_dir / "contact_sheet.png"
    story = Story(args.story, args.num_clips, args.setting, args)
    for clip in story.tell(pipe, conditioning=SCHEMES[args.conditioning]):
        rows.append((f"{clip.index + 1}. {clip.prompt}", (clip.frames * 255).round().astype(np.uint8)))
    save_video(film, (frame for _, frames in rows for frame in enlarged(frames)), world.FPS)
    contact_sheet(rows, sheet)
    num_frames = sum(len(frames) for _, frames in rows)
    print(f"\n{num_frames} frames in {len(rows)} clips.\nFilm:          {film}\nContact sheet: {sheet}")


def compare(pipe: SVIPipeline, args: argparse.Namespace) -> None:
    """The same story by `pipe` as it is and with error recycling; rows of last frames."""
    story = Story(args.compare_story, args.compare_clips, "consistent", args)
    wanted = {1, 10, 25, 50, args.compare_clips}
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for name in ("svi-tiny", "with error recycling"):
        if rows:
            pipe.load_lora_weights(SVI_TINY / "loras" / "shot.safetensors")
            pipe.fuse_lora()
        # The LoRA knows how its clips are chained; without one they begin with the last frame of the clip before.
        clips = tqdm(story.tell(pipe), desc=f"One prompt, {name}", total=args.compare_clips)
        shown = {clip.index + 1: clip.frames[-1] for clip in clips if clip.index + 1 in wanted}
        frames = (np.stack(list(shown.values())) * 255).round().astype(np.uint8)
        rows.append((f"{name}: clips {', '.join(map(str, shown))}", frames))
    path = args.output_dir / "comparison.png"
    contact_sheet(rows, path, len(rows[0][1]))
    print(f"Comparison:    {path}")


def talk(args: argparse.Namespace) -> None:
    """A film that follows a voice, with the sound, and a picture of both."""
    sound, film, picture = (args.output_dir / name for name in ("voice.wav", "talk.mp4", "talk.png"))
    voice = voices.make_voice(HELD_OUT_SEED, 0, 1 + 16 * args.talk_clips)
    voices.write_voice(sound, voice)
    states = voices.follow_voice(voices.sample_start(HELD_OUT_SEED, 0), voice)
    pipe = SVITalkPipeline.from_pretrained(SVI_TINY / "model", audio_encoder=voices.make_ear())
    pipe.load_lora_weights(SVI_TINY / "loras" / "talk.safetensors")
    pipe.set_progress_bar_config(disable=True)
    clips = pipe.stream(
        image=PIL.Image.fromarray(world.render(states[0])),
        prompts=voices.tell(states[0], "audio"),
        audio=open_audio(sound, pipe.audio_encoder, world.FPS),
        audio_guidance_scale=1.0,
        **clip_options(args),
    )
    frames = np.concatenate([clip.frames for clip in tqdm(clips, "Following a voice", total=args.talk_clips)])
    save_video(film, enlarged(frames), world.FPS, audio=sound)
    followed = show_voice(frames, states, picture)
    print(f"Voice:         {film}, {picture}: loudness and size are correlated by {followed:.2f}")


def show_voice(frames: np.ndarray, states: list[world.State], path: Path, columns: int = 16) -> float:
    """Frames, and under them the radius that the loudness asks for and the one that is seen; their correlation."""
    shape, light = states[0].sprite.shape, states[0].light
    seen = np.array([radius_of(shape, frame.area) if frame.found else 0 for frame in track(frames, light)])
    wanted = np.array([state.sprite.radius for state in states])
    figure, (above, below) = plt.subplots(2, figsize=(12, 4.2), layout="constrained", height_ratios=(1, 2.6))
    chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    above.imshow(np.hstack(frames[chosen]), interpolation="nearest")
    above.axis("off")
    seconds = np.arange(len(frames)) / world.FPS
    below.plot(seconds, wanted, color="C1", label="loudness, as a radius")
    below.plot(seconds, seen, color="C0", label="radius that is seen")
    below.set(xlabel="seconds", ylabel="pixels", xlim=(0, seconds[-1]))
    below.legend(loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return float(np.corrcoef(seen[1:], wanted[1:])[0, 1])


def show_recycling(output_dir: Path) -> None:
    """The figures of `benchmarks/recycling.py` as they were committed."""
    figures = json.loads((RECYCLING / "recycling.json").read_text())["table"]
    kept = {name: f"{figures[name]['long']['identity'][0]:.0%}" for name in ("base", "control", "published")}
    clips = figures["published"]["long"]["clips"]
    path = shutil.copy(RECYCLING / "recycling.png", output_dir)
    print(
        f"Vectors:       {path}, measured before: after {clips} clips {kept['published']} of identities are kept by "
        f"error recycling, {kept['control']} by plain tuning and {kept['base']} by the base"
    )


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = SVIPipeline.from_pretrained(SVI_TINY / "model")
    make_film(pipe, args)
    if args.compare_clips:
        compare(pipe, args)
    if args.talk_clips:
        talk(args)
    show_recycling(args.output_dir)


if __name__ == "__main__":
    main()
