import json
import logging
import re

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import CLIP, TEXT_DIM, make_components, make_transformer, quiet, seeded
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.lora_file import lora_metadata, read_lora, save_lora


# The layers an SVI LoRA has, in the original names and in diffusers'.
NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
FILM_OPT = "svi-film-opt-10212025.safetensors"


def make_lora(transformer, seed=0, rank=4, layout="official", alpha=None) -> dict[str, torch.Tensor]:
    """A random LoRA for every layer in `NAMES`, in one of the layouts met in the wild."""
    generator, state_dict = seeded(seed), {}
    layers = dict(transformer.named_modules())
    for block in range(len(transformer.blocks)):
        for original, ours in NAMES.items():
            layer = layers[f"blocks.{block}.{ours}"]
            device = layer.weight.device
            shapes = (rank, layer.in_features), (layer.out_features, rank)
            if device.type == "meta":
                down, up = (torch.empty(shape, device="meta") for shape in shapes)
            else:
                down, up = (torch.randn(shape, generator=generator) / 4 for shape in shapes)
            name = f"blocks.{block}.{original}"
            a, b, prefix = {
                "official": ("lora_A.default", "lora_B.default", ""),
                "pipe.dit": ("lora_A.default", "lora_B.default", "pipe.dit."),
                "dit": ("lora_A.default", "lora_B.default", "dit."),
                "diffusion_model": ("lora_A", "lora_B", "diffusion_model."),
                "diffusion_model.default": ("lora_A.default", "lora_B.default", "diffusion_model."),
                "bare": ("lora_A", "lora_B", ""),
                "kohya": ("lora_down", "lora_up", "diffusion_model."),
                "kohya bare": ("lora_down", "lora_up", ""),
                "musubi": ("lora_down", "lora_up", "lora_unet_"),
                "diffusers": ("lora_A", "lora_B", "transformer."),
                "diffusers bare": ("lora_A", "lora_B", ""),
                "peft": ("lora_A", "lora_B", "base_model.model."),
            }[layout]
            if layout.startswith(("diffusers", "peft")):
                name = f"blocks.{block}.{ours}"
            if layout == "musubi":
                name = name.replace(".", "_")
            state_dict[f"{prefix}{name}.{a}.weight"] = down
            state_dict[f"{prefix}{name}.{b}.weight"] = up
            if alpha is not None:
                state_dict[f"{prefix}{name}.alpha"] = torch.tensor(float(alpha))
    return state_dict


LAYOUTS = [
    "official",
    "pipe.dit",
    "dit",
    "diffusion_model",
    "diffusion_model.default",
    "bare",
    "kohya",
    "kohya bare",
    "musubi",
    "diffusers",
    "diffusers bare",
    "peft",
]


# The second matrix of a LoRA whose first has another size.
ZERO_UP = {"blocks.0.ffn.0.lora_B.weight": torch.zeros(32, 4)}


