"""A stream that is killed goes on from its last state, and one that runs for ever keeps nothing of what it made."""

import gc
import itertools
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from conftest import CLIP, make_components, quiet, seeded
from diffusers_svi import LatentMotion, PixelMotion, SVIPipeline


SCRIPT = """
import os
import signal
import sys
from pathlib import Path
from threading import Timer

import numpy as np
import PIL.Image
import torch

from diffusers_svi import ChainState, SVIPipeline, LatentMotion, PixelMotion

model, folder, conditioning = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
saved = folder / "film.state"
pipe = SVIPipeline.from_pretrained(model)
clips = pipe.stream(
    image=PIL.Image.open(model / "start.png"),
    prompts=["a cat sits", "the dog jumps"],
    num_clips=6,
    conditioning=conditioning,
    generator=torch.Generator().manual_seed(0),
    state=ChainState.load(saved) if saved.exists() else None,
    height=32, width=32, num_frames=9, num_inference_steps=2,
)
for clip in clips:
    np.save(folder / f"{clip.index}.npy", clip.frames)
    clip.state.save(saved)
    print(clip.index, flush=True)
    if clip.index + 1 == int(sys.argv[4]):  # somewhere in the next one
        Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


def run(model: Path, folder: Path, conditioning, kill_after: int = 0) -> list[int]:
    """Run the script; with `kill_after`, it kills itself when that many clips are finished."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(model), str(folder), repr(conditioning), str(kill_after)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == (-signal.SIGKILL if kill_after else 0), process.stderr
    return [int(line) for line in process.stdout.split()]


@pytest.mark.parametrize("conditioning", [PixelMotion(5), LatentMotion(1)], ids=str)
def test_a_killed_stream_goes_on_bit_identically(tmp_path, image, conditioning):
    model = tmp_path / "model"
    SVIPipeline(**make_components("i2v")).save_pretrained(model)
    image.save(model / "start.png")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(model, whole, conditioning) == list(range(6))

    before = run(model, killed, conditioning, kill_after=3)
    after = run(model, killed, conditioning)
    assert before == list(range(len(before))) and after[-1] == 5 and after[0] in (len(before), len(before) + 1)
    for index in range(6):
        assert np.array_equal(np.load(whole / f"{index}.npy"), np.load(killed / f"{index}.npy")), index


def test_nothing_is_kept_of_clips_that_are_gone(i2v, image):
    prompts = (f"a cat {'sits ' * n}" for n in itertools.count(1))
    clips = quiet(i2v).stream(image=image, prompts=prompts, generator=seeded(), output_type="np", **CLIP)
    frames, states = [], []
    for clip in itertools.islice(clips, 6):
        frames.append(weakref.ref(clip.frames))
        states.append(weakref.ref(clip.state))
    del clip
    gc.collect()
    # The stream holds the clip it has just given, and lets go of it before it makes the next.
    assert [ref() is None for ref in frames] == [True] * 5 + [False]
    assert [ref() is None for ref in states] == [True] * 5 + [False]
