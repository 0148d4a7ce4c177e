"""Optimizers by name, and learning rates that change when a run goes on."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..checks import check_choice


OPTIMIZERS = ("adamw", "prodigy")
# What steps are of the size of, where no learning rate is given; Prodigy finds the size by itself.
LEARNING_RATES = {"adamw": 1e-4, "prodigy": 1.0}


def check_optimizer(name: str, eight_bit: bool = False) -> None:
    """Raise a `ValueError` if there is no such optimizer, or the library it comes from is missing."""
    check_choice("optimizer", name, OPTIMIZERS)
    if eight_bit and name != "adamw":
        raise ValueError(f"`--use_8bit_adam` is for `--optimizer adamw`, got {name}.")
    library = "prodigyopt" if name == "prodigy" else "bitsandbytes" if eight_bit else None
    if library and importlib.util.find_spec(library) is None:
        option = "--use_8bit_adam" if eight_bit else f"--optimizer {name}"
        raise ValueError(f"`{option}` needs {library}: `pip install {library}`.")


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    *,
    eight_bit: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimizer.

    Args:
        name (`str`): "adamw", or "prodigy", with the settings that diffusers' scripts have.
        parameters (`Iterable[torch.nn.Parameter]`): What it changes.
        learning_rate (`float`): Of a step; Prodigy multiplies its own by it.
        eight_bit (`bool`, defaults to `False`): AdamW of bitsandbytes.
        betas, weight_decay, epsilon: As in Adam.

    Raises:
        ValueError: as [`check_optimizer`].
    """
    check_optimizer(name, eight_bit)
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, decouple=True, use_bias_correction=True, safeguard_warmup=True, **options)
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def apply_learning_rate(scheduler: LambdaLR, learning_rate: float) -> None:
    """Let a scheduler that was loaded go on with another learning rate; its schedule is the one it was made with.

    What is loaded brings the learning rate of the run that was saved, in the scheduler and in the optimizer. If that
    is the same, nothing changes.
    """
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    rates = [learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate
    scheduler._last_lr = list(rates)
