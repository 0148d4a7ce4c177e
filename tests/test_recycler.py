"""Switches and injection, statistically and exactly, and the recycler in a training loop of a real transformer."""

import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import TEXT_DIM, make_transformer, seeded
from diffusers_svi.erft import (
    BankConfig,
    ErrorBank,
    ErrorRecycler,
    InjectionConfig,
    RecyclerConfig,
    erft_loss,
    load_bank,
    recycled_velocity,
    save_bank,
)
from diffusers_svi.erft.injection import add_to_condition, draw_factors, draw_img_grids, draw_switches
from diffusers_svi.erft.snapshot import check_bank
from diffusers_svi.flow import interpolate, shifted_sigmas
from diffusers_svi.wan import known_mask


SHAPE = (16, 3, 4, 4)


def make_recycler(seed: int = 0, capacity: int = 4, clean_buffer_update_prob: float = 0.1, **injection):
    bank = ErrorBank(SHAPE, shifted_sigmas(5, 5.0), BankConfig(num_grids=5, capacity=capacity, dtype="float32"))
    config = RecyclerConfig(clean_buffer_update_prob=clean_buffer_update_prob)
    return ErrorRecycler(bank, InjectionConfig(**injection), config, seed)


def batch(size: int = 2, seed: int = 0):
    generator = seeded(seed)
    return [torch.randn(size, *SHAPE, generator=generator) for _ in range(3)]


def test_frequencies_of_the_switches():
    """Within five standard deviations of 20000 draws, and independent given that a sample is not clean."""
    config = InjectionConfig(p_vid=0.9, p_noi=0.3, p_img=0.5, p_clean=0.2)
    switches = draw_switches(config, torch.full((20000,), 0.5), seeded())
    corrupted = ~switches.clean
    assert switches.clean.double().mean().item() == pytest.approx(0.2, abs=5 * 0.0029)
    for name, p in (("vid", 0.9), ("noi", 0.3), ("img", 0.5)):
        on = getattr(switches, name)
        assert not (on & switches.clean).any()
        assert on[corrupted].double().mean().item() == pytest.approx(p, abs=5 * 0.004)
    together = (switches.noi & switches.img)[corrupted].double().mean().item()
    assert together == pytest.approx(0.15, abs=5 * 0.0029)


def test_probabilities_of_zero_and_one_are_exact():
    sigmas = torch.linspace(0, 1, 1000)
    always = draw_switches(InjectionConfig(p_vid=1, p_noi=1, p_img=1, p_clean=0), sigmas, seeded())
    never = draw_switches(InjectionConfig(p_vid=0, p_noi=0, p_img=0, p_clean=0), sigmas, seeded())
    assert always.vid.all() and always.noi.all() and always.img.all() and not always.clean.any()
    assert not (never.vid | never.noi | never.img | never.clean).any()


def test_condition_errors_come_from_the_grids_in_range_that_hold_some():
    sigmas = shifted_sigmas(5, 5.0)
    filled = torch.tensor([True, False, True, True, True])
    grids = draw_img_grids(InjectionConfig(), sigmas, filled, 4000, seeded())
    for grid, expected in enumerate((1000, 0, 1000, 1000, 1000)):
        # 4000 draws, four standard deviations of 27.
        assert abs(int((grids == grid).sum()) - expected) < 110
    low = draw_img_grids(InjectionConfig(img_sigmas=(0.0, float(sigmas[3]))), sigmas, filled, 100, seeded())
    assert set(low.tolist()) == {3, 4}
    assert (
        draw_img_grids(InjectionConfig(), sigmas, torch.zeros(5, dtype=torch.bool), 3, seeded()).tolist() == [-1] * 3
    )


