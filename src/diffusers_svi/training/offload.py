"""Encoders that are on the CPU but when they are used."""

import torch
from accelerate import cpu_offload_with_hook
from diffusers import WanImageToVideoPipeline


def offload_encoders(pipe: WanImageToVideoPipeline, device: torch.device) -> None:
    """Let every encoder and the VAE come to `device` when it is used, and leave it when the next one is.

    The transformers stay where they are: one that is trained must not be moved, as `enable_model_cpu_offload` does.
    """
    # By these, the pipeline knows that it works on `device` though its encoders are elsewhere.
    pipe._exclude_from_cpu_offload = ["transformer", "transformer_2"]
    hook = None
    for model in (pipe.text_encoder, pipe.image_encoder, pipe.vae):
        if model is not None:
            _, hook = cpu_offload_with_hook(model.to("cpu"), device, prev_module_hook=hook)
