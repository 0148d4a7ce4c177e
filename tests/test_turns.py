"""Trainings that take turns: in which order, with random numbers of their own, and on the CPU meanwhile."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from diffusers_svi.training.turns import put_by, take_turns


def counting(name: str, turns: list[int], told: list[str]) -> Iterator[int]:
    for steps in turns:
        told.append(f"{name}{steps}")
        yield steps
    told.append(f"{name} ends")


@pytest.mark.parametrize(
    ("high", "low", "order"),
    [
        ([0, 2, 4], [0, 2, 4], "h0 l0 h2 l2 h4 l4 h ends l ends"),
        # Of two checkpoints: whoever is behind comes first.
        ([6, 8], [4, 8], "h6 l4 l8 h8 h ends l ends"),
        ([8], [0, 4, 8], "h8 l0 l4 l8 h ends l ends"),
        ([3], [], "h3 l ends h ends"),
    ],
)
def test_the_one_that_is_behind_goes_on(high, low, order):
    told: list[str] = []
    take_turns({"high": counting("h", high, told), "low": counting("l", low, told)})
    assert " ".join(told) == order


def drawing(seed: int, drawn: list[float]) -> Iterator[int]:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    for step in range(5):
        drawn += [torch.rand(()).item(), float(np.random.rand()), random.random()]
        yield step


def test_each_has_random_numbers_of_its_own():
    alone, together = [[], []], [[], []]
    for seed, drawn in enumerate(alone):
        take_turns({"": drawing(seed, drawn)})
    take_turns({str(seed): drawing(seed, drawn) for seed, drawn in enumerate(together)})
    assert together == alone and len(alone[0]) == 15 and alone[0] != alone[1]


def test_what_goes_wrong_in_one_ends_all():
    def broken() -> Iterator[int]:
        yield 0
        raise FloatingPointError("no number")

    told: list[str] = []
    with pytest.raises(FloatingPointError, match="no number"):
        take_turns({"high": counting("h", [0, 2], told), "low": broken()})
    assert told == ["h0", "h2"]


def train(device: str, rests: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(4):
        model(torch.full((1, 3), step + 1.0, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rests:
            states = [value for state in optimizer.state.values() for value in state.values()]
            places = [value.device for value in states]
            bring_back = put_by(model, optimizer)
            there = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
            assert {value.device.type for value in there} == {"cpu"} and len(places) == 6
            bring_back()
            assert {value.device.type for value in model.parameters()} == {device}
            assert [v.device for state in optimizer.state.values() for v in state.values()] == places
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU."))],
)
def test_what_was_put_by_goes_on_as_it_was(device):
    assert all(map(torch.equal, train(device, rests=True), train(device, rests=False)))


def test_a_model_that_cannot_be_moved_stays_where_it_is():
    model = torch.nn.Linear(3, 2, device="meta")
    bring_back = put_by(None, torch.optim.AdamW(model.parameters()))
    bring_back()
    assert model.weight.is_meta
