"""How far chains of clips drift: the base model, LoRAs, and training-free remedies, measured against the truth.

    python benchmarks/drift.py --lora control=control.safetensors erft=erft.safetensors --output_dir docs/results/drift

Every contestant continues the same held-out start images with the same prompts and the same noise, in two settings:
*consistent*, one prompt throughout, and *creative*, a new one every clip. The world of svi-tiny knows what every frame
should show, so a clip's quality, between 0 and 1, is the mean of three parts, read from its last frame:

- sprite: a third each for the right shape, the right size, and the nearness of its colour; 0 if it is not found; where
  none belongs, 1 if none is found;
- background: 0 in the wrong scene, else 1 less the mean absolute error over a tenth of the range;
- sharpness: the root mean square difference of neighbouring pixels over the true one, or its inverse if that is less.

*Kept* is quality at the last clip over quality at the tenth (or over the first), *lost* quality at the first clip less
that at the last: what the chain adds to the error of one clip. *Alive*, the mean change from frame to frame over the
true one, is reported beside it: a frozen picture does not drift. *Ends* is the start-end contrast of other long-video
benchmarks: of every measure M, |M(start) - M(end)| over the first and the last 15% of the frames of a film (FramePack,
arXiv:2504.12626, "Drifting measurement"). Measures are read once a clip, so it is 15% of the clips, rounded, one at
least. It tells of any change, for the better too. Intervals are of 95%, by bootstrap over chains. In the summary the
best LoRA named `erft...` is compared with the `control...` of the same ending, or with `control`.
`--color_match mkl` adds the base model with the colours of its clips matched.
Writes `drift.json`, a plot, a contact sheet for every contestant, and one of all side by side. Chains are kept in the
folder `chains` as they are done; a run that was interrupted, or has one more contestant, takes them there.

Any other model is measured on images and prompts of one's own, without a truth and without weights: colour (the shift
of the mean over a tenth of the range), contrast and sharpness of the last frame against that of the first clip.

    python benchmarks/drift.py --model_dir Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --contestants base \
        --lora erft=svi-shot.safetensors --images cat.png boat.png --prompts prompts.txt --device cuda --dtype bfloat16

`--stories FOLDER` takes images and prompts as the authors of SVI keep them, see `diffusers_svi.load_stories`.
`--save_films` writes films as VBench-Long reads them, see `vbench.py`.
"""

import argparse
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import torch
from contestants import HELD_OUT_SEED, WORLD_OPTIONS, add_contestant_options, contestants, world
from diffusers.utils import load_image, make_image_grid
from report import provenance, write_json
from scipy.stats import bootstrap
from tqdm.auto import tqdm
from vbench import film_name

from diffusers_svi import Clip, LatentMotion, PixelMotion, SVIPipeline, load_stories, save_video
from diffusers_svi.color import METHODS, check_color_match
from diffusers_svi.conditioning import Carried, Scheme
from diffusers_svi.prompts import load_prompts
from diffusers_svi.stories import Story
from diffusers_svi.training.cache import fingerprint
from diffusers_svi.training.quality import drift_figures, sharpness
from diffusers_svi.video import encode_frames, frame_rate, to_8_bits
from svi_tiny.tracker import displacement, track


matplotlib.use("Agg")
import matplotlib.pyplot as plt


