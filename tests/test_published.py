"""The published models at their true shapes, on the meta device: what is conditioned, loaded and saved fits them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from conftest import make_components
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.conditioning import Carried
from diffusers_svi.lora_file import TARGET_MODULES, read_lora, save_lora
from diffusers_svi.lora_layers import check_fits
from diffusers_svi.memory.model import build
from diffusers_svi.published import PUBLISHED, published_model
from diffusers_svi.wan import num_latent_frames, pipeline_condition, transformer_inputs
from test_lora import LAYOUTS, make_lora


# Whether it is a film's first clip. Those that encode a whole clip take seconds, even on the meta device.
CASES = (
    ("wan2.1-i2v-14b-480p", PixelMotion(5, "reference"), False),
    ("wan2.1-i2v-14b-720p", LatentMotion(1), True),
    ("wan2.2-i2v-a14b", LatentMotion(1), False),
    ("wan2.2-ti2v-5b", PixelMotion(5), False),
    ("wan2.2-ti2v-5b", HeldLatents(0), True),
    ("wan2.2-ti2v-5b", HeldLatents(1), False),
)
COUNTS = {
    "wan2.1-i2v-14b-480p": 16_394_878_784,
    "wan2.1-i2v-14b-720p": 16_394_878_784,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_transformers_have_as_many_weights_as_the_published_ones(name):
    known = PUBLISHED[name]
    experts = [build(known, part) for part in ("transformer", "transformer_2")]
    experts = [expert for expert in experts if expert is not None]
    assert len(experts) == (2 if name == "wan2.2-i2v-a14b" else 1)
    assert {sum(value.numel() for value in expert.parameters()) for expert in experts} == {COUNTS[name]}


def test_a_model_is_found_by_each_of_its_names():
    for name, known in PUBLISHED.items():
        assert published_model(name) is published_model(known.name) is known
    assert published_model("Wan2.1-I2V-14B") is PUBLISHED["wan2.1-i2v-14b-480p"]
    assert published_model("somebody/else") is None


@pytest.mark.parametrize(("name", "scheme", "is_first"), CASES, ids=str)
def test_conditions_and_latents_are_what_the_patch_embedding_takes(name, scheme, is_first):
    """By the true VAE on the meta device: nothing is computed, all shapes are."""
    known = PUBLISHED[name]
    vae, transformer = build(known, "vae"), build(known, "transformer")
    z_dim, scale = vae.config.z_dim, vae.config.scale_factor_spatial
    size = (known.height // scale, known.width // scale)
    frames = torch.empty(1, 3, 5, known.height, known.width, device="meta")
    noise = torch.empty(1, z_dim, num_latent_frames(known.num_frames), *size, device="meta")
    carried = Carried(frames[:, :, 0])
    if not is_first:
        carried = Carried(frames[:, :, 0], frames, torch.empty(1, z_dim, 1, *size, device="meta"))
    patch, expand = transformer.config.patch_size, known.expand_timesteps
    with torch.no_grad():
        condition = scheme.condition(vae, carried, known.num_frames, expand)
        given = pipeline_condition(condition, noise.shape[2], expand)
        hidden, timesteps = transformer_inputs(noise, condition, torch.empty(1, device="meta"), patch, expand)
        tokens = transformer.patch_embedding(hidden).flatten(2).shape[2]
    at_inference = noise if expand else torch.cat([noise, *given], dim=1)
    assert hidden.shape == at_inference.shape == (1, transformer.config.in_channels, *noise.shape[2:])
    assert tokens == {480: 32_760, 720: 75_600, 704: 27_280}[known.height]
    if expand:
        held, mask = given
        assert held.shape == noise.shape and mask.shape == (1, 1, *noise.shape[2:])
        assert timesteps.shape == (1, tokens)
    else:
        assert timesteps.shape == (1,)


def loaded(known, lora):
    """The layers, by shape, of a LoRA that was loaded into every expert."""
    kind = {"transformer": build(known, "transformer"), "transformer_2": build(known, "transformer_2")}
    parts = {**make_components("a14b" if kind["transformer_2"] is not None else "i2v"), **kind}
    pipe = SVIPipeline(**parts)
    for second in (False, True)[: 1 if kind["transformer_2"] is None else 2]:
        pipe.load_lora_weights(lora, conditioning=PixelMotion(5), adapter_name="svi", load_into_transformer_2=second)
    return {
        part: {
            name: tuple(value.shape) for name, value in get_peft_model_state_dict(model, adapter_name="svi").items()
        }
        for part, model in kind.items()
        if model is not None
    }


@pytest.fixture(scope="module")
def expert():
    return build(PUBLISHED["wan2.2-i2v-a14b"], "transformer")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fits_an_expert_at_rank_128(layout, expert):
    """400 pairs by name and shape, as `load_lora_weights` checks them; the experts are of one form."""
    read = read_lora(make_lora(expert, rank=128, layout=layout))
    assert len(read.state_dict) == 800
    check_fits(read.state_dict, dict(expert.named_modules()), layout)
    assert read.state_dict["transformer.blocks.39.ffn.net.2.lora_A.weight"].shape == (128, 13824)


def test_a_lora_loads_into_both_experts(expert):
    experts = loaded(PUBLISHED["wan2.2-i2v-a14b"], make_lora(expert, rank=128))
    assert experts.keys() == {"transformer", "transformer_2"} and experts["transformer"] == experts["transformer_2"]
    assert len(experts["transformer"]) == 800


def test_a_few_step_lora_with_image_projections_and_biases_fits():
    """As lightx2v's: beside the pairs k_img, v_img and `diff_b` of their layers."""
    known = PUBLISHED["wan2.1-i2v-14b-480p"]
    lora = make_lora(build(known, "transformer"), rank=64, layout="kohya")
    for block in range(40):
        for name in ("k_img", "v_img"):
            layer = f"diffusion_model.blocks.{block}.cross_attn.{name}"
            lora[f"{layer}.lora_down.weight"] = torch.empty(64, 5120, device="meta")
            lora[f"{layer}.lora_up.weight"] = torch.empty(5120, 64, device="meta")
    lora |= {
        f"{key.removesuffix('.lora_up.weight')}.diff_b": torch.empty(value.shape[0], device="meta")
        for key, value in lora.items()
        if key.endswith(".lora_up.weight")
    }
    layers = loaded(known, lora)["transformer"]
    assert len(layers) == 3 * 480
    assert layers["blocks.0.attn2.add_k_proj.lora_A.weight"] == (64, 5120)
    assert layers["blocks.0.ffn.net.0.proj.lora_B.bias"] == (13824,)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_what_the_trainer_saves_loads_back_at_the_true_shapes(layout, tmp_path):
    """One block's weights are written, as a file of all is 2.5 GB; the other blocks' names and shapes are alike."""
    known = PUBLISHED["wan2.2-i2v-a14b"]
    transformer = build(known, "transformer")
    config = LoraConfig(r=128, lora_alpha=128, target_modules=TARGET_MODULES)
    with torch.device("meta"):
        transformer.add_adapter(config)
    trained = get_peft_model_state_dict(transformer)
    assert len(trained) == 800
    written = {
        key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in trained.items() if ".39." in f".{key}"
    }
    assert len(written) == 20
    save_lora(tmp_path / "lora.safetensors", written, config, LatentMotion(1), "high", layout)
    read = read_lora(tmp_path / "lora.safetensors")
    assert {key: value.shape for key, value in read.state_dict.items()} == {
        f"transformer.{key}": value.shape for key, value in written.items()
    }
    names = {"diffusers": "transformer.blocks.39.attn1.to_q", "original": "diffusion_model.blocks.39.self_attn.q"}
    # ComfyUI's names are the authors' after a prefix: without it the file is theirs.
    saved = load_file(tmp_path / "lora.safetensors")
    assert f"{names[layout]}.lora_A.weight" in saved
    bare = {key.removeprefix("diffusion_model."): value for key, value in saved.items()}
    save_file(bare, tmp_path / "authors.safetensors")
    assert read_lora(tmp_path / "authors.safetensors").state_dict.keys() == read.state_dict.keys()
    check_fits(read.state_dict, dict(build(known, "transformer").named_modules()), layout)
