"""A frozen base with fewer bits: which of its weights, how far off, and what is trained in full."""

import importlib.util

import pytest
import torch
from peft import LoraConfig

from conftest import make_transformer
from diffusers_svi.training.lora_model import load_transformer
from diffusers_svi.training.quantized import QUANTIZATIONS, check_quantization, quantization_config


LORA = LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_transformer().save_pretrained(folder / "transformer")
    return folder


# Half a step of 1/127 of a row's largest weight; half a bit of the three that float8 has for a fraction.
@pytest.mark.parametrize(
    ("form", "stored", "error"), [("int8", torch.int8, 1 / 254), ("fp8", torch.float8_e4m3fn, 1 / 16)]
)
def test_weights_of_linear_layers_take_a_byte(folder, form, stored, error):
    pytest.importorskip("torchao")
    full, quantized = (load_transformer(folder, "transformer", torch.float32, LORA, quantize=f) for f in (None, form))
    layers = [name for name, module in full.named_modules() if name.startswith("blocks.") and name.endswith("to_k")]
    assert len(layers) == 4
    for name in (*layers, "blocks.0.attn1.to_q.base_layer"):
        weight, given = quantized.get_submodule(name).weight, full.get_submodule(name).weight
        assert weight.qdata.dtype == stored and weight.qdata.numel() == given.numel() and not weight.requires_grad
        lost = (weight.dequantize() - given).abs()
        assert 0 < lost.max() <= 1.001 * error * given.abs().max()
    trained = {name: p for name, p in quantized.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 3 and all(
        ".lora_" in name and p.dtype == torch.float32 for name, p in trained.items()
    )


def test_what_never_changes_is_not_told_to_other_processes(folder):
    transformer = load_transformer(folder, "transformer", torch.float32, LORA)
    of_lora = {name for name, _ in transformer.named_parameters() if ".lora_" in name}
    assert of_lora and of_lora.isdisjoint(transformer._ddp_params_and_buffers_to_ignore)
    names = {name for name, _ in transformer.named_parameters()}
    assert set(transformer._ddp_params_and_buffers_to_ignore) == names - of_lora


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="`quantize_base` must be one of .*, got '2bit'"):
        check_quantization("2bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for form, message in zip(QUANTIZATIONS, 2 * ["needs a GPU"] + 2 * ["needs torchao: `pip install"], strict=True):
        with pytest.raises(ValueError, match=f"`--quantize_base={form}` {message}"):
            quantization_config(form, torch.bfloat16)
