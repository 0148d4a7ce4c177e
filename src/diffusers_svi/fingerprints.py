"""What a chain is made with, told so shortly that it can be carried along, and compared when the chain goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .lora_layers import at_work, experts_of, lora_layers


# Values of a tensor that are looked at: to read all of a large model would take longer than to load it.
VALUES_PER_TENSOR = 16


def made_with(pipe: WanImageToVideoPipeline, settings: Mapping[str, Any]) -> dict[str, str]:
    """Models, LoRAs and scheduler of `pipe`, and `settings`, as one line of text each."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    told = {
        "model": _kind(pipe),
        "scheduler": f"{type(pipe.scheduler).__name__} {_digest(json.dumps(scheduler, sort_keys=True, default=str))}",
    }
    for component, module in {**experts_of(pipe), "vae": pipe.vae}.items():
        told[component] = fingerprint_weights(module)
    for component, module in experts_of(pipe).items():
        told[f"LoRAs of {component}"] = fingerprint_loras(module)
    return told | {name: _text(value) for name, value in settings.items()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What is not as it was: by name, then and now. What was not told then is not compared."""
    return {
        name: (value, now.get(name, "nothing")) for name, value in before.items() if now.get(name, "nothing") != value
    }


def fingerprint_weights(module: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits of a model's weights, without the LoRAs on it: names, shapes, types, some values.

    Weights that are not there (those of models that are offloaded one layer at a time) count without their values.
    """
    module = unwrap_module(module)
    # Adapters wrap the layers they are on.
    weights = {
        part: tensor
        for name, value in module.state_dict().items()
        if ".lora_" not in name and isinstance(value, torch.Tensor)
        for part, tensor in _parts(name.replace(".base_layer", ""), value)
    }
    return _digest_tensors(weights)


def fingerprint_loras(module: torch.nn.Module) -> str:
    """The LoRAs at work in a model, each as digits of its weights and its weight; "none" without one.

    Names do not count: the same LoRA is the same under any.
    """
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    scales: dict[str, list[float]] = {}
    for name, layer in lora_layers(unwrap_module(module)).items():
        for adapter in [] if layer.disable_adapters else at_work(layer):
            parts = {"A": layer.lora_A[adapter].weight, "B": layer.lora_B[adapter].weight}
            matrices.setdefault(adapter, {}).update({f"{name}.{side}": weight for side, weight in parts.items()})
            # A tensor where LoRAs are to be swapped in a compiled model.
            scales.setdefault(adapter, []).append(float(layer.scaling[adapter]))
    told = [
        f"{_digest_tensors(tensors)} of scale {' ... '.join(f'{scale:g}' for scale in sorted(set(scales[adapter])))}"
        for adapter, tensors in matrices.items()
    ]
    return ", ".join(sorted(told)) or "none"


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor itself, or what torchao packed it into: such a one has no values of its own."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()
    for part in inner:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for _, value in sorted(tensors.items()):
        # Of quantized weights only what they are packed into counts.
        flat = value.detach().as_subclass(torch.Tensor).flatten()
        if flat.numel() and flat.device.type != "meta":
            step = max(1, flat.numel() // VALUES_PER_TENSOR)
            samples.setdefault(flat.device, []).append(flat[::step][:VALUES_PER_TENSOR].float())
    shapes = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in sorted(tensors.items())]
    # One transfer from each device.
    values = [
        torch.cat(parts).cpu().numpy().tobytes() for _, parts in sorted(samples.items(), key=lambda i: str(i[0]))
    ]
    return _digest("\n".join(shapes).encode() + b"".join(values))


def _kind(pipe: WanImageToVideoPipeline) -> str:
    if pipe.config.expand_timesteps:
        return "holds latents (Wan 2.2 TI2V-5B)"
    if pipe.transformer is not None and pipe.transformer_2 is not None:
        return "two experts (Wan 2.2 I2V A14B)"
    transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    return "with CLIP (Wan 2.1 I2V)" if transformer.config.image_dim is not None else "one transformer without CLIP"


def _text(value: Any) -> str:
    return _digest_tensors({"": value}) if isinstance(value, torch.Tensor) else str(value)


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