def test_every_error_is_modulated_by_a_factor_of_its_own():
    """Three errors a sample, scaled by what is drawn for each: uniform in [0.7, 1.3] of what they are."""
    recycler = make_recycler(p_vid=1, p_noi=1, p_img=1, p_clean=0, modulation=0.3)
    for grid in range(5):
        recycler.bank.put(grid, torch.ones(SHAPE), 0.5, seeded())
    zeros, factors = torch.zeros(8, *SHAPE), []
    for _ in range(50):
        injected = recycler.inject(zeros, zeros, zeros, torch.ones(8))
        # Half of r to the noise and half of it, turned round, to latents and condition.
        for values in (-injected.latents, injected.noise, -injected.condition):
            factors += [2 * float(sample.flatten()[0]) for sample in values]
            assert all(torch.equal(sample, torch.full_like(sample, sample.flatten()[0])) for sample in values)
    factors = torch.tensor(factors)
    assert len(factors.unique()) == len(factors) == 1200
    assert factors.min() > 0.7 and factors.max() < 1.3
    # Five standard deviations of the mean and of the spread of 1200 draws.
    assert factors.mean().item() == pytest.approx(1, abs=5 * 0.005)
    assert factors.std().item() == pytest.approx(0.6 / 12**0.5, abs=5 * 0.0023)
    state = recycler.generator.get_state()
    assert draw_factors(InjectionConfig(), 3, recycler.generator) == [1.0, 1.0, 1.0]
    assert torch.equal(recycler.generator.get_state(), state)


def test_latents_take_errors_in_a_range_of_noise_levels():
    config = InjectionConfig(p_vid=1, p_noi=1, p_img=1, p_clean=0, vid_sigmas=(0.5, 0.75))
    switches = draw_switches(config, torch.tensor([0.25, 0.5, 0.75, 1.0]), seeded())
    assert switches.vid.tolist() == [False, True, True, False]
    assert switches.noi.all() and switches.img.all()


def test_a_run_of_the_error_lands_on_the_first_frames_of_the_condition():
    error = torch.arange(1.0, 8.0).view(1, 7, 1, 1)
    starts = set()
    for seed in range(200):
        out = add_to_condition(torch.zeros(1, 7, 1, 1), error, InjectionConfig(n_img=3), seeded(seed)).flatten()
        assert out[3:].abs().max() == 0
        assert torch.equal(out[:3].diff(), torch.ones(2))
        starts.add(int(out[0]))
    assert starts == {1, 2, 3, 4, 5}


def test_the_anchor_stays_clean_and_the_scale_is_random():
    error, scales = torch.ones(1, 7, 1, 1), []
    config = InjectionConfig(first_img=1, n_img=1, img_scale=(0.25, 0.75))
    for seed in range(200):
        out = add_to_condition(torch.zeros(1, 7, 1, 1), error, config, seeded(seed)).flatten()
        assert out[0] == 0 and out[2:].abs().max() == 0
        scales.append(float(out[1]))
    assert 0.25 <= min(scales) < 0.3 and 0.7 < max(scales) <= 0.75
    # Held latents of a first clip: there is nothing but the anchor.
    assert torch.equal(add_to_condition(torch.zeros(1, 1, 1, 1), error, config, seeded()), torch.zeros(1, 1, 1, 1))


def test_held_latents_have_no_errors_to_give():
    error, starts = torch.arange(7.0).view(1, 7, 1, 1), set()
    config = InjectionConfig(first_img=1, n_img=2, first_error=3)
    for seed in range(200):
        out = add_to_condition(torch.zeros(1, 7, 1, 1), error, config, seeded(seed)).flatten()
        assert out[2] == out[1] + 1 and out[0] == 0 and out[3:].abs().max() == 0
        starts.add(int(out[1]))
    assert starts == {3, 4, 5}


def test_an_empty_bank_injects_nothing():
    latents, noise, condition = batch()
    recycler = make_recycler(p_vid=1, p_noi=1, p_img=1, p_clean=0)
    injected = recycler.inject(latents, noise, condition, torch.tensor([0.5, 0.9]))
    for before, after in zip((latents, noise, condition), injected, strict=False):
        assert torch.equal(before, after)


def test_own_errors_take_the_place_of_those_of_the_bank_on_latents_alone():
    recycler = make_recycler(p_vid=0.5, p_noi=1, p_img=0, p_clean=0)
    sigmas = recycler.bank.grid_sigmas[[0, 2, 4, 4]]
    for grid, sigma in zip((0, 2, 4), sigmas.tolist(), strict=False):
        recycler.bank.put(grid, torch.full(SHAPE, 9.0), sigma, seeded())
    latents, noise, condition = batch(4)
    own = torch.arange(1.0, 5).view(-1, 1, 1, 1, 1).expand_as(latents)
    injected = recycler.inject(latents, noise, condition, sigmas, own)
    vid = injected.switches.vid
    assert 0 < vid.sum() < 4
    torch.testing.assert_close(injected.latents, latents + own * vid.view(-1, 1, 1, 1, 1))
    torch.testing.assert_close(injected.noise[2] - noise[2], torch.full(SHAPE, (1 - float(sigmas[2])) * 9))


