"""ZeRO-3 of DeepSpeed: every process holds a share of the weights, and none ever all of them."""

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel


def zero_stage(accelerator: Accelerator) -> int | None:
    """Of DeepSpeed, if the run was launched with it."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


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