FIRST_STORY = 40000
SETTINGS = ("consistent", "creative")
PARTS = ("quality", "sprite", "background")  # of which every chain's figures are kept
# What a model of true size makes unless told otherwise.
OWN_OPTIONS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_contestant_options(parser, PLAIN)
    parser.add_argument(
        "--color_match",
        nargs="*",
        choices=METHODS[1:],
        default=[],
        help="The base model once more with the colours of its clips matched, `base-mkl`. Default: not.",
    )
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS, help="Default: both.")
    parser.add_argument("--num_chains", type=int, default=16, help="Default: %(default)s.")
    parser.add_argument("--num_clips", type=int, default=50, help="Clips of a chain. Default: %(default)s.")
    parser.add_argument("--num_inference_steps", type=int, help="Default: 10 for svi-tiny, else 50.")
    parser.add_argument("--eight_lights", action="store_true", help="Films of the world in one of eight lights.")
    parser.add_argument("--images", nargs="*", help="Start images of one's own, a chain each, for any model.")
    parser.add_argument("--stories", help="In their place: a folder for each, with frame.jpg and prompt.txt.")
    parser.add_argument("--prompts", help="Their prompts, a file with one a line: the first, or one a clip in turn.")
    parser.add_argument("--height", type=int, help="Default: 480.")
    parser.add_argument("--width", type=int, help="Default: 832.")
    parser.add_argument("--num_frames", type=int, help="Of a clip. Default: 81.")
    parser.add_argument("--guidance_scale", type=float, help="Default: 5.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/drift"), help="Default: %(default)s.")
    parser.add_argument(
        "--save_clips",
        action="store_true",
        help="Keep every clip: <output_dir>/clips/<setting>-<name>/<film>-<clip>.mp4.",
    )
    parser.add_argument(
        "--save_films",
        action="store_true",
        help="Keep every film as VBench-Long reads it: <output_dir>/vbench/<setting>-<name>/<prompt>-<index>.mp4.",
    )
    parser.add_argument("--quick", action="store_true", help="2 chains of 10 clips of `base` and the LoRAs.")
    args = parser.parse_args()
    if args.quick:
        args.num_chains, args.num_clips, args.contestants = 2, 10, ["base"]
    for method in args.color_match:
        check_color_match(method)
    if (args.images is None) != (args.prompts is None):
        parser.error("--images and --prompts come together.")
    if args.images and args.stories:
        parser.error("--images and --stories are two ways of the same: give one.")
    args.own = own_stories(args)
    if args.own:
        args.num_chains = len(args.own)
    if args.save_films:
        for story in args.own:
            film_name(story.prompts[0], 0)
    defaults = OWN_OPTIONS if args.own else WORLD_OPTIONS
    args.options = {name: getattr(args, name) or value for name, value in defaults.items()}
    return args


@dataclass(frozen=True)
class NoisyPixelMotion(PixelMotion):
    """`PixelMotion` with noise on the condition frames, as SkyReels' `addnoise_condition`.

    Args:
        noise (`float`): Standard deviation, on pixels in [-1, 1].
    """

    noise: float = 0.05

    def _motion(self, carried: Carried) -> torch.Tensor:
        motion = super()._motion(carried)
        # The same noise for every clip and contestant, whatever else is drawn.
        noise = torch.randn(motion.shape, generator=torch.Generator().manual_seed(0))
        return motion if carried.frames is None else motion + self.noise * noise.to(motion)


PLAIN = {
    "base": PixelMotion(1),
    "reference": PixelMotion(1, padding="reference"),
    "anchor": LatentMotion(1),
    "noise": NoisyPixelMotion(1),
}


@dataclass(frozen=True)
class Film:
    """What a chain begins with, a prompt for every clip, and how a clip is measured, given where it begins."""

    number: int
    image: PIL.Image.Image
    prompts: list[str]
    measure: Callable[[np.ndarray, int], dict[str, float]]


def world_films(setting: str, args, scheme: Scheme) -> Iterator[Film]:
    """Held-out films with a sprite to begin with, measured against the truth."""
    durations = [world.CLIP_FRAMES - 1] + [world.CLIP_FRAMES - scheme.overlap] * (args.num_clips - 1)
    found, index = 0, FIRST_STORY
    while found < args.num_chains:
        index += 1
        state, actions = world.sample_story(HELD_OUT_SEED, index, args.num_clips, setting, args.eight_lights)
        if state.sprite is None:
            continue
        found += 1
        states = world.film(state, actions, durations)
        begins = np.cumsum([0, *durations[:-1]])
        prompts = [world.caption(states[begin], action) for begin, action in zip(begins, actions, strict=True)]
        image = PIL.Image.fromarray(world.render(state))
        yield Film(index, image, prompts, partial(measure_against, states))


