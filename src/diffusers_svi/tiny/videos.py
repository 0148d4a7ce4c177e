"""The world of svi-tiny as training data: a folder of videos laid out like the authors', or films made on the fly."""

import csv
import os
from functools import partial
from pathlib import Path

import numpy as np

from ..checks import check_count
from ..data import Video, fingerprint
from .world import CLIP_FRAMES, FPS, TRAVEL_FRAMES, State, caption, film, render, sample_story


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


def world_videos(
    num_videos: int,
    seed: int = 0,
    clip_frames: int = CLIP_FRAMES,
    history: int = 0,
    retold: int = 1,
    setting: str = "creative",
) -> list[Video]:
    """Films for `diffusers_svi.data.Samples`, made on the fly, with one clip each that goes on from what was before.

    Its first `retold` frames re-tell the end of the action before; the others show the action of the caption. As in a
    chain, every action takes `clip_frames - retold` frames. The clip is the end of the film, unless it re-tells more
    than one frame of another action: then a first clip begins where its own action does, and ends after it.

    Args:
        num_videos (`int`): How many films.
        seed (`int`, defaults to 0): Film `index` shows `sample_story(seed, index, num_clips, setting)`.
        clip_frames (`int`, defaults to 17): Frames of a clip.
        history (`int`, defaults to 0): Frames before the clip that are needed. There is always one more before these.
        retold (`int`, defaults to 1): Frames of the overlap of two clips.
        setting (`str`, defaults to `"creative"`): Whether actions differ ("creative") or are the same ("consistent").

    Raises:
        ValueError: for a negative number, or if a clip has less than 12 new frames.
    """
    for name, value, least in (("num_videos", num_videos, 1), ("history", history, 0), ("retold", retold, 1)):
        check_count(name, value, least)
    new = clip_frames - retold
    if new < TRAVEL_FRAMES:
        raise ValueError(
            f"`clip_frames`={clip_frames} less `retold`={retold} must leave at least {TRAVEL_FRAMES} new frames, in "
            f"which every change is over, got {new}."
        )
    # Frames 0 to num_before * new are told when the last action begins; retold + history + 1 of them are needed.
    num_before = -(-(history + retold) // new)
    last_start = num_before * new
    # A first clip is told by its caption alone: it must not begin with the end of another action.
    moved = setting == "creative" and retold > 1
    durations = [new] * num_before + [clip_frames - 1 if moved else new]
    videos = []
    for index in range(num_videos):
        story = (seed, index, num_before + 1, setting)
        states, actions = _film(story, durations), sample_story(*story)[1]
        before, last = (caption(states[i * new], actions[i]) for i in (num_before - 1, num_before))
        videos.append(
            Video(
                name=f"svi-tiny {seed}-{index}",
                caption=last,
                history_caption=before,
                num_frames=sum(durations) + 1,
                fingerprint=fingerprint("svi-tiny world 2", *story, new),
                read=partial(_render_frames, story, durations),
                starts=(last_start + 1 - retold,),
                first_start=last_start if moved else None,
            )
        )
    return videos


def _film(story: tuple, durations: list[int]) -> list[State]:
    return film(*sample_story(*story), durations)


def _render_frames(story: tuple, durations: list[int], indices: list[int]) -> np.ndarray:
    states = _film(story, durations)
    return render([states[index] for index in indices])
