"""Films that are killed: SIGKILL at random moments, the same again until it ends, and the bytes compared.

Half of them are made in Python, by a `FilmWriter` around `SVIPipeline.stream`, and half by `diffusers-svi generate`.
Every second kill waits until the film's file changes, so that it falls into the writing. What was hit is told by what
is found on disk afterwards. This file as a program is what makes the films in Python: it has the model loaded once and
forks a process for each.
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from contestants import SVI_TINY, load_fused

from diffusers_svi.chain import read_notes


START = Path(__file__).parents[1] / "docs" / "images" / "start.png"
PROMPT = "a large red circle moves left over a green meadow"
# As small as films are made: what is tried is the file.
OPTIONS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
NUM_CLIPS = 5
SCHEMES = ("PixelMotion", "LatentMotion")
WRITING = ("writing frames", "writing the state")
# Between two looks at a file, in seconds.
PAUSE = 0.0002


def generate_command(path: Path, num_clips: int, **options: object) -> list[str]:
    """A film of svi-tiny by the command."""
    told = {"num_clips": num_clips, "model": SVI_TINY, "lora": "none", "max_sequence_length": 32, **options}
    listed = [f"--{name}={value}" for name, value in told.items()]
    return [sys.executable, "-m", "diffusers_svi", "generate", f"--out={path}", f"--image={START}", *listed]


@dataclass(frozen=True)
class Run:
    """A process that makes a film: its id, whether it has ended, and how it did, once that is waited for."""

    pid: int
    ended: Callable[[], bool]
    wait: Callable[[], int]


class Command:
    """Makes films by `diffusers-svi generate --prompt ...`."""

    def start(self, path: Path, scheme: str) -> Run:
        command = [*generate_command(path, NUM_CLIPS, **OPTIONS), f"--prompt={PROMPT}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return Run(process.pid, lambda: process.poll() is not None, process.wait)


class Python:
    """Makes films by this file as a program."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, path: Path, scheme: str) -> Run:
        print(json.dumps([str(path), scheme]), file=self._server.stdin, flush=True)
        pid = int(self._server.stdout.readline())
        return Run(pid, lambda: not psutil.pid_exists(pid), lambda: int(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def serve() -> None:
    """For every line of the input, a film in a process of its own: its id, and when it has ended, its exit status."""
    pipe = load_fused(SVI_TINY, None)
    for line in sys.stdin:
        path, scheme = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                make(pipe, path, scheme)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def make(pipe, path: str, scheme: str) -> None:
    import PIL.Image

    from diffusers_svi import FilmWriter, conditioning

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


def kill_films(folder: Path, number: int, runs: list[dict], keep: Callable[[], None]) -> None:
    """Add to `runs` until they are `number`; `keep` is called after each.

    Raises:
        RuntimeError: if a run that was not killed fails.
    """
    whole: dict[tuple[str, str], tuple[bytes, float]] = {}
    python = Python()
    makers = {"Python": python, "command": Command()}
    try:
        while len(runs) < number:
            index = len(runs)
            how = ("Python", "command")[index % 2]
            scheme = SCHEMES[index // 2 % 2] if how == "Python" else SCHEMES[0]
            if (how, scheme) not in whole:
                path = empty(folder / f"{how}-{scheme}") / "film.mp4"
                began = time.monotonic()
                finish(makers[how].start(path, scheme))
                whole[how, scheme] = path.read_bytes(), time.monotonic() - began
            content, seconds = whole[how, scheme]
            path = empty(folder / "killed") / "film.mp4"
            # The moments do not depend on how often this was interrupted itself.
            hit = kill_and_go_on(makers[how], path, scheme, random.Random(index), index // 2 % 4 > 1, seconds)
            runs.append({"by": how, "scheme": scheme, "hit": hit, "equal": path.read_bytes() == content})
            keep()
    finally:
        python.close()


def kill_and_go_on(
    maker: Python | Command, path: Path, scheme: str, drawn: random.Random, in_writing: bool, seconds: float
) -> list[str]:
    """What was hit by the kills: at least one, and then, in one of four films, another on the way to the end."""
    hit: list[str] = []
    while True:
        run = maker.start(path, scheme)
        if not hit or (len(hit) == 1 and drawn.random() < 0.25):
            number, delay = drawn.randint(1, NUM_CLIPS), drawn.uniform(0, seconds)
            if in_writing and not hit:
                wait_for_writing(path, run.ended, number)
            else:
                wait_until(run.ended, time.monotonic() + delay)
            if not run.ended():
                os.kill(run.pid, 9)
            if run.wait() == -9:
                hit.append(found(path))
                continue
        else:
            finish(run)
        if hit:
            return hit
        # It ended before its moment came: once more from the beginning.
        empty(path.parent)


def finish(run: Run) -> None:
    status = run.wait()
    if status:
        raise RuntimeError(f"A film that was not killed ended with status {status}.")


def wait_until(ended: Callable[[], bool], moment: float) -> None:
    while time.monotonic() < moment and not ended():
        time.sleep(PAUSE)


def wait_for_writing(path: Path, ended: Callable[[], bool], number: int) -> None:
    """Until the film's file changes once its state has been replaced `number` times: at first, when it is begun."""
    state = Path(f"{path}.state")
    for file, times in ((state, number), (path, 1)):
        before = stamp(file)
        while times and not ended():
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
