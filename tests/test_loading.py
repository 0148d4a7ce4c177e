"""A pipeline for a preset: model, LoRA, and the ways of keeping and computing them, on the embedded model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import load_image

from diffusers_svi import PixelMotion, SVIEulerScheduler
from diffusers_svi.loading import load_pipeline
from diffusers_svi.presets import PRESETS


ROOT = Path(__file__).parents[1]
SVI_TINY = {
    "model": ROOT / "examples" / "svi_tiny" / "model",
    "lora": ROOT / "examples" / "svi_tiny" / "loras" / "shot.safetensors",
}


def clip(**options: object) -> np.ndarray:
    pipe = load_pipeline(PRESETS["shot"], **{**SVI_TINY, **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=load_image(str(ROOT / "docs" / "images" / "start.png")),
        prompts="a large red circle moves left over a green meadow",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=1,
        max_sequence_length=64,
        seeds=[0],
    ).frames[0]


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return clip()


def test_a_preset_is_loaded_with_the_model_and_the_lora_of_ones_own():
    pipe = load_pipeline(PRESETS["film"], **SVI_TINY)
    assert isinstance(pipe.scheduler, SVIEulerScheduler) and pipe.scheduler.config.shift == 5.0
    assert pipe.lora_conditioning == PixelMotion(1, "reference")
    assert load_pipeline(PRESETS["film"], **{**SVI_TINY, "lora": "none"}).lora_conditioning is None


def test_the_vae_is_in_float32_whatever_the_rest_is():
    pipe = load_pipeline(PRESETS["shot"], **SVI_TINY, dtype="bfloat16", vae_tiling=True)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.vae.use_tiling


@pytest.mark.parametrize(("quantize", "least", "most"), [("quanto", 1e-5, 0.01), ("fp8", 1e-4, 0.05)])
def test_a_clip_of_smaller_weights_is_nearly_the_same(plain, quantize, least, most):
    assert least < np.abs(clip(quantize=quantize) - plain).mean() < most


def test_float8_is_how_layers_are_kept_and_the_lora_stays_as_it_is():
    layer = load_pipeline(PRESETS["shot"], **SVI_TINY, quantize="fp8").transformer.blocks[0].attn1.to_q
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer.lora_A["default_0"].weight.dtype == torch.float32


def test_whole_numbers_of_8_bits_are_how_transformer_and_text_encoder_are_kept():
    pipe = load_pipeline(PRESETS["shot"], **SVI_TINY, quantize="quanto")
    assert pipe.transformer.blocks[0].attn1.to_q.base_layer.weight_qtype.name == "qint8"
    assert pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight_qtype.name == "qint8"


def test_attention_is_computed_as_asked_for_and_other_models_are_left_alone(plain):
    pipe = load_pipeline(PRESETS["shot"], **SVI_TINY, attention_backend="_native_math")
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == AttentionBackendName._NATIVE_MATH
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    np.testing.assert_allclose(clip(attention_backend="_native_math"), plain, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "quick"}, "`attention_backend` must be one of .*'native'.*, got 'quick'"),
        ({"attention_backend": "flash"}, "`attention_backend`='flash' cannot be used here: .*install `flash-attn"),
        ({"quantize": "int2"}, "`quantize` must be one of .*'quanto'.*, got 'int2'"),
        ({"offload": "disk"}, "`offload` must be one of .*, got 'disk'"),
        ({"dtype": "float8"}, "`dtype` must be one of .*, got 'float8'"),
        ({"lora": None, "weight_name": "high.safetensors"}, "`weight_name`='high.safetensors' .* name its repository"),
    ],
)
def test_what_there_is_not_is_refused_before_the_model_is_looked_for(options, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(PRESETS["shot"], **{**SVI_TINY, "model": "missing", **options})


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)  # Python's way of saying that there is none
    with pytest.raises(ValueError, match="pip install optimum-quanto"):
        load_pipeline(PRESETS["shot"], **SVI_TINY, quantize="quanto")
