"""The world of svi-tiny as training data: a folder of videos laid out like the authors'."""

import csv
import os
from pathlib import Path

from .world import FPS, caption, film, render, sample_story


COLUMNS = ["Video Title", "Video Description", "Video URL", "Download URL", "Filename"]


def write_videos(
    folder: str | os.PathLike, num_videos: int, seed: int = 0, num_clips: int = 1, setting: str = "creative"
) -> Path:
    """Write `num_videos` mp4 files and `<folder>.csv` with their captions into `folder`.

    Args:
        folder: Where to; it is made if need be.
        num_videos (`int`): How many videos.
        seed (`int`, defaults to 0): Video `index` shows `sample_story(seed, index, num_clips, setting)`.
        num_clips (`int`, defaults to 1): Prompts a video; each adds 16 frames to the first.
        setting (`str`, defaults to `"creative"`): Whether prompts differ ("creative") or are the same ("consistent").

    Returns:
        The path of the CSV file.
    """
    import imageio

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_videos):
        state, actions = sample_story(seed, index, num_clips, setting)
        states = film(state, actions)
        captions = [caption(states[16 * clip], action) for clip, action in enumerate(actions)]
        name = f"{seed}-{index:06d}.mp4"
        # Full chroma and little loss: at 64 x 64 pixels the usual settings of a video file would be seen.
        imageio.mimwrite(
            folder / name,
            render(states),
            fps=FPS,
            codec="libx264",
            pixelformat="yuv444p",
            macro_block_size=1,
            output_params=["-crf", "8", "-threads", "1"],
        )
        rows.append([f"svi-tiny {seed}-{index}", "; then ".join(captions), "", "", name])
    file = folder / f"{folder.name}.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])
    return file
