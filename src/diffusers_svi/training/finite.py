"""Whether numbers are still numbers."""

from collections.abc import Iterable

import torch


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value of any tensor is NaN or infinite; waits for a GPU once."""
    # A sum is finite if all of it is, unless it overflows: then the values are past use too.
    sums = [tensor.detach().sum(dtype=torch.float32) for tensor in tensors]
    return not sums or bool(torch.stack(sums).isfinite().all())
