"""Boundary errors: made as a chain makes them, and met by the sample they belong to."""

import pytest
import torch

from conftest import CLIP, make_components, quiet, seeded
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.erft import BankConfig, ErrorBank, ErrorRecycler, InjectionConfig, RecyclerConfig
from diffusers_svi.erft.boundary import denoise, next_condition
from diffusers_svi.flow import shifted_sigmas, velocity


SHAPE = (16, 3, 4, 4)


@pytest.mark.parametrize("start", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_denoise_with_the_true_velocity_ends_at_the_clean_latents(start, num_steps):
    clean, noise = torch.randn(2, 2, *SHAPE, generator=seeded(), dtype=torch.float64)
    seen = []

    def predict(noisy, sigmas):
        seen.append(sigmas[0].item())
        return velocity(clean, noise)

    latents = denoise(predict, clean, noise, start, num_steps, shift=5.0)
    torch.testing.assert_close(latents, clean)
    assert seen[0] == pytest.approx(start) and seen == sorted(seen, reverse=True) and len(seen) == num_steps


def test_denoise_from_pure_noise_takes_the_steps_of_the_schedule():
    seen = []

    def predict(noisy, sigmas):
        seen.append(sigmas[0].item())
        return torch.zeros_like(noisy)

    clean, noise = torch.randn(2, 1, *SHAPE, generator=seeded())
    assert torch.equal(denoise(predict, clean, noise, 1.0, 4, shift=5.0), noise)
    assert seen == pytest.approx(shifted_sigmas(4, 5.0).tolist())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("i2v", PixelMotion(1, "reference")),
        ("i2v", PixelMotion(5)),
        ("i2v", LatentMotion(1)),
        ("ti2v-5b", HeldLatents(1)),
    ],
)
def test_the_next_condition_is_that_of_a_chain(kind, scheme):
    """What training takes for the condition after a clip is what the pipeline conditions the next clip on, exactly."""
    pipe = quiet(SVIPipeline(**make_components(kind)))
    image = torch.rand(1, 3, CLIP["height"], CLIP["width"], generator=seeded())
    options = {"prompts": "a cat", "conditioning": scheme, "output_type": "latent", **CLIP}
    first = next(pipe.stream(image=image, num_clips=2, generator=seeded(), **options))
    conditions = []
    prepare = pipe.prepare_latents

    def spy(*arguments, **named):
        prepared = prepare(*arguments, **named)
        conditions.append(prepared[1])
        return prepared

    pipe.prepare_latents = spy
    list(pipe.stream(image=image, num_clips=2, generator=seeded(), **options))
    held = kind == "ti2v-5b"
    latents = first.frames[None].float()
    made = next_condition(pipe.vae, scheme, image * 2 - 1, latents, CLIP["num_frames"], expand_timesteps=held)
    used = conditions[1][:, :, : made.shape[2]] if held else conditions[1][:, 4:]
    assert torch.equal(made, used)


def make_recycler(p_boundary: float, **injection) -> ErrorRecycler:
    injection = {"p_vid": 0, "p_noi": 0, "p_img": 1, "p_clean": 0, "p_boundary": p_boundary, **injection}
    bank = ErrorBank(SHAPE, shifted_sigmas(5, 5.0), BankConfig(num_grids=5, capacity=4, dtype="float32"))
    config = BankConfig(num_grids=3, capacity=2, replacement="fifo", dtype="float32")
    boundary = ErrorBank(SHAPE, torch.ones(3), config)
    return ErrorRecycler(bank, InjectionConfig(**injection), RecyclerConfig(), 0, boundary)


def inject(recycler: ErrorRecycler, samples: list[int]) -> torch.Tensor:
    """What was added to the conditions of `samples`."""
    zeros = torch.zeros(len(samples), *SHAPE)
    return recycler.inject(zeros, zeros, zeros, torch.ones(len(samples)), torch.tensor(samples)).condition


def test_a_sample_meets_its_own_boundary_error_whole():
    recycler = make_recycler(p_boundary=1)
    errors = torch.randn(2, *SHAPE, generator=seeded())
    recycler.recycle_boundary(errors, torch.tensor([2, 0]))
    added = inject(recycler, [0, 1, 2, -1])
    torch.testing.assert_close(added[[0, 2]], errors[[1, 0]])
    assert not added[1].any() and not added[3].any()


def test_boundary_errors_are_scaled_too():
    recycler = make_recycler(p_boundary=1, img_scale=(0.5, 2.0))
    recycler.recycle_boundary(torch.ones(1, *SHAPE), torch.tensor([0]))
    scales = [inject(recycler, [0]) for _ in range(200)]
    assert all(added.max() - added.min() < 1e-6 for added in scales)
    assert 0.5 <= min(added.max() for added in scales) < 0.6 and 1.9 < max(added.max() for added in scales) <= 2.0


def test_only_the_last_boundary_errors_of_a_sample_are_kept():
    recycler = make_recycler(p_boundary=1)
    for value in (1.0, 2.0, 3.0):
        recycler.recycle_boundary(torch.full((1, *SHAPE), value), torch.tensor([1]))
    assert {inject(recycler, [1]).mean().item() for _ in range(50)} == {2.0, 3.0}


def test_the_share_of_boundary_errors_and_who_else_is_met():
    """A sample that meets no boundary error meets one of the bank, as ever."""
    recycler = make_recycler(p_boundary=0.3)
    recycler.recycle_boundary(torch.full((1, *SHAPE), 5.0), torch.tensor([0]))
    recycler.bank.put(2, torch.full(SHAPE, -1.0), 1.0, seeded())
    means = torch.stack([inject(recycler, [0])[0, :, 0].mean() for _ in range(2000)])
    assert set(means.tolist()) == {5.0, 1.0}
    # Within five standard deviations.
    assert (means == 5).double().mean().item() == pytest.approx(0.3, abs=5 * 0.0103)


def test_clean_samples_meet_none():
    recycler = make_recycler(p_boundary=1, p_clean=1)
    recycler.recycle_boundary(torch.ones(1, *SHAPE), torch.tensor([0]))
    assert not inject(recycler, [0]).any()
