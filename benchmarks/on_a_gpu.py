"""What films and error recycling cost at the published shapes, on one GPU, in one call.

    python benchmarks/on_a_gpu.py --output_dir docs/results/gpu
    python benchmarks/on_a_gpu.py --tiny --output_dir outputs/tiny     # the same on a CPU, to see that it runs

Parts, of at most nine minutes each, for Wan of 1.3 and of 14 billion parameters, weights in bfloat16 made at random on
the GPU, clips of 81 frames of 480 x 832, one pass a step:

- sides: `chain.py` with four steps: SVIPipeline over by hand, where the time goes, frames a second, the peak of either
  side, and the share of the card's ceiling, a large product of matrices in the same run, that denoising reaches. Aim:
  60%.
- erft: `erft_step.py` at the larger of both that fits, with 100 errors a grid.
- fast50, fast4: a clip by SVIPipeline, attention by cuDNN and compiled blocks, of so many steps.

Writes `gpu.json`, and what every part wrote into a folder of its own. What is done is kept: the same call goes on. A
part that takes too long, or more memory than there is, is noted as such, and the next one begins.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from chain import AIMS
from random_models import MODELS
from report import provenance, write_json


FOLDER = Path(__file__).parent
LIMIT = 540  # seconds
LARGEST_FIRST = ("14b", "1.3b")
BACKEND = "_native_cudnn" if torch.cuda.is_available() else "native"
FAST = ["--sides", "SVIPipeline", "--num_pairs", "1", "--attention_backend", BACKEND, "--compile_blocks"]
# In the order in which they matter, should the time run out.
PARTS: dict[str, list[str] | None] = {
    "sides": ["--num_pairs", "2", "--num_inference_steps", "4"],
    "erft": None,
    "fast50": [*FAST, "--num_inference_steps", "50"],
    "fast4": [*FAST, "--num_inference_steps", "4"],
}
# Of the larger model, the smaller has these otherwise.
SHAPES = ("num_layers", "num_attention_heads", "ffn_dim")
ERFT = {
    model: [
        *("--preset", "14b", "--capacity", "100", "--steps", "2"),
        *(told for name in SHAPES for told in (f"--{name}", str(MODELS[model].transformer[name]))),
    ]
    for model in LARGEST_FIRST
}
ERFT["tiny"] = ["--preset", "quick"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="Default: all.")
    parser.add_argument("--models", nargs="*", choices=LARGEST_FIRST, default=LARGEST_FIRST, help="Default: both.")
    parser.add_argument("--tiny", action="store_true", help="A tiny model, on a CPU too.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="Default: %(default)s.")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here: `--tiny` tries it on the CPU.")
    return args


def measure(name: str, script: str, options: list[str], file: Path) -> dict[str, Any]:
    """What `script` wrote to `file`, or why it did not; with the minutes that it took."""
    # As one would type it: it stands in the records.
    command = [sys.executable, os.path.relpath(FOLDER / script), *options]
    print(f"{name}: {script} {' '.join(options)}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode == 0:
            outcome = json.loads(file.read_text())
        elif "OutOfMemoryError" in done.stderr:
            outcome = {"failed": "out of memory"}
        else:
            outcome = {"failed": done.stderr[-2000:]}
    except subprocess.TimeoutExpired:
        outcome = {"failed": f"not done after {LIMIT} seconds"}
    return {"minutes": round((time.monotonic() - begun) / 60, 1), **outcome}


def run_parts(args: argparse.Namespace, parts: dict[str, dict], keep: Callable[[], None]) -> None:
    models = ["tiny"] if args.tiny else args.models
    for kind, options in PARTS.items():
        for model in models if kind in args.parts else []:
            name = f"{kind}-{model}"
            if name not in parts or "failed" in parts[name]:
                folder = args.output_dir / name
                if options is None:
                    file = folder / "erft_step.json"
                    parts[name] = measure(name, "erft_step.py", [*ERFT[model], "--output_file", str(file)], file)
                else:
                    told = ["--models", model, "--only", "sides", *options, "--output_dir", str(folder)]
                    parts[name] = measure(name, "chain.py", told, folder / "chain.json")
                keep()
            if kind == "erft" and "failed" not in parts[name]:
                break  # it is the largest that fits


def summary(parts: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The figures of every part that there are, by its name."""
    told: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        figures = next(iter(part["sides"]["figures"].values())) if "sides" in part else {}
        if figures:
            told[name] = {
                "frames a second": figures["frames_a_second"]["SVIPipeline"],
                "share of the ceiling": figures["share_of_ceiling"]["SVIPipeline"],
            }
        if "peak_device_bytes" in figures:
            told[name]["GB"] = figures["peak_device_bytes"]["SVIPipeline"] / 1e9
        if "ratio" in figures:
            told[name]["over by hand"] = figures["ratio"]["total"]["median"]
        if "step_ratio" in part:
            told[name] = {"seconds": part["median_seconds"]["erft"], "over plain": part["step_ratio"]}
        if "peak_device_bytes" in part:
            told[name]["GB"] = part["peak_device_bytes"] / 1e9
    return told


def main():
    args = parse_args()
    file = args.output_dir / "gpu.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if not results:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        results = {"date": date, **provenance(), "aims": AIMS, "parts": {}}
    run_parts(args, results["parts"], lambda: write_json(results, file))
    results["summary"] = summary(results["parts"])
    write_json(results, file)
    for name, part in results["parts"].items():
        figures = ", ".join(f"{key} {value:.4g}" for key, value in results["summary"].get(name, {}).items())
        print(f"{name:14} {part['minutes']:4} min  {part.get('failed', figures)}")


if __name__ == "__main__":
    main()
