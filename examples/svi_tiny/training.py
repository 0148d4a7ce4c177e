"""What the scripts of svi-tiny share: clips of the world, the record beside the weights, checkpoints."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_svi.pixels import from_uint8

from . import world


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from report import provenance


EMA_NAME = "ema.safetensors"
# Clips with an index from here on are never trained on.
HELD_OUT = 2**31


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """`(batch, frames, height, width, 3)` uint8 to `(batch, 3, frames, height, width)` in [-1, 1]."""
    return from_uint8(torch.from_numpy(frames).permute(0, 4, 1, 2, 3))


def sample_clips(
    seed: int, indices: Iterable[int], device: torch.device | str = "cpu"
) -> tuple[list[str], torch.Tensor]:
    """Prompts and pixels `(len(indices), 3, CLIP_FRAMES, SIZE, SIZE)`, in [-1, 1], of the clips of these numbers."""
    stories = [world.sample_story(seed, index) for index in indices]
    clips = np.stack([world.render(world.film(*story)) for story in stories])
    return [world.caption(state, action) for state, (action,) in stories], to_pixels(clips).to(device)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizer",
        choices=("muon", "adamw"),
        default="muon",
        help="Of the matrices. Muon computes in bfloat16, whatever `--mixed_precision` says.",
    )
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="bf16",
        help="A CPU without bfloat16 instructions is a hundred times slower with bf16 than without.",
    )


def matrix_optimizer(args: argparse.Namespace, matrices, weight_decay: float) -> torch.optim.Optimizer:
    """What `--optimizer` asks for, at `--learning_rate`."""
    options = {"lr": args.learning_rate, "weight_decay": weight_decay}
    if args.optimizer == "muon":
        return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    return torch.optim.AdamW(matrices, betas=(0.9, 0.98), **options)


class Record:
    """What was run, on what, for how long, and how it went: a JSON file that grows with the run."""

    def __init__(self, path: Path, seed: int):
        self.path = path
        self.started = time.time()
        earlier = json.loads(path.read_text()) if path.exists() else {}
        self.minutes_before = earlier.get("minutes", 0.0)
        now, commands = provenance(), earlier.get("commands", [])
        self.values = {
            # More than one where a run was interrupted and went on with other settings.
            "commands": commands if commands[-1:] == [now["command"]] else [*commands, now["command"]],
            "seed": seed,
            "minutes": self.minutes_before,
            "machine": now["machine"],
            "versions": {**now["versions"], "accelerate": accelerate.__version__},
            "curve": earlier.get("curve", []),
        }

    def add(self, step: int, progress: tqdm, **figures: float) -> None:
        """Put the figures after `step` into the file and behind the progress bar."""
        self.values["curve"] = [point for point in self.values["curve"] if point["step"] < step]
        self.values["curve"].append(
            {"step": step, **{name: round(float(value), 5) for name, value in figures.items()}}
        )
        self.write()
        progress.set_postfix({name: f"{float(value):.4g}" for name, value in figures.items()})

    def write(self, **values) -> None:
        self.values.update(values, minutes=round(self.minutes_before + (time.time() - self.started) / 60, 1))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")


def training_steps(accelerator: Accelerator, first_step: int, max_steps: int, description: str) -> tqdm:
    """The steps that are left, with a progress bar in the main process."""
    return tqdm(
        range(first_step, max_steps),
        initial=first_step,
        total=max_steps,
        desc=description,
        disable=not accelerator.is_main_process,
    )


def resume(accelerator: Accelerator, folder: Path, ema: EMAModel | None = None) -> int:
    """Load the last checkpoint under `folder`, if any, and return the step to go on from."""
    checkpoints = sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    if ema is not None:
        averages = load_file(checkpoints[-1] / EMA_NAME)
        step = int(checkpoints[-1].name.split("-")[1])
        ema.load_state_dict(
            {"shadow_params": [averages[str(i)] for i in range(len(averages))], "optimization_step": step}
        )
    accelerator.print(f"Going on from {checkpoints[-1]}.")
    return int(checkpoints[-1].name.split("-")[1])


def checkpoint(accelerator: Accelerator, folder: Path, step: int, ema: EMAModel | None = None) -> None:
    """Save everything under `folder/step-<step>` and drop the checkpoint before it."""
    unfinished = folder / "unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    if ema is not None:
        # Not among what accelerate keeps: it would pickle it.
        averages = {str(index): average.contiguous() for index, average in enumerate(ema.shadow_params)}
        save_file(averages, unfinished / EMA_NAME)
    earlier = list(folder.glob("step-*"))
    unfinished.rename(folder / f"step-{step}")
    for path in earlier:
        shutil.rmtree(path)