def test_without_a_bank_only_errors_that_are_handed_over_are_injected_and_none_is_kept():
    recycler = ErrorRecycler([], InjectionConfig(p_vid=1, p_noi=0, p_img=0, p_clean=0), RecyclerConfig(), 0)
    latents, noise, condition = batch()
    sigmas, own = torch.tensor([0.5, 0.9]), torch.full((2, *SHAPE), 3.0)
    injected = recycler.inject(latents, noise, condition, sigmas, own)
    torch.testing.assert_close(injected.latents, latents + 3)
    assert torch.equal(injected.noise, noise) and torch.equal(injected.condition, condition)
    recycler.recycle(own, sigmas, injected.switches)
    assert recycler.num_errors() == 0
    with pytest.raises(ValueError, match=r"There is no error bank for samples \(16, 3, 4, 4\), nor for any others"):
        recycler.inject(latents, noise, condition, sigmas)


@pytest.mark.parametrize(
    ("probabilities", "banked", "expected"),
    [
        ((0.9, 0, 0, 0.2), True, True),
        ((0.9, 0, 0, 0.2), False, False),
        ((0, 0.01, 0, 0.2), False, True),
        ((0, 0, 0.9, 0.2), False, True),
        ((0.9, 0.9, 0.9, 1), True, False),
        ((0, 0, 0, 0), True, False),
    ],
)
def test_whether_errors_of_a_bank_are_ever_injected(probabilities, banked, expected):
    config = InjectionConfig(**dict(zip(("p_vid", "p_noi", "p_img", "p_clean"), probabilities, strict=True)))
    assert config.draws(banked) == expected


def test_every_sample_takes_the_errors_of_its_own_grid():
    recycler = make_recycler(p_vid=1, p_noi=1, p_img=0, p_clean=0)
    sigmas = recycler.bank.grid_sigmas[[0, 2, 4]]
    for grid, sigma in zip((0, 2, 4), sigmas.tolist(), strict=True):
        recycler.bank.put(grid, torch.full(SHAPE, grid + 1.0), sigma, seeded())
    latents, noise, condition = batch(3)
    injected = recycler.inject(latents, noise, condition, sigmas)
    for sample, (grid, sigma) in enumerate(zip((0, 2, 4), sigmas.tolist(), strict=True)):
        torch.testing.assert_close(injected.latents[sample] - latents[sample], torch.full(SHAPE, -sigma * (grid + 1)))
        torch.testing.assert_close(injected.noise[sample] - noise[sample], torch.full(SHAPE, (1 - sigma) * (grid + 1)))
    assert torch.equal(injected.condition, condition)


def test_what_comes_in_is_left_alone():
    recycler = make_recycler(p_vid=1, p_noi=1, p_img=1, p_clean=0)
    recycler.bank.put(0, torch.ones(SHAPE), 0.9, seeded())
    before = batch()
    inputs = [tensor.clone() for tensor in before]
    injected = recycler.inject(*inputs, torch.ones(2))
    for tensor, copy, out in zip(inputs, before, injected, strict=False):
        assert torch.equal(tensor, copy) and not torch.equal(out, copy)


def test_errors_of_clean_samples_are_banked_now_and_then():
    recycler = make_recycler(p_clean=1, capacity=1000)
    for _ in range(20):
        *_, switches = recycler.inject(*batch(100), torch.ones(100))
        recycler.recycle(torch.zeros(100, *SHAPE), torch.ones(100), switches)
    # 2000 draws at 0.1, five standard deviations of 13.4; but a grid keeps no more than 1000.
    assert abs(int(recycler.bank.counts[0]) - 200) < 67


