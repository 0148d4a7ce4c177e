"""How well long films of svi-tiny follow a voice or a pose, and whether that lasts.

    python benchmarks/conditions.py --output_dir docs/results/conditions

In the films of `svi_tiny.voices` the radius of a sprite is what the loudness of a frame says, or its place is where a
stick figure stands. Every contestant, trained with error recycling or without, makes the same held-out films, from the
same start images, with the same noise. Of five clips, the first, the last, or those around another one, every second
frame gives, film by film

- audio: the correlation of the loudness and the radius that is seen, and the mean difference of the radii in pixels. A
  sprite that is not found has the radius 0;
- pose: the mean distance of the sprite from its pose, in pixels. That of a sprite that is not found is half the width.

The radius is that of the sprite's own shape, from the area that it covers. *Shuffled* is the control, which must fail:
the same films against the voice or the poses of the next one. *Kept* is the correlation in the last five clips over
that in the first, aimed at 0.95 or more; in *halves*, that of the second half of a film over that of the first, which
chance in the voices touches less. Intervals are of 95%, by bootstrap over films.

Writes `conditions.json` and `conditions.png`. Films are kept in the folder `chains` as they are done: a run that was
interrupted, or has one more film or contestant, takes them there; and what is not measured again is kept.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import torch
from contestants import HELD_OUT_SEED, SVI_TINY, WORLD_OPTIONS, world
from drift import digest, interval
from report import provenance, write_json
from tqdm.auto import tqdm

from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.condition_pipeline import ConditionPipeline
from diffusers_svi.conditions.following import PIPELINES
from diffusers_svi.files import written_whole
from diffusers_svi.training.cache import fingerprint
from svi_tiny import voices
from svi_tiny.tracker import radius_of, track


matplotlib.use("Agg")
import matplotlib.pyplot as plt


LORAS = Path(SVI_TINY).parent / "loras"
NAMES = {"audio": "talk", "pose": "dance"}
# Frames of a clip that the one before has not told, and how many of them are looked at: every second.
NEW, EVERY = world.CLIP_FRAMES - 1, 2
AIM = 0.95
# At these clips figures are of so many clips: the first, the last, and those around the others.
MARKS, AROUND = (1, 10, 25, 50), 5


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--follows", nargs="*", choices=tuple(PIPELINES), default=list(PIPELINES), help="Default: both."
    )
    parser.add_argument(
        "--lora_dir",
        type=Path,
        default=LORAS,
        help="With talk.safetensors, dance.safetensors, and those with -control. Default: svi-tiny's.",
    )
    parser.add_argument("--num_films", type=int, default=8, help="Default: %(default)s.")
    parser.add_argument("--num_clips", type=int, default=50, help="Clips of a film. Default: %(default)s.")
    parser.add_argument("--num_inference_steps", type=int, default=6, help="Default: %(default)s.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/conditions"), help="Default: %(default)s.")
    parser.add_argument("--quick", action="store_true", help="2 films of one clip, made in 2 steps.")
    parser.add_argument("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    args = parser.parse_args()
    if args.quick:
        args.num_films, args.num_clips, args.num_inference_steps = 2, 1, 2
    return args


def contestants(follows: str, folder: Path) -> Iterator[tuple[str, ConditionPipeline]]:
    """With and without error recycling: the base with a LoRA, and with the modules that lie in its file."""
    for name, ending in {"error recycling": "", "control": "-control"}.items():
        pipe = PIPELINES[follows].from_pretrained(SVI_TINY)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(folder / f"{NAMES[follows]}{ending}.safetensors")
        pipe.fuse_lora()
        yield name, pipe


def make_film(
    pipe: ConditionPipeline, follows: str, index: int, states: list[world.State], args, progress: tqdm
) -> list[list[float]]:
    """Radius, x and y of the sprite in every second frame, the radius 0 and no place where it is not found."""
    start = states[0]
    if follows == "audio":
        voice = voices.make_voice(HELD_OUT_SEED, index, 1 + NEW * args.num_clips).astype(np.float32)
        options = {
            "audio": open_audio((voice, voices.RATE), voices.make_ear(), world.FPS),
            "audio_guidance_scale": 1.0,
        }
    else:
        options = {"pose": voices.draw_poses(states)}
    clips = pipe.stream(
        image=PIL.Image.fromarray(world.render(start)),
        prompts=voices.tell(start, follows),
        # The noise of a clip is the same for every contestant.
        seeds=[1000 * index + clip for clip in range(args.num_clips)],
        max_sequence_length=32,
        **{**WORLD_OPTIONS, "num_inference_steps": args.num_inference_steps},
        **options,
    )
    seen = []
    for clip in clips:
        for observed in track(clip.frames[::EVERY], start.light):
            place = [observed.x, observed.y] if observed.found else [np.nan, np.nan]
            seen.append([radius_of(start.sprite.shape, observed.area) if observed.found else 0.0, *place])
        progress.update()
    return np.round(seen, 3).tolist()


def truth(follows: str, index: int, num_clips: int) -> list[world.State]:
    """What a film should show."""
    start, num_frames = voices.sample_start(HELD_OUT_SEED, index), 1 + NEW * num_clips
    if follows == "audio":
        return voices.follow_voice(start, voices.make_voice(HELD_OUT_SEED, index, num_frames))
    return voices.follow_path(start, HELD_OUT_SEED, index, num_frames)


def films(pipe: ConditionPipeline, name: str, follows: str, states: list[list[world.State]], args) -> np.ndarray:
    """What is seen of all films, `(films, 1 + NEW / EVERY * clips, 3)`."""
    weights, seen = digest(pipe), []
    with tqdm(total=args.num_films * args.num_clips, desc=f"{follows}, {name}") as progress:
        for index, wanted in enumerate(states):
            key = fingerprint(weights, args.num_clips, args.num_inference_steps)
            path = args.output_dir / "chains" / f"{follows}-{name.replace(' ', '_')}-{index}-{key[:12]}.json"
            if path.exists():
                progress.update(args.num_clips)
            else:
                figures = make_film(pipe, follows, index, wanted, args, progress)
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(path) as unfinished:
                    unfinished.write_text(json.dumps(figures))
            seen.append(json.loads(path.read_text()))
    return np.array(seen)


def by_clip(frames: np.ndarray) -> np.ndarray:
    """`(films, 1 + n * clips, ...)` as `(films, clips, n, ...)`: the start image is nobody's work."""
    return frames[:, 1:].reshape(len(frames), -1, NEW // EVERY, *frames.shape[2:])


def around(clip: int, num_clips: int) -> slice:
    """The `AROUND` clips at one of `MARKS`, of as many as there are."""
    first = max(0, min(clip - 1 - AROUND // 2, num_clips - AROUND))
    return slice(first, first + AROUND)


def around_each(values: np.ndarray) -> np.ndarray:
    """Means of `(films, clips, n)` around each clip: `(films, clips)`."""
    means, num_clips = values.mean(axis=2), values.shape[1]
    return np.stack([means[:, around(clip, num_clips)].mean(axis=1) for clip in range(1, num_clips + 1)], axis=1)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays of one shape; 0 where one does not vary."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if a.std() and b.std() else 0.0


def correlations(seen: np.ndarray, wanted: np.ndarray, stretches: list[slice]) -> np.ndarray:
    """Of two `(films, clips, n)`, in each film and each stretch of clips: `(films, stretches)`."""
    return np.array(
        [[correlation(a[clips], b[clips]) for clips in stretches] for a, b in zip(seen, wanted, strict=True)]
    )


def kept(values: np.ndarray) -> float:
    """The mean over films of the last column over that of the first."""
    return values[:, -1].mean() / values[:, 0].mean()


def distances(seen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`(..., 2)` from one another, the short way around the torus; half the width where one is not there."""
    way = (seen - wanted + world.SIZE / 2) % world.SIZE - world.SIZE / 2
    return np.nan_to_num(np.hypot(*np.moveaxis(way, -1, 0)), nan=world.SIZE / 2)


def summarize(follows: str, seen: np.ndarray, states: list[list[world.State]]) -> dict:
    """Curves over clips, and figures with intervals at the clips of `MARKS`."""
    sprites = [[state.sprite for state in film[::EVERY]] for film in states]
    wanted = by_clip(np.array([[(sprite.radius, sprite.x, sprite.y) for sprite in film] for film in sprites]))
    seen = by_clip(seen)
    figures, num_clips = {}, seen.shape[1]
    for ending, of in {"": wanted, "_shuffled": np.roll(wanted, -1, axis=0)}.items():
        if follows == "audio":
            # The radius that is wanted is the loudness, by a line.
            stretches = [around(clip, num_clips) for clip in range(1, num_clips + 1)]
            figures[f"correlation{ending}"] = correlations(seen[..., 0], of[..., 0], stretches)
            errors = np.abs(seen[..., 0] - of[..., 0])
        else:
            errors = distances(seen[..., 1:], of[..., 1:])
        figures[f"{'radius_error' if follows == 'audio' else 'distance'}{ending}"] = around_each(errors)
    figures["found"] = around_each((seen[..., 0] > 0).astype(float))
    marks = [clip for clip in MARKS if clip <= num_clips]
    summary = {
        name: {
            "curve": np.round(values.mean(axis=0), 4).tolist(),
            "films": np.round(values[:, [clip - 1 for clip in marks]], 4).tolist(),
            "at": {str(clip): interval(values[:, clip - 1], np.mean) for clip in marks},
        }
        for name, values in figures.items()
    }
    if follows == "audio":
        summary["kept"] = interval(figures["correlation"], kept)
        half = num_clips // 2
        halves = correlations(seen[..., 0], wanted[..., 0], [slice(0, max(half, 1)), slice(half, None)])
        summary["kept_halves"] = {
            **interval(halves, kept),
            "first": halves[:, 0].mean(),
            "second": halves[:, 1].mean(),
        }
    return summary


def plot(results: dict, path: Path) -> None:
    shown = {"audio": "correlation", "pose": "distance"}
    titles = {"audio": "correlation of loudness and radius", "pose": "distance from the pose (pixels)"}
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.4), squeeze=False, layout="tight")
    for axis, (follows, measured) in zip(axes[0], results.items(), strict=True):
        for number, (name, summary) in enumerate(measured.items()):
            for ending, style in {"": "-", "_shuffled": ":"}.items():
                curve = summary[shown[follows] + ending]["curve"]
                label = name + (", shuffled" if ending else "")
                axis.plot(range(1, len(curve) + 1), curve, style, color=f"C{number}", label=label, linewidth=1.2)
        axis.set_title(titles[follows], fontsize=10)
        axis.set_xlabel("clip")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def main():
    args = parse_args()
    path = args.output_dir / "conditions.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    for follows in args.follows:
        states = [truth(follows, index, args.num_clips) for index in range(args.num_films)]
        measured = {
            name: summarize(follows, films(pipe, name, follows, states, args), states)
            for name, pipe in contestants(follows, args.lora_dir)
        }
        told[follows] = {
            **provenance(),
            "seed": HELD_OUT_SEED,
            "films": args.num_films,
            "clips": args.num_clips,
            "aim": {"kept": AIM},
            "results": measured,
        }
    write_json(told, path)
    plot({follows: of["results"] for follows, of in told.items()}, args.output_dir / "conditions.png")
    for follows in args.follows:
        for name, summary in told[follows]["results"].items():
            for figure, values in summary.items():
                of = values.get("at", {"last over first": values})
                row = "  ".join(
                    f"{clip}: {v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for clip, v in of.items()
                )
                print(f"{follows:6} {name:16} {figure:22} {row}")
    if args.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