def measure_against(states: list[world.State], frames: np.ndarray, start: int) -> dict[str, float]:
    return measure(frames, states[start : start + len(frames)])


def own_stories(args) -> list[Story]:
    """Images with prompts of one's own, if there are any.

    Raises:
        ValueError: where more is said of a clip than its prompt.
    """
    if args.stories:
        stories, source = load_stories(args.stories), f"`--stories`: {args.stories}"
    else:
        lines = load_prompts(args.prompts) if args.images else []
        stories = [Story(str(image), load_image(image), lines) for image in args.images or []]
        source = f"`--prompts`: {args.prompts}"
    if not all(isinstance(line, str) for story in stories for line in story.prompts):
        raise ValueError(f"{source} says more of a clip than its prompt, which is not compared here.")
    return stories


def own_films(setting: str, args) -> Iterator[Film]:
    """Films of one's own, of which nobody knows the truth: clips are measured against the first."""
    for number, story in enumerate(args.own):
        lines = story.prompts
        prompts = [lines[0 if setting == "consistent" else clip % len(lines)] for clip in range(args.num_clips)]
        yield Film(number, story.image, prompts, FromFirst())


class FromFirst:
    """Measures clips against the first it is given, from pixels alone."""

    def __init__(self):
        self.first: np.ndarray | None = None

    def __call__(self, frames: np.ndarray, start: int) -> dict[str, float]:
        self.first = frames if self.first is None else self.first
        figures = {name: values[1] for name, values in drift_figures([self.first, frames]).items()}
        parts = {
            "colour": max(0.0, 1 - figures["colour_shift"] / 0.1),
            "contrast": no_more_no_less(figures["contrast_kept"]),
            "sharpness": no_more_no_less(figures["sharpness_kept"]),
        }
        moved = np.abs(np.diff(self.first, axis=0)).mean()
        alive = np.abs(np.diff(frames, axis=0)).mean() / max(moved, 1e-6)
        return {"quality": sum(parts.values()) / 3, **parts, "alive": float(alive)}


def no_more_no_less(ratio: float) -> float:
    """1 for a ratio of 1, less for more and for less."""
    return min(ratio, 1 / max(ratio, 1e-6))


def measure(frames: np.ndarray, states: list[world.State]) -> dict[str, float]:
    """One clip `(frames, SIZE, SIZE, 3)` in [0, 1] against the states it should show."""
    state, truth = states[-1], world.render(states) / 255.0
    seen = track(frames, state.light)
    observed = seen[-1]
    wanted = state.sprite
    if wanted is None:
        sprite = float(not observed.found)
    elif not observed.found:
        sprite = 0.0
    else:
        distance = np.abs(np.subtract(observed.rgb, world.COLOURS[wanted.colour])).mean() / 128
        sprite = ((observed.shape == wanted.shape) + (observed.size == wanted.size) + max(0.0, 1 - distance)) / 3
    background = float(observed.scene == state.scene) * max(0.0, 1 - observed.background_error / 0.1)
    sharp = no_more_no_less(sharpness(frames[-1]) / sharpness(truth[-1]))
    parts = {"sprite": sprite, "background": background, "sharpness": sharp}
    figures = {"quality": sum(parts.values()) / 3, **parts}
    moved = np.abs(np.diff(truth, axis=0)).mean()
    # Where nothing should move, there is nothing to be alive.
    figures["alive"] = np.abs(np.diff(frames, axis=0)).mean() / moved if moved > 1e-3 else np.nan
    figures["direction"] = direction(seen, states)
    return {name: float(value) for name, value in figures.items()}