def train(recycler: ErrorRecycler, steps: range) -> list[float]:
    """Steps of a real transformer, which is not updated; the errors it makes go round."""
    transformer = make_transformer()
    losses = []
    for step in steps:
        latents, noise, condition = batch(seed=step)
        sigmas = torch.rand(2, generator=seeded(step))
        injected = recycler.inject(latents, noise, condition, sigmas)
        noisy = interpolate(injected.latents, injected.noise, sigmas)
        with torch.no_grad():
            prediction = transformer(
                torch.cat([noisy, known_mask(injected.condition), injected.condition], dim=1),
                sigmas * 1000,
                torch.zeros(2, 3, TEXT_DIM),
                return_dict=False,
            )[0]
        target = recycled_velocity(latents, injected.noise)
        losses.append(erft_loss(prediction, target, torch.ones(2)).mean().item())
        recycler.recycle(prediction - target, sigmas, injected.switches)
    return losses


def contents(bank: ErrorBank) -> list[torch.Tensor]:
    return [bank.get(grid, place).residual for grid in range(5) for place in range(int(bank.counts[grid]))]


def test_a_run_taken_up_again_is_the_same_run(tmp_path):
    straight = make_recycler(capacity=2)
    losses = train(straight, range(24))
    first = make_recycler(capacity=2)
    train(first, range(12))
    writer, state = save_bank(first.bank, tmp_path / "bank.safetensors"), first.state_dict()
    # The run goes on, and overwrites, while the bank is being written.
    train(first, range(12, 18))
    writer.wait()

    second = make_recycler(seed=1, capacity=2)
    load_bank(second.bank, tmp_path / "bank.safetensors")
    second.load_state_dict(state)
    assert train(second, range(12, 24)) == losses[12:]
    assert torch.equal(second.bank.counts, straight.bank.counts) and torch.equal(
        second.bank.taken, straight.bank.taken
    )
    for left, right in zip(contents(straight.bank), contents(second.bank), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_bank_is_saved_as_it_was_when_saving_began(dtype, tmp_path):
    """Whatever is overwritten in the meantime, at any speed of the disk."""

    def make_bank():
        return ErrorBank((500,), shifted_sigmas(3, 5.0), BankConfig(num_grids=3, capacity=50, dtype=dtype))

    bank = make_bank()
    for index in range(120):
        bank.put(index % 2, torch.full((500,), float(index)), 0.5, seeded())
    before = [bank.get(grid, place) for grid in (0, 1) for place in range(50)]
    writer = save_bank(bank, tmp_path / "bank.safetensors")
    for index in range(300):
        bank.put(index % 3, torch.full((500,), -1.0 - index), 0.1, seeded())
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]
    loaded = make_bank()
    load_bank(loaded, tmp_path / "bank.safetensors")
    assert loaded.counts.tolist() == [50, 50, 0]
    for stored, (grid, place) in zip(before, ((g, p) for g in (0, 1) for p in range(50)), strict=True):
        assert torch.equal(loaded.get(grid, place).residual, stored.residual)
        assert loaded.get(grid, place).sigma == stored.sigma


class Rows:
    """Rows of a bank of which the second is not to be had until `go`."""

    def __init__(self, rows: torch.Tensor, reached: threading.Event, go: threading.Event):
        self.rows, self.reached, self.go = rows, reached, go

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def __getitem__(self, slot):
        if slot == 1:
            self.reached.set()
            assert self.go.wait(60)
        return self.rows[slot]


def test_the_file_has_its_name_only_when_all_is_in_it(tmp_path):
    reached, go = threading.Event(), threading.Event()

    class SlowBank(ErrorBank):
        def tensors(self):
            return {name: Rows(rows, reached, go) for name, rows in super().tensors().items()}

    bank = SlowBank((5,), shifted_sigmas(1, 5.0), BankConfig(num_grids=1, capacity=3, dtype="float32"))
    for value in (1.0, 2.0, 3.0):
        bank.put(0, torch.full((5,), value), 0.5, seeded())
    (tmp_path / "bank.safetensors").write_text("the bank before")
    writer = save_bank(bank, tmp_path / "bank.safetensors")
    assert reached.wait(60)
    assert (tmp_path / "bank.safetensors").read_text() == "the bank before"
    with pytest.raises(RuntimeError, match="still being written"):
        save_bank(bank, tmp_path / "again.safetensors")
    go.set()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]
    loaded = ErrorBank((5,), shifted_sigmas(1, 5.0), BankConfig(num_grids=1, capacity=3, dtype="float32"))
    load_bank(loaded, tmp_path / "bank.safetensors")
    assert [loaded.get(0, place).residual.tolist() for place in range(3)] == [[1.0] * 5, [2.0] * 5, [3.0] * 5]


