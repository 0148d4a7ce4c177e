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


def test_the_shift_of_another_scheduler_is_taken_over():
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert SVIEulerScheduler.from_config(unipc.config).config.shift == 5.0
    assert SVIEulerScheduler.from_config(unipc.config, shift=3.0).config.shift == 3.0
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert SVIEulerScheduler.from_config(euler.config).config.shift == 7.0


def test_save_and_load(tmp_path):
    SVIEulerScheduler(shift=5.0).save_pretrained(tmp_path)
    assert SVIEulerScheduler.from_pretrained(tmp_path).config.shift == 5.0
