"""What is alive while a module runs on tensors without memory: an exact count of the bytes of its activations."""

import weakref
from collections.abc import Iterable

import diffusers.models.transformers.transformer_wan as transformer_wan
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts storages that operations make, from then on until they are gone; `known` ones are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {value.untyped_storage()._cdata: 0 for value in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def _flash(query, key, value, **options):
    """Attention as fused kernels allocate it; on the meta device torch would write out all scores."""
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value)[0].transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", _flash)