def merged(transformer, lora: dict, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """W + scale * B A for an official LoRA, by hand."""
    weights = {key: value.clone() for key, value in transformer.state_dict().items()}
    for key, down in lora.items():
        if ".lora_A." in key:
            up = lora[key.replace(".lora_A.", ".lora_B.")]
            block, original = re.fullmatch(r"blocks\.(\d+)\.(.+)\.lora_A\.default\.weight", key).groups()
            weights[f"blocks.{block}.{NAMES[original]}.weight"] += scale * up @ down
    return weights


def first_clip(pipe, image, **options):
    options = {"prompts": "a cat sits", "generator": seeded(), "output_type": "latent", **CLIP, **options}
    return pipe(image=image, **options).frames[0]


@pytest.mark.parametrize("kind", ["wan2.1", "i2v"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_and_does_the_same(kind, pipe, image, layout, tmp_path):
    reference = quiet(SVIPipeline(**make_components(kind)))
    reference.transformer.load_state_dict(merged(reference.transformer, make_lora(reference.transformer)))
    expected, base = first_clip(reference, image), first_clip(pipe, image)
    assert not torch.allclose(expected, base, atol=1e-2)

    alpha = 4 if layout in ("kohya", "musubi") else None  # alpha = rank: scale 1, as without one
    save_file(make_lora(pipe.transformer, layout=layout, alpha=alpha), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(first_clip(pipe, image), expected, atol=2e-4, rtol=2e-4)
    pipe.unload_lora_weights()
    assert torch.equal(first_clip(pipe, image), base)


@pytest.mark.parametrize("layout", ["kohya", "kohya bare", "musubi"])
def test_alpha_scales(i2v, image, layout):
    lora = make_lora(i2v.transformer)
    reference = quiet(SVIPipeline(**make_components("i2v")))
    reference.transformer.load_state_dict(merged(reference.transformer, lora, scale=0.5))
    i2v.load_lora_weights(make_lora(i2v.transformer, layout=layout, alpha=2))  # of rank 4
    torch.testing.assert_close(first_clip(i2v, image), first_clip(reference, image), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("weighted_by", ["set_adapters", "fuse_lora"])
def test_fused_and_partly_weighted(i2v, image, weighted_by):
    lora = make_lora(i2v.transformer)
    reference = quiet(SVIPipeline(**make_components("i2v")))
    reference.transformer.load_state_dict(merged(reference.transformer, lora, scale=0.5))
    i2v.load_lora_weights(lora, adapter_name="svi")
    i2v.set_adapters("svi", 0.5 if weighted_by == "set_adapters" else 1.0)
    i2v.fuse_lora(lora_scale=0.5 if weighted_by == "fuse_lora" else 1.0)
    i2v.unload_lora_weights()
    torch.testing.assert_close(first_clip(i2v, image), first_clip(reference, image), atol=2e-4, rtol=2e-4)


def test_the_alpha_of_diffusers_metadata_counts(i2v, image, tmp_path):
    """A LoRA of rank 4 saved by diffusers with alpha 2 has scale 0.5."""
    transformer = make_transformer()
    layers, config = trained(transformer)
    WanImageToVideoPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    i2v.load_lora_weights(tmp_path)
    reference = quiet(SVIPipeline(**{**make_components("i2v"), "transformer": transformer}))
    torch.testing.assert_close(first_clip(i2v, image), first_clip(reference, image), atol=1e-5, rtol=1e-5)


# Bases as people have them


def test_a_transformer_that_is_compiled_first(i2v, image):
    reference = quiet(SVIPipeline(**make_components("i2v")))
    reference.transformer.load_state_dict(merged(reference.transformer, make_lora(reference.transformer, seed=1)))
    i2v.transformer = torch.compile(i2v.transformer, backend="eager")
    i2v.load_lora_weights(make_lora(make_transformer()), adapter_name="svi")
    i2v.load_lora_weights(make_lora(make_transformer(), seed=1), adapter_name="svi", hotswap=True)
    with pytest.raises(ValueError, match="made for a model of another size"):
        i2v.load_lora_weights({"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 9), **ZERO_UP})
    torch.testing.assert_close(first_clip(i2v, image), first_clip(reference, image), atol=2e-4, rtol=2e-4)


def test_blocks_that_are_compiled(i2v):
    i2v.transformer.compile_repeated_blocks(backend="eager")
    i2v.load_lora_weights(make_lora(make_transformer()), adapter_name="svi")
    assert len(get_peft_model_state_dict(i2v.transformer, adapter_name="svi")) == 40
    i2v.transformer.blocks[0] = torch.compile(i2v.transformer.blocks[0])
    with pytest.raises(
        ValueError, match=r"`transformer` are wrapped by `torch.compile`.*`transformer.compile_repeated"
    ):
        i2v.load_lora_weights(make_lora(make_transformer()))


def gguf_base(transformer):
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def packed(layer):
        weight = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        new = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
        new.weight, new.bias = GGUFParameter(weight, requires_grad=False, quant_type=kind), layer.bias
        return new

    return packed_base(transformer, packed)


def bitsandbytes_base(transformer):
    import bitsandbytes

    def packed(layer):
        new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
        new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = layer.bias
        return new.to("cpu")

    return packed_base(transformer, packed)


def quanto_base(transformer):
    from optimum import quanto

    quanto.quantize(transformer, weights=quanto.qint8)
    quanto.freeze(transformer)
    return transformer


def packed_base(transformer, packed):
    for name, layer in list(transformer.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear):
            transformer.set_submodule(name, packed(layer))
    return transformer


@pytest.mark.parametrize("make", [gguf_base, bitsandbytes_base, quanto_base])
def test_a_quantized_base(make):
    """Its weights are packed; the update is that of the file."""
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 128}
    transformer = WanTransformer3DModel(in_channels=36, num_layers=1, **config)
    lora = make_lora(transformer)
    pipe = SVIPipeline(**{**make_components("i2v"), "transformer": make(transformer)})
    pipe.load_lora_weights(lora, adapter_name="svi")
    x = torch.randn(1, 3, 64, generator=seeded())
    layer = pipe.transformer.blocks[0].ffn.net[0].proj
    down, up = (lora[f"blocks.0.ffn.0.lora_{side}.default.weight"] for side in "AB")
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ down.T @ up.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="but the layer is 128 x 64. It was made for a model of another size"):
        pipe.load_lora_weights({"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 9), **ZERO_UP})


def test_a_lora_of_the_patch_embedding(i2v):
    lora = {
        "patch_embedding.lora_A.weight": torch.randn(4, 36, 1, 2, 2, generator=seeded()),
        "patch_embedding.lora_B.weight": torch.randn(24, 4, 1, 1, 1, generator=seeded(1)),
    }
    i2v.load_lora_weights(lora, adapter_name="svi")
    update = i2v.transformer.patch_embedding.get_delta_weight("svi").flatten(1)
    down, up = (value.flatten(1) for value in lora.values())
    torch.testing.assert_close(update, up @ down)
    lora["patch_embedding.lora_A.weight"] = torch.zeros(4, 16, 1, 2, 2)
    with pytest.raises(ValueError, match="but the layer is 24 x 36 x 1 x 2 x 2"):
        i2v.load_lora_weights(lora)


# The scheme


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("version-1.0/svi-shot.safetensors", PixelMotion(1, "reference")),
        ("version-1.0/svi-film.safetensors", PixelMotion(5, "zeros")),
        (f"version-1.0/{FILM_OPT}", PixelMotion(5, "zeros")),
        ("version-1.0/svi-film-transitions.safetensors", PixelMotion(5, "zeros")),
        ("version-1.0/svi-tom.safetensors", PixelMotion(1, "zeros")),
        ("version-2.0/SVI_Wan2.1-I2V-14B_lora_v2.0.safetensors", PixelMotion(5, "reference")),
        ("version-2.0/SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0.safetensors", PixelMotion(1, "reference")),
        ("version-2.0/SVI_Wan2.2-I2V-A14B_low_noise_lora_v2.0.safetensors", PixelMotion(1, "reference")),
        ("version-2.0/SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0_pro.safetensors", LatentMotion(1)),
        ("SVI_v2_PRO_Wan2.2-I2V-A14B_LOW_lora_rank_128_fp16.safetensors", LatentMotion(1)),
        ("svi-shot_lora_rank_128_fp16.safetensors", PixelMotion(1, "reference")),
        ("svi-model-pro-5b/lora.safetensors", HeldLatents(1)),
        ("svi-model-pro-5b.safetensors", HeldLatents(1)),
        ("SVI_Wan2.2-TI2V-5B_lora_v2.0_pro.safetensors", HeldLatents(1)),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", None),
        ("Seko-V1/low_noise_model.safetensors", None),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", None),
        ("Wan_2_2_I2V_A14B_LOW_lightx2v_4step_lora_v1030_rank_64_bf16.safetensors", None),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors", None),
        ("my-style.safetensors", None),
    ],
)
def test_the_scheme_of_published_files_is_known(tmp_path, name, scheme):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save_file(make_lora(make_transformer()), tmp_path / name)
    lora = read_lora(tmp_path, name)
    assert lora.conditioning == scheme
    assert lora.expert == ("high" if "high" in name.lower() else "low" if "low" in name.lower() else None)


@pytest.mark.parametrize(
    "name",
    ["colours-high-contrast", "wan2.1-low-angle-shot", "wan2.2_a14b_low_angle", "wan2.2-high-detail", "yellow_noise"],
)
def test_other_files_are_for_no_expert(tmp_path, name):
    """Whatever "high" in their name is to mean."""
    save_file(make_lora(make_transformer()), tmp_path / f"{name}.safetensors")
    assert read_lora(tmp_path, f"{name}.safetensors").expert is None


def test_what_a_file_is_for_is_said_by_hand(tmp_path):
    """Where its name misleads: a LoRA for both experts, and one of an expert by another name."""
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    save_file(make_lora(pipe.transformer), tmp_path / "for_low_noise_levels.safetensors")
    with pytest.raises(ValueError, match=r"for the low-noise expert.*Where the name misleads, .* with `expert=`"):
        pipe.load_lora_weights(tmp_path / "for_low_noise_levels.safetensors")
    pipe.load_lora_weights(tmp_path / "for_low_noise_levels.safetensors", expert="high")
    pipe.load_lora_weights(tmp_path / "for_low_noise_levels.safetensors", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "transformer_2": ["default_0"]}
    with pytest.raises(ValueError, match=r"for the low-noise expert"):
        pipe.load_lora_weights(make_lora(pipe.transformer), expert="low")
    with pytest.raises(ValueError, match=r"`expert` must be one of \('high', 'low'\), got 'both'"):
        pipe.load_lora_weights(make_lora(pipe.transformer), expert="both")
    with pytest.raises(ValueError, match="is for one file: leave it out with `weight_name_2`"):
        pipe.load_lora_weights(tmp_path, weight_name=HIGH, weight_name_2=LOW, expert="high")


def test_the_scheme_in_the_metadata_comes_first(tmp_path):
    file = tmp_path / "svi-film.safetensors"
    save_file(make_lora(make_transformer()), file, metadata=lora_metadata(LatentMotion(2), expert="low"))
    lora = read_lora(file)
    assert lora.conditioning == LatentMotion(2) and lora.expert == "low"


def test_the_pipeline_uses_the_scheme_of_the_lora(i2v, image, tmp_path):
    save_file(make_lora(i2v.transformer), tmp_path / "svi-film.safetensors")
    assert i2v.lora_conditioning is None
    i2v.load_lora_weights(tmp_path, weight_name="svi-film.safetensors")
    assert i2v.lora_conditioning == PixelMotion(5)
    assert first_clip(i2v, image, num_clips=2, output_type="np").shape[0] == 13
    assert first_clip(i2v, image, num_clips=2, condition_frames=5, output_type="np").shape[0] == 13
    i2v.unload_lora_weights()
    assert i2v.lora_conditioning is None
    assert first_clip(i2v, image, num_clips=2, output_type="np").shape[0] == 17


@pytest.mark.parametrize("options", [{"condition_frames": 1}, {"conditioning": PixelMotion(5, "reference")}])
def test_another_scheme_than_the_loras_is_refused_unless_meant(i2v, image, options):
    i2v.load_lora_weights(make_lora(i2v.transformer), conditioning=PixelMotion(5))
    with pytest.raises(ValueError, match=r"trained for PixelMotion\(num_frames=5.*`ignore_lora_conditioning=True`"):
        first_clip(i2v, image, **options)
    first_clip(i2v, image, ignore_lora_conditioning=True, **options)


def test_a_second_lora_beside_it(i2v):
    """A few-step LoRA, say: it has no scheme and changes none. Two SVI LoRAs must agree."""
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    i2v.load_lora_weights(make_lora(i2v.transformer, seed=1), adapter_name="fast")
    i2v.set_adapters(["svi", "fast"], [1.0, 0.5])
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.load_lora_weights(
        make_lora(i2v.transformer, seed=2), adapter_name="shot", conditioning=PixelMotion(1, "reference")
    )
    i2v.set_adapters(["svi", "shot"])
    with pytest.raises(ValueError, match="different schemes"):
        _ = i2v.lora_conditioning
    i2v.set_adapters("shot")
    assert i2v.lora_conditioning == PixelMotion(1, "reference")


def test_the_scheme_comes_along_to_another_pipeline(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer), conditioning=PixelMotion(5))
    assert SVIPipeline.from_pipe(i2v).lora_conditioning == PixelMotion(5)


def test_a_lora_that_is_disabled_has_no_say(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer), conditioning=PixelMotion(5))
    i2v.disable_lora()
    assert i2v.lora_conditioning is None
    i2v.enable_lora()
    assert i2v.lora_conditioning == PixelMotion(5)


def test_a_lora_that_is_deleted_has_no_say(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    i2v.delete_adapters("svi")
    assert i2v.lora_conditioning is None


def test_a_hotswapped_lora_brings_its_scheme(i2v):
    i2v.load_lora_weights(make_lora(make_transformer()), adapter_name="svi", conditioning=PixelMotion(5))
    # Swapping is what compiled transformers do: `torch.compile` wraps them here, nothing is compiled.
    i2v.transformer = torch.compile(i2v.transformer)
    assert i2v.lora_conditioning == PixelMotion(5)
    swap = {"adapter_name": "svi", "hotswap": True}
    i2v.load_lora_weights(make_lora(make_transformer(), seed=1), conditioning=PixelMotion(1, "reference"), **swap)
    assert i2v.lora_conditioning == PixelMotion(1, "reference")
    i2v.load_lora_weights(make_lora(make_transformer(), seed=2), **swap)
    assert i2v.lora_conditioning is None


# Fused LoRAs


def test_a_fused_lora_has_a_say_while_it_is_fused(i2v, image):
    """And it alone: beside it, peft applies no other."""
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    alone = first_clip(i2v, image)
    i2v.load_lora_weights(make_lora(i2v.transformer, seed=1), adapter_name="pro", conditioning=LatentMotion(1))
    i2v.fuse_lora(adapter_names=["svi"])
    i2v.set_adapters("pro")
    torch.testing.assert_close(first_clip(i2v, image), alone, atol=2e-4, rtol=2e-4)
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.unfuse_lora()
    assert i2v.lora_conditioning == LatentMotion(1)
    i2v.set_adapters("svi")
    i2v.unload_lora_weights()
    assert i2v.lora_conditioning is None


@pytest.mark.parametrize("leave", ["unload_lora_weights", "delete_adapters"])
def test_a_fused_lora_keeps_its_scheme(i2v, image, leave):
    """It stays in the weights, so it stays on record, beside what is loaded later under the same name."""
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    fused = first_clip(i2v, image)
    i2v.fuse_lora()
    i2v.delete_adapters("svi") if leave == "delete_adapters" else i2v.unload_lora_weights()
    torch.testing.assert_close(first_clip(i2v, image), fused, atol=2e-4, rtol=2e-4)
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.disable_lora()
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.unload_lora_weights()
    i2v.load_lora_weights(make_lora(i2v.transformer, seed=1), adapter_name="svi")
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.fuse_lora()
    i2v.unfuse_lora()
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.unload_lora_weights()
    i2v.load_lora_weights(make_lora(i2v.transformer, seed=1), adapter_name="shot", conditioning=LatentMotion(1))
    with pytest.raises(
        ValueError, match=r"different schemes \(shot: LatentMotion.*, fused: PixelMotion.*`set_adapters`"
    ):
        _ = i2v.lora_conditioning
    i2v.disable_lora()
    assert i2v.lora_conditioning == PixelMotion(5)
    i2v.enable_lora()
    i2v.fuse_lora()
    i2v.unload_lora_weights()
    with pytest.raises(ValueError, match=r"different schemes \(fused: PixelMotion.*, fused: LatentMotion"):
        _ = i2v.lora_conditioning


def test_only_what_is_fused_stays_on_record(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="shot", conditioning=PixelMotion(1, "reference"))
    i2v.fuse_lora(adapter_names=["svi"])
    i2v.delete_adapters(["shot"])
    i2v.unfuse_lora()
    i2v.delete_adapters("svi")
    assert i2v.lora_conditioning is None


def test_an_adapter_of_weight_zero_has_no_say(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="film", conditioning=PixelMotion(5))
    i2v.load_lora_weights(make_lora(i2v.transformer, seed=1), adapter_name="shot", conditioning=PixelMotion(1))
    i2v.set_adapters(["film", "shot"], [0.0, 1.0])
    assert i2v.lora_conditioning == PixelMotion(1)


# What the image encoder saw in training


def test_published_loras_were_trained_on_whole_frames(i2v, tmp_path):
    for name, metadata, expected in (
        ("svi-shot.safetensors", None, "squash"),
        ("unknown.safetensors", None, None),
        ("svi-film.safetensors", lora_metadata(PixelMotion(5)), None),
        ("mine.safetensors", lora_metadata(PixelMotion(5), clip_resize="squash"), "squash"),
        ("svi-tom.safetensors", lora_metadata(PixelMotion(1), clip_resize="crop"), "crop"),
    ):
        save_file(make_lora(i2v.transformer), tmp_path / name, metadata=metadata)
        assert read_lora(tmp_path / name).clip_resize == expected, name
        i2v.load_lora_weights(tmp_path / name, adapter_name="svi")
        assert i2v.lora_clip_resize == expected, name
        i2v.unload_lora_weights()


def test_loras_that_saw_different_things(i2v, tmp_path):
    for name, value in (("a", "squash"), ("b", "crop"), ("c", None)):
        file = tmp_path / f"{name}.safetensors"
        save_file(make_lora(i2v.transformer), file, metadata=lora_metadata(PixelMotion(5), clip_resize=value))
        i2v.load_lora_weights(file, adapter_name=name)
    i2v.set_adapters(["a", "c"])
    assert i2v.lora_clip_resize == "squash"
    i2v.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="different values of `clip_resize` .*'squash': 'a'"):
        _ = i2v.lora_clip_resize


def test_what_a_lora_saw_is_saved_with_it(i2v, tmp_path):
    metadata = lora_metadata(PixelMotion(5), clip_resize="squash")
    save_file(make_lora(i2v.transformer), tmp_path / "lora.safetensors", metadata=metadata)
    i2v.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="svi")
    i2v.save_lora_weights(tmp_path, get_peft_model_state_dict(i2v.transformer, adapter_name="svi"))
    assert read_lora(tmp_path, "pytorch_lora_weights.safetensors").clip_resize == "squash"
    i2v.fuse_lora()
    i2v.unload_lora_weights()
    i2v.save_pretrained(tmp_path / "model")
    loaded = SVIPipeline.from_pretrained(tmp_path / "model")
    assert loaded.lora_clip_resize == "squash" and loaded.lora_conditioning == PixelMotion(5)


def test_a_clip_resize_that_is_none(tmp_path, i2v):
    metadata = lora_metadata(PixelMotion(5)) | {"svi_clip_resize": "pad"}
    save_file(make_lora(i2v.transformer), tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="`svi_clip_resize` must be one of .*, got 'pad'"):
        read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="`clip_resize` must be one of .*, got 'pad'"):
        lora_metadata(PixelMotion(5), clip_resize="pad")


def test_a_fused_lora_is_saved_with_its_scheme(tmp_path, image, caplog, monkeypatch):
    """Both experts are fused; the folder says so to `SVIPipeline`, and nothing that disturbs to stock diffusers."""
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    pipe.load_lora_weights(make_lora(pipe.transformer), adapter_name="fast")
    pipe.load_lora_weights(
        make_lora(pipe.transformer_2, seed=1), load_into_transformer_2=True, conditioning=PixelMotion(5)
    )
    expected = first_clip(pipe, image, num_inference_steps=4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.fuse_lora()  # nothing is left to fuse
    pipe.save_pretrained(tmp_path)
    loaded = quiet(SVIPipeline.from_pretrained(tmp_path))
    assert loaded.lora_conditioning == PixelMotion(5)
    torch.testing.assert_close(first_clip(loaded, image, num_inference_steps=4), expected, atol=2e-4, rtol=2e-4)
    loaded.save_pretrained(tmp_path / "again")
    assert SVIPipeline.from_pretrained(tmp_path / "again").lora_conditioning == PixelMotion(5)

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"):
        stock = WanImageToVideoPipeline.from_pretrained(tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("diffusers")]
    for key, value in pipe.transformer_2.state_dict().items():
        assert torch.equal(stock.transformer_2.state_dict()[key], value), key


def test_unfusing_is_for_both_experts_too(image):
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    base = first_clip(pipe, image, num_inference_steps=4)
    pipe.load_lora_weights(make_lora(pipe.transformer), adapter_name="svi")
    pipe.load_lora_weights(make_lora(pipe.transformer_2), adapter_name="svi", load_into_transformer_2=True)
    with_lora = first_clip(pipe, image, num_inference_steps=4)
    pipe.fuse_lora(components=["transformer"])
    pipe.disable_lora()  # what is not fused; and peft takes out what is
    torch.testing.assert_close(first_clip(pipe, image, num_inference_steps=4), base, atol=2e-4, rtol=2e-4)
    pipe.enable_lora()
    pipe.fuse_lora()
    fused = [layer.merged for layer in pipe.transformer_2.modules() if isinstance(layer, BaseTunerLayer)]
    assert fused and all(fused)
    torch.testing.assert_close(first_clip(pipe, image, num_inference_steps=4), with_lora, atol=2e-4, rtol=2e-4)
    pipe.unfuse_lora()
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert not any(layer.merged for layer in transformer.modules() if isinstance(layer, BaseTunerLayer))


# Two experts


HIGH = "SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0_pro.safetensors"
LOW = "SVI_Wan2.2-I2V-A14B_low_noise_lora_v2.0_pro.safetensors"


@pytest.fixture
def experts(tmp_path):
    """A pipeline with two experts, and a folder with a LoRA for each."""
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    save_file(make_lora(pipe.transformer, seed=0), tmp_path / HIGH)
    save_file(make_lora(pipe.transformer_2, seed=1), tmp_path / LOW)
    return pipe, tmp_path


def test_both_experts_in_one_call_or_in_two(experts, image):
    pipe, folder = experts
    pipe.load_lora_weights(folder, weight_name=HIGH, weight_name_2=LOW)
    assert pipe.lora_conditioning == LatentMotion(1)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "transformer_2": ["default_0"]}
    in_one = first_clip(pipe, image, num_inference_steps=4)

    two = quiet(SVIPipeline(**make_components("a14b")))
    two.load_lora_weights(folder, weight_name=HIGH)
    two.load_lora_weights(folder, weight_name=LOW, load_into_transformer_2=True)
    assert torch.equal(first_clip(two, image, num_inference_steps=4), in_one)

    reference = quiet(SVIPipeline(**make_components("a14b")))
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        expert = getattr(reference, name)
        expert.load_state_dict(merged(expert, make_lora(expert, seed=seed)))
    expected = first_clip(reference, image, num_inference_steps=4, conditioning=LatentMotion(1))
    torch.testing.assert_close(in_one, expected, atol=2e-4, rtol=2e-4)


def test_a_lora_of_the_other_expert_is_refused(experts):
    pipe, folder = experts
    with pytest.raises(ValueError, match=r"low-noise expert.*`weight_name_2` or with `load_into_transformer_2=True`"):
        pipe.load_lora_weights(folder, weight_name=LOW)
    with pytest.raises(ValueError, match=r"high-noise expert.*pass it as `weight_name`"):
        pipe.load_lora_weights(folder, weight_name=HIGH, load_into_transformer_2=True)
    with pytest.raises(ValueError, match="leave out `load_into_transformer_2"):
        pipe.load_lora_weights(folder, weight_name=HIGH, weight_name_2=LOW, load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_a_lora_in_one_expert_only(component):
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    second = component == "transformer_2"
    pipe.load_lora_weights(
        make_lora(pipe.transformer), adapter_name="svi", conditioning=PixelMotion(5), load_into_transformer_2=second
    )
    pipe.load_lora_weights(make_lora(pipe.transformer), adapter_name="fast", load_into_transformer_2=not second)
    assert pipe.lora_conditioning == PixelMotion(5)
    pipe.transformer, pipe.transformer_2 = torch.compile(pipe.transformer), torch.compile(pipe.transformer_2)
    assert pipe.lora_conditioning == PixelMotion(5)


def test_the_experts_must_agree():
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    options = {"adapter_name": "svi", "load_into_transformer_2": True}
    pipe.load_lora_weights(make_lora(pipe.transformer), adapter_name="svi", conditioning=PixelMotion(5))
    pipe.load_lora_weights(make_lora(pipe.transformer), conditioning=LatentMotion(1), **options)
    with pytest.raises(ValueError, match="different schemes"):
        _ = pipe.lora_conditioning


def test_two_files_of_different_schemes_are_refused(tmp_path):
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    for number in (1, 2):
        save_file(make_lora(pipe.transformer), tmp_path / f"{number}", metadata=lora_metadata(LatentMotion(number)))
        (tmp_path / f"{number}").rename(tmp_path / f"{number}.safetensors")
    with pytest.raises(ValueError, match=r"two experts were trained for different schemes.*1\).*2\)"):
        pipe.load_lora_weights(tmp_path, weight_name="1.safetensors", weight_name_2="2.safetensors")
    assert pipe.get_list_adapters() == {}


def test_a_name_that_is_free_in_both_experts(experts):
    pipe, folder = experts
    for transformer, adapters in ((pipe.transformer, 9), (pipe.transformer_2, 10)):
        for number in range(adapters):
            transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), adapter_name=f"default_{number}")
    pipe.load_lora_weights(folder, weight_name=HIGH, weight_name_2=LOW)
    assert "default_10" in pipe.transformer.peft_config and "default_10" in pipe.transformer_2.peft_config


