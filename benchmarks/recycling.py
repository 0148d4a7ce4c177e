r"""Show what error recycling does to drift, in a world that is small enough for statistics: see `vectors.py`.

    python benchmarks/recycling.py --output_dir outputs/recycling          # hours, resumable
    python benchmarks/recycling.py --quick --output_dir outputs/recycling  # a minute: that it runs, not what it shows

A transformer of Wan's form learns to make clips from their first frame and a prompt: the *base*. It is trained on: on
the same clips (*control*), by error recycling as published, and with one thing changed at a time
(`vector_training.py`). Then chains: every clip begins with the last frame of the clip before. Prompts and noise are
the same for all.

Measured of every clip's last frame: its distance from the surface that all true frames lie on (root mean square), and
whether its identity is still that of the film's first frame; and of the clip its motion. *Slopes*: a known error is
put on the frame that a clip begins with; what is left of it in the last frame, over what was put in. Below 1 an error
shrinks from clip to clip. An error towards another angle is none that a model could know of: 1 is right for it.

Every training is a pair of files in `runs` of the folder. Those that are there are not made again, so that several
processes can share the work by their `--seeds`, with `--only_runs`.
"""

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from report import provenance, write_json
from safetensors.torch import load_model, save_model
from scipy.stats import t as student
from tqdm.auto import tqdm
from vector_training import BASE, CONTESTANTS, SHIFT, condition_on, make_model, predict, train
from vectors import CHANNELS, FRAMES, SPEEDS, World

