r"""What a film by `SVIPipeline` costs over one by diffusers' pipeline called clip by clip by hand, and where it goes.

    python benchmarks/chain.py --output_dir docs/results/chain
    python benchmarks/chain.py --models 14b --num_pairs 2 --output_dir outputs/14b   # a GPU of 80 GB

Both sides have the same components, of random weights: prompt, start image and noise are the same, and so is the work,
the last frame of every clip encoded again (`PixelMotion(1)`). Each by itself with `--only`:

- sides: the clips of a film by both in turn, each time in another order. The ratio of each pair, SVIPipeline over by
  hand, as median and middle half; aim: at most 1.00. *Without text* it is that of everything but the text encoder,
  which by hand is asked for every clip, and by SVIPipeline once for every prompt. Where the time goes: text encoder,
  encoders (VAE and image), denoising (transformer and scheduler), decoder, and all that is none of these.
  Operations are counted by torch in a clip of one step, which warms up; those of denoising, by the second, are held
  against the machine's ceiling: a large product of matrices in the type of the weights. Aim: 60% on a GPU. There also
  the most that torch allocated in a clip.
- memory, of a CPU only: the peak of a film of two clips, of either side in a process of its own: the most that was
  resident, less what was before models were made.
- cost: of SVIPipeline, against the number of clips, the pixels of a frame and the frames of a clip. Straight lines
  fitted to seconds and to operations: slope, intercept, and the share of the variance that the line explains.

Seconds are of the clock on a GPU. On a CPU they are of one core, as other programs share the machine; the clock's are
beside them in the ratio. Writes `chain.json` and a plot; what is there of other measurements is kept.
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import psutil
import torch
from contestants import DTYPES
from phases import PHASES, Phases, matmul_ceiling
from random_models import MODELS, Model, random_pipeline
from report import provenance, ratio_of, write_json
from sides import SIDES, largest_difference

from diffusers_svi.training.step_times import peak_resident_bytes


matplotlib.use("Agg")
import matplotlib.pyplot as plt


START = Path(__file__).parents[1] / "docs" / "images" / "start.png"
PROMPT = "a large red circle moves left over a green meadow"
AIMS = {"ratio": 1.0, "share_of_ceiling": 0.6}
CLIPS_OF_MEMORY = 2
MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
# What the cost is measured against: clips, sides of a square frame in pixels, frames of a clip.
COSTS = {"clips": (1, 2, 4), "pixels": (112, 144, 176), "frames": (5, 9, 17)}
QUICK_COSTS = {"clips": (1, 2), "pixels": (16, 32), "frames": (5, 9)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="*", choices=MODELS, default=["small", "medium", "large"], help="Default: %(default)s.")
    add("--only", nargs="*", choices=MEASUREMENTS, help="Default: all.")
    add("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="Of `sides` and `memory`. Default: both.")
    add("--num_pairs", type=int, default=8, help="Clips of either side. Default: %(default)s.")
    add("--num_repeats", type=int, default=3, help="Films of every cost. Default: %(default)s.")
    add("--num_inference_steps", type=int, default=4, help="Default: %(default)s.")
    add("--guidance_scale", type=float, default=1.0, help="Above 1 every step is two. Default: %(default)s.")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=here, help="Default: cuda if there is one, else cpu.")
    add("--dtype", choices=DTYPES, help="Of all but the VAE. Default: bfloat16 on a GPU, else float32.")
    add("--attention_backend", help="Of the transformer, a name of diffusers': _native_cudnn. Default: its own.")
    add("--compile_blocks", action="store_true", help="Compile the transformer's blocks, once operations are counted.")
    add("--seed", type=int, default=0, help="Of the weights. Default: %(default)s.")
    add("--output_dir", type=Path, default=Path("outputs/chain"), help="Default: %(default)s.")
    add("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    add("--quick", action="store_true", help="As little as shows that it runs, for a test.")
    args = parser.parse_args()
    args.is_cuda = args.device.startswith("cuda")
    if args.dtype is None:
        args.dtype = "bfloat16" if args.is_cuda else "float32"
    if args.only is None:
        args.only = [name for name in MEASUREMENTS if name != "memory" or not args.is_cuda]
    elif args.is_cuda and "memory" in args.only:
        parser.error("--only memory is for a CPU: on a GPU `sides` tells the peak.")
    if args.quick:
        args.models, args.num_pairs, args.num_repeats, args.num_inference_steps = ["tiny"], 2, 1, 1
    return args


def clip_options(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """How either side makes a clip."""
    steps = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return {"prompt": PROMPT, **model.clip, **steps}


def start_image(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.open(START).resize((width, height))


def pipeline(name: str, args: argparse.Namespace):
    return random_pipeline(MODELS[name], args.device, DTYPES[args.dtype], args.seed)


def measure_sides(args: argparse.Namespace) -> dict:
    return {name: _sides(name, args) for name in args.models}


def _sides(name: str, args: argparse.Namespace) -> dict:
    pipe, model = pipeline(name, args), MODELS[name]
    if args.attention_backend is not None:
        pipe.transformer.set_attention_backend(args.attention_backend)
    phases, image = Phases(pipe, args.device), start_image(model.height, model.width)
    seconds: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    wall: dict[str, list[float]] = {side: [] for side in args.sides}
    peaks: dict[str, int] = dict.fromkeys(args.sides, 0)
    orders, difference = itertools.cycle(itertools.permutations(args.sides)), 0.0
    with phases.watching():
        flops = {side: _flops(pipe, phases, model, side, args) for side in args.sides}
        if args.compile_blocks:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
            _film(pipe, model, args.sides[0], 1, _of_one_step(args))
        films = {side: SIDES[side](pipe, image, args.num_pairs, **clip_options(model, args)) for side in args.sides}
        for _ in range(args.num_pairs):
            made = {}
            for side in next(orders):
                if args.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                begun = time.perf_counter()
                made[side], spent = phases.seconds(partial(next, films[side]))
                seconds[side].append(spent)
                wall[side].append(time.perf_counter() - begun)
                if args.is_cuda:
                    peaks[side] = max(peaks[side], torch.cuda.max_memory_allocated())
            if len(made) == 2:
                difference = max(difference, largest_difference(made))
    figures = {
        "clip": model.clip,
        "parameters": {
            part: sum(value.numel() for value in getattr(pipe, part).parameters())
            for part in ("transformer", "vae", "text_encoder", "image_encoder")
            if getattr(pipe, part) is not None
        },
        "num_pairs": args.num_pairs,
        "flops": flops,
        "median_seconds": {side: _medians(clips) for side, clips in seconds.items()},
        "shares": {side: _shares(clips) for side, clips in seconds.items()},
        "frames_a_second": {side: (model.num_frames - 1) / statistics.median(values) for side, values in wall.items()},
        **_against_ceiling(seconds, flops, args),
    }
    if args.is_cuda:
        figures["peak_device_bytes"] = peaks
    if len(films) == 2:
        figures |= {"largest_difference": difference, "ratio": _ratios(seconds, wall)}
    return figures


def _flops(pipe, phases: Phases, model: Model, side: str, args: argparse.Namespace) -> dict[str, float]:
    """Operations of a clip, counted in one of a single step, which also warms up."""
    counted = phases.flops(partial(_film, pipe, model, side, 1, _of_one_step(args)))[1]
    return {**counted, "denoise": counted["denoise"] * args.num_inference_steps}


def _of_one_step(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "num_inference_steps": 1})


def _medians(clips: list[dict[str, float]]) -> dict[str, float]:
    phases = {phase: statistics.median(clip[phase] for clip in clips) for phase in PHASES}
    return {**phases, "total": statistics.median(sum(clip.values()) for clip in clips)}


def _shares(clips: list[dict[str, float]]) -> dict[str, float]:
    total = sum(sum(clip.values()) for clip in clips)
    return {phase: sum(clip[phase] for clip in clips) / total for phase in PHASES}


def _ratios(seconds: dict[str, list[dict[str, float]]], wall: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """SVIPipeline over by hand, pair by pair."""
    svi, hand = (seconds[side] for side in SIDES)
    totals = [[sum(clip.values()) for clip in clips] for clips in (svi, hand)]
    rests = [[sum(clip.values()) - clip["text"] for clip in clips] for clips in (svi, hand)]
    return {"total": ratio_of(*totals), "without text": ratio_of(*rests), "wall": ratio_of(*wall.values())}


def _against_ceiling(seconds: dict, flops: dict[str, dict[str, float]], args: argparse.Namespace) -> dict:
    """Operations a second in denoising, over those of a product of matrices."""
    ceiling = matmul_ceiling(args.device, DTYPES[args.dtype])
    shares = {}
    for side, clips in seconds.items():
        reached = flops[side]["denoise"] / statistics.median(clip["denoise"] for clip in clips)
        shares[side] = reached / ceiling["flops_a_second"]
    return {"ceiling": {"dtype": args.dtype, **ceiling}, "share_of_ceiling": shares}


def measure_memory(args: argparse.Namespace) -> dict:
    """Each in a process of its own, before this one has a model."""
    processes = multiprocessing.get_context("fork")
    figures: dict[str, dict] = {}
    for name, side in itertools.product(args.models, args.sides):
        with processes.Pool(1) as pool:
            figures.setdefault(name, {})[side] = pool.apply(peak_of_film, (name, side, args))
    for sides in figures.values():
        # What a tiny film takes may have been there before.
        if len(sides) == 2 and min(sides.values()) > 0:
            sides["ratio"] = sides["SVIPipeline"] / sides["by hand"]
    return figures


def peak_of_film(name: str, side: str, args: argparse.Namespace) -> int:
    """Bytes of a film by one side, whose clips are dropped once they are made."""
    # Large blocks go back to the machine when they are freed.
    if hasattr(c := ctypes.CDLL(None), "mallopt"):
        c.mallopt(MMAP_THRESHOLD, 65536)
    # What libraries load when they are first used is there before.
    _film(pipeline("tiny", args), MODELS["tiny"], side, 1, args)
    before = psutil.Process().memory_info().rss
    _film(pipeline(name, args), MODELS[name], side, CLIPS_OF_MEMORY, args)
    return peak_resident_bytes() - before


def _film(pipe, model: Model, side: str, num_clips: int, args: argparse.Namespace) -> None:
    image = start_image(model.height, model.width)
    for _ in SIDES[side](pipe, image, num_clips, **clip_options(model, args)):
        pass


def measure_cost(args: argparse.Namespace) -> dict:
    """Of the first model: one thing is changed, the others are as they are."""
    name = args.models[0]
    pipe = pipeline(name, args)
    phases, figures = Phases(pipe, args.device), {"model": name}
    for kind, values in (QUICK_COSTS if args.quick else COSTS).items():
        films = [partial(_costing, pipe, kind, value, args) for value in values]
        flops = [sum(phases.flops(film)[1].values()) for film in films]
        # All sizes in turn, again and again: what slows the machine slows all of them.
        rounds = [[sum(phases.seconds(film)[1].values()) for film in films] for _ in range(args.num_repeats)]
        seconds = np.median(rounds, axis=0).tolist()
        against = [value**2 for value in values] if kind == "pixels" else list(values)
        lines = {"seconds": line(against, seconds), "flops": line(against, flops)}
        figures[kind] = {"against": against, "seconds": seconds, "flops": flops, "lines": lines}
    return figures


def _costing(pipe, kind: str, value: int, args: argparse.Namespace) -> None:
    """A film of `value` clips, or of one clip of frames of `value` x `value` pixels, or of `value` frames."""
    model = MODELS[args.models[0]]
    changed = {"clips": {}, "pixels": {"height": value, "width": value}, "frames": {"num_frames": value}}[kind]
    _film(pipe, replace(model, **changed), "SVIPipeline", value if kind == "clips" else 1, args)


def line(against: list[float], values: list[float]) -> dict[str, float]:
    """The straight line of least squares through `values`, and how much of their variance it explains."""
    slope, intercept = np.polyfit(against, values, 1)
    rest = np.array(values) - (slope * np.array(against) + intercept)
    return {"slope": slope, "intercept": intercept, "explained": float(1 - rest.var() / np.var(values))}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "memory": measure_memory,
    "sides": measure_sides,
    "cost": measure_cost,
}


def plot(results: dict, path: Path) -> None:
    found = {name: measured["figures"] for name, measured in results.items()}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    if "sides" in found:
        ratios = {name: figures["ratio"] for name, figures in found["sides"].items() if "ratio" in figures}
        _plot_shares(found["sides"], axes[0, 0])
        _plot_ratios(ratios, axes[0, 1])
    if "memory" in found:
        _plot_memory(found["memory"], axes[0, 2])
    for axis, kind in zip(axes[1], COSTS, strict=True):
        if "cost" in found:
            _plot_cost(found["cost"], kind, axis)
    for axis in axes.flat:
        if not axis.has_data():
            axis.remove()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def _plot_shares(sides: dict, axis) -> None:
    bars = [(f"{name}, {side}", shares) for name in sides for side, shares in sides[name]["shares"].items()]
    left = np.zeros(len(bars))
    for phase in PHASES:
        values = np.array([shares[phase] for _, shares in bars])
        axis.barh([label for label, _ in bars], values, left=left, label=phase)
        left += values
    axis.invert_yaxis()
    axis.set(title="Where the time goes", xlabel="share of a clip", xlim=(0, 1))
    axis.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, -0.32))


def _plot_ratios(ratios: dict, axis) -> None:
    for offset, kind in enumerate(("total", "without text", "wall")):
        places = np.arange(len(ratios)) + 0.2 * (offset - 1)
        for place, ratio in zip(places, ratios.values(), strict=True):
            axis.plot([place] * 2, [ratio[kind]["quarter"], ratio[kind]["three_quarters"]], color=f"C{offset}")
        axis.plot(places, [ratio[kind]["median"] for ratio in ratios.values()], "o", color=f"C{offset}", label=kind)
    axis.axhline(AIMS["ratio"], color="black", linewidth=0.8)
    axis.set_xticks(range(len(ratios)), ratios)
    axis.set(title="Time, SVIPipeline over by hand")
    axis.legend(fontsize=7)


def _plot_memory(memory: dict, axis) -> None:
    for offset, side in enumerate(SIDES):
        peaks = [sides.get(side, 0) / 1e9 for sides in memory.values()]
        axis.bar(np.arange(len(memory)) + 0.4 * offset - 0.2, peaks, width=0.4, label=side)
    axis.set_xticks(range(len(memory)), memory)
    axis.set(title="Peak memory", ylabel="GB")
    axis.legend(fontsize=7)


def _plot_cost(cost: dict, kind: str, axis) -> None:
    against, fit = np.array(cost[kind]["against"]), cost[kind]["lines"]["seconds"]
    axis.plot(against, cost[kind]["seconds"], "o")
    axis.plot(against, fit["slope"] * against + fit["intercept"], linewidth=0.8)
    axis.set(title=f"{fit['slope']:.3g} s each + {fit['intercept']:.3g} s", ylim=(0, None), ylabel="seconds")
    axis.set_xlabel({"clips": "clips", "pixels": "pixels of a frame", "frames": "frames of a clip"}[kind])


def show(results: dict) -> None:
    """Tables of what was measured."""
    found = {name: measured["figures"] for name, measured in results.items()}
    for name, figures in found.get("sides", {}).items():
        print(f"\n{name:28} " + "".join(f"{phase:>10}" for phase in (*PHASES, "total")))
        for side, seconds in figures["median_seconds"].items():
            print(f"  {side + ', seconds':26} " + "".join(f"{value:10.3f}" for value in seconds.values()))
        for side, shares in figures["shares"].items():
            print(f"  {side + ', share':26} " + "".join(f"{value:10.3f}" for value in shares.values()))
        for side, share in figures["share_of_ceiling"].items():
            frames = figures["frames_a_second"][side]
            print(f"  {side:26} {share:.3f} of the ceiling in denoising, {frames:.3g} frames a second")
        for kind, ratio in figures.get("ratio", {}).items():
            print(
                f"  ratio, {kind:19} {ratio['median']:.3f} ({ratio['quarter']:.3f} to {ratio['three_quarters']:.3f})"
            )
    for name, sides in found.get("memory", {}).items():
        print(f"{name:12} peak " + ", ".join(f"{key} {value:.4g}" for key, value in sides.items()))
    for kind in COSTS:
        for of, fit in found.get("cost", {}).get(kind, {}).get("lines", {}).items():
            told = ", ".join(f"{key} {value:.4g}" for key, value in fit.items())
            print(f"{of} against {kind}: {told}")


def main():
    args = parse_args()
    if not args.is_cuda:
        torch.set_num_threads(1)  # the seconds of one core
    file = args.output_dir / "chain.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    told = ("device", "dtype", "attention_backend", "compile_blocks", "seed", "models")
    told += ("num_inference_steps", "guidance_scale", "num_pairs", "num_repeats")
    for name in MEASUREMENTS:
        if name in args.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            made_with = {**provenance(), **{option: getattr(args, option) for option in told}}
            results[name] = {**made_with, "figures": MEASUREMENTS[name](args)}
            write_json(results, file)
    plot(results, args.output_dir / "chain.png")
    show(results)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
