"""Two trainings that take turns in one process: while one goes on, the other is on the CPU.

Each is an iterator that pauses and says how many steps it has done. What all of a process shares, the random numbers,
is put by with it; so each comes out as if it had been alone, bit for bit.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from diffusers.training_utils import free_memory

from ..erft import ErrorRecycler
from .average import MovingAverage
from .block_offload import BlockOffload
from .samples import Samples


@dataclass
class Pair:
    """What the trainings of two experts know of each other. Each tells of itself before it does any step.

    Args:
        args (`dict[str, argparse.Namespace]`): Arguments of each, by expert.
        transformers (`dict[str, torch.nn.Module]`): What is trained, by the name of the component.
        recyclers (`list[ErrorRecycler]`): With their banks.
        steps (`dict[str, int]`): How many each has done, by expert.
        finished (`set[str]`): Experts that have done all.
        samples (`Samples`, *optional*): What both are trained on, once the first has found it.
        averages (`list[MovingAverage]`): Of what each trains, where it has one.
        blocks (`list[BlockOffload]`): Of each, where its blocks are on the CPU.
        trackers (`list[GeneralTracker]`): Of the run.
    """

    args: dict[str, argparse.Namespace] = field(default_factory=dict)
    transformers: dict[str, torch.nn.Module] = field(default_factory=dict)
    recyclers: list[ErrorRecycler] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    samples: Samples | None = None
    averages: list[MovingAverage] = field(default_factory=list)
    blocks: list[BlockOffload] = field(default_factory=list)
    trackers: list[GeneralTracker] = field(default_factory=list)

    def others(self, component: str) -> dict[str, torch.nn.Module]:
        """The transformers but that one."""
        return {name: transformer for name, transformer in self.transformers.items() if name != component}


def take_turns(runs: dict[str, Iterator[int]]) -> None:
    """Let the one of `runs` go on that has done the fewest steps, of several the first, until all have ended."""
    steps, states = dict.fromkeys(runs, -1), dict.fromkeys(runs, _random_states())
    while steps:
        name = min(steps, key=lambda name: steps[name])
        _set_random_states(states[name])
        try:
            steps[name] = next(runs[name])
        except StopIteration:
            del steps[name]
        states[name] = _random_states()


def put_by(
    model: torch.nn.Module | None, optimizer: torch.optim.Optimizer, blocks: BlockOffload | None = None
) -> Callable[[], None]:
    """Move a model, if one is given, and the state of its optimizer to the CPU, and blocks that come and go.

    Returns:
        What brings each of them back to where it was.
    """
    device = None if model is None else next(model.parameters()).device
    places = [
        (state, name, value.device)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    ]

    if blocks is not None:
        blocks.put_away()

    def move(is_back: bool) -> None:
        if model is not None:
            model.to(device if is_back else "cpu")
        for state, name, place in places:
            state[name] = state[name].to(place if is_back else "cpu")
        free_memory()

    move(is_back=False)
    return partial(move, is_back=True)


def _random_states() -> tuple[Any, ...]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpus


def _set_random_states(states: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch, gpus = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
