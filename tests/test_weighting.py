"""How often noise levels are drawn, and what they count."""

import math

import pytest
import torch

from diffusers_svi.erft import loss_weights
from diffusers_svi.flow import shifted_sigmas
from diffusers_svi.training.weighting import SCHEMES, timestep_pool, timestep_weights


@pytest.mark.parametrize("scheme", ["svi", "none", "sigma_sqrt", "cosmap"])
def test_levels_are_drawn_uniformly(scheme):
    assert torch.equal(timestep_pool(scheme, 1000), torch.arange(1000))


def test_logit_normal_has_its_quantiles():
    """u = sigmoid(mean + std * z): half of the draws lie below sigmoid(mean), 84.13% below sigmoid(mean + std)."""
    pool = timestep_pool("logit_normal", 1000, logit_mean=-0.5, logit_std=0.8).double() / 1000
    for z, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        level = 1 / (1 + math.exp(0.5 - 0.8 * z))
        assert (pool < level).double().mean() == pytest.approx(share, abs=0.01)


def test_mode_has_its_quantiles():
    """u = 1 - v - s (cos^2(pi v / 2) - 1 + v) falls with v for s = 1: its median is that of v = 1/2."""
    pool = timestep_pool("mode", 1000, mode_scale=1.0).double() / 1000
    for v in (0.25, 0.5, 0.9):
        level = 1 - v - (math.cos(math.pi * v / 2) ** 2 - 1 + v)
        assert (pool < level).double().mean() == pytest.approx(1 - v, abs=0.01)
    assert pool.min() >= 0 and pool.max() < 1


def test_a_pool_is_the_same_in_every_process():
    assert torch.equal(timestep_pool("logit_normal"), timestep_pool("logit_normal"))


def test_what_levels_count():
    sigmas = shifted_sigmas(1000, 3.0)
    assert torch.equal(timestep_weights("svi", 1000, 3.0), loss_weights(1000, 3.0))
    for scheme in ("none", "logit_normal", "mode"):
        assert torch.equal(timestep_weights(scheme, 1000, 3.0), torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(timestep_weights("sigma_sqrt", 1000, 3.0), sigmas**-2.0, rtol=1e-6, atol=0)
    expected = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    torch.testing.assert_close(timestep_weights("cosmap", 1000, 3.0), expected, rtol=1e-6, atol=0)


def test_another_scheme_is_refused():
    for function in (timestep_pool, timestep_weights):
        with pytest.raises(ValueError, match="`weighting_scheme` must be one of"):
            function("bell")
    assert SCHEMES[0] == "svi"
