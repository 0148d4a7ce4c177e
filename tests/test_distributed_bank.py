"""Banks of two real processes that talk over gloo."""

import subprocess
import sys
from pathlib import Path

import pytest


WORKER = """
import os, sys
import torch
import torch.distributed as dist
from accelerate import PartialState
from diffusers_svi.erft import BankConfig, ErrorRecycler, InjectionConfig, RecyclerConfig, ErrorBank, ShardedErrorBank
from diffusers_svi.flow import shifted_sigmas

kind = sys.argv[1]
state = PartialState(cpu=True)
rank = dist.get_rank()
SHAPE = (2, 3, 4, 4)
sigmas = shifted_sigmas(6, 5.0)


def error(rank, step):  # every error is one number, which tells where it is from
    return torch.full((1, *SHAPE), 100.0 * rank + step)


def everyones(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


config = BankConfig(num_grids=6, capacity=50, dtype="float32")
if kind == "gather":
    recycler = ErrorRecycler(
        ErrorBank(SHAPE, sigmas, config),
        InjectionConfig(p_clean=0), RecyclerConfig(buffer_warmup_iter=3), seed=rank,
    )
    for step in range(5):
        grid = (step + rank) % 6
        sigma = sigmas[grid : grid + 1].float()
        injected = recycler.inject(*(torch.zeros(1, *SHAPE) for _ in range(3)), sigma)
        recycler.recycle(error(rank, step), sigma, injected.switches)
        if step == 2:
            shared = everyones([recycler.bank.get(g, p).residual.mean().item()
                                for g in range(6) for p in range(int(recycler.bank.counts[g]))])
            assert shared[0] == shared[1] and sorted(shared[0]) == [0, 1, 2, 100, 101, 102], shared
    local = everyones(int(recycler.bank.counts.sum()))
    assert local == [8, 8], local
else:
    bank = ShardedErrorBank(SHAPE, sigmas, config)
    generator = torch.Generator().manual_seed(rank)
    assert not bank.filled().any()
    assert sorted(everyones(list(bank.first_slot))) == [[0, 2, 4], [1, 3, 5]]
    # Each rank makes errors on all grids, some of which are not kept, and not as many as the other.
    for step in range(6):
        keep = torch.tensor([step != rank])
        bank.synchronize()
        bank.add(error(rank, step).double(), sigmas[step : step + 1], keep, generator)
    bank.synchronize()
    assert bank.all_counts.tolist() == [1, 1, 2, 2, 2, 2], bank.all_counts
    assert bank.filled().all() and int(bank.counts.sum()) == 5
    # Ranks want different numbers of errors, from their own grids, the other's, and none.
    seen = {}
    for turn in range(60):
        wanted = torch.tensor([[0, 3, -1, 5], [-1, -1, 4, -1]][rank] if turn % 2 else [[-1] * 4, [1, 2, 3, 0]][rank])
        for grid, drawn in zip(wanted.tolist(), bank.draw(wanted, generator), strict=True):
            assert (drawn is None) == (grid == -1)
            if drawn is not None:
                value = drawn.residual.mean().item()
                assert drawn.residual.std() == 0 and value % 100 == grid, (grid, value)
                assert abs(drawn.sigma - float(sigmas[grid])) < 1e-6
                seen.setdefault(grid, set()).add(value)
    expected = {0: {0: {100.0}, 3: {3.0, 103.0}, 5: {5.0, 105.0}},
                1: {0: {100.0}, 1: {1.0}, 2: {2.0, 102.0}, 3: {3.0, 103.0}, 4: {4.0, 104.0}}}[rank]
    assert seen == expected, (rank, seen)

    # And as a recycler uses it, with switches of its own on every rank.
    recycler = ErrorRecycler(bank, InjectionConfig(p_vid=0.5, p_noi=0.5, p_img=0.5), RecyclerConfig(), seed=rank)
    for step in range(20):
        noise_levels = torch.rand(2, generator=generator)
        injected = recycler.inject(*(torch.zeros(2, *SHAPE) for _ in range(3)), noise_levels)
        recycler.recycle(error(rank, step).expand(2, *SHAPE), noise_levels, injected.switches)
dist.barrier()
state.destroy_process_group()  # threads of gloo still at work would abort the process as it ends
print("ok")
"""


@pytest.mark.parametrize("kind", ["gather", "sharded"])
def test_two_processes(kind, tmp_path):
    """In warm-up everyone banks everyone's errors; a sharded bank is one, wherever its errors lie."""
    script = Path(tmp_path / "worker.py")
    script.write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command = [sys.executable, *launcher, str(script), kind]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("ok") == 2
