"""Encoders come to the device when they are used; the transformers are left where they are."""

import torch

from conftest import make_components
from diffusers_svi import SVIPipeline
from diffusers_svi.training.offload import offload_encoders


def test_encoders_are_moved_and_transformers_are_not():
    pipe = SVIPipeline(**make_components("wan2.1") | {"transformer_2": None})
    offload_encoders(pipe, torch.device("meta"))
    assert pipe._execution_device == torch.device("meta")
    assert not hasattr(pipe.transformer, "_hf_hook")
    models = {"text_encoder": pipe.text_encoder, "image_encoder": pipe.image_encoder, "vae": pipe.vae}
    assert {model.device.type for model in models.values()} == {"cpu"}
    models["text_encoder"]._hf_hook.pre_forward(models["text_encoder"])
    assert {name for name, model in models.items() if model.device.type == "meta"} == {"text_encoder"}
    # Each sends back the one before it.
    assert pipe.vae._hf_hook.prev_module_hook.model is pipe.image_encoder
    assert pipe.image_encoder._hf_hook.prev_module_hook.model is pipe.text_encoder


def test_a_model_without_image_encoder():
    pipe = SVIPipeline(**make_components("i2v"))
    offload_encoders(pipe, torch.device("cpu"))
    assert hasattr(pipe.vae, "_hf_hook") and pipe._execution_device == torch.device("cpu")
