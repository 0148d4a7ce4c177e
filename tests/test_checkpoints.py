"""Checkpoints: named when whole, found again, no more of them than wanted, and nothing damaged taken for one."""

import json
import logging
import os
import re
import shutil

import pytest
import torch
from accelerate import Accelerator

from conftest import seeded
from diffusers_svi.erft import BankConfig, ErrorBank, ErrorRecycler, InjectionConfig, RecyclerConfig
from diffusers_svi.flow import shifted_sigmas
from diffusers_svi.training.checkpoints import Checkpoints, find_checkpoint
from diffusers_svi.training.manifest import check_checkpoint


SHAPE = (2, 3)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    accelerator.prepare(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
    return accelerator


def make_run(folder, accelerator, total_limit=None, seed: int = 0, run=None) -> Checkpoints:
    bank = ErrorBank(SHAPE, shifted_sigmas(2, 5.0), BankConfig(num_grids=2, capacity=3, dtype="float32"))
    recycler = ErrorRecycler(bank, InjectionConfig(), RecyclerConfig(), seed)
    return Checkpoints(folder, accelerator, recycler, seeded(seed), total_limit, run)


def make_shaped_run(folder, accelerator) -> Checkpoints:
    config = BankConfig(num_grids=2, capacity=3, dtype="float32")
    banks = [ErrorBank(shape, shifted_sigmas(2, 5.0), config) for shape in (SHAPE, (6, 1))]
    return Checkpoints(folder, accelerator, ErrorRecycler(banks, InjectionConfig(), RecyclerConfig(), 0), seeded())


def save(run: Checkpoints, *steps: int) -> None:
    for step in steps:
        run.save(step)
        run.finish()


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


def test_banks_of_several_shapes_come_back(tmp_path, accelerator):
    """A checkpoint has its name when all of them are there, and none is taken for another."""
    first = make_shaped_run(tmp_path, accelerator)
    for value, (shape, bank) in enumerate(first.recycler.banks.items(), start=1):
        bank.put(value - 1, torch.full(shape, float(value)), 0.5, seeded())
    first.save(5)
    for writer in first._writers:
        writer.wait()
    files = ["bank-0-2x3.safetensors", "bank-0-6x1.safetensors"]
    for name in files:
        path = tmp_path / "checkpoint-5.unfinished" / name
        path.rename(tmp_path / name)
        first.poll()
        assert names(tmp_path) == [name, "checkpoint-5.unfinished"]
        (tmp_path / name).rename(path)
    first.finish()
    second = make_shaped_run(tmp_path, accelerator)
    assert second.resume("latest") == 5
    assert [bank.counts.tolist() for bank in second.recycler.banks.values()] == [[1, 0], [0, 1]]
    assert [second.recycler.banks[SHAPE].get(0, 0).residual.mean().item()] == [1.0]
    assert second.recycler.banks[6, 1].get(1, 0).residual.tolist() == [[2.0]] * 6
    one_bit(tmp_path / "checkpoint-5" / files[1])
    with pytest.raises(ValueError, match=r"bank-0-6x1.safetensors' is damaged"):
        make_shaped_run(tmp_path, accelerator).resume("latest")


def test_what_is_known_of_the_run_comes_back(tmp_path, accelerator):
    save(make_run(tmp_path, accelerator, run={"arguments": {"rank": 4, "img_sigmas": [0.0, 1.0]}}), 3)
    path, manifest = find_checkpoint(tmp_path, "latest")
    assert path == (tmp_path / "checkpoint-3").resolve()
    assert (manifest.step, manifest.num_processes) == (3, 1)
    assert manifest.run == {"arguments": {"rank": 4, "img_sigmas": [0.0, 1.0]}}


def test_the_last_ones_are_kept_and_leftovers_go(tmp_path, accelerator):
    (tmp_path / "checkpoint-1.unfinished").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    run = make_run(tmp_path, accelerator, total_limit=2)
    assert names(tmp_path) == ["checkpoint-notes"]
    save(run, 8, 9, 10, 11)
    assert [path.name for path in run.all()] == ["checkpoint-10", "checkpoint-11"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-notes"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_there_are_never_more_than_the_limit_but_always_one(tmp_path, accelerator, limit):
    run = make_run(tmp_path, accelerator, total_limit=limit)
    save(run, *range(1, 6))
    run.save(6)
    # The new one has no name before its bank is there.
    kept = [path.name for path in run.all() if path.name != "checkpoint-6"]
    assert kept == [f"checkpoint-{step}" for step in range(6 - max(limit - 1, 1), 6)]
    run.finish()
    assert [path.name for path in run.all()] == [f"checkpoint-{step}" for step in range(7 - limit, 7)]


def test_the_last_whole_one_is_never_removed(tmp_path, accelerator):
    save(make_run(tmp_path, accelerator), 1, 2, 3, 4)
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}" / "optimizer.bin").unlink()
    run = make_run(tmp_path, accelerator, total_limit=2)
    run._prune(2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    save(run, 5)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, accelerator, limit):
    with pytest.raises(ValueError, match=f"`total_limit` must be a whole number of at least 1, got {limit}"):
        make_run(tmp_path, accelerator, total_limit=limit)


def test_only_folders_named_exactly_so_are_checkpoints(tmp_path, accelerator):
    """Others are never listed, resumed or removed: copies the user made, other digits, files, links."""
    save(make_run(tmp_path, accelerator), 1, 2)
    others = [
        "checkpoint-1-good",
        "checkpoint-2-old",
        "checkpoint-9.old",
        "my-checkpoint-9",
        "checkpoint-",
        "checkpoint",
    ]
    others += ["checkpoint-007", "checkpoint-٩", "checkpoint--9", "checkpoint-9 ", "checkpoint-9-good.unfinished"]
    for name in others:
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    (tmp_path / "checkpoint-8").write_text("notes")
    (tmp_path / "checkpoint-7.unfinished").write_text("notes")
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "checkpoint-1-good")
    others += ["checkpoint-8", "checkpoint-7.unfinished", "checkpoint-9"]
    run = make_run(tmp_path, accelerator, total_limit=1)
    assert [path.name for path in run.all()] == ["checkpoint-1", "checkpoint-2"]
    assert run.resume("latest") == 2
    for name in others:
        with pytest.raises(ValueError, match="is no checkpoint"):
            run.resume(name)
    save(run, 3)
    assert names(tmp_path) == sorted(["checkpoint-3", *others])


