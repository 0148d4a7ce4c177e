"""Checkpoints: named when whole, found again, and no more of them than wanted."""

import pytest
import torch
from accelerate import Accelerator

from conftest import seeded
from diffusers_svi.erft import BankConfig, ErrorBank, ErrorRecycler, InjectionConfig, RecyclerConfig
from diffusers_svi.flow import shifted_sigmas
from diffusers_svi.training.checkpoints import Checkpoints


SHAPE = (2, 3)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_run(folder, accelerator, total_limit=None, seed: int = 0) -> Checkpoints:
    bank = ErrorBank(SHAPE, shifted_sigmas(2, 5.0), BankConfig(num_grids=2, capacity=3, dtype="float32"))
    recycler = ErrorRecycler(bank, InjectionConfig(), RecyclerConfig(), seed)
    return Checkpoints(folder, accelerator, recycler, seeded(seed), total_limit)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bank_and_generators_come_back(tmp_path, accelerator):
    first = make_run(tmp_path, accelerator)
    first.recycler.bank.put(1, torch.full(SHAPE, 4.0), 0.5, seeded())
    first.recycler.step = 7
    torch.rand(5, generator=first.generator), torch.rand(3, generator=first.recycler.generator)
    first.save(12)
    # What happens while it is written does not belong to it.
    first.recycler.bank.put(1, torch.full(SHAPE, 5.0), 0.5, seeded())
    first.finish()
    expected = torch.rand(2, generator=first.generator), torch.rand(2, generator=first.recycler.generator)
    assert names(tmp_path) == ["checkpoint-12"]
    for name in ("latest", "checkpoint-12", str(tmp_path / "checkpoint-12")):
        second = make_run(tmp_path, accelerator, seed=3)
        assert second.resume(name) == 12 and second.recycler.step == 7
        assert second.recycler.bank.counts.tolist() == [0, 1]
        assert second.recycler.bank.get(1, 0).residual.tolist() == [[4.0] * 3] * 2
        drawn = torch.rand(2, generator=second.generator), torch.rand(2, generator=second.recycler.generator)
        assert all(map(torch.equal, drawn, expected))


def test_the_last_ones_are_kept_and_leftovers_go(tmp_path, accelerator):
    (tmp_path / "checkpoint-1.unfinished").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    run = make_run(tmp_path, accelerator, total_limit=2)
    assert names(tmp_path) == ["checkpoint-notes"]
    for step in (8, 9, 10, 11):
        run.save(step)
        run.finish()
    assert [path.name for path in run.all()] == ["checkpoint-10", "checkpoint-11"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-notes"]


def test_a_checkpoint_has_its_name_when_every_bank_is_there(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    run.save(3)
    run._writer.wait()
    bank = tmp_path / "checkpoint-3.unfinished" / "bank-0.safetensors"
    bank.rename(tmp_path / "elsewhere")
    run.poll()
    assert "checkpoint-3" not in names(tmp_path)
    (tmp_path / "elsewhere").rename(bank)
    run.poll()
    assert names(tmp_path) == ["checkpoint-3"]


def test_what_is_no_checkpoint_is_refused(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    assert run.resume("latest") == 0
    run.save(3)
    run.finish()
    message = r"`resume_from_checkpoint`='checkpoint-4' is no checkpoint. There are: \['checkpoint-3'\]."
    with pytest.raises(ValueError, match=message):
        run.resume("checkpoint-4")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is no checkpoint"):
        run.resume(str(tmp_path / "other"))
    (tmp_path / "checkpoint-3" / "recycler-0.safetensors").unlink()
    with pytest.raises(ValueError, match="was written by fewer processes than the 1 now"):
        run.resume("latest")