def test_a_model_of_one_transformer_takes_the_lora_of_either_expert(i2v, tmp_path):
    for expert in ("high", "low"):
        file = tmp_path / f"{expert}.safetensors"
        save_file(make_lora(i2v.transformer), file, metadata=lora_metadata(LatentMotion(1), expert))
        i2v.load_lora_weights(file)
    assert i2v.get_list_adapters() == {"transformer": ["default_0", "default_1"]}


def test_a_second_expert_that_is_not_there(i2v):
    with pytest.raises(ValueError, match=r"`transformer_2`, which this pipeline does not have"):
        i2v.load_lora_weights(make_lora(i2v.transformer), load_into_transformer_2=True)


# Saving


def trained(transformer, seed=0) -> tuple[dict, dict]:
    """Weights and configuration of a LoRA as a training leaves them, of scale 0.5."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
    torch.manual_seed(seed)
    transformer.add_adapter(config)
    return get_peft_model_state_dict(transformer), config.to_dict()


def test_both_experts_are_saved_with_their_scheme(image, tmp_path):
    """On the class, and loaded again by `SVIPipeline` and by stock diffusers."""
    source = quiet(SVIPipeline(**make_components("a14b")))
    (high, high_config), (low, low_config) = trained(source.transformer), trained(source.transformer_2, seed=1)
    SVIPipeline.save_lora_weights(
        tmp_path / "new",
        transformer_lora_layers=high,
        transformer_lora_adapter_metadata=high_config,
        transformer_2_lora_layers=low,
        transformer_2_lora_adapter_metadata=low_config,
        conditioning=LatentMotion(1),
    )
    names = {"weight_name": "pytorch_lora_weights.safetensors", "weight_name_2": "pytorch_lora_weights_2.safetensors"}
    assert [read_lora(tmp_path / "new", name).expert for name in names.values()] == ["high", "low"]
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    with pytest.raises(ValueError, match="low-noise expert"):
        pipe.load_lora_weights(tmp_path / "new", weight_name=names["weight_name_2"])
    pipe.load_lora_weights(tmp_path / "new", **names)
    assert pipe.lora_conditioning == LatentMotion(1)
    options = {"num_inference_steps": 4, "conditioning": LatentMotion(1)}
    expected = first_clip(source, image, **options)
    torch.testing.assert_close(first_clip(pipe, image, **options), expected, atol=1e-5, rtol=1e-5)

    stock = quiet(WanImageToVideoPipeline(**make_components("a14b")))
    stock.load_lora_weights(tmp_path / "new", weight_name=names["weight_name"])
    stock.load_lora_weights(tmp_path / "new", weight_name=names["weight_name_2"], load_into_transformer_2=True)
    for component in ("transformer", "transformer_2"):
        ours, theirs = (getattr(pipeline, component).state_dict() for pipeline in (pipe, stock))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        scales = [m.scaling["default_0"] for m in getattr(stock, component).modules() if isinstance(m, BaseTunerLayer)]
        assert set(scales) == {0.5}


@pytest.mark.parametrize(("kind", "expert"), [("a14b", "high"), ("i2v", None)], indirect=["kind"])
def test_a_pipeline_saves_the_scheme_of_its_loras(pipe, expert, tmp_path):
    pipe.load_lora_weights(make_lora(pipe.transformer), conditioning=PixelMotion(5))
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    pipe.save_lora_weights(tmp_path, layers, weight_name="first.safetensors")
    lora = read_lora(tmp_path, "first.safetensors")
    assert lora.conditioning == PixelMotion(5) and lora.expert == expert and lora.adapter_metadata is None
    assert lora.state_dict.keys() == {f"transformer.{key}" for key in layers}
    pipe.save_lora_weights(tmp_path, layers, weight_name="second.safetensors", conditioning=LatentMotion(1))
    assert read_lora(tmp_path, "second.safetensors").conditioning == LatentMotion(1)
    pipe.save_lora_weights(tmp_path / "other", layers, is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_one_expert_is_saved_alone_and_without_a_scheme(i2v, tmp_path):
    layers, _ = trained(i2v.transformer)
    SVIPipeline.save_lora_weights(tmp_path, transformer_2_lora_layers=layers, weight_name_2="low.safetensors")
    SVIPipeline.save_lora_weights(tmp_path, layers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["low.safetensors", "pytorch_lora_weights.safetensors"]
    low, only = read_lora(tmp_path, "low.safetensors"), read_lora(tmp_path, "pytorch_lora_weights.safetensors")
    assert (low.expert, low.conditioning) == ("low", None) and (only.expert, only.conditioning) == (None, None)


def test_what_cannot_be_saved(i2v, tmp_path):
    layers, _ = trained(i2v.transformer)
    with pytest.raises(ValueError, match="are both empty: there is nothing to save"):
        SVIPipeline.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"both 'a.safetensors': name two files"):
        SVIPipeline.save_lora_weights(
            tmp_path,
            layers,
            transformer_2_lora_layers=layers,
            weight_name="a.safetensors",
            weight_name_2="a.safetensors",
        )
    for option in ({"save_function": torch.save}, {"safe_serialization": False}):
        with pytest.raises(ValueError, match=r"`save_function`=.*Leave both out"):
            SVIPipeline.save_lora_weights(tmp_path, layers, **option)
    with pytest.raises(ValueError, match=r"`layout` must be one of \('diffusers', 'original'\), got 'kohya'"):
        save_lora(tmp_path / "lora.safetensors", layers, LoraConfig(), PixelMotion(5), layout="kohya")
    assert not list(tmp_path.iterdir())


# What is refused


def test_an_option_with_a_typing_error(i2v, tmp_path):
    save_file(make_lora(i2v.transformer), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"must be one of \('subfolder', .*got 'weigth_name'"):
        i2v.load_lora_weights(tmp_path, weigth_name="lora.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(make_lora(i2v.transformer), tmp_path / "folder" / "svi-film.safetensors")
    assert read_lora(tmp_path, "svi-film.safetensors", subfolder="folder").conditioning == PixelMotion(5)


def test_unknown_options_of_fusing_are_not_ignored(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer))
    with pytest.raises(TypeError, match=r"no options \['lora_scal'\]"):
        i2v.fuse_lora(lora_scal=0.5)
    with pytest.raises(TypeError, match=r"no options \['component'\]"):
        i2v.unfuse_lora(component=["transformer"])
    assert not any(layer.merged for layer in i2v.transformer.modules() if isinstance(layer, BaseTunerLayer))


@pytest.mark.parametrize("conditioning", ["shot", 5, {"scheme": "PixelMotion"}, PixelMotion])
def test_a_conditioning_that_is_no_scheme(i2v, tmp_path, conditioning):
    lora = make_lora(i2v.transformer)
    for refused in (
        lambda: i2v.load_lora_weights(lora, conditioning=conditioning),
        lambda: i2v.load_lora_weights(tmp_path / "missing", conditioning=conditioning),
        lambda: SVIPipeline.save_lora_weights(
            tmp_path / "new", trained(make_transformer())[0], conditioning=conditioning
        ),
        lambda: lora_metadata(conditioning),
    ):
        with pytest.raises(
            ValueError, match=r"`conditioning` must be the scheme a LoRA was trained for, `PixelMotion"
        ):
            refused()
    assert i2v.get_list_adapters() == {} and not (tmp_path / "new").exists()


def test_a_name_in_use(experts):
    """In one of the experts is enough, and nothing is loaded into the other."""
    pipe, folder = experts
    pipe.load_lora_weights(folder, weight_name=LOW, load_into_transformer_2=True, adapter_name="svi")
    with pytest.raises(ValueError, match=r"`adapter_name`='svi' is in use in `transformer_2`, with `hotswap`=False"):
        pipe.load_lora_weights(folder, weight_name=HIGH, weight_name_2=LOW, adapter_name="svi")
    with pytest.raises(ValueError, match=r"`adapter_name`='svi' is not in use in `transformer`, with `hotswap`=True"):
        pipe.load_lora_weights(folder, weight_name=HIGH, weight_name_2=LOW, adapter_name="svi", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer_2": ["svi"]}


def test_a_hotswapped_lora_must_have_its_places(i2v):
    """The adapter stays as it was."""
    few = {key: value for key, value in make_lora(i2v.transformer, layout="bare").items() if "self_attn.q" in key}
    i2v.load_lora_weights(few, adapter_name="svi")
    bias = {"blocks.0.self_attn.q.diff_b": torch.ones(24)}
    for more, name in ((make_lora(make_transformer()), "attn1.to_k.lora_A.weight"), ({**few, **bias}, "lora_B.bias")):
        with pytest.raises(
            ValueError, match=rf"has more: 'transformer.blocks.0.*{name}' and .*under a name of its own"
        ):
            i2v.load_lora_weights(more, adapter_name="svi", hotswap=True)
    weights = get_peft_model_state_dict(i2v.transformer, adapter_name="svi")
    assert len(weights) == len(few)
    assert torch.equal(weights["blocks.1.attn1.to_q.lora_A.weight"], few["blocks.1.self_attn.q.lora_A.weight"])


@pytest.mark.parametrize("member", ["talk", "dance"])
def test_talk_and_dance_are_named(i2v, tmp_path, member):
    extra = {"talk": "audio_proj.proj1.weight", "dance": "dwpose_embedding.0.weight"}[member]
    state_dict = {**make_lora(i2v.transformer), extra: torch.zeros(2, 2)}
    save_file(state_dict, tmp_path / f"svi-{member}.safetensors")
    save_file(state_dict, tmp_path / "renamed.safetensors")
    named = {"talk": "audio, .* load it with `SVITalkPipeline`", "dance": "pose, .* load it with `SVIDancePipeline`"}
    for name in (f"svi-{member}.safetensors", "renamed.safetensors"):
        with pytest.raises(ValueError, match=f"is for films that follow {named[member]}"):
            i2v.load_lora_weights(tmp_path, weight_name=name)
        with pytest.raises(ValueError, match=f"is for films that follow {named[member]}"):
            SVIPipeline.lora_state_dict(tmp_path, weight_name=name)
    assert not hasattr(i2v.transformer, "peft_config")


@pytest.mark.parametrize(("side", "shape"), [("A", (4, 99)), ("B", (99, 4))])
def test_a_lora_of_another_size(i2v, side, shape):
    lora = make_lora(make_transformer(seed=3))
    lora[f"blocks.1.ffn.0.lora_{side}.default.weight"] = torch.zeros(shape)
    message = rf"blocks\.1\.ffn\.net\.0\.proj\.lora_{side}` is {re.escape(str(shape))}, but the layer is 32 x 24"
    with pytest.raises(ValueError, match=message):
        i2v.load_lora_weights(lora)
    assert i2v.get_list_adapters() == {}


def test_a_lora_of_a_deeper_model(i2v):
    lora = {key.replace("blocks.1.", "blocks.7."): value for key, value in make_lora(i2v.transformer).items()}
    with pytest.raises(ValueError, match=r"weights for `blocks\.7\..*does not have"):
        i2v.load_lora_weights(lora)


def test_files_that_are_no_lora(i2v, tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.* holds no LoRA: none of its 1 keys"):
        i2v.load_lora_weights(tmp_path, weight_name="model.safetensors")
    save_file({"unet.down.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors.* layout that is not known"):
        i2v.load_lora_weights(tmp_path, weight_name="other.safetensors")


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_pickles_are_never_opened(i2v, tmp_path, suffix):
    torch.save(make_lora(i2v.transformer), tmp_path / f"lora.{suffix}")
    for source, weight_name in ((tmp_path, f"lora.{suffix}"), (tmp_path / f"lora.{suffix}", None)):
        with pytest.raises(ValueError, match="is not a safetensors file. Other formats can run code"):
            i2v.load_lora_weights(source, weight_name=weight_name)


def test_a_pickle_by_another_name_and_other_damage(i2v, tmp_path):
    torch.save(make_lora(i2v.transformer), tmp_path / "pickled.safetensors")
    save_file(make_lora(i2v.transformer), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-64])
    for name in ("pickled.safetensors", "cut.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"No LoRA could be read from '.*{name}'.*Give a safetensors file"):
            i2v.load_lora_weights(tmp_path, weight_name=name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No LoRA could be read"):
        i2v.load_lora_weights(tmp_path / "empty")


def test_metadata_that_describes_no_scheme(i2v, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(make_lora(i2v.transformer), file, metadata={"svi_conditioning": json.dumps({"scheme": "Unknown"})})
    with pytest.raises(ValueError, match="No scheme of"):
        i2v.load_lora_weights(file)


# At the true size


@pytest.mark.parametrize("image_dim", [1280, None], ids=["wan2.1", "wan2.2"])
def test_the_official_layout_at_the_true_14b_shapes(image_dim, tmp_path):
    """400 layers of rank 128, on the meta device: nothing is computed, every name and shape is."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            ffn_dim=13824,
            num_layers=40,
            image_dim=image_dim,
            added_kv_proj_dim=None if image_dim is None else 5120,
        )
        lora = make_lora(transformer, rank=128, layout="official")
    assert len(lora) == 800
    pipe = SVIPipeline(**{**make_components("i2v"), "transformer": transformer})
    pipe.load_lora_weights(lora, conditioning=PixelMotion(5))
    layers = [module for name, module in transformer.named_modules() if name.endswith("lora_A.default_0")]
    # Wan 2.1 gets zero matrices for the image projections, which the official files leave out.
    assert len(layers) == 400 + (80 if image_dim else 0)
    assert all(tuple(layer.weight.shape) in ((128, 5120), (128, 13824)) for layer in layers)
    scalings = {module.scaling["default_0"] for module in transformer.modules() if hasattr(module, "scaling")}
    assert scalings == {1.0}
    with pytest.raises(ValueError, match="made for a model of another size"):
        SVIPipeline(**make_components("i2v")).load_lora_weights(lora)