def test_a_bank_of_one_place(tmp_path):
    def make_bank():
        return ErrorBank((3,), torch.tensor([0.5]), BankConfig(num_grids=1, capacity=1, dtype="float32"))

    bank, loaded = make_bank(), make_bank()
    bank.put(0, torch.tensor([1.0, 2.0, 3.0]), 0.4, seeded())
    save_bank(bank, tmp_path / "bank.safetensors").wait()
    load_bank(loaded, tmp_path / "bank.safetensors")
    assert loaded.get(0, 0).residual.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_bank_of_which_one_byte_was_changed_is_refused(tmp_path, dtype):
    """Wherever in the file that is: rows, their order in the header, counts, or checksums."""
    config = BankConfig(num_grids=2, capacity=2, dtype=dtype)
    bank = ErrorBank((2, 3), shifted_sigmas(2, 5.0), config)
    for value in (1.0, 2.0, 3.0):
        bank.put(int(value) % 2, torch.full((2, 3), value), 0.5, seeded())
    path, changed = tmp_path / "bank.safetensors", tmp_path / "changed.safetensors"
    save_bank(bank, path).wait()
    check_bank(path)
    content = path.read_bytes()
    for position in range(len(content)):
        changed.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ValueError, match="changed.safetensors' is damaged"):
            check_bank(changed)
    loaded = ErrorBank((2, 3), shifted_sigmas(2, 5.0), config)
    with pytest.raises(ValueError, match="changed.safetensors' is damaged: its sigmas have another checksum"):
        load_bank(loaded, changed)


def shaped_recycler(*shapes: tuple[int, ...], **injection) -> ErrorRecycler:
    config = BankConfig(num_grids=5, capacity=4, dtype="float32")
    banks = [ErrorBank(shape, shifted_sigmas(5, 5.0), config) for shape in shapes]
    return ErrorRecycler(banks, InjectionConfig(**injection), RecyclerConfig(), 0)


def test_no_error_of_one_shape_meets_another():
    """Each shape banks into its own and draws from it, and from nothing while that is empty."""
    # As many values, so that nothing but the shape tells them apart.
    shapes = [(16, 3, 4, 4), (16, 3, 2, 8), (16, 1, 4, 12)]
    recycler = shaped_recycler(*shapes, p_vid=1, p_noi=1, p_img=1, p_clean=0)
    sigmas = torch.tensor([0.5, 0.5])
    for made, shape in enumerate(shapes):
        zeros = torch.zeros(2, *shape)
        injected = recycler.inject(zeros, zeros, zeros, sigmas)
        assert not any(part.any() for part in injected[:3])
        recycler.recycle(torch.full((2, *shape), made + 1.0), sigmas, injected.switches)
        assert [int(bank.counts.sum()) for bank in recycler.banks.values()] == [2] * (made + 1) + [0] * (2 - made)
        assert recycler.num_errors() == 2 * (made + 1) and recycler.bank_of(zeros).error_shape == shape
    for value, shape in enumerate(shapes, start=1):
        zeros = torch.zeros(2, *shape)
        injected = recycler.inject(zeros, zeros, zeros, sigmas)
        assert injected.noise.unique().tolist() == [0.5 * value] and injected.noise.shape == (2, *shape)
        assert injected.latents.unique().tolist() == [-0.5 * value]
        assert injected.condition.unique().tolist() in ([-0.5 * value], [-0.5 * value, 0])
    with pytest.raises(
        ValueError, match=r"There is no error bank for samples \(16, 3, 4, 5\), only for \(16, 3, 4, 4\)"
    ):
        recycler.inject(*(torch.zeros(2, 16, 3, 4, 5) for _ in range(3)), sigmas)


