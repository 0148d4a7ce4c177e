"""The layers of a transformer as LoRAs find them: which have one, and what fits on them."""

from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer


# The transformers of a pipeline; with two, the high-noise expert first.
EXPERTS = ("transformer", "transformer_2")


def experts_of(pipe: WanImageToVideoPipeline) -> dict[str, WanTransformer3DModel]:
    """The transformers that a pipeline has, by name; one that `torch.compile` wrapped, without the wrapping."""
    modules = {name: getattr(pipe, name) for name in EXPERTS}
    return {name: unwrap_module(module) for name, module in modules.items() if module is not None}


def lora_layers(transformer: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers with adapters, by name."""
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}


def at_work(layer: BaseTunerLayer) -> list[str]:
    """The adapters of a layer that are active, and not with a weight of 0."""
    return [name for name in layer.active_adapters if layer.scaling.get(name)]


def layer_of(key: str) -> str:
    """The layer that a weight of a LoRA is for."""
    return key.removeprefix("transformer.").partition(".lora_")[0]


def check_fits(state_dict: dict[str, torch.Tensor], layers: dict[str, torch.nn.Module], name: str) -> None:
    """Raise a `ValueError` unless every LoRA matrix of `state_dict` has its layer in `layers`."""
    for key, value in state_dict.items():
        layer = layer_of(key)
        if layer not in layers:
            raise ValueError(
                f"The LoRA {name!r} has weights for `{layer}`, which this transformer does not have. It was made for "
                "another model: load the LoRA of this base model, or the base model of this LoRA."
            )
        rows, *columns = shape_of(layers[layer])
        side = key.split(".lora_")[1]
        fits = value.shape[0] == rows if side.startswith("B") else list(value.shape[1:]) == columns
        if not fits:
            raise ValueError(
                f"The LoRA {name!r} does not fit this transformer: `{layer}.lora_{side[0]}` is {tuple(value.shape)}, "
                f"but the layer is {' x '.join(map(str, (rows, *columns)))}. It was made for a model of another size: "
                "load the LoRA of this base model, or the base model of this LoRA."
            )


def shape_of(layer: torch.nn.Module) -> tuple[int, ...]:
    """What a weight of this layer has in full precision. Quantized ones are packed, so the layer itself is asked."""
    # Adapters loaded before wrap their layers.
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(base, torch.nn.Conv3d):
        return base.out_channels, base.in_channels, *base.kernel_size
    return base.out_features, base.in_features


def adjustable(transformer: torch.nn.Module) -> set[str]:
    """The adapters whose weight can be set: those that are not fused, and not disabled."""
    names: set[str] = set()
    for layer in lora_layers(transformer).values():
        if not layer.disable_adapters:
            names |= layer.scaling.keys() - set(layer.merged_adapters)
    return names


def set_weight(transformer: torch.nn.Module, adapter: str, weight: float) -> None:
    """Give one adapter a weight, and make it active; the others stay as they are, unlike in `set_adapters`."""
    for layer in lora_layers(transformer).values():
        if adapter in layer.scaling:
            layer.set_scale(adapter, weight)
            if adapter not in layer.active_adapters:
                layer.set_adapter([*layer.active_adapters, adapter])


# Of every layer, by name: which adapters are active, and the scales of all.
Weights = dict[str, tuple[list[str], dict[str, float]]]


def weights_of(transformer: torch.nn.Module) -> Weights:
    """What `set_weight` may change, for `restore_weights`."""
    return {
        name: (list(layer.active_adapters), dict(layer.scaling)) for name, layer in lora_layers(transformer).items()
    }


def restore_weights(transformer: torch.nn.Module, weights: Weights) -> None:
    """Put back what `weights_of` told; layers and adapters that are gone or new since are left alone."""
    for name, layer in lora_layers(transformer).items():
        active, scaling = weights.get(name, ([], {}))
        layer.scaling.update({adapter: scale for adapter, scale in scaling.items() if adapter in layer.scaling})
        if name in weights and layer.active_adapters != active:
            layer.set_adapter([adapter for adapter in active if adapter in layer.scaling])
