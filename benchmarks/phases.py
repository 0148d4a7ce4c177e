"""Where the time of a clip goes: seconds and floating-point operations, by what a pipeline calls of its components."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


Made = TypeVar("Made")
# Whatever no component is at is "other": noise, layouts, frames turned into pixels, state.
PHASES = ("text", "encode", "denoise", "decode", "other")
_CALLS = {
    ("text_encoder", "forward"): "text",
    ("image_encoder", "forward"): "encode",
    ("vae", "encode"): "encode",
    ("transformer", "forward"): "denoise",
    ("transformer_2", "forward"): "denoise",
    ("scheduler", "step"): "denoise",
    ("vae", "decode"): "decode",
}


class Phases:
    """Clocks on the components of `pipe`, for every pipeline that has the same ones.

    Args:
        pipe (`DiffusionPipeline`): A Wan pipeline.
        device (`str`): Waited for at the ends of a phase.
    """

    def __init__(self, pipe: DiffusionPipeline, device: str):
        self._pipe, self._device = pipe, torch.device(device)
        self._spent: dict[str, float] = defaultdict(float)
        self._meter: Callable[[], float] = self._now

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The clocks are there until the end of the block."""
        components = self._pipe.components
        watched = [(components[name], call, phase) for (name, call), phase in _CALLS.items() if components.get(name)]
        for component, call, phase in watched:
            setattr(component, call, self._metered(getattr(component, call), phase))
        try:
            yield
        finally:
            for component, call, _ in watched:
                delattr(component, call)

    def seconds(self, make: Callable[[], Made]) -> tuple[Made, dict[str, float]]:
        """What `make` makes, and the seconds of `PHASES`, of which the sum is that of all of it."""
        return self._measure(make, self._now)

    def flops(self, make: Callable[[], Made]) -> tuple[Made, dict[str, float]]:
        """The same for floating-point operations: multiplications of matrices, convolutions and attention."""
        # torch counts the attention of GPUs by itself.
        mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            return self._measure(make, counter.get_total_flops)

    def _measure(self, make: Callable[[], Made], meter: Callable[[], float]) -> tuple[Made, dict[str, float]]:
        self._spent.clear()
        self._meter, begun = meter, meter()
        try:
            made = make()
            total = meter() - begun
        finally:
            self._meter = self._now
        parts = {phase: self._spent[phase] for phase in PHASES[:-1]}
        return made, {**parts, "other": total - sum(parts.values())}

    def _metered(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(call)
        def metered(*args: Any, **kwargs: Any) -> Any:
            begun = self._meter()
            try:
                return call(*args, **kwargs)
            finally:
                self._spent[phase] += self._meter() - begun

        return metered

    def _now(self) -> float:
        return now(self._device)


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def matmul_ceiling(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What a machine can do: operations a second of the product of two square matrices, the median of ten."""
    is_cuda = torch.device(device).type == "cuda"
    side = 8192 if is_cuda else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        begun = now(device)
        left @ right
        seconds.append(now(device) - begun)
    return {"side": side, "flops_a_second": 2 * side**3 / median(seconds[2:])}


def now(device: str | torch.device) -> float:
    """Seconds: of the clock, once a GPU is done; on a CPU of its own work, as other programs share it."""
    if torch.device(device).type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