def test_held_latents_survive_the_metadata(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(make_lora(make_transformer()), file, metadata=lora_metadata(HeldLatents(1)))
    assert read_lora(file).conditioning == HeldLatents(1)
    assert np.array_equal(
        sorted(read_lora(file).state_dict), sorted(make_lora(make_transformer(), layout="diffusers"))
    )


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_saved_lora_is_read_back(layout, tmp_path):
    """Scheme, expert, and the change it makes to every weight, with an alpha other than the rank."""
    transformer = make_transformer()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2"])
    transformer.add_adapter(config)
    state_dict = get_peft_model_state_dict(transformer)
    # As a training may have them: transposed in memory.
    state_dict = {key: torch.randn(value.T.shape, generator=seeded()).T for key, value in state_dict.items()}
    save_lora(tmp_path / "lora.safetensors", state_dict, config, LatentMotion(1), "high", layout)

    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.conditioning == LatentMotion(1) and lora.expert == "high"
    assert lora.state_dict.keys() == {f"transformer.{key}" for key in state_dict}
    if layout == "diffusers":
        assert lora.adapter_metadata["transformer.target_modules"] == sorted(config.target_modules)
    alpha = 4 if lora.adapter_metadata is None else lora.adapter_metadata["transformer.lora_alpha"]
    for key in state_dict:
        if ".lora_A." in key:
            up = key.replace(".lora_A.", ".lora_B.")
            read = alpha / 4 * lora.state_dict[f"transformer.{up}"] @ lora.state_dict[f"transformer.{key}"]
            torch.testing.assert_close(read, 8 / 4 * state_dict[up] @ state_dict[key])
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        name = {"diffusers": "transformer.blocks.0.attn1.to_out.0", "original": "diffusion_model.blocks.0.self_attn.o"}
        assert file.metadata()["format"] == "pt"
        down, up = (file.get_tensor(f"{name[layout]}.lora_{side}.weight") for side in "AB")
    # Where alpha has no place of its own it is in the second matrix.
    assert torch.equal(down, state_dict["blocks.0.attn1.to_out.0.lora_A.weight"])
    assert torch.equal(up, state_dict["blocks.0.attn1.to_out.0.lora_B.weight"] * (1 if layout == "diffusers" else 2))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_where_alpha_has_no_place_every_layer_has_its_own(use_rslora, tmp_path):
    """Ranks and alphas by layer: the file makes the change that peft makes."""
    transformer = make_transformer()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        rank_pattern={r"blocks\.1\.attn1\.to_q": 2},
        alpha_pattern={"to_k": 3.0},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    transformer.add_adapter(config)
    save_lora(
        tmp_path / "lora.safetensors",
        get_peft_model_state_dict(transformer),
        config,
        LatentMotion(1),
        layout="original",
    )
    weights = read_lora(tmp_path / "lora.safetensors").state_dict
    for name, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer):
            down, up = (weights[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))
