"""What a training step costs: the time of its parts, memory, and when the run ends."""

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from statistics import median
from typing import TypeVar

import torch


Batch = TypeVar("Batch")
# Steps that an estimate is of: the newest ones.
REMEMBERED = 100


def peak_resident_bytes() -> int:
    """The most that this process has been resident."""
    # In kilobytes, but in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepTimes:
    """Clocks for the parts of a step. What comes between steps, a film or a checkpoint, is no part of any.

    Args:
        device (`torch.device`): Waited for at the ends of a part, so that what it is still at counts where it belongs.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._parts: dict[str, float] = defaultdict(float)
        self._steps: deque[dict[str, float]] = deque(maxlen=REMEMBERED)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time until the end of the block is that of the part `name`, beside what it took before in this step."""
        begun = self._now()
        try:
            yield
        finally:
            self._parts[name] += self._now() - begun

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time until each is there is that of the part "data"."""
        iterator = iter(batches)
        while True:
            with self.part("data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def step_done(self) -> dict[str, float]:
        """What the step took, to be logged: seconds of it and of its parts, and the peak of memory so far, in GB."""
        self._steps.append(dict(self._parts))
        self._parts.clear()
        logs = {f"seconds/{name}": seconds for name, seconds in self._steps[-1].items()}
        return {"seconds/step": sum(logs.values()), **logs, "memory/peak_gb": self.peak_memory() / 1e9}

    def peak_memory(self) -> int:
        """Bytes: allocated on a GPU, resident on a CPU; of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes()

    def describe(self, steps_left: int) -> str:
        """The line that tells it; medians of the newest steps."""
        names = dict.fromkeys(name for step in self._steps for name in step)
        parts = ", ".join(f"{name} {median(step.get(name, 0.0) for step in self._steps):.3g}" for name in names)
        seconds = median(sum(step.values()) for step in self._steps)
        left = timedelta(seconds=round(seconds * steps_left))
        end = (datetime.now() + left).strftime("%Y-%m-%d %H:%M")
        return (
            f"A step takes {seconds:.3g} s ({parts}); {steps_left} more take {left}, until {end}, without films and "
            f"checkpoints. Peak memory of this process: {self.peak_memory() / 1e9:.3g} GB."
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