def test_a_checkpoint_has_its_name_when_every_bank_is_there(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    run.save(3)
    run._writers[0].wait()
    bank = tmp_path / "checkpoint-3.unfinished" / "bank-0.safetensors"
    bank.rename(tmp_path / "elsewhere")
    run.poll()
    assert "checkpoint-3" not in names(tmp_path)
    (tmp_path / "elsewhere").rename(bank)
    run.poll()
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_bank_that_cannot_be_written_is_told_by_the_next_poll(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    save(run, 3)
    run.recycler.bank.put(1, torch.full(SHAPE, 4.0), 0.5, seeded())
    # The writer meets a folder where its file is to be.
    (tmp_path / "checkpoint-4.unfinished" / "bank-0.safetensors.unfinished").mkdir(parents=True)
    run.save(4)
    run._writers[0]._thread.join()
    message = (
        r"checkpoint-4.unfinished could not be written: .*Is a directory.*The newest good checkpoint is checkpoint-3"
    )
    with pytest.raises(RuntimeError, match=message):
        run.poll()
    assert [path.name for path in run.all()] == ["checkpoint-3"]


def test_a_checkpoint_without_the_bank_of_a_process_is_told(tmp_path, accelerator):
    """Which is on the disk of another machine, say."""
    run = make_run(tmp_path, accelerator)
    run.save(3)
    run._writers[0].wait()
    (tmp_path / "checkpoint-3.unfinished" / "bank-0.safetensors").unlink()
    with pytest.raises(
        RuntimeError, match="banks of other processes are not there. Is `--output_dir` the same folder"
    ):
        run.finish()


def test_a_run_that_must_end_finishes_what_it_has_begun(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    assert run.newest() == f"There is no good checkpoint in {tmp_path}."
    run.save(4)
    expected = "The newest good checkpoint is checkpoint-4: `--resume_from_checkpoint checkpoint-4`."
    assert run.newest() == expected and names(tmp_path) == ["checkpoint-4"]


def test_what_is_no_checkpoint_is_refused(tmp_path, accelerator):
    run = make_run(tmp_path, accelerator)
    assert run.resume("latest") == 0
    save(run, 3)
    message = r"`resume_from_checkpoint`='checkpoint-4' is no checkpoint. There are: \['checkpoint-3'\]."
    with pytest.raises(ValueError, match=message):
        run.resume("checkpoint-4")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is no checkpoint"):
        run.resume(str(tmp_path / "other"))


def test_a_branch_that_is_given_up_is_set_aside(tmp_path, accelerator, caplog):
    """Going back to a checkpoint: later ones are not lost, not counted, and not the latest."""
    run = make_run(tmp_path, accelerator, total_limit=3)
    save(run, 1, 2, 3)
    again = make_run(tmp_path, accelerator, total_limit=3)
    with caplog.at_level(logging.WARNING):
        assert again.resume("checkpoint-1") == 1
    assert f"checkpoint-2, checkpoint-3 of the earlier branch: moved to {tmp_path / 'abandoned-1'}" in caplog.text
    assert names(tmp_path) == ["abandoned-1", "checkpoint-1"]
    assert make_run(tmp_path, accelerator).resume("latest") == 1
    save(again, 2, 3, 4)
    assert names(tmp_path) == ["abandoned-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert names(tmp_path / "abandoned-1") == ["checkpoint-2", "checkpoint-3"]
    assert make_run(tmp_path, accelerator).resume("checkpoint-2") == 2
    assert names(tmp_path / "abandoned-2") == ["checkpoint-3", "checkpoint-4"]
    # They are whole: a run elsewhere can go on from them.
    assert make_run(tmp_path / "new", accelerator).resume(str(tmp_path / "abandoned-1" / "checkpoint-3")) == 3


def test_a_folder_that_appears_meanwhile_is_set_aside(tmp_path, accelerator, caplog):
    run = make_run(tmp_path, accelerator)
    run.save(5)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "mine").write_text("x")
    run.finish()
    assert "checkpoint-5 of the earlier branch: moved to" in caplog.text
    assert names(tmp_path / "abandoned-1" / "checkpoint-5") == ["mine"]
    check_checkpoint(tmp_path / "checkpoint-5")


def test_a_used_folder_is_refused(tmp_path, accelerator):
    save(make_run(tmp_path / "one", accelerator), 2)
    save(make_run(tmp_path / "two", accelerator), 5)
    assert find_checkpoint(tmp_path / "none", None) is None
    assert find_checkpoint(tmp_path / "none", "latest") is None
    message = "one has checkpoints of an earlier run, checkpoint-2: go on with it by `--resume_from_checkpoint latest`"
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path / "one", None)
    with pytest.raises(ValueError, match="lies elsewhere, but .*one has checkpoints of its own, checkpoint-2"):
        find_checkpoint(tmp_path / "one", str(tmp_path / "two" / "checkpoint-5"))
    with pytest.raises(ValueError, match="was written by 1 processes, but there are 2 now: launch as many"):
        find_checkpoint(tmp_path / "one", "latest", num_processes=2)


def test_a_name_means_the_folder_of_the_run(tmp_path, accelerator, monkeypatch):
    save(make_run(tmp_path / "run", accelerator), 2)
    save(make_run(tmp_path / "here", accelerator), 2)
    monkeypatch.chdir(tmp_path / "here")
    assert find_checkpoint(tmp_path / "run", "checkpoint-2")[0].parent == (tmp_path / "run").resolve()


BANK, LAST = "bank-0.safetensors", "checkpoint-4"
FILES = [BANK, "recycler-0.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"]


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def truncated(file):
    os.truncate(file, file.stat().st_size - 4)


def longer(file):
    with open(file, "ab") as stream:
        stream.write(b"\0" * 8)


def zeroed(file):
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\0" * (size - size // 2))


def zeroed_at_the_start(file):
    with open(file, "r+b") as stream:
        stream.write(b"\0" * 64)


def one_bit(file):
    content = bytearray(file.read_bytes())
    content[2 * len(content) // 3] ^= 1
    file.write_bytes(content)


def last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def foreign(file):
    content = b"PK" + os.urandom(file.stat().st_size - 2)
    file.write_bytes(content)


def a_folder(file):
    file.unlink()
    file.mkdir()


KINDS = [missing, empty, truncated, longer, zeroed, zeroed_at_the_start, one_bit, last_bit, foreign, a_folder]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_with_the_newest_good_one(tmp_path, accelerator, kind, name):
    run = make_run(tmp_path, accelerator)
    run.recycler.bank.put(1, torch.rand(SHAPE, generator=seeded()) + 1, 0.5, seeded())
    save(run, 2, 3, 4)
    (tmp_path / "checkpoint-3" / "optimizer.bin").write_bytes(b"damaged too")
    kind(tmp_path / LAST / name)
    other = make_run(tmp_path, accelerator)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / LAST / name))) as error:
        other.resume("latest")
    assert str(error.value).endswith(
        "newest good checkpoint is checkpoint-2: `--resume_from_checkpoint checkpoint-2`."
    )
    # Nothing was moved or removed.
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_an_empty_folder_is_no_checkpoint(tmp_path, accelerator):
    save(make_run(tmp_path, accelerator), 4)
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(
        ValueError, match=r"checkpoint-5/manifest.json is missing.*newest good checkpoint is checkpoint-4"
    ):
        find_checkpoint(tmp_path, "latest")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="There is no other good checkpoint in"):
        find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_under_another_name_is_refused(tmp_path, accelerator):
    save(make_run(tmp_path, accelerator), 4)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6 was written as checkpoint-4: give it its name again"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": "x"}', "[" * 100000, "{\x00", '{"step": 4'])
def test_a_manifest_that_cannot_be_read_is_told(tmp_path, accelerator, text):
    save(make_run(tmp_path, accelerator), 4)
    (tmp_path / LAST / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint-4/manifest.json is damaged"):
        find_checkpoint(tmp_path, "latest")


def test_a_manifest_that_was_edited_is_told(tmp_path, accelerator):
    save(make_run(tmp_path, accelerator, run={"arguments": {"rank": 4}}), 4)
    file = tmp_path / LAST / "manifest.json"
    content = json.loads(file.read_text())
    content["run"]["arguments"]["rank"] = 8
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: its content has another hash"):
        find_checkpoint(tmp_path, "latest")
