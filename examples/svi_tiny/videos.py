"""The world of svi-tiny as training data: a folder of videos with captions, laid out like the authors'.

    PYTHONPATH=examples python -m svi_tiny.videos --output_dir outputs/world --num_videos 512 --setting consistent

`examples/train_erft.py --train_data_dir outputs/world --center_crop --fps 8` takes the folder.

A caption tells all actions of a film. In a consistent film they are one and the same, and fit every clip that is cut
from it; in a creative one a clip shows one or two of them. There `--before` helps: every video is one clip, captioned
by its own action alone, and the frames before it that a scheme asks for:

    Shot    --before 1                 the reference
    Film    --before 0 --retold 5      nothing, but the clip begins with the end of the action before
    Pro     --before 13 --retold 5     the anchor, and the clip before as far as its latents are carried
"""

import argparse
import csv
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffusers_svi.video import encode_frames

from .world import CLIP_FRAMES, FPS, TRAVEL_FRAMES, caption, film, render, sample_story


COLUMNS = ["Video Title", "Video Description", "Video URL", "Download URL", "Filename"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to; the CSV file has its name.")
    parser.add_argument("--num_videos", type=int, default=16, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the films; svi-tiny saw 0. Default: %(default)s.")
    parser.add_argument(
        "--num_clips", type=int, default=3, help="Actions of a film, each of 16 frames. Default: %(default)s."
    )
    parser.add_argument(
        "--setting",
        choices=("creative", "consistent"),
        default="creative",
        help="Whether the actions of a film differ, or are the same in one scene. Default: %(default)s.",
    )
    parser.add_argument(
        "--before",
        type=int,
        metavar="FRAMES",
        help="Write one clip of 17 frames and so many before it, instead of a film of --num_clips.",
    )
    parser.add_argument(
        "--retold",
        type=int,
        default=1,
        help="With --before: frames at the start of the clip that belong to the action before. Default: %(default)s.",
    )
    parser.add_argument(
        "--eight_lights", action="store_true", help="Films in one of eight lights, and not in any between."
    )
    return parser.parse_args()


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write `(frames, SIZE, SIZE, 3)` uint8 as a video of the world's rate."""
    # Full chroma and little loss: at 64 x 64 pixels the usual settings of a video file would be seen.
    encode_frames(path, frames, Fraction(FPS), crf=8, pixel_format="yuv444p")


def write_videos(
    folder: str | os.PathLike,
    num_videos: int,
    seed: int = 0,
    num_clips: int = 1,
    setting: str = "creative",
    before: int | None = None,
    retold: int = 1,
    eight_lights: bool = False,
) -> Path:
    """Write `num_videos` mp4 files and `<folder>.csv` with their captions into `folder`.

    Args:
        folder: Where to; it is made if need be.
        num_videos (`int`): How many videos.
        seed (`int`, defaults to 0): Video `index` shows `sample_story(seed, index, num_clips, setting)`.
        num_clips (`int`, defaults to 1): Actions a film; each adds 16 frames to the first.
        setting (`str`, defaults to `"creative"`):
            Whether actions differ ("creative") or are the same ("consistent"), which the caption tells once.
        before (`int`, *optional*):
            Not a film, but the end of one: a clip of 17 frames, captioned by the last action, and so many frames
            before it. The film has as many actions as that takes, each of `17 - retold` frames.
        retold (`int`, defaults to 1): Frames of that clip, from 1 to 5, that belong to the action before.
        eight_lights (`bool`, defaults to `False`): As in `sample_story`.

    Returns:
        The path of the CSV file.

    Raises:
        ValueError: if `before` is negative or `retold` out of its range.
    """
    new = CLIP_FRAMES - 1
    if before is not None:
        new = CLIP_FRAMES - retold
        if before < 0 or not TRAVEL_FRAMES <= new < CLIP_FRAMES:
            raise ValueError(
                f"`before` must be at least 0 and `retold` from 1 to {CLIP_FRAMES - TRAVEL_FRAMES}, got {before} and "
                f"{retold}."
            )
        num_clips = 1 + -(-(before + retold - 1) // new)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_videos):
        state, actions = sample_story(seed, index, num_clips, setting, eight_lights)
        states = film(state, actions, new)
        captions = [caption(states[new * clip], action) for clip, action in enumerate(actions)]
        if before is not None:
            states = states[-(before + CLIP_FRAMES) :]
        if before is not None or setting == "consistent":
            captions = captions[-1:]
        name = f"{seed}-{index:06d}.mp4"
        write_video(folder / name, render(states))
        rows.append([f"svi-tiny {seed}-{index}", "; then ".join(captions), "", "", name])
    file = folder / f"{folder.name}.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])
    return file


def main():
    args = vars(parse_args())
    file = write_videos(args.pop("output_dir"), **args)
    print(f"{args['num_videos']} videos, listed in {file}.")


if __name__ == "__main__":
    main()
