"""A model with its LoRAs, and the same model without them."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..clip_pipeline import ClipPipeline
from ..lora import FUSED_KEY
from ..lora_layers import at_work, experts_of, lora_layers


BASE, LORA = "base", "lora"


def contestants(pipe: ClipPipeline, without_base: bool = False) -> tuple[str, ...]:
    """Who is measured: `BASE` and `LORA`, or one of them.

    Args:
        pipe: The model, with the LoRAs that are loaded.
        without_base (`bool`, defaults to `False`): Leave out the model without them.

    Raises:
        ValueError: if there is no LoRA to measure alone, or one is fused, so that there is no model without it.
    """
    fused = any(
        module.config.get(FUSED_KEY) or any(layer.merged_adapters for layer in lora_layers(module).values())
        for module in experts_of(pipe).values()
    )
    active = fused or any(
        not layer.disable_adapters and at_work(layer)
        for module in experts_of(pipe).values()
        for layer in lora_layers(module).values()
    )
    if fused and not without_base:
        raise ValueError(
            "A LoRA is fused into the model, which cannot be measured without it: load it without `fuse_lora`, or "
            "measure it alone, with `without_base`."
        )
    if without_base and not active:
        raise ValueError("`without_base` leaves nothing to measure: no LoRA is loaded and at work.")
    return (LORA,) if without_base else (BASE, LORA) if active else (BASE,)


@contextmanager
def as_contestant(pipe: ClipPipeline, name: str) -> Iterator[None]:
    """The pipeline as `BASE`, its LoRAs switched off in every expert, or as it is. Afterwards it is as it was."""
    layers = [layer for module in experts_of(pipe).values() for layer in lora_layers(module).values()]
    switched = [layer for layer in layers if name == BASE and not layer.disable_adapters]
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