from diffusers_svi.files import written_whole
from diffusers_svi.flow import shifted_sigmas


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SAMPLING_STEPS = 12
SIZES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
# The one that is looked at while a model is trained.
WATCHED = 0.2
ERRORS = ("off", "identity", "angle")
# These are trained with every seed, and go on for `--long_clips`.
MAIN = ("base", "control", "published")
MEASURES = ("distance", "identity", "motion")
# Clips of which the table tells.
TOLD = (1, 10, 25, 50, 100)
STORY_SEED, SLOPES_SEED = 99, 98


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recycling"), help="Default: %(default)s.")
    parser.add_argument("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*CONTESTANTS], help="Which.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Default: 0 to 4.")
    parser.add_argument(
        "--ablation_seeds", type=int, nargs="+", default=[0, 1], help="Those of other contestants than the main ones."
    )
    parser.add_argument("--base_steps", type=int, default=4000, help="Steps of the base. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=10000, help="Steps after them. Default: %(default)s.")
    parser.add_argument("--watch_every", type=int, default=1000, help="Steps between slopes. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=128, help="Clips a step. Default: %(default)s.")
    parser.add_argument("--num_chains", type=int, default=256, help="Default: %(default)s.")
    parser.add_argument("--num_clips", type=int, default=100, help="Clips of a chain. Default: %(default)s.")
    parser.add_argument("--long_chains", type=int, default=64, help="Default: %(default)s.")
    parser.add_argument(
        "--long_clips", type=int, default=1000, help=f"Clips of them, of {', '.join(MAIN)} only. Default: %(default)s."
    )
    parser.add_argument("--compile", action="store_true", help="A quarter faster; takes a C++ compiler.")
    parser.add_argument("--add_to", type=Path, help="A recycling.json: what it has of other contestants is kept.")
    parser.add_argument("--only_runs", action="store_true", help="Train what is missing, and report nothing.")
    parser.add_argument(
        "--quick", action="store_true", help="300 steps, after 100 of the base, one seed, three contestants."
    )
    args = parser.parse_args()
    if args.quick:
        args.contestants, args.seeds, args.ablation_seeds = ["control", "published", "white noise"], [0], [0]
        args.base_steps, args.steps, args.watch_every, args.batch_size = 100, 300, 150, 8
        args.num_chains, args.num_clips, args.long_chains, args.long_clips = 8, 6, 4, 8
    return args


@torch.no_grad()
def make_clips(
    model: WanTransformer3DModel, world: World, frames: torch.Tensor, prompts: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Clips `(n, CHANNELS, FRAMES)` that go on from frames `(n, CHANNELS)`, by Euler's method."""
    condition, texts = condition_on(frames), world.texts[prompts]
    sigmas = torch.cat([shifted_sigmas(SAMPLING_STEPS, SHIFT).float(), torch.zeros(1)])
    for sigma, following in pairwise(sigmas):
        noise = noise + (following - sigma) * predict(model, noise, condition, sigma.expand(len(noise)), texts)
    return noise[..., 0, 0]


def run_chains(model: WanTransformer3DModel, world: World, num_chains: int, num_clips: int) -> dict[str, list[float]]:
    """Of every clip the mean over chains of each of `MEASURES`. The same story for every model."""
    generator = torch.Generator().manual_seed(STORY_SEED)
    begun = world.clips(num_chains, generator)
    frames = begun.latents[:, :, 0, 0, 0]
    figures: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for _ in range(num_clips):
        prompts = torch.randint(len(SPEEDS), (num_chains,), generator=generator)
        noise = torch.randn(num_chains, CHANNELS, FRAMES, 1, 1, generator=generator)
        clips = make_clips(model, world, frames, prompts, noise)
        frames = clips[:, :, -1]
        distance, identity = world.nearest(frames)
        kept = (identity == begun.identities).float()
        for measure, values in zip(MEASURES, (distance, kept, clips.diff(dim=2).abs()), strict=True):
            figures[measure].append(values.mean().item())
    return figures


def measure_slopes(
    model: WanTransformer3DModel, world: World, count: int, sizes: tuple[float, ...]
) -> dict[str, list[float]]:
    """For each kind of error what is left of it after a clip, of each of `sizes`: the median over `count` clips."""
    generator = torch.Generator().manual_seed(SLOPES_SEED)
    clips = world.clips(count, generator)
    frames = clips.latents[:, :, 0, 0, 0]
    noise = torch.randn(clips.latents.shape, generator=generator)
    untouched = make_clips(model, world, frames, clips.prompts, noise)[:, :, -1]
    slopes = {}
    for kind in ERRORS:
        direction = world.errors(kind, clips, generator)
        lasts = [make_clips(model, world, frames + s * direction, clips.prompts, noise)[:, :, -1] for s in sizes]
        slopes[kind] = [
            ((last - untouched).square().mean(1).sqrt() / size).median().item()
            for last, size in zip(lasts, sizes, strict=True)
        ]
    return slopes


def settings(args: argparse.Namespace) -> dict[str, int]:
    """What figures depend on, whoever they are of; flags change none."""
    return {name: value for name, value in vars(args).items() if type(value) is int}


def files_of(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    """Figures and weights of a run."""
    file = f"{name.replace(' ', '_').replace('%', '')}-{seed}"
    return folder / "runs" / f"{file}.json", folder / "runs" / f"{file}.safetensors"


def run(name: str, seed: int, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """One training and what it shows; from its file, if it has been made."""
    contestant = BASE if name == "base" else CONTESTANTS[name]
    key = json.loads(json.dumps({"seed": seed, "contestant": asdict(contestant), **settings(args)}))
    figures_file, weights_file = files_of(args.output_dir, name, seed)
    if figures_file.exists():
        found = json.loads(figures_file.read_text())
        if found["key"] != key:
            raise SystemExit(f"{figures_file} was made with other settings: choose another `--output_dir`.")
        return found
    begun, model, watched = time.time(), make_model(), {}
    if args.compile:
        # Else what was compiled for the models before counts against this one.
        torch.compiler.reset()
        model.compile(dynamic=False)

    def look(step: int) -> None:
        if step % args.watch_every == 0:
            slopes = measure_slopes(model, world, args.batch_size, (WATCHED,))
            watched[step] = {kind: values[0] for kind, values in slopes.items()}

    if name == "base":
        train(model, world, contestant, args.base_steps, args.batch_size, seed)
    else:
        load_model(model, files_of(args.output_dir, "base", seed)[1])
        steps = round(contestant.share * args.steps)
        train(model, world, contestant, steps, args.batch_size, 1000 + seed, look)
        look(steps)
    slopes = measure_slopes(model, world, args.batch_size, SIZES)
    found = {"key": key, "watched": watched, "slopes": slopes}
    found |= run_chains(model, world, args.num_chains, args.num_clips)
    if name in MAIN:
        found["long"] = run_chains(model, world, args.long_chains, args.long_clips)
    found["minutes"] = round((time.time() - begun) / 60, 1)
    figures_file.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, weights_file)
    with written_whole(figures_file) as unfinished:
        unfinished.write_text(json.dumps(found))
    return json.loads(figures_file.read_text())


def interval(values: list[float]) -> list[float]:
    """Mean, and half the width of its 95% interval by Student's t; 0 where there is one value only."""
    count = len(values)
    half = student.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count) if count > 1 else 0.0
    return [round(float(np.mean(values)), 4), round(float(half), 4)]


def summarize(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Of trainings with several seeds: each measure at some clips, and the slopes, with intervals over seeds."""
    count = len(trainings[0]["distance"])
    told = [clip for clip in TOLD if clip < count] + [count]
    found: dict[str, Any] = {"seeds": len(trainings)}
    for measure in MEASURES:
        found[measure] = {clip: interval([one[measure][clip - 1] for one in trainings]) for clip in told}
    found["slopes"] = {
        kind: {size: interval([one["slopes"][kind][i] for one in trainings]) for i, size in enumerate(SIZES)}
        for kind in ERRORS
    }
    if "long" in trainings[0]:
        long = {measure: interval([one["long"][measure][-1] for one in trainings]) for measure in MEASURES}
        found["long"] = {"clips": len(trainings[0]["long"]["distance"]), **long}
    return found


def check_bars(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For every seed, at the last clip: does published keep what the control loses, stay near, and move?"""
    bars = []
    for control, published in zip(runs["control"], runs["published"], strict=True):
        figures = {
            "identity": published["identity"][-1],
            "control_identity": control["identity"][-1],
            "distance_growth": published["distance"][-1] / published["distance"][0],
            "motion": published["motion"][-1] / control["motion"][-1],
        }
        holds = {
            "identity": figures["identity"] >= 0.98,
            "control_identity": figures["control_identity"] <= 0.80,
            "distance_growth": figures["distance_growth"] <= 1.3,
            "motion": figures["motion"] >= 0.95,
        }
        rounded = {name: round(value, 4) for name, value in figures.items()}
        bars.append({"seed": control["key"]["seed"], **rounded, "fails": [n for n, held in holds.items() if not held]})
    return bars


def check_report(args: argparse.Namespace, seeds: Counter[str], earlier: dict[str, Any] | None) -> None:
    """Leave the program where no report could come of it; `seeds` counts those of every contestant."""
    for name in args.contestants:
        if not seeds[name]:
            raise SystemExit(f"`--ablation_seeds`: none of the `--seeds` is one of them, and {name} has no other.")
        if earlier is not None and earlier["table"].get(name, {"seeds": 0})["seeds"] > seeds[name]:
            raise SystemExit(f"`--add_to`: {args.add_to} has more `--seeds` of {name} than {seeds[name]}.")
    both = len({"control", "published"} & {*args.contestants})
    if both == 1 or (both == 0 and earlier is None):
        raise SystemExit(
            "`--contestants`: control and published are compared, name both; or neither, with `--add_to`."
        )
    if earlier is not None and earlier["settings"] != settings(args):
        raise SystemExit(f"`--add_to`: {args.add_to} has other settings, {earlier['settings']}.")


def add_to(earlier: dict[str, Any], results: dict[str, Any], contestants: list[str]) -> dict[str, Any]:
    """Results with what the `earlier` ones have of others than these contestants."""
    found = {**results, "made": earlier["made"] + results["made"]}
    for part in ("table", "curves"):
        rows = {**earlier[part], **{name: results[part][name] for name in contestants}}
        found[part] = {name: rows[name] for name in ("base", *CONTESTANTS) if name in rows}
    found["bars"] = results["bars"] or earlier["bars"]
    return found


def curves(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plot shows of trainings with several seeds: for each seed a list. Of long chains some clips."""
    found = {measure: [rounded(one[measure]) for one in trainings] for measure in ("identity", "distance")}
    if "long" in trainings[0]:
        count = len(trainings[0]["long"]["identity"])
        clips = np.unique(np.geomspace(1, count, 60).round().astype(int)).tolist()
        found["long_clips"] = clips
        for measure in ("identity", "distance"):
            found[f"long_{measure}"] = [rounded([one["long"][measure][c - 1] for c in clips]) for one in trainings]
    found["watched_steps"] = [int(step) for step in trainings[0]["watched"]]
    for kind in ERRORS:
        found[f"watched_{kind}"] = [rounded([w[kind] for w in one["watched"].values()]) for one in trainings]
    return found


def rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Identity and distance over clips, a line for each seed, and slopes over training, from `curves`."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for colour, name in enumerate(MAIN):
        for axis, measure in ((left, "identity"), (middle, "distance")):
            for index, (values, long) in enumerate(
                zip(found[name][measure], found[name][f"long_{measure}"], strict=True)
            ):
                label = {0: name}.get(index)
                axis.plot(range(1, len(values) + 1), values, color=f"C{colour}", alpha=0.6, lw=1, label=label)
                axis.plot(found[name]["long_clips"], long, ":", color=f"C{colour}", alpha=0.6, lw=1)
        for kind, style in zip(ERRORS, ("-", "--", ":"), strict=True):
            values = np.mean(found[name][f"watched_{kind}"], axis=0)
            if len(values):
                right.plot(found[name]["watched_steps"], values, style, color=f"C{colour}", label=f"{name}: {kind}")
    left.set(title="Identity kept", ylabel="share of chains", ylim=(0, 1.03))
    middle.set(title="Distance from the surface", ylabel="root mean square", ylim=(0, None))
    for axis in (left, middle):
        axis.set(xscale="log", xlabel="clip; dotted: fewer chains, longer")
        axis.legend()
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(title=f"What a clip leaves of an error of {WATCHED}", xlabel="training step", ylim=(0, None))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    world = World()
    earlier = None if args.add_to is None else json.loads(args.add_to.read_text())
    others = [name for name in args.contestants if name not in MAIN]
    wanted = [(name, seed) for seed in args.seeds for name in MAIN if name in ("base", *args.contestants)]
    wanted += [(name, seed) for seed in args.seeds if seed in args.ablation_seeds for name in others]
    if not args.only_runs:
        check_report(args, Counter(name for name, _ in wanted), earlier)
    runs: dict[str, list[dict[str, Any]]] = {}
    with tqdm(wanted, desc="Trainings", unit="training") as progress:
        for name, seed in progress:
            progress.set_postfix_str(f"{name}, seed {seed}")
            runs.setdefault(name, []).append(run(name, seed, world, args))
    if args.only_runs:
        return
    minutes = round(sum(one["minutes"] for trainings in runs.values() for one in trainings))
    results = {
        "made": [{**provenance(), "minutes": minutes}],
        "settings": settings(args),
        "table": {name: summarize(trainings) for name, trainings in runs.items()},
        "bars": check_bars(runs) if "control" in runs else [],
        "curves": {name: curves(trainings) for name, trainings in runs.items()},
    }
    results = json.loads(json.dumps(results))  # numbers that are names are text in files
    if earlier is not None:
        results = add_to(earlier, results, args.contestants)
    write_json(results, args.output_dir / "recycling.json")
    plot(results["curves"], args.output_dir / "recycling.png")
    for name, row in results["table"].items():
        last = max(row["distance"], key=int)
        told = ", ".join(f"{measure} {row[measure][last][0]:.3f}" for measure in MEASURES)
        print(f"{name:20} clip {last}: {told}")
    for bar in results["bars"]:
        print(f"seed {bar['seed']}: {'every bar holds' if not bar['fails'] else 'fails: ' + ', '.join(bar['fails'])}")


if __name__ == "__main__":
    main()
