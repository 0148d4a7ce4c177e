"""What a film of any length costs, and whether it survives: the file and the memory. Its time: `chain.py`.

    python benchmarks/film.py --output_dir docs/results/film

All with svi-tiny, each by itself with `--only`:

- memory: peak resident memory of `diffusers-svi generate`, the whole process, of a long film over a short one. Aim: at
  most 1.05.
- append: bytes and time of `FilmWriter.append`, the last ten clips over the first ten of another film, in turn, whose
  frames are the same. Aim: at most 1.1. The state, which it writes too, is timed by itself.
- kills: runs killed by SIGKILL at random moments and run again (see `kills.py`). Aim: the bytes of a film that was
  never stopped, each time, with ten kills at least while the file is written.
- overlap: time of a film with `FilmWriter(background=True)` over one without, with a thread each.

Writes `film.json` and a plot. What is there already is kept: a run that was interrupted goes on.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from contestants import SVI_TINY, WORLD_OPTIONS, load_fused
from kills import PROMPT, START, WRITING, generate_options, kill_films
from report import provenance, ratio_of, write_json

from diffusers_svi import Clip, FilmWriter, PixelMotion, SVIPipeline


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Prints the peak resident memory of a command. It is small itself: what a process had before it became another counts.
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
AIMS = {"memory": 1.05, "append bytes": 1.1, "append time": 1.1}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="Default: all.")
    parser.add_argument("--num_clips", type=int, default=200, help="Of the long films. Default: %(default)s.")
    parser.add_argument("--num_runs", type=int, default=3, help="Whose memory is measured. Default: %(default)s.")
    parser.add_argument("--num_kills", type=int, default=40, help="Default: %(default)s.")
    parser.add_argument("--num_films", type=int, default=3, help="Of 20 clips, by either way. Default: %(default)s.")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="Of timed clips. Default: %(default)s.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/film"), help="Default: %(default)s.")
    parser.add_argument("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    parser.add_argument("--quick", action="store_true", help="As little as shows that it runs, for a test.")
    args = parser.parse_args()
    if args.quick:
        args.num_clips, args.num_runs, args.num_kills = 20, 1, 4
        args.num_films, args.num_inference_steps = 1, 1
    return args


def measure_memory(args, figures: dict, keep: Callable[[], None]) -> None:
    """Films of one step a clip: the steps leave nothing behind. The medians of several processes, in turn."""
    peaks = figures.setdefault("peak_resident_bytes", {"5": [], str(args.num_clips): []})
    for number in range(args.num_runs):
        for num_clips in (5, args.num_clips):
            if len(peaks[str(num_clips)]) > number:
                continue
            options = {**WORLD_OPTIONS, "num_inference_steps": 1, "prompt": PROMPT}
            with tempfile.TemporaryDirectory() as folder:
                told = generate_options(Path(folder, "film.mp4"), num_clips, **options)
                command = [sys.executable, "-c", PEAK, sys.executable, "-m", "diffusers_svi", *told]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"`diffusers-svi generate` failed: {done.stderr}")
            peaks[str(num_clips)].append(int(done.stdout))
            keep()
    figures["ratio"] = statistics.median(peaks[str(args.num_clips)]) / statistics.median(peaks["5"])


def measure_append(args, figures: dict, keep: Callable[[], None]) -> None:
    """Ten clips again and again, so that the last ten of a film have the frames of the first.

    Its last ten are written in turn with the first ten of another one: what slows the machine slows both.
    """
    clips = list(stream(pipeline(), 10, 1))
    first, last, curves = [], [], []
    for _ in range(args.num_films):
        with (
            tempfile.TemporaryDirectory() as folder,
            FilmWriter(Path(folder, "old.mp4")) as old,
            FilmWriter(Path(folder, "new.mp4")) as new,
        ):
            begin, curve = again_and_again(clips, 10), []
            for clip in again_and_again(clips, args.num_clips):
                curve.append(timed_append(old, clip))
                if clip.index >= args.num_clips - 10:
                    first.append(timed_append(new, next(begin)))
            last += curve[-10:]
            curves.append(curve)
    figures["num_clips"], figures["num_films"] = args.num_clips, args.num_films
    for name in first[0]:
        values = [[clip[name] for clip in ten] for ten in (first, last)]
        medians = [statistics.median(value) for value in values]
        ratio = medians[1] / medians[0] if name == "bytes" else ratio_of(values[1], values[0])["median"]
        figures[name] = {"first": medians[0], "last": medians[1], "ratio": ratio}
    figures["curves"] = {
        name: np.median([[clip[name] for clip in film] for film in curves], axis=0).round(5).tolist()
        for name in ("bytes", "seconds")
    }
    keep()


def timed_append(film: FilmWriter, clip: Clip) -> dict[str, float]:
    """What a clip adds to the file, what that takes, and what its state takes when it is written by itself."""
    before, wall, cpu = size(film.path), time.perf_counter(), time.process_time()
    film.append(clip)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    grown, wall = size(film.path) - before, time.perf_counter()
    clip.state.save(f"{film.path}.alone")
    state = time.perf_counter() - wall
    return {"bytes": grown, "seconds": seconds, "cpu_seconds": cpu_seconds, "state_seconds": state}


def again_and_again(clips: list[Clip], num_clips: int) -> Iterator[Clip]:
    """Ten clips of a film as the clips of a longer one."""
    new = clips[1].start
    for index in range(num_clips):
        clip = clips[index % len(clips)]
        state = replace(clip.state, num_clips=index + 1, start=new * (index + 1))
        yield replace(clip, index=index, start=new * index, state=state)


def measure_kills(args, figures: dict, keep: Callable[[], None]) -> None:
    runs = figures.setdefault("runs", [])
    with tempfile.TemporaryDirectory() as folder:
        kill_films(Path(folder), args.num_kills, runs, keep)
    hit = Counter(moment for run in runs for moment in run["hit"])
    figures |= {
        "films": len(runs),
        "equal": sum(run["equal"] for run in runs),
        "kills": sum(hit.values()),
        "while_writing": sum(hit[moment] for moment in WRITING),
        "hit": dict(sorted(hit.items())),
    }


def measure_overlap(args, figures: dict, keep: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    pipe, steps, num_clips = pipeline(), args.num_inference_steps, args.num_clips // 10
    seconds = figures.setdefault("seconds", {"background": [], "in turn": []})
    contents = []
    while len(seconds["in turn"]) < args.num_films:
        # Each is the first one every second time.
        order = list(seconds) if len(seconds["in turn"]) % 2 else list(seconds)[::-1]
        took = {}
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                path, began = Path(folder, "film.mp4"), time.perf_counter()
                with FilmWriter(path, background=name == "background") as film:
                    for clip in stream(pipe, num_clips, steps):
                        film.append(clip)
                took[name] = time.perf_counter() - began
                contents.append(path.read_bytes())
        for name, value in took.items():
            seconds[name].append(value)
        figures["bytes_equal"] = figures.get("bytes_equal", True) and len(set(contents)) == 1
        keep()
    figures |= {
        "num_clips": num_clips,
        "num_inference_steps": steps,
        "ratio": ratio_of(seconds["background"], seconds["in turn"])["median"],
    }


def pipeline() -> SVIPipeline:
    return load_fused(SVI_TINY, None)


def stream(pipe: SVIPipeline, num_clips: int, steps: int) -> Iterator[Clip]:
    return pipe.stream(
        image=PIL.Image.open(START),
        prompts=PROMPT,
        num_clips=num_clips,
        conditioning=PixelMotion(1),
        seeds=itertools.count(),
        max_sequence_length=32,
        **{**WORLD_OPTIONS, "num_inference_steps": steps},
    )


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, dict, Callable[[], None]], None]] = {
    "memory": measure_memory,
    "append": measure_append,
    "kills": measure_kills,
    "overlap": measure_overlap,
}


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    if "append" in results:
        curves = results["append"]["curves"]
        axes[0].plot(np.array(curves["bytes"]) / 1000, linewidth=0.8, label="kB")
        axes[0].plot(np.array(curves["seconds"]) * 1000, linewidth=0.8, label="ms")
        axes[0].set(title="An appended clip", xlabel="clip", ylim=(0, None))
        axes[0].legend(fontsize=7)
    if "kills" in results:
        hit = results["kills"]["hit"]
        axes[1].barh(list(hit), list(hit.values()))
        axes[1].set(title=f"Kills, films equal: {results['kills']['equal']} of {results['kills']['films']}")
    told = ratios(results)
    axes[2].barh(list(told), list(told.values()))
    axes[2].set(title="Ratios and their aims")
    for place, name in enumerate(told):
        if name in AIMS:
            axes[2].plot([AIMS[name]] * 2, [place - 0.4, place + 0.4], color="black")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def ratios(results: dict) -> dict[str, float]:
    """The one figure of each, where it has one."""
    found = {
        "memory": ("memory", "ratio"),
        "append bytes": ("append", "bytes", "ratio"),
        "append time": ("append", "seconds", "ratio"),
        "background": ("overlap", "ratio"),
    }
    told = {}
    for name, keys in found.items():
        value: Any = results
        for key in keys:
            value = value.get(key, {})
        if value:
            told[name] = value
    return told


def main():
    args = parse_args()
    file = args.output_dir / "film.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.only:
        figures = results.setdefault(name, {})
        if figures.get("done"):
            continue
        if not figures:
            figures |= {"done": False, **provenance()}
        print(f"{name} ...", file=sys.stderr, flush=True)
        MEASUREMENTS[name](args, figures, lambda: write_json(results, file))
        figures["done"] = True
        write_json(results, file)
    plot(results, args.output_dir / "film.png")
    told = {**ratios(results), **{name: results["kills"][name] for name in ("films", "equal") if "kills" in results}}
    print("\n".join(f"{name:16} {value:.4g}" for name, value in told.items()))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
