"""The closed forms of flow matching and of the recycled objective, in float64 against independent derivations."""

import math

import pytest
import torch

from conftest import seeded
from diffusers_svi.erft import clean_side_error, erft_loss, loss_weights, noise_side_error, recycled_velocity
from diffusers_svi.flow import interpolate, shifted_sigmas, velocity


@pytest.fixture
def sample():
    """Clean latents, noise, two errors, a prediction, and a sigma for each of three samples."""
    generator = seeded()
    latents, noise, e_vid, e_noi, prediction = (
        torch.randn(3, 4, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    return latents, noise, e_vid, e_noi, prediction, torch.tensor([0.1, 0.55, 1.0], dtype=torch.float64)


def test_interpolation_runs_from_clean_to_noise_at_the_velocity(sample):
    latents, noise, *_ = sample
    for value, expected in ((0.0, latents), (1.0, noise)):
        torch.testing.assert_close(interpolate(latents, noise, torch.full((3,), value)), expected)
    # The derivative, by autograd.
    sigma = torch.full((3,), 0.3, dtype=torch.float64)
    _, slope = torch.autograd.functional.jvp(lambda s: interpolate(latents, noise, s), sigma, torch.ones_like(sigma))
    torch.testing.assert_close(slope, velocity(latents, noise))


def test_one_step_along_the_true_velocity_reaches_both_ends(sample):
    latents, noise, *_, sigma = sample
    noisy, step = interpolate(latents, noise, sigma), sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - step * velocity(latents, noise), latents)
    torch.testing.assert_close(noisy + (1 - step) * velocity(latents, noise), noise)


def test_the_recycled_velocity_leads_to_the_clean_latents(sample):
    """From injected noise, at sigma 1, one step ends in the latents without their injected error."""
    latents, noise, e_vid, e_noi, *_ = sample
    target = recycled_velocity(latents, noise + e_noi)
    start = interpolate(latents + e_vid, noise + e_noi, torch.ones(3))
    torch.testing.assert_close(start - target, latents)


def test_one_residual_is_both_errors(sample):
    """The differences of the four endpoints, integrated one by one, are two readings of `v_hat - V`."""
    latents, noise, e_vid, e_noi, prediction, sigma = sample
    noisy = interpolate(latents + e_vid, noise + e_noi, sigma)
    target = recycled_velocity(latents, noise + e_noi)
    residual = prediction - target
    clean_side = torch.stack(
        [x - s * v - (x - s * w) for x, v, w, s in zip(noisy, prediction, target, sigma, strict=True)]
    )
    noise_side = torch.stack(
        [x + (1 - s) * v - (x + (1 - s) * w) for x, v, w, s in zip(noisy, prediction, target, sigma, strict=True)]
    )
    torch.testing.assert_close(clean_side_error(residual, sigma), clean_side)
    torch.testing.assert_close(noise_side_error(residual, sigma), noise_side)
    # And the identity between the two sides: (1 - sigma) * clean side = -sigma * noise side.
    torch.testing.assert_close((1 - sigma).view(-1, 1, 1, 1, 1) * clean_side, -sigma.view(-1, 1, 1, 1, 1) * noise_side)


def test_shifted_sigmas_are_the_published_schedule():
    sigmas = shifted_sigmas(50, 5.0).tolist()
    assert [round(sigma, 4) for sigma in sigmas[:3]] == [1.0, 0.9959, 0.9917]
    assert [round(sigma, 4) for sigma in sigmas[-3:]] == [0.2419, 0.1724, 0.0926]


def test_loss_weights_against_a_loop():
    bells = []
    for i in range(1000):
        u = 1 - i / 1000
        t = 1000 * 5 * u / (1 + 4 * u)
        bells.append(math.exp(-2 * ((t - 500) / 1000) ** 2))
    least = min(bells)
    total = sum(bell - least for bell in bells)
    weights = loss_weights()
    assert weights.tolist() == pytest.approx([(bell - least) * 1000 / total for bell in bells], rel=1e-10)
    assert weights.mean().item() == pytest.approx(1) and weights.min() == 0


def test_the_loss_is_weighted_per_sample_and_in_float32():
    prediction, target = torch.zeros(2, 3, 2, 2, 2), torch.ones(2, 3, 2, 2, 2)
    target[1] *= 2
    loss = erft_loss(prediction.bfloat16(), target.bfloat16(), torch.tensor([0.5, 1.5]))
    assert loss.dtype == torch.float32 and loss.tolist() == [0.5, 6.0]


def test_masked_frames_do_not_count():
    prediction, target = torch.zeros(1, 3, 2, 2, 2), torch.ones(1, 3, 2, 2, 2)
    target[:, :, 0] = 100
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    assert erft_loss(prediction, target, torch.ones(1), mask).tolist() == [1.0]
