"""The moving average of what is trained: its weights, its place for a while, and how it goes on."""

import pytest
import torch

from diffusers_svi.training.average import MovingAverage


def make(decay: float = 0.3) -> tuple[torch.nn.Parameter, MovingAverage]:
    parameter = torch.nn.Parameter(torch.tensor([100.0, -1.0]))
    return parameter, MovingAverage([parameter], decay)


def take(parameter: torch.nn.Parameter, average: MovingAverage, *values: float) -> None:
    for value in values:
        parameter.data.fill_(value)
        average.step()


def test_the_first_step_sets_it_and_then_it_warms_up_to_its_decay():
    parameter, average = make()
    take(parameter, average, 1.0)
    for step, (value, kept) in enumerate([(2.0, 2 / 11), (5.0, 3 / 12), (-3.0, 0.3), (0.5, 0.3)]):
        with average.applied():
            before = parameter[0].item()
        take(parameter, average, value)
        with average.applied():
            assert parameter.tolist() == pytest.approx(2 * [kept * before + (1 - kept) * value], rel=1e-6), step


def test_it_takes_the_place_for_a_while_only():
    """Through an error as well."""
    parameter, average = make()
    take(parameter, average, 1.0, 2.0)
    parameter.data.copy_(torch.tensor([0.1, 1e-30]))
    with pytest.raises(KeyError), average.applied():
        assert parameter.tolist() == pytest.approx(2 * [2 / 11 + 2 * 9 / 11])
        raise KeyError
    assert torch.equal(parameter, torch.tensor([0.1, 1e-30]))


def test_one_that_was_saved_goes_on(tmp_path):
    parameter, average = make()
    take(parameter, average, 1.0, 2.0)
    torch.save(average.state_dict(), tmp_path / "average.bin")
    other_parameter, other = make()
    other.load_state_dict(torch.load(tmp_path / "average.bin", weights_only=True))
    for one, of in ((parameter, average), (other_parameter, other)):
        take(one, of, 7.0)
    with average.applied(), other.applied():
        assert torch.equal(parameter, other_parameter) and parameter[0] != 7


def test_many_small_steps_in_bfloat16_are_not_lost():
    """Of 1 towards 2, a thousandth a step: in bfloat16 itself nothing would ever change."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = MovingAverage([parameter], decay=0.999)
    average.load_state_dict({**average.state_dict(), "optimization_step": 10**6})
    parameter.data.fill_(2.0)
    for _ in range(1000):
        average.step()
    with average.applied():
        assert parameter.item() == pytest.approx(2 - 0.999**1000, abs=0.01)