def direction(seen, states: list[world.State]) -> float:
    """1 if the sprite went where it should, 0 if not, nan if it was not to move, or not to be there all along."""
    ends = states[0].sprite, states[-1].sprite
    if None in ends:
        return np.nan
    way = np.array([ends[1].x - ends[0].x, ends[1].y - ends[0].y])
    way = (way + world.SIZE / 2) % world.SIZE - world.SIZE / 2
    length = np.linalg.norm(way)
    if length < 4:
        return np.nan
    if not (seen[0].found and seen[-1].found):
        return 0.0
    moved = np.array(displacement(seen[0], seen[-1]))
    return float(np.linalg.norm(moved - way) < length / 2)


def run_chains(
    pipe: SVIPipeline, name: str, scheme: Scheme, setting: str, args, color_match: str = "none"
) -> tuple[list[list[dict]], np.ndarray]:
    """Figures of every clip of every chain, and the last frames of the first chains for the contact sheet."""
    chains, rows = [], []
    films = own_films(setting, args) if args.own else world_films(setting, args, scheme)
    weights, folder = digest(pipe), args.output_dir / "vbench" / f"{setting}-{name}"
    films_of: Counter[str] = Counter()
    with tqdm(total=args.num_chains * args.num_clips, desc=f"{setting}, {name}") as progress:
        for film in films:
            index = films_of[film.prompts[0]]
            films_of[film.prompts[0]] += 1
            options = {
                "prompts": film.prompts,
                "max_sequence_length": 512 if args.own else 32,
                # The noise of a clip is the same for every contestant.
                "seeds": [1000 * film.number + clip for clip in range(args.num_clips)],
                **args.options,
            }
            if color_match != "none":  # chains of before have their key without it
                options["color_match"] = color_match
            image = film.image.resize((args.options["width"], args.options["height"]))
            saved = [args.save_clips, *(["films"] if args.save_films else [])]  # nor this
            key = fingerprint(str(scheme), weights, image.tobytes(), sorted(options.items()), *saved)
            path = args.output_dir / "chains" / f"{setting}-{name}-{film.number}-{key[:12]}.json"
            if path.exists():
                figures, row = json.loads(path.read_text()), np.array(PIL.Image.open(path.with_suffix(".png")))
                row = np.stack(np.split(row, args.num_clips, axis=1))
                progress.update(args.num_clips)
            else:
                figures, row = [], []
                clips = pipe.stream(image, conditioning=scheme, **options)
                clips = measured(clips, film, f"{setting}-{name}", args, figures, row, progress)
                if args.save_films:
                    folder.mkdir(parents=True, exist_ok=True)
                    frames = (frame for clip in clips for frame in clip.frames)
                    save_video(folder / film_name(film.prompts[0], index), frames, fps_of(args))
                deque(clips, maxlen=0)
                path.parent.mkdir(exist_ok=True)
                PIL.Image.fromarray(np.hstack(row)).save(path.with_suffix(".png"))
                path.with_suffix(".part").write_text(json.dumps(figures))
                path.with_suffix(".part").replace(path)
            chains.append(figures)
            if len(rows) < 8:
                rows.append(row)
    return chains, np.array(rows)


def measured(
    clips: Iterator[Clip], film: Film, name: str, args, figures: list[dict], row: list[np.ndarray], progress: tqdm
) -> Iterator[Clip]:
    """`clips` of a film, once they are measured; figures and last frames are added to what is given."""
    for clip in clips:
        figures.append(film.measure(clip.frames, clip.start))
        if args.save_clips:
            save_clip(clip.frames, args.output_dir / "clips" / name / f"{film.number}-{clip.index + 1:03d}.mp4", args)
        row.append((clip.frames[-1] * 255).round().astype(np.uint8))
        progress.update()
        yield clip


