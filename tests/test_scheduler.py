import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_svi import SVIEulerScheduler


@pytest.mark.parametrize("num_steps", [4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_sigmas_are_the_closed_form(num_steps, shift):
    scheduler = SVIEulerScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    u = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    expected = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(scheduler.sigmas.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * expected[:-1], atol=1e-3, rtol=0)


def test_published_values_of_the_official_schedule():
    scheduler = SVIEulerScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    torch.testing.assert_close(scheduler.sigmas[:3], torch.tensor([1.0, 0.9959, 0.9917]), atol=5e-5, rtol=0)
    torch.testing.assert_close(scheduler.sigmas[-4:], torch.tensor([0.2419, 0.1724, 0.0926, 0.0]), atol=5e-5, rtol=0)


def test_the_stock_scheduler_does_not_give_it():
    """The reason for the subclass; when this fails, the subclass can go."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.0244, abs=5e-5)


def test_one_step_is_euler():
    scheduler = SVIEulerScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    sample, velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    stepped = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
    torch.testing.assert_close(stepped, sample + (scheduler.sigmas[1] - scheduler.sigmas[0]) * velocity)


def test_a_perfect_velocity_leads_to_the_clean_sample():
    scheduler = SVIEulerScheduler(shift=5.0)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - clean, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, clean, atol=1e-5, rtol=1e-5)


def test_the_shift_and_timesteps_of_another_scheduler_are_taken_over():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    unipc = UniPCMultistepScheduler(flow_shift=3.0, num_train_timesteps=500, **flow)
    taken = SVIEulerScheduler.from_config(unipc.config)
    assert taken.config.shift == 3.0 and taken.config.num_train_timesteps == 500
    taken.set_timesteps(4)
    assert taken.timesteps[0] == 500
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0, num_train_timesteps=500)
    taken = SVIEulerScheduler.from_config(euler.config)
    assert taken.config.shift == 7.0 and taken.config.num_train_timesteps == 500
    for config in (unipc.config, euler.config):
        for name in ("shift", "flow_shift"):
            taken = SVIEulerScheduler.from_config(config, **{name: 5.0})
            assert taken.config.shift == 5.0 and taken.config.num_train_timesteps == 500


def test_options_that_are_not_used_come_back():
    scheduler, unused = SVIEulerScheduler.from_config({"shift": 2.0}, return_unused_kwargs=True, other=1)
    assert scheduler.config.shift == 2.0 and unused == {"other": 1}


def test_save_and_load(tmp_path):
    scheduler = SVIEulerScheduler(shift=5.0, num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = SVIEulerScheduler.from_pretrained(tmp_path)
    for each in (scheduler, loaded):
        each.set_timesteps(6)
    assert torch.equal(loaded.sigmas, scheduler.sigmas) and torch.equal(loaded.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    "schedule", [{"sigmas": [1.0, 0.5]}, {"num_inference_steps": 2, "timesteps": [1000.0, 400.0]}]
)
def test_a_schedule_of_ones_own_is_the_parents(schedule):
    ours, parent = SVIEulerScheduler(shift=5.0), FlowMatchEulerDiscreteScheduler(shift=5.0)
    for scheduler in (ours, parent):
        scheduler.set_timesteps(**schedule)
    assert torch.equal(ours.sigmas, parent.sigmas) and torch.equal(ours.timesteps, parent.timesteps)


def test_a_shift_that_depends_on_the_size():
    """`mu` is passed on: exp(mu) is the shift then."""
    scheduler = SVIEulerScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, device="meta", mu=math.log(5))
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_timesteps(4, mu=math.log(5))
    expected = SVIEulerScheduler(shift=5.0)
    expected.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, expected.sigmas)
