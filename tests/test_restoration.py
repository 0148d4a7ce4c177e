"""The restorative target and self errors, in float64."""

import math

import pytest
import torch

from diffusers_svi.erft import (
    clean_side_error,
    loss_weights,
    recycled_velocity,
    restoration_weights,
    restorative_velocity,
    self_error,
)
from diffusers_svi.flow import interpolate, like, shifted_sigmas, velocity


def randn(seed: int) -> torch.Tensor:
    return torch.randn(5, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sample() -> dict[str, torch.Tensor]:
    sigma = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    return {"clean": randn(0), "flawed": randn(1), "noise": randn(2), "sigma": sigma}


def one_step(start: torch.Tensor, along: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return start - like(sigma, start) * along


def test_with_alpha_1_over_sigma_the_step_from_the_flawed_sample_ends_at_the_clean_one(sample):
    flawed = interpolate(sample["flawed"], sample["noise"], sample["sigma"])
    target = restorative_velocity(**sample, alpha=1 / sample["sigma"])
    torch.testing.assert_close(one_step(flawed, target, sample["sigma"]), sample["clean"], atol=1e-13, rtol=0)


def test_with_alpha_0_it_is_the_recycled_velocity_and_leaves_1_less_sigma_of_the_error(sample):
    flawed = interpolate(sample["flawed"], sample["noise"], sample["sigma"])
    target = restorative_velocity(**sample, alpha=torch.zeros(5))
    assert torch.equal(target, recycled_velocity(sample["clean"], sample["noise"]))
    left = one_step(flawed, target, sample["sigma"]) - sample["clean"]
    error = sample["flawed"] - sample["clean"]
    torch.testing.assert_close(left, like(1 - sample["sigma"], error) * error, atol=1e-13, rtol=0)


def test_without_a_flaw_it_is_the_recycled_velocity(sample):
    sample["flawed"] = sample["clean"]
    target = restorative_velocity(**sample, alpha=torch.ones(5))
    assert torch.equal(target, recycled_velocity(sample["clean"], sample["noise"]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_weights_are_the_bell_stretched_over_the_schedule(shift):
    bell = [math.exp(-2 * ((1000 * sigma - 500) / 1000) ** 2) for sigma in shifted_sigmas(1000, shift).tolist()]
    low, high = min(bell), max(bell)
    expected = torch.tensor([(value - low) / (high - low) for value in bell], dtype=torch.float64)
    torch.testing.assert_close(restoration_weights(1000, shift), expected, atol=1e-12, rtol=0)
    assert loss_weights(1000, shift).argmax() == restoration_weights(1000, shift).argmax()


def test_a_self_error_leads_to_the_one_step_prediction(sample):
    predicted = randn(3)
    noisy = interpolate(sample["clean"], sample["noise"], sample["sigma"])
    error = self_error(predicted, sample["clean"], sample["noise"], sample["sigma"])
    torch.testing.assert_close(
        sample["clean"] + error, one_step(noisy, predicted, sample["sigma"]), atol=1e-13, rtol=0
    )
    residual = predicted - velocity(sample["clean"], sample["noise"])
    assert torch.equal(error, clean_side_error(residual, sample["sigma"]))