def digest(pipe: SVIPipeline) -> str:
    """Of the weights that make a clip, by the first values of every tensor."""
    models = (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder, pipe.image_encoder)
    tensors = (tensor for model in models if model is not None for tensor in model.state_dict().values())
    return fingerprint(*(tensor.flatten()[:16].tolist() for tensor in tensors))


def save_clip(frames: np.ndarray, path: Path, args) -> None:
    """`frames` `(frames, height, width, 3)` in [0, 1] as a video with little loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_frames(path, map(to_8_bits, frames), frame_rate(fps_of(args)), crf=8)


def fps_of(args) -> int:
    return 16 if args.own else world.FPS


def interval(values: np.ndarray, statistic) -> dict[str, float]:
    """A statistic of chains `(chains, ...)` with its 95% bootstrap interval; of one chain, that is the value."""
    draws = [statistic(values)]
    if len(values) > 1:
        # By number: a chain is drawn with all of its clips.
        numbers, drawn = np.arange(len(values)), lambda chosen: statistic(values[chosen])
        options = {"n_resamples": 2000, "method": "percentile", "vectorized": False, "rng": 0}
        draws = bootstrap((numbers,), drawn, **options).bootstrap_distribution
    # Where a figure is not defined for every chain it may not be for every draw.
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high)}


def lost(quality: np.ndarray) -> float:
    """Mean quality `(chains, clips)` of the first clips less that of the last."""
    return quality[:, 0].mean() - quality[:, -1].mean()


def start_end(values: np.ndarray) -> np.ndarray:
    """|M(start) - M(end)| `(chains,)` of a measure `(chains, clips)`; without a value at either end it is nan."""
    window = max(1, round(0.15 * values.shape[1]))
    known = np.ma.masked_invalid(values)
    return np.ma.abs(known[:, :window].mean(axis=1) - known[:, -window:].mean(axis=1)).filled(np.nan)


def summarize(chains: list[list[dict]], num_clips: int) -> dict:
    """Curves over clips, and the headline numbers with intervals."""
    arrays = {name: np.array([[clip[name] for clip in chain] for chain in chains]) for name in chains[0][0]}
    tenth = min(10, num_clips) - 1
    quality = arrays["quality"]
    return {
        "curves": {name: np.nanmean(values, axis=0).tolist() for name, values in arrays.items()},
        "chains": {name: arrays[name].round(3).tolist() for name in PARTS if name in arrays},
        "quality_first": interval(quality, lambda q: q[:, 0].mean()),
        "quality_last": interval(quality, lambda q: q[:, -1].mean()),
        "lost": interval(quality, lost),
        "kept_over_first": interval(quality, lambda q: q[:, -1].mean() / q[:, 0].mean()),
        "kept_over_tenth": interval(quality, lambda q: q[:, -1].mean() / q[:, tenth].mean()),
        "ends": {name: interval(start_end(values), np.nanmean) for name, values in arrays.items()},
        "alive_first": interval(arrays["alive"], lambda a: np.nanmean(a[:, 0])),
        **{name: interval(arrays[name], np.nanmean) for name in ("alive", "direction") if name in arrays},
    }


def summarize_setting(measured: dict[str, dict]) -> dict:
    """What is kept by the base, by the LoRA with error recycling that ends best, and by its control."""
    best = max(
        (name for name in measured if name.startswith("erft")),
        key=lambda name: measured[name]["quality_last"]["value"],
        default="erft",
    )
    own = best.replace("erft", "control")
    roles = {"base": "base", "control": own if own in measured else "control", "erft": best}
    summary = {
        f"{role}_kept": measured[name]["kept_over_tenth"]["value"] for role, name in roles.items() if name in measured
    }
    if {"control_kept", "erft_kept"} <= set(summary):
        error, reference = (1 - measured[roles[role]]["quality_last"]["value"] for role in ("erft", "control"))
        summary["error_vs_control"] = error / reference
        pairs = np.stack([measured[roles[role]]["chains"]["quality"] for role in ("control", "erft")], axis=1)
        summary["lost_less_than_control"] = interval(pairs, lambda pair: lost(pair[:, 0]) - lost(pair[:, 1]))
    return summary


def plot(results: dict, path: Path) -> None:
    first = next(iter(next(iter(results.values())).values()))
    shown = [name for name in first["curves"] if name != "direction"]
    figure, axes = plt.subplots(len(results), len(shown), figsize=(3.4 * len(shown), 3 * len(results)), squeeze=False)
    for row, (setting, measured) in zip(axes, results.items(), strict=True):
        for axis, name in zip(row, shown, strict=True):
            for label, result in measured.items():
                curve = result["curves"][name]
                axis.plot(range(1, len(curve) + 1), curve, label=label, linewidth=1.2)
            axis.set_title(f"{setting}: {name}", fontsize=9)
            axis.set_xlabel("clip")
            axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def grid(rows: np.ndarray) -> PIL.Image.Image:
    """Frames `(rows, columns, height, width, 3)` uint8 as one picture."""
    return make_image_grid([PIL.Image.fromarray(frame) for row in rows for frame in row], *rows.shape[:2])


def compare(rows: dict[str, np.ndarray], path: Path) -> None:
    """Last frames `(chains, clips, height, width, 3)` of everyone side by side, at clips 1, 10, 25, 50."""
    chains, num_clips, height, width, _ = next(iter(rows.values())).shape
    chosen = [clip - 1 for clip in sorted({1, 10, 25, 50, num_clips}) if clip <= num_clips]
    size = (1.6 * len(chosen) * len(rows), 1.6 * chains * height / width + 0.8)
    figure, axes = plt.subplots(1, len(rows), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, frames) in zip(axes[0], rows.items(), strict=True):
        axis.imshow(grid(frames[:, chosen]))
        axis.set_title(name, fontsize=16)
        axis.set_xticks(width * (np.arange(len(chosen)) + 0.5), [f"clip {clip + 1}" for clip in chosen], fontsize=12)
        axis.set_yticks([])
    figure.savefig(path, dpi=60)
    plt.close(figure)


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {setting: {} for setting in args.settings}
    sheets = {setting: {} for setting in args.settings}
    for contestant, scheme, pipe in contestants(args, PLAIN):
        for color_match in ["none", *(args.color_match if contestant == "base" else [])]:
            name = contestant if color_match == "none" else f"{contestant}-{color_match}"
            for setting in args.settings:
                chains, rows = run_chains(pipe, name, scheme, setting, args, color_match)
                results[setting][name] = {"scheme": str(scheme), **summarize(chains, args.num_clips)}
                shown = np.unique(np.linspace(0, args.num_clips - 1, 12).round().astype(int))
                grid(rows[:, shown]).save(args.output_dir / f"{setting}-{name}.png")
                sheets[setting][name] = rows

    summary = {setting: summarize_setting(measured) for setting, measured in results.items()}
    write_json({**provenance(), "summary": summary, "results": results}, args.output_dir / "drift.json")
    plot(results, args.output_dir / "drift.png")
    for setting, rows in sheets.items():
        compare(rows, args.output_dir / f"{setting}.png")
    for setting, measured in results.items():
        print(f"\n{setting:24} first  last   kept over 10th (95%)   lost    ends   alive  direction")
        for name, result in measured.items():
            kept, way = result["kept_over_tenth"], result.get("direction", {}).get("value", math.nan)
            print(
                f"{name:24} {result['quality_first']['value']:.3f}  {result['quality_last']['value']:.3f}  "
                f"{kept['value']:.3f} ({kept['low']:.3f} to {kept['high']:.3f})  {result['lost']['value']:6.3f}  "
                f"{result['ends']['quality']['value']:.3f}  {result['alive']['value']:.2f}   {way:.2f}"
            )


if __name__ == "__main__":
    main()