def test_a_bank_beside_others_is_what_it_is_alone():
    alone, beside = shaped_recycler(SHAPE, p_clean=0.5), shaped_recycler((16, 1, 4, 12), SHAPE, p_clean=0.5)
    for seed in range(8):
        latents, noise, condition = batch(seed=seed)
        results = []
        for recycler in (alone, beside):
            injected = recycler.inject(latents, noise, condition, torch.tensor([0.2, 0.8]))
            recycler.recycle(noise - latents, torch.tensor([0.2, 0.8]), injected.switches)
            results.append(injected)
        for one, other in zip(*[(*result[:3], *result.switches) for result in results], strict=True):
            assert torch.equal(one, other)
    assert alone.num_errors() == beside.num_errors() > 4
    with pytest.raises(ValueError, match="too many values"):
        _ = beside.bank


def rewrite(source, target, metadata):
    """The same tensors with other metadata; `None` takes an entry out."""
    with safe_open(source, "pt") as file:
        values = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, target, metadata={name: value for name, value in values.items() if value is not None})


def test_a_bank_of_another_run_is_refused(tmp_path):
    recycler = make_recycler(capacity=3)
    recycler.bank.add(torch.zeros(3, *SHAPE), torch.ones(3), torch.ones(3, dtype=torch.bool), seeded())
    path = tmp_path / "bank.safetensors"
    save_bank(recycler.bank, path).wait()
    with pytest.raises(ValueError, match=r"holds up to 3 errors a grid, but `capacity` is 2"):
        load_bank(make_recycler(capacity=2).bank, path)
    other = ErrorBank((1, 2), shifted_sigmas(5, 5.0), BankConfig(num_grids=5, capacity=3, dtype="float32"))
    with pytest.raises(ValueError, match=r"has error_shape \[16, 3, 4, 4\], but this run \[1, 2\]"):
        load_bank(other, path)
    config = BankConfig(num_grids=5, capacity=3, dtype="float32", metric="clean")
    other = ErrorBank(SHAPE, shifted_sigmas(5, 5.0), config)
    # Banks were of residuals before they said so.
    for metadata in ({}, {"metric": None}):
        rewrite(path, tmp_path / "other.safetensors", metadata)
        with pytest.raises(ValueError, match='has metric "residual", but this run "clean"'):
            load_bank(other, tmp_path / "other.safetensors")
        load_bank(make_recycler(capacity=3).bank, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p_vid": 1.1}, r"`p_vid` is a probability in \[0, 1\], got 1.1"),
        ({"p_clean": -0.1}, "`p_clean` is a probability"),
        ({"n_img": 0}, "`n_img` must be a whole number of at least 1, got 0"),
        ({"first_img": -1}, "`first_img` must be"),
        ({"first_error": -1}, "`first_error` must be"),
        ({"img_sigmas": (0.9, 0.1)}, r"`img_sigmas` must be a range within \[0, 1\]"),
        ({"img_sigmas": (0.5, 1.01)}, "`img_sigmas` must be a range"),
        ({"img_sigmas": (-0.01, 0.5)}, "`img_sigmas` must be a range"),
        ({"img_sigmas": (0.5, 0.5)}, "`img_sigmas` must be a range"),
        ({"img_scale": (1, 0)}, "`img_scale` must be a range of factors"),
        ({"modulation": 1.1}, r"`modulation` must be in \[0, 1\], .* got 1.1"),
        ({"modulation": -0.1}, "`modulation` must be"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        InjectionConfig(**values)


def test_defaults_are_as_published_for_shot():
    injection, recycler, bank = InjectionConfig(), RecyclerConfig(), BankConfig()
    assert (injection.p_vid, injection.p_noi, injection.p_img, injection.p_clean) == (0.9, 0.01, 0.9, 0.2)
    assert (injection.n_img, injection.first_img, injection.first_error) == (3, 0, 0)
    assert (injection.img_sigmas, injection.img_scale, injection.modulation) == ((0.0, 1.0), (1.0, 1.0), 0.0)
    assert bank.metric == "residual"
    assert (recycler.clean_buffer_update_prob, recycler.buffer_warmup_iter) == (0.1, 50)
    assert (bank.num_grids, bank.capacity, bank.replacement, bank.dtype) == (50, 500, "l2", "bfloat16")


def test_wrong_values_of_the_recycler():
    with pytest.raises(ValueError, match="`clean_buffer_update_prob` is a probability"):
        RecyclerConfig(clean_buffer_update_prob=2)
    with pytest.raises(ValueError, match="`buffer_warmup_iter` must be a whole number, got -1"):
        RecyclerConfig(buffer_warmup_iter=-1)
