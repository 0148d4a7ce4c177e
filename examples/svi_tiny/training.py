"""What the scripts of svi-tiny share: clips of the world, the record beside the weights, checkpoints."""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_svi.pixels import from_uint8

from . import world
from .sizes import SIZES


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from report import provenance


EMA_NAME = "ema.safetensors"
WEIGHTS_NAME = "weights.safetensors"
# The exit status of a training that is not finished, EX_TEMPFAIL of sysexits.h: "try again".
UNFINISHED = 75
# Clips with an index from here on are never trained on.
HELD_OUT = 2**31


def to_pixels(frames: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """`(batch, frames, height, width, 3)` uint8 to `(batch, 3, frames, height, width)` in [-1, 1]."""
    return from_uint8(torch.from_numpy(frames).to(device).permute(0, 4, 1, 2, 3))


def draw_clips(seed: int, indices: Iterable[int]) -> tuple[list[str], np.ndarray]:
    """Prompts and frames `(len(indices), CLIP_FRAMES, SIZE, SIZE, 3)`, uint8, of the clips of these numbers."""
    stories = [world.sample_story(seed, index) for index in indices]
    clips = np.stack([world.render(world.film(*story)) for story in stories])
    return [world.caption(state, action) for state, (action,) in stories], clips


def sample_clips(
    seed: int, indices: Iterable[int], device: torch.device | str = "cpu"
) -> tuple[list[str], torch.Tensor]:
    """Prompts and pixels `(len(indices), 3, CLIP_FRAMES, SIZE, SIZE)`, in [-1, 1], of the clips of these numbers."""
    prompts, frames = draw_clips(seed, indices)
    return prompts, to_pixels(frames, device)


def clip_batches(
    seed: int, batches: Sequence[range], device: torch.device | str = "cpu", num_workers: int = 0
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """[`sample_clips`] for one range of numbers after the other; `num_workers` processes draw ahead."""
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=partial(draw_clips, seed),
        num_workers=num_workers,
        generator=torch.Generator(),  # of its own: the global one is for the training
    )
    for prompts, frames in loader:
        yield prompts, to_pixels(frames, device)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="Of the model. Default: as embedded.")
    parser.add_argument("--max_minutes", type=float, help="Stop after the step in which they are over, and save.")
    parser.add_argument(
        "--weights_only",
        action="store_true",
        help="Small checkpoints: weights in float16, without the optimizers' state. They warm up again instead.",
    )
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that draw clips; one does 50 a second."
    )
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


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, max_steps: int, first_step: int = 0) -> LambdaLR:
    """Diffusers' "cosine", and, where the optimizer begins anew at `first_step`, the warm-up from there once more."""

    def factor(done: int) -> float:
        progress = max(0, first_step + done - warmup) / max(1, max_steps - warmup)
        return min(1.0, done / warmup) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


class Deadline:
    """When a training has to stop.

    Args:
        minutes (`float`, *optional*): From now on; never if not given.

    Raises:
        ValueError: if `minutes` is below 0.
    """

    def __init__(self, minutes: float | None = None):
        if minutes is not None and not minutes >= 0:
            raise ValueError(f"`--max_minutes` must be 0, for one step, or more, got {minutes}.")
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def over(self) -> bool:
        return time.monotonic() >= self.end


def stop_unfinished(done: int, total: int, what: str) -> NoReturn:
    """Leave the program with the status that says so."""
    print(f"Not finished, {done} of {total} {what}: the same command goes on from there.")
    raise SystemExit(UNFINISHED)


class Checkpoints:
    """The last checkpoint of a training, a folder `step-<step>`.

    Either it is all that accelerate keeps, or weights alone: in float16, two bytes a parameter, from which averages
    and optimizers begin anew. What these remember is short: a thousand steps, and fifty.

    Args:
        folder (`Path`): Where to; it is made if need be.
        models (`dict[str, torch.nn.Module]`): Whose weights are kept, by name.
        weights_only (`bool`, defaults to `False`): Whether nothing else is.

    Raises:
        ValueError: if there is a checkpoint of the other kind.
    """

    def __init__(self, folder: Path, models: dict[str, torch.nn.Module], weights_only: bool = False):
        self.folder, self.models, self.weights_only = folder, models, weights_only
        found = sorted(folder.glob("step-*"), key=self._step)
        self.last = found[-1] if found else None
        if self.last is not None and (self.last / WEIGHTS_NAME).exists() != weights_only:
            other = "without" if weights_only else "with"
            raise ValueError(f"`--weights_only`: {self.last} was written {other} it; go on so, or take it away.")

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.name.split("-")[1])

    def load_weights(self) -> int:
        """Fill the models from a checkpoint of weights alone, if there is one, and return the step to go on from."""
        if self.last is None or not self.weights_only:
            return 0
        weights = load_file(self.last / WEIGHTS_NAME)
        for name, model in self.models.items():
            model.load_state_dict({key: weights.pop(f"{name}.{key}") for key in model.state_dict()})
        assert not weights, f"{self.last} has more than belongs to the models: {sorted(weights)[:3]}"
        print(f"Going on from the weights of {self.last}.")
        return self._step(self.last)

    def load_everything(self, accelerator: Accelerator, ema: EMAModel | None = None) -> int:
        """Load a full checkpoint, if there is one, and return the step to go on from."""
        if self.last is None:
            return 0
        accelerator.load_state(str(self.last))
        step = self._step(self.last)
        if ema is not None:
            averages = load_file(self.last / EMA_NAME)
            ema.load_state_dict(
                {"shadow_params": [averages[str(i)] for i in range(len(averages))], "optimization_step": step}
            )
        accelerator.print(f"Going on from {self.last}.")
        return step

    def save(self, accelerator: Accelerator, step: int, ema: EMAModel | None = None) -> None:
        """Write `step-<step>` and drop the checkpoint before it."""
        unfinished = self.folder / "unfinished"
        if not self.weights_only:
            accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        if self.weights_only:
            unfinished.mkdir(parents=True, exist_ok=True)
            weights = {
                f"{name}.{key}": value.half().contiguous()
                for name, model in self.models.items()
                for key, value in model.state_dict().items()
            }
            save_file(weights, unfinished / WEIGHTS_NAME)
        elif ema is not None:
            # Not among what accelerate keeps: it would pickle it.
            averages = {str(index): average.contiguous() for index, average in enumerate(ema.shadow_params)}
            save_file(averages, unfinished / EMA_NAME)
        earlier = list(self.folder.glob("step-*"))
        unfinished.rename(self.folder / f"step-{step}")
        for path in earlier:
            shutil.rmtree(path)
