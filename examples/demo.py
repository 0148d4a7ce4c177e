"""Make a long film with svi-tiny, the model in this repository, and look at it.

    python examples/demo.py --output_dir outputs/demo

Writes `film.mp4`, clip by clip as it is made, and `contact_sheet.png` with a row for every clip.
"""

import argparse
from pathlib import Path

import imageio
import matplotlib
import numpy as np
import PIL.Image
import torch

from diffusers_svi import LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.tiny import world


matplotlib.use("Agg")
import matplotlib.pyplot as plt


MODEL = Path(__file__).parents[1] / "models" / "svi-tiny"
SCHEMES = {"pixel": PixelMotion(num_frames=1), "latent": LatentMotion(num_latents=1)}
HELD_OUT_SEED = 1  # svi-tiny was trained on films of seed 0


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
    return parser.parse_args()


def contact_sheet(rows: list[tuple[str, np.ndarray]], path: Path, columns: int = 6) -> None:
    """One row of frames for every clip, under its prompt."""
    figure, axes = plt.subplots(len(rows), figsize=(columns * 1.5, len(rows) * 1.75), squeeze=False, layout="tight")
    for axis, (title, frames) in zip(axes[:, 0], rows, strict=True):
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        gaps = np.pad(chosen, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(gaps), axis=1), interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = SVIPipeline.from_pretrained(MODEL)

    state, actions = world.sample_story(HELD_OUT_SEED, args.story, args.num_clips, args.setting)
    states = world.film(state, actions)
    prompts = [world.caption(states[16 * clip], action) for clip, action in enumerate(actions)]
    rows = []
    film = args.output_dir / "film.mp4"
    # Full chroma: at 64 x 64 pixels the usual subsampling would be seen.
    options = {"codec": "libx264", "pixelformat": "yuv444p", "macro_block_size": 1, "output_params": ["-crf", "8"]}
    with imageio.get_writer(film, fps=world.FPS, **options) as writer:
        for clip in pipe.stream(
            image=PIL.Image.fromarray(world.render(state)),
            prompts=prompts,
            conditioning=SCHEMES[args.conditioning],
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.CLIP_FRAMES,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(args.seed),
        ):
            frames = (clip.frames * 255).round().astype(np.uint8)
            for frame in frames:
                writer.append_data(frame)
            rows.append((f"{clip.index + 1}. {clip.prompt}", frames))
    sheet = args.output_dir / "contact_sheet.png"
    contact_sheet(rows, sheet)
    num_frames = sum(len(frames) for _, frames in rows)
    print(f"\n{num_frames} frames in {len(rows)} clips.\nFilm:          {film}\nContact sheet: {sheet}")


if __name__ == "__main__":
    main()
