"""ZeRO-3 of DeepSpeed: every process holds a share of the weights, and none ever all of them."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel

from .quantized import TORCHAO


def zero_stage(accelerator: Accelerator) -> int | None:
    """Of DeepSpeed, if the run was launched with it."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


def check_beside_zero(values: Mapping[str, object], stage: int | None) -> None:
    """Raise a `ValueError` for an argument that does not go with DeepSpeed.

    Args:
        values (`Mapping[str, object]`): All arguments of the training script by name.
        stage (`int`, *optional*): As [`zero_stage`] has it; everything goes without DeepSpeed.
    """
    if stage is None:
        return
    if values["condition"] and stage == 3:
        raise ValueError(f"`--condition {values['condition']}`: ZeRO-3 cannot deal its modules out. Use ZeRO-2.")
    form = values["quantize_base"]
    if values["group_offload"]:
        raise ValueError(
            f"`--group_offload` and DeepSpeed (ZeRO-{stage}) would both place the weights: launch without DeepSpeed, "
            "or give ZeRO-3 `offload_param_device: cpu` instead."
        )
    if form in TORCHAO:
        raise ValueError(
            f"`--quantize_base={form}`: DeepSpeed (ZeRO-{stage}) cannot move weights of torchao. Launch without it."
        )
    if form is not None and stage == 3:
        raise ValueError(f"`--quantize_base={form}`: ZeRO-3 cannot deal quantized weights out. Use ZeRO-2.")
    if values["compile"] and stage == 3:
        raise ValueError("`--compile`: under ZeRO-3 weights come and go inside of the blocks. Use ZeRO-2.")
    if values["use_ema"] and stage == 3:
        raise ValueError("`--use_ema`: under ZeRO-3 every process has a share of the LoRA only. Use ZeRO-2.")


def deal_out(transformer: WanTransformer3DModel, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Leave to every process its share of a transformer that all have on the CPU, one parameter after the other.

    Left to itself DeepSpeed would move all of it to the GPU of each process first.

    Args:
        transformer (`WanTransformer3DModel`): On the CPU, with its LoRA.
        accelerator (`Accelerator`): Of a run with ZeRO-3. All processes must call this.
        dtype (`torch.dtype`):
            Of all parameters, as DeepSpeed wants them; its optimizer keeps what is trained in float32.
    """
    import deepspeed

    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    plugin = accelerator.state.deepspeed_plugin
    plugin.set_deepspeed_weakref()  # fills in what "auto" stands for
    deepspeed.zero.Init(module=transformer, config_dict_or_path=plugin.dschf.config)
    transformer.to(accelerator.device)  # buffers: there is nothing else any more
