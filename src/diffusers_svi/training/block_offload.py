"""A frozen transformer on a small card: its blocks stay on the CPU, and come to the device when they compute.

Group offload of diffusers is made for inference. Trained with gradient checkpointing it brings a block back for the
backward pass and never takes it away again, since what is computed anew ends early, by an exception: after one step
every block is on the device. And it moves the LoRA as well.
"""

from contextlib import nullcontext
from functools import partial

import torch
from diffusers import WanTransformer3DModel


class BlockOffload:
    """Keeps the frozen weights of the blocks on the CPU; at most two blocks are on the device at a time.

    Everything else, what is trained above all, is moved to the device and stays there. On CUDA the weights lie in
    page-locked memory, and the next block is copied by a stream of its own while one computes. A block on its way back
    is the one before. The weights of a block that is away are not a number: nothing can be computed with them.

    Gradients are the same, bit for bit. They need gradient checkpointing: without it the backward pass does not ask
    for a block again.

    Args:
        transformer (`WanTransformer3DModel`): On the CPU, with its LoRA; what needs no gradient is frozen.
        device (`torch.device`): Where it computes.
    """

    def __init__(self, transformer: WanTransformer3DModel, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.on_device: set[int] = set()
        self._last = -1
        self._frozen = [[p for p in block.parameters() if not p.requires_grad] for block in transformer.blocks]
        self._weights: list[list[torch.Tensor]] = [[] for _ in self._frozen]
        self._absent: list[list[torch.Tensor]] = [[] for _ in self._frozen]
        for index, block in enumerate(transformer.blocks):
            # One by one: what is copied to page-locked memory is let go of at once.
            for parameter in self._frozen[index]:
                self._weights[index].append(parameter.data.pin_memory() if self.stream else parameter.data)
                # Of the same shape, type and device, in the memory of one number.
                nothing = torch.full((1,), float("nan"), dtype=parameter.dtype, device=device)
                self._absent[index].append(nothing.expand(parameter.shape))
                parameter.data = self._absent[index][-1]
            block.register_forward_pre_hook(partial(self._enter, index))
        transformer.to(device)

    @torch.compiler.disable
    def _enter(self, index: int, *_: object) -> None:
        """Before block `index` computes."""
        # Forward 0, 1, ..., backward ..., 1, 0: the first block is followed by the second in both.
        following = index - 1 if 0 < index <= self._last else index + 1
        self.put_away(self.on_device - {index, following})
        self._fetch(index)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if following < len(self._frozen):
            self._fetch(following)
        self._last = index

    def put_away(self, indices: set[int] | None = None) -> None:
        """Take blocks off the device, all that are there if none are named."""
        indices = set(self.on_device) if indices is None else indices
        for index in indices:
            for parameter, absent in zip(self._frozen[index], self._absent[index], strict=True):
                parameter.data = absent
        self.on_device -= indices

    def _fetch(self, index: int) -> None:
        if index in self.on_device:
            return
        if self.stream:
            # The memory that it gets may still be read by what was launched before it was given back.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for parameter, weight in zip(self._frozen[index], self._weights[index], strict=True):
                parameter.data = weight.to(self.device, non_blocking=True, copy=True)
        self.on_device.add(index)
