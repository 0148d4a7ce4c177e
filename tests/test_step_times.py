"""What a training step is said to cost."""

import re
import time
from datetime import datetime, timedelta

import pytest
import torch

from diffusers_svi.training.step_times import REMEMBERED, StepTimes


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: `clock(seconds)` lets time pass."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def step(times: StepTimes, clock, **parts: float) -> dict[str, float]:
    for name, seconds in parts.items():
        with times.part(name):
            clock(seconds)
        clock(100.0)  # a film, or a checkpoint
    return times.step_done()


def test_a_step_is_the_sum_of_its_parts(clock):
    times = StepTimes(torch.device("cpu"))
    logs = step(times, clock, forward=1.0, backward=2.0)
    assert logs.pop("memory/peak_gb") == times.peak_memory() / 1e9 > 0.01
    assert logs == {"seconds/step": 3.0, "seconds/forward": 1.0, "seconds/backward": 2.0}
    # Several batches of a step add up, and the next step begins anew.
    with times.part("forward"):
        clock(1.0)
    assert step(times, clock, forward=2.0)["seconds/forward"] == 3.0
    assert step(times, clock, forward=2.0)["seconds/step"] == 2.0


def test_a_part_that_fails_counts(clock):
    times = StepTimes(torch.device("cpu"))
    with pytest.raises(RuntimeError), times.part("forward"):
        clock(1.0)
        raise RuntimeError
    assert times.step_done()["seconds/forward"] == 1.0


def test_waiting_for_batches_is_a_part(clock):
    def batches():
        for number in range(3):
            clock(number)
            yield number

    times, seconds = StepTimes(torch.device("cpu")), []
    for number in times.waiting(batches()):
        clock(50.0)
        seconds.append((number, times.step_done()["seconds/data"]))
    assert seconds == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_line_tells_medians_and_the_end(clock):
    times = StepTimes(torch.device("cpu"))
    for seconds in (100.0, *([1.0] * 60), *([3.0] * 40)):  # the first is forgotten
        step(times, clock, forward=seconds, bank=0.5)
    assert REMEMBERED == 100
    before = datetime.now()
    line = times.describe(1000)
    assert line.startswith("A step takes 1.5 s (forward 1, bank 0.5); 1000 more take 0:25:00, until ")
    told = datetime.strptime(re.search("until (.*?),", line)[1], "%Y-%m-%d %H:%M")
    end = timedelta(minutes=25)
    assert before + end - timedelta(minutes=1) < told <= datetime.now() + end
    assert line.endswith("GB.")
