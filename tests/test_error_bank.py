"""The replay memory: what it holds, what it forgets, what it takes."""

import os
import shutil
from dataclasses import replace

import psutil
import pytest
import torch

from conftest import seeded
from diffusers_svi.erft import BankConfig, ErrorBank
from diffusers_svi.erft.storage import PART, make_storage, squared_distance
from diffusers_svi.flow import shifted_sigmas


SHAPE = (4, 3, 8, 8)


def make_bank(num_grids: int = 5, shape=SHAPE, **config) -> ErrorBank:
    return ErrorBank(shape, shifted_sigmas(num_grids, 5.0), BankConfig(num_grids=num_grids, **config))


def errors(count: int, shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=seeded(seed))


def correlated_errors(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Errors of a model: a few directions it often errs in, of random strength, and a little noise."""
    directions = torch.randn(16, size, generator=generator)
    strengths = torch.randn(count, 16, generator=generator) * torch.linspace(1, 0.1, 16)
    return strengths @ directions + 0.1 * torch.randn(count, size, generator=generator)


def add(bank: ErrorBank, residuals: torch.Tensor, sigmas, seed: int = 0) -> None:
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64).expand(len(residuals))
    bank.add(residuals, sigmas, torch.ones(len(residuals), dtype=torch.bool), seeded(seed))


@pytest.mark.parametrize("config", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "int8"}])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_goes_in_comes_out(config, mapped, tmp_path):
    bank = make_bank(capacity=3, **config, path=str(tmp_path / "deep" / "bank") if mapped else None)
    (residual,) = errors(1)
    add(bank, residual.unsqueeze(0), 0.9)
    stored, sigma = bank.get(int(bank.nearest_grid(torch.tensor([0.9]))), 0)
    assert sigma == pytest.approx(0.9) and stored.shape == SHAPE and stored.dtype == torch.float32
    tolerance = {"float32": 0, "bfloat16": 2**-8, "int8": 0.02}[config["dtype"]]
    torch.testing.assert_close(stored, residual, rtol=0, atol=tolerance * residual.abs().max().item())


def test_int8_is_as_exact_as_documented():
    """0.6% of root mean square for normally distributed errors; zeros stay zeros."""
    bank = make_bank(dtype="int8", capacity=2, shape=(1000, 100))
    (residual,) = errors(1, (1000, 100))
    residual[:10] = 0
    add(bank, residual.unsqueeze(0), 1.0)
    stored = bank.get(0, 0).residual
    assert stored[:10].abs().max() == 0
    assert ((stored - residual).square().mean() / residual.square().mean()).sqrt() == pytest.approx(0.006, abs=5e-4)


def test_every_error_goes_to_the_nearest_grid():
    bank = make_bank(capacity=8)
    sigmas = torch.tensor([1.0, 0.97, 0.9, 0.7, 0.05])
    expected = [min(range(5), key=lambda g: abs(float(bank.grid_sigmas[g]) - s)) for s in sigmas.tolist()]
    add(bank, errors(5), sigmas)
    assert bank.counts.tolist() == [expected.count(grid) for grid in range(5)]


def test_only_what_is_to_be_kept_is_kept():
    bank = make_bank(capacity=4)
    bank.add(errors(3), torch.ones(3), torch.tensor([True, False, True]), seeded())
    assert bank.counts.sum() == 2
    torch.testing.assert_close(bank.get(0, 1).residual, errors(3)[2], rtol=0, atol=0.02)


def test_fifo_replaces_the_oldest_first():
    bank = make_bank(capacity=3, replacement="fifo", dtype="float32")
    residuals = errors(5)
    add(bank, residuals, 1.0)
    assert bank.counts[0] == 3
    for place, index in enumerate((3, 4, 2)):
        assert torch.equal(bank.get(0, place).residual, residuals[index])


def test_random_replacement_reaches_every_place():
    bank = make_bank(capacity=3, replacement="random", dtype="float32")
    add(bank, torch.zeros(3, *SHAPE), 1.0)
    add(bank, torch.ones(30, *SHAPE), 1.0)
    assert all(bank.get(0, place).residual.mean() == 1 for place in range(3))


@pytest.mark.parametrize("size", [100, 20000, 300000])
def test_l2_replaces_the_nearest(size):
    """The same victim as an exact search over what is stored, for errors as a model makes them."""
    generator = seeded()
    bank = make_bank(capacity=40, dtype="float32", shape=(size,))
    residuals = correlated_errors(70, size, generator)
    stored, agreed = list(residuals[:40]), 0
    add(bank, residuals[:40], 1.0)
    for residual in residuals[40:]:
        exact = min(range(40), key=lambda place: float((stored[place] - residual).square().sum()))
        place = bank.put(0, residual, 1.0, generator)
        agreed += place == exact
        stored[place] = residual
    assert agreed == 30


@pytest.mark.parametrize("size", [100, 20000])
def test_the_nearest_on_the_clean_side_is_that_of_an_exact_search(size):
    """Of sigma * r, where the sigmas of a grid differ much; by the residual others would go."""
    generator = seeded()
    bank = make_bank(capacity=40, dtype="float32", metric="clean", shape=(size,))
    # Much the same error, more or less strong: those that are alike in r are not in sigma * r.
    strengths, noise = 0.5 + torch.rand(70, 1, generator=generator), torch.randn(70, size, generator=generator)
    residuals = strengths * torch.randn(size, generator=generator) + 0.01 * noise
    sigmas = 0.5 + 0.5 * torch.rand(70, generator=generator)
    stored, by_residual = [], 0
    for index in range(70):
        residual, sigma = residuals[index], float(sigmas[index])
        place = bank.put(0, residual, sigma, generator)
        if index < 40:
            stored.append((residual, sigma))
            continue
        clean = [float((level * error - sigma * residual).square().sum()) for error, level in stored]
        assert place == min(range(40), key=clean.__getitem__)
        by_residual += place == min(range(40), key=lambda at: float((stored[at][0] - residual).square().sum()))
        stored[place] = (residual, sigma)
        # What it holds is still the residual.
        assert torch.equal(bank.get(0, place).residual, residual)
    assert by_residual < 15


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_distances_are_sums_of_squares_given_up_beyond_a_limit(dtype):
    size = 2 * PART + 128
    error, other = torch.full((size,), 3.0), torch.full((size,), 1.0)
    storage = make_storage(2, size, dtype)
    storage.write(1, error)
    assert squared_distance(storage, 1, other) == pytest.approx(4.0 * size, rel=1e-5)
    # The first part alone is beyond it; a limit that is just reached is not.
    assert squared_distance(storage, 1, other, limit=4.0 * PART - 100) == pytest.approx(4.0 * PART, rel=1e-5)
    storage.write(0, torch.cat([torch.full((4,), 2.0), torch.zeros(size - 8), torch.full((4,), 2.0)]))
    assert squared_distance(storage, 1, other, scale=0.5) == pytest.approx(0.25 * size, rel=1e-5)
    zeros = torch.zeros(size)
    assert (
        squared_distance(storage, 0, zeros, limit=16.0) == 32.0 and squared_distance(storage, 0, zeros, 15.9) == 16.0
    )
    assert squared_distance(storage, 1, other, limit=9.0 * size) == pytest.approx(4.0 * size, rel=1e-5)


def test_sketches_keep_the_distances_of_errors_with_structure():
    """A squared distance is off by 1.6% of its size in standard deviation; of constant errors too, by the signs."""
    size = 150_000
    bank, line = make_bank(capacity=1, shape=(size,), dtype="float32"), torch.linspace(-1, 1, size)
    ones, waves = torch.ones(size), (40 * line).sin()
    structured = [torch.zeros(size), ones, -2 * ones, line, waves, 3 + waves, (line > 0.5).float()]
    sketches, deviations = [bank.sketch.of(error) for error in structured], []
    assert bank.sketch.deviation == pytest.approx((2 / 8192) ** 0.5) and sketches[0].shape == (8192,)
    for index, error in enumerate(structured):
        bank.sketch.rows[0] = sketches[index]
        for other in range(index):
            (estimate,) = bank.sketch.distances(sketches[other], 0, 1).tolist()
            deviations.append(estimate / (error - structured[other]).square().sum().item() - 1)
    assert max(map(abs, deviations)) < 5 * bank.sketch.deviation
    assert torch.tensor(deviations).square().mean().sqrt() < 2 * bank.sketch.deviation


def test_draws_come_from_the_grid_asked_for_and_are_uniform():
    bank = make_bank(capacity=4, dtype="float32")
    for grid in (0, 3):
        for value in range(4):
            bank.put(grid, torch.full(SHAPE, 10.0 * grid + value), 0.5, seeded())
    drawn = bank.draw(torch.tensor([0, -1, 1, 3] * 500), seeded(1))
    assert all(error is None for index, error in enumerate(drawn) if index % 4 in (1, 2))
    for grid, first in ((0, 0), (3, 3)):
        values = [float(error.residual.mean()) - 10 * grid for error in drawn[first::4]]
        # 500 draws of 4: 125 each, give or take four standard deviations of 9.7.
        assert all(abs(values.count(value) - 125) < 39 for value in range(4))


def test_it_says_what_it_takes_and_takes_no_more():
    shape = (16, 21, 60, 104)
    config = BankConfig(capacity=500)
    # Two bytes a value, and a sketch of less than a hundredth of that.
    assert config.num_bytes(shape) == 50 * 500 * (16 * 21 * 60 * 104 * 2 + 8192 * 4)
    bank = make_bank(capacity=100, byte_budget=5 * 7 * (2 * 768 + 4 * 256))
    assert bank.config.capacity == 7
    assert "5 grids of 7 errors (4, 3, 8, 8) in bfloat16" in bank.describe()
    assert sum(tensor.nbytes for name, tensor in bank.tensors().items() if name != "sigmas") == 5 * 7 * (1536 + 1024)


def test_a_bank_of_some_grids_has_more_room_in_each():
    row = 2 * 768 + 4 * 256
    config = BankConfig(num_grids=5, capacity=100, byte_budget=5 * 7 * row)
    assert (config.fitted(SHAPE).capacity, config.fitted(SHAPE, 1).capacity) == (7, 35)
    assert (config.num_bytes(SHAPE), config.num_bytes(SHAPE, 1)) == (500 * row, 100 * row)


def test_banks_of_several_shapes_share_a_budget():
    """All have the same capacity, and files of their own."""
    shapes, rows = [SHAPE, (4, 1, 8, 8)], [2 * 768 + 4 * 256, 2 * 256 + 4 * 256]
    config = BankConfig(num_grids=5, capacity=100, path="bank", byte_budget=3 * 7 * sum(rows) + 1)
    configs = config.shared_by(shapes, 3)
    assert [(one.capacity, one.path) for one in configs] == [(7, "bank-4x3x8x8"), (7, "bank-4x1x8x8")]
    taken = sum(one.num_bytes(shape, 3) for one, shape in zip(configs, shapes, strict=True))
    assert config.byte_budget - 1 == taken
    assert [one.path for one in config.shared_by([SHAPE])] == ["bank"]
    message = rf"holds no error: one for each of 3 grids in each of 2 banks takes {3 * sum(rows)} bytes in bfloat16"
    with pytest.raises(ValueError, match=message):
        BankConfig(byte_budget=3 * sum(rows) - 1).shared_by(shapes, 3)


def test_banks_that_fit_one_by_one_alone_are_refused():
    free = psutil.virtual_memory().available
    config = BankConfig(num_grids=1, capacity=free * 2 // 3 // (2 * 768 + 4 * 256))
    config.fitted(SHAPE)
    with pytest.raises(ValueError, match=r"The error banks would take .* errors \(4, 3, 8, 8\) and \(2, 6, 8, 8\) in"):
        config.shared_by([SHAPE, (2, 6, 8, 8)])


def test_a_bank_leaves_room_for_what_others_will_take(tmp_path):
    """Of memory all of it, which is taken when it is written; of a disk what their files have not taken yet."""
    row = 2 * 768 + 4 * 256
    bank, kept = make_bank(capacity=3), make_bank(capacity=3, path=str(tmp_path / "bank"))
    assert bank.num_bytes() == bank.bytes_to_come() == kept.num_bytes() == 5 * 3 * row
    (tmp_path / "bank").write_bytes(os.urandom(8192))
    assert kept.bytes_to_come() == 5 * 3 * row - 8192
    free = psutil.virtual_memory().available
    config = BankConfig(num_grids=1, capacity=free * 2 // 3 // row)
    config.shared_by([SHAPE])
    with pytest.raises(ValueError, match="What would fit: a `capacity` of at most"):
        config.shared_by([SHAPE], taken=free // 2)
    with pytest.raises(ValueError, match="free for each of 2 processes. What would fit: a `capacity` of at most"):
        config.shared_by([SHAPE], num_processes=2)


def test_a_bank_the_machine_has_no_room_for_is_refused():
    with pytest.raises(ValueError, match=r"would take .* GB \(50 grids of 100000000 errors .* What would fit: a `cap"):
        make_bank(50, shape=(16, 21, 60, 104), capacity=10**8)
    with pytest.raises(ValueError, match=r"the disk of '/.*bank' has"):
        make_bank(50, shape=(16, 21, 60, 104), capacity=10**8, path="/tmp/bank")
    with pytest.raises(ValueError, match="`byte_budget`=10 holds no error"):
        make_bank(byte_budget=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity": 0}, "`capacity` must be a whole number of at least 1, got 0"),
        ({"num_grids": 2.5}, "`num_grids` must be"),
        ({"byte_budget": -1}, "`byte_budget` must be"),
        ({"replacement": "best"}, r"`replacement` must be one of \('l2', 'random', 'fifo'\), got 'best'"),
        ({"dtype": "float16"}, "`dtype` must be one of"),
        ({"metric": "noise"}, r"`metric` must be one of \('residual', 'clean'\), got 'noise'"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        BankConfig(**values)
    with pytest.raises(ValueError, match=r"`grid_sigmas` must be \(50,\), got \(3,\)"):
        ErrorBank(SHAPE, torch.zeros(3), BankConfig())


def test_the_file_of_an_earlier_run_counts_as_room(tmp_path):
    """A run that goes on writes over it."""
    (tmp_path / "bank").write_bytes(os.urandom(2**26))
    (tmp_path / "bank.scales").write_bytes(os.urandom(2**25))
    capacity = (shutil.disk_usage(tmp_path).free + 2**25) // (2 * 768 + 4 * 256)
    config = BankConfig(num_grids=1, capacity=capacity, path=str(tmp_path / "bank"))
    assert config.fitted(SHAPE).capacity == capacity
    with pytest.raises(ValueError, match="What would fit: a `capacity` of at most"):
        replace(config, path=str(tmp_path / "other")).fitted(SHAPE)
