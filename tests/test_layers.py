"""Layers of a LoRA by diffusers' and by the original names; those a model lacks are told."""

import pytest

from conftest import make_transformer
from diffusers_svi.lora_file import TARGET_MODULES
from diffusers_svi.training.layers import check_layers, parse_layers


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (None, TARGET_MODULES),
        ("to_k,to_q,to_v,to_out.0", ["to_k", "to_q", "to_v", "to_out.0"]),
        ("q,k,v,o,ffn.0,ffn.2", ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]),
        (" attn1.to_q, cross_attn.v ,self_attn.q,", ["attn1.to_q", "attn2.to_v"]),
        ("cross_attn.k_img,add_v_proj", ["attn2.add_k_proj", "add_v_proj"]),
    ],
)
def test_both_kinds_of_names_are_understood(given, layers):
    assert parse_layers(given) == layers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("to_q,to_z", "`--lora_layers`: 'to_z' is none of self_attn.q, "),
        ("patch_embedding", "'patch_embedding' is none of"),
        ("", "names no layer"),
        (" , ", "names no layer"),
    ],
)
def test_other_layers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(given)


def test_layers_that_the_model_lacks_are_told():
    plain, with_image = make_transformer(), make_transformer(image_dim=16, added_kv_proj_dim=24)
    for model in (plain, with_image):
        check_layers(TARGET_MODULES, dict(model.named_modules()))
    check_layers(["add_k_proj"], dict(with_image.named_modules()))
    with pytest.raises(ValueError, match="`--lora_layers`: this model has no add_k_proj. Leave it out."):
        check_layers(["to_q", "add_k_proj"], dict(plain.named_modules()))
