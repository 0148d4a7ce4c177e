"""Optimizers by name, and a learning rate that changes when a run goes on."""

import importlib.util

import pytest
import torch
from diffusers.optimization import get_scheduler

from diffusers_svi.training.optimizers import apply_learning_rate, check_optimizer, make_optimizer


def make_run(learning_rate: float, schedule: str = "linear", num_steps: int = 10):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("adamw", [parameter], learning_rate)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    return optimizer, scheduler, parameter


def step(optimizer, scheduler, parameter) -> float:
    """The learning rate of a step."""
    used = optimizer.param_groups[0]["lr"]
    parameter.square().sum().backward()
    optimizer.step(), scheduler.step(), optimizer.zero_grad()
    return used


def resumed(learning_rate: float, **options):
    """A run that has loaded what one of learning rate 1 has saved after four of ten steps."""
    saved, run = make_run(1.0, options.get("schedule", "linear")), make_run(learning_rate, **options)
    for _ in range(4):
        step(*saved)
    run[0].load_state_dict(saved[0].state_dict())
    run[1].load_state_dict(saved[1].state_dict())
    return saved, run


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial"])
def test_the_same_learning_rate_changes_nothing(schedule):
    saved, run = resumed(1.0, schedule=schedule)
    before = run[0].state_dict()["param_groups"], run[1].state_dict()
    apply_learning_rate(run[1], 1.0)
    assert before == (run[0].state_dict()["param_groups"], run[1].state_dict())
    assert [step(*run) for _ in range(6)] == [step(*saved) for _ in range(6)]


def test_another_learning_rate_holds_from_the_next_step_on():
    _, run = resumed(0.5)
    assert run[0].param_groups[0]["lr"] == pytest.approx(0.6)
    apply_learning_rate(run[1], 0.5)
    assert [step(*run) for _ in range(3)] == pytest.approx([0.3, 0.25, 0.2])
    assert run[1].get_last_lr() == pytest.approx([0.15])


def test_another_schedule_goes_on_where_the_run_is():
    _, run = resumed(1.0, num_steps=20)
    apply_learning_rate(run[1], 1.0)
    assert [step(*run) for _ in range(2)] == pytest.approx([0.8, 0.75])


def test_settings_of_adam_arrive():
    options = {"betas": (0.8, 0.9), "weight_decay": 0.3, "epsilon": 1e-5}
    optimizer = make_optimizer("adamw", [torch.nn.Parameter(torch.ones(1))], 0.1, **options)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.8, 0.9), 0.3, 1e-5)


def test_an_optimizer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`optimizer` must be one of \('adamw', 'prodigy'\), got 'lion'"):
        check_optimizer("lion")
    with pytest.raises(ValueError, match="`--use_8bit_adam` is for `--optimizer adamw`, got prodigy"):
        check_optimizer("prodigy", eight_bit=True)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`--optimizer prodigy` needs prodigyopt: `pip install prodigyopt`"):
        make_optimizer("prodigy", [torch.nn.Parameter(torch.ones(1))], 1.0)


def test_prodigy_finds_its_own_step():
    parameter = torch.nn.Parameter(torch.full((4,), 3.0))
    optimizer = make_optimizer("prodigy", [parameter], 1.0, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.1
