"""Films that are killed: SIGKILL at random moments, the same again until it ends, and the bytes compared.

Half of them are made in Python, by a `FilmWriter` around `SVIPipeline.stream`, and half by `diffusers-svi generate`.
Every second one waits until the film's file changes, so that it falls into the writing. What was hit is told by what
is found on disk afterwards. This file as a program is what makes the films: it imports everything once, loads the
model for those in Python, and forks a process for each; the command runs from its entry point on, and loads its own.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL.Image
import psutil
from contestants import SVI_TINY, load_fused
from tqdm import tqdm

from diffusers_svi import FilmWriter, SVIPipeline, conditioning
from diffusers_svi.chain import read_notes
from diffusers_svi.cli import main


START = Path(__file__).parents[1] / "docs" / "images" / "start.png"
PROMPT = "a large red circle moves left over a green meadow"
# As small as films are made: what is tried is the file.
OPTIONS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
NUM_CLIPS = 5
SCHEMES = ("PixelMotion", "LatentMotion")
WRITING = ("writing frames", "writing the state")
# Between two looks at a file, in seconds.
PAUSE = 0.0002


def generate_options(path: Path, num_clips: int, **options: object) -> list[str]:
    """What `diffusers-svi` is called with for a film of svi-tiny."""
    told = {"out": path, "image": START, "num_clips": num_clips, "model": SVI_TINY, "lora": "none", **options}
    return ["generate", "--max_sequence_length=32", *(f"--{name}={value}" for name, value in told.items())]


@dataclass(frozen=True)
class Run:
    """A process that makes a film, and how it ended, once that is waited for."""

    pid: int
    wait: Callable[[], int]

    @property
    def ended(self) -> bool:
        return not psutil.pid_exists(self.pid)


class Maker:
    """Makes films, each in a process of its own, which is forked from one that has all imported."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, path: Path, by: str, scheme: str) -> Run:
        print(json.dumps([str(path), by, scheme]), file=self._server.stdin, flush=True)
        return Run(self._answer(), self._answer)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def _answer(self) -> int:
        return int(self._server.stdout.readline())


def serve() -> None:
    """For every line of the input, a film in a process of its own: its id, and when it has ended, its exit status."""
    # tqdm's own is shared by all processes: one that is killed while it has it would leave it taken.
    tqdm.set_lock(threading.RLock())
    pipe = load_fused(SVI_TINY, None)
    for line in sys.stdin:
        path, by, scheme = json.loads(line)
        pid = os.fork()
        if not pid:
            os._exit(make(pipe, path, scheme) if by == "Python" else run_command(path))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_command(path: str) -> int:
    """`diffusers-svi generate --prompt ...` from its entry point on."""
    # What is said on the output is for who asked for the film.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["diffusers-svi", *generate_options(Path(path), NUM_CLIPS, **OPTIONS, prompt=PROMPT)]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def make(pipe: SVIPipeline, path: str, scheme: str) -> int:
    try:
        with FilmWriter(path) as film:
            clips = pipe.stream(
                image=PIL.Image.open(START),
                prompts=PROMPT,
                num_clips=NUM_CLIPS,
                conditioning=getattr(conditioning, scheme)(1),
                seeds=itertools.count(),
                state=film.state,
                max_sequence_length=32,
                **OPTIONS,
            )
            for clip in clips:
                film.append(clip)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def kill_films(folder: Path, number: int, runs: list[dict], keep: Callable[[], None]) -> None:
    """Add to `runs` until they are `number`; `keep` is called after each.

    Raises:
        RuntimeError: if a run that was not killed fails.
    """
    whole: dict[tuple[str, str], tuple[bytes, float]] = {}
    maker = Maker()
    try:
        while len(runs) < number:
            index = len(runs)
            by = ("Python", "command")[index % 2]
            scheme = SCHEMES[index // 2 % 2] if by == "Python" else SCHEMES[0]
            if (by, scheme) not in whole:
                path = empty(folder / f"{by}-{scheme}") / "film.mp4"
                began = time.monotonic()
                if maker.start(path, by, scheme).wait():
                    raise RuntimeError(f"A film by {by} failed.")
                whole[by, scheme] = path.read_bytes(), time.monotonic() - began
            content, seconds = whole[by, scheme]
            path = empty(folder / "killed") / "film.mp4"
            # The moments do not depend on how often this was interrupted itself.
            start = partial(maker.start, path, by, scheme)
            hit = kill_and_go_on(start, path, random.Random(index), index // 2 % 4 in (1, 2), seconds)
            runs.append({"by": by, "scheme": scheme, "hit": hit, "equal": path.read_bytes() == content})
            keep()
    finally:
        maker.close()


def kill_and_go_on(
    start: Callable[[], Run], path: Path, drawn: random.Random, in_writing: bool, seconds: float
) -> list[str]:
    """What was hit by the kills: at least one, and then, in one of four films, another on the way to the end."""
    hit: list[str] = []
    while True:
        run = start()
        if not hit or (len(hit) == 1 and drawn.random() < 0.25):
            number, delay = drawn.randint(1, NUM_CLIPS), drawn.uniform(0, seconds)
            if in_writing and not hit:
                wait_for_writing(path, run, number)
            else:
                wait_until(run, time.monotonic() + delay)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(run.pid, signal.SIGKILL)
            status = run.wait()
            if status == -signal.SIGKILL:
                hit.append(found(path))
                continue
        else:
            status = run.wait()
        if status:
            raise RuntimeError(f"A film that was not killed ended with status {status}.")
        if hit:
            return hit
        # It ended before its moment came: once more from the beginning.
        empty(path.parent)


def wait_until(run: Run, moment: float) -> None:
    while time.monotonic() < moment and not run.ended:
        time.sleep(PAUSE)


def wait_for_writing(path: Path, run: Run, number: int) -> None:
    """Until the film's file changes once its state has been replaced `number` times: at first, when it is begun."""
    state = Path(f"{path}.state")
    for file, times in ((state, number), (path, 1)):
        before = stamp(file)
        while times and not run.ended:
            now = stamp(file)
            if now != before:
                before, times = now, times - 1
            time.sleep(PAUSE)


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_ino, told.st_size


def found(path: Path) -> str:
    """At what the run was killed, by what it left."""
    state, unfinished = Path(f"{path}.state"), Path(f"{path}.state.unfinished")
    if unfinished.exists():
        return "writing the state"
    if not state.exists():
        return "before the first clip"
    notes = read_notes(state)
    if stamp(path) and path.stat().st_size != json.loads(notes["film"])["size"]:
        return "writing frames"
    if int(notes.get("num_clips", 0)) == NUM_CLIPS:
        return "after the last clip"
    return "making a clip" if "num_clips" in notes else "before the first clip"


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    serve()
