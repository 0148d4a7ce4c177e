"""The moving average of what is trained, which is steadier than its last step."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class MovingAverage:
    """`EMAModel` of diffusers, with its default warm-up, of parameters that are given once.

    The first step sets it; in step 1 + n it keeps the share min((1 + n) / (10 + n), `decay`) of what it was.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`):
            What is averaged. The average is in float32, for in less a step would be lost, and on their device.
        decay (`float`, defaults to 0.9999): In [0, 1).
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.9999):
        self.parameters = list(parameters)
        self._average = EMAModel(self.parameters, decay=decay)
        self._average.to(dtype=torch.float32)

    def step(self) -> None:
        """Take the parameters as they are into the average."""
        self._average.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the parameters are those of the average; then, bit for bit, what they were."""
        self._average.store(self.parameters)
        self._average.copy_to(self.parameters)
        try:
            yield
        finally:
            self._average.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """For `Accelerator.register_for_checkpointing`."""
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an average that was saved."""
        devices = [value.device for value in self._average.shadow_params]
        self._average.load_state_dict(state_dict)
        loaded = zip(self._average.shadow_params, devices, strict=True)
        self._average.shadow_params = [value.to(device) for value, device in loaded]


@contextmanager
def all_applied(averages: Iterable[MovingAverage]) -> Iterator[None]:
    """`applied()` of all of them; of none, nothing is done."""
    with ExitStack() as stack:
        for average in averages:
            stack.enter_context(average.applied())
        yield
