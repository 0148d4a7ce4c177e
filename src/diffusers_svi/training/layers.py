"""Which layers of a transformer a LoRA is trained for, by diffusers' names or those of the original code."""

from collections.abc import Iterable

from ..lora_file import TARGET_MODULES


_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj"}
_BLOCKS = {"self_attn.": "attn1.", "cross_attn.": "attn2.", "": ""}
_NAMES = {f"{block}{name}": f"{of}{to}" for block, of in _BLOCKS.items() for name, to in _ATTENTION.items()}
_NAMES |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
_NAMES |= {name: name for name in _NAMES.values()}


def parse_layers(layers: str | None) -> list[str]:
    """Layers of `--lora_layers`, such as "to_q,to_k" or "attn1.to_q,ffn.0"; those that were published if not given.

    Raises:
        ValueError: for a layer that no published loader would find again.
    """
    if layers is None:
        return list(TARGET_MODULES)
    names = [name.strip() for name in layers.split(",") if name.strip()]
    for name in names:
        if name not in _NAMES:
            raise ValueError(f"`--lora_layers`: {name!r} is none of {', '.join(_NAMES)}.")
    if not names:
        raise ValueError(f"`--lora_layers`={layers!r} names no layer. Leave it out for those that were published.")
    return list(dict.fromkeys(_NAMES[name] for name in names))


def without_modules(layers: list[str]) -> list[str]:
    """Such layers, named so that they are those of the film alone, and none of modules for audio that have as many."""
    return [
        full
        for layer in layers
        for full in ([f"attn1.{layer}", f"attn2.{layer}"] if layer in ("to_q", "to_k", "to_v") else [layer])
    ]


def check_layers(layers: list[str], modules: Iterable[str]) -> None:
    """Raise a `ValueError` unless the model, which has these `modules`, has every one of `layers`."""
    modules = tuple(modules)
    for layer in layers:
        if not any(module.endswith(f".{layer}") for module in modules):
            raise ValueError(f"`--lora_layers`: this model has no {layer}. Leave it out.")
