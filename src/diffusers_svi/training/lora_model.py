"""A frozen transformer with a LoRA to be trained, and the LoRA's weights, out of what processes and wrappers made."""

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.training_utils import cast_training_params
from diffusers.utils.torch_utils import is_compiled_module
from peft import LoraConfig, convert_to_lora, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from ..lora_file import check_condition, read_lora
from .layers import check_layers
from .quantized import BITSANDBYTES, quantization_config


def read_init_lora(
    source: str | os.PathLike,
    weight_name: str | None,
    rank: int,
    alpha: float,
    cache_dir: str | None = None,
    condition: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights to go on from, at the scale of a LoRA of `rank` and `alpha`, and the modules that lie with them.

    Raises:
        ValueError: if there is no LoRA, it has another rank, or its films follow something that is not `condition`.
    """
    lora = read_lora(source, weight_name, cache_dir=cache_dir)
    check_condition(lora, condition)
    ranks = {value.shape[0] for name, value in lora.state_dict.items() if ".lora_A." in name}
    if ranks != {rank}:
        raise ValueError(
            f"`--init_lora`: {lora.name!r} has rank {', '.join(map(str, sorted(ranks)))}, but `--rank` is {rank}."
        )
    # Files without settings are of scale 1.
    of_file = (lora.adapter_metadata or {}).get("transformer.lora_alpha", rank)
    weights = {
        name.removeprefix("transformer."): value.float() * (of_file / alpha if ".lora_B." in name else 1)
        for name, value in lora.state_dict.items()
    }
    return weights, lora.modules


def load_transformer(
    folder: str | os.PathLike,
    subfolder: str,
    dtype: torch.dtype,
    config: LoraConfig,
    init_lora: dict[str, torch.Tensor] | None = None,
    quantize: str | None = None,
    variant: str | None = None,
    *,
    kind: type[WanTransformer3DModel] = WanTransformer3DModel,
    with_modules: Callable[[WanTransformer3DModel], WanTransformer3DModel] | None = None,
    trained: Callable[[WanTransformer3DModel], Iterable[torch.nn.Parameter]] | None = None,
) -> WanTransformer3DModel:
    """The frozen base with a float32 LoRA on it.

    Args:
        folder, subfolder: Where the base is.
        dtype (`torch.dtype`): What it computes in.
        config (`LoraConfig`): Of the LoRA; `target_modules` is a list of layers.
        init_lora (`dict[str, torch.Tensor]`, *optional*): Weights it begins with, as `read_init_lora` has them.
        quantize (`str`, *optional*): What the base is kept in, as [`quantization_config`] has it.
        variant (`str`, *optional*): Of the weight files.
        kind (`type`, defaults to `WanTransformer3DModel`): Of the base.
        with_modules (`Callable`, *optional*): Gives the base modules that it lacks.
        trained (`Callable`, *optional*): Which of its weights are trained beside the LoRA, in float32 too.

    Raises:
        ValueError: if the model lacks a layer, or the weights are of another LoRA.
    """
    quantization = quantization_config(quantize, dtype) if quantize else None
    transformer = kind.from_pretrained(
        folder, subfolder=subfolder, dtype=dtype, quantization_config=quantization, variant=variant
    )
    if with_modules is not None:
        transformer = with_modules(transformer)
    transformer.requires_grad_(False)
    if quantize in BITSANDBYTES:
        transformer = prepare_model_for_kbit_training(transformer, use_gradient_checkpointing=False)
    check_layers(config.target_modules, (name for name, _ in transformer.named_modules()))
    transformer.add_adapter(config)
    for parameter in [] if trained is None else trained(transformer):
        parameter.requires_grad_(True)
    cast_training_params(transformer, dtype=torch.float32)
    # Processes need not tell each other what never changes.
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    if init_lora is not None:
        own, given = get_peft_model_state_dict(transformer).keys(), init_lora.keys()
        if own != given:
            raise ValueError(
                f"`--init_lora` does not fit: it lacks {len(own - given)} of {len(own)} weights of this model's LoRA, "
                f"and has {len(given - own)} others."
            )
        set_peft_model_state_dict(transformer, init_lora)
    return transformer


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, out of what accelerate and `torch.compile` put around it."""
    model = accelerator.unwrap_model(model)
    return model.get_submodule("_orig_mod") if is_compiled_module(model) else model


def lora_state_dict(
    accelerator: Accelerator, transformer: torch.nn.Module, rank: int | None = None
) -> dict[str, torch.Tensor]:
    """The LoRA's weights on the CPU, or the nearest of a lower `rank`, with an alpha equal to it.

    Under ZeRO-3 they are put together from all processes, which must all call this.
    """
    model, gathered = unwrap(accelerator, transformer), nullcontext()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])
    with gathered, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already a LoRA")
        state_dict = convert_to_lora(model, rank)[1] if rank else get_peft_model_state_dict(model)
        return {name: value.detach().cpu().clone() for name, value in state_dict.items()}
