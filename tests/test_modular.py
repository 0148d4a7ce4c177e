"""`SVIBlocks`: films of Modular Diffusers are those of `SVIPipeline`, bit for bit."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ModularPipeline,
    ModularPipelineBlocks,
    SkipLayerGuidance,
    WanModularPipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig
from safetensors.torch import save_file

from conftest import CLIP, make_components, make_transformer, quiet, seeded
from diffusers_svi import (
    ClipSpec,
    HeldLatents,
    LatentMotion,
    PixelMotion,
    SVIBlocks,
    SVIEulerScheduler,
    SVIModularPipeline,
    SVIPipeline,
)
from diffusers_svi.lora_file import lora_metadata
from diffusers_svi.modular.loop import SVIClipLoop
from diffusers_svi.modular.underway import pipeline_of
from test_lora import make_lora


ROOT = Path(__file__).parents[1]
PROMPTS = ["a cat sits", "the dog jumps", "the cat sleeps"]
SCHEMES = {
    "wan2.1": [PixelMotion(1), PixelMotion(5, "reference"), LatentMotion(1)],
    "a14b": [PixelMotion(1, "reference"), LatentMotion(1)],
    "ti2v-5b": [PixelMotion(5), HeldLatents(1)],
    "i2v": [PixelMotion(1), LatentMotion(0)],
}
# For what does not depend on the number of clips or steps.
SHORT = {**CLIP, "prompts": PROMPTS[:2], "num_inference_steps": 1}


def modular(components, **guiders):
    pipe = SVIBlocks().init_pipeline()
    pipe.update_components(**components, **guiders)
    return quiet(pipe)


def film(pipe, **options):
    options = {"generator": seeded(), **options}
    if isinstance(pipe, SVIPipeline):
        return pipe(**options).frames
    return pipe(**options, output="videos")


def assert_same_film(components, pipe=None, guided=None, **options):
    """`guided` is the guidance of `SVIPipeline`, where the guiders of `pipe` are not the default ones."""
    expected = film(quiet(SVIPipeline(**components)), **options, **(guided or {}))
    assert np.array_equal(film(pipe or modular(components), **options), expected)


@pytest.mark.parametrize(
    ("kind", "scheme"), [(kind, scheme) for kind, schemes in SCHEMES.items() for scheme in schemes], ids=str
)
def test_a_film_is_that_of_the_pipeline(kind, scheme, image):
    options = {"image": image, "prompts": PROMPTS, "negative_prompt": "bad", "conditioning": scheme, **CLIP}
    assert_same_film(make_components(kind), **options)


def test_a_film_of_the_authors_schedule_is_that_of_the_pipeline(image):
    components = {**make_components("i2v"), "scheduler": SVIEulerScheduler(shift=5.0)}
    assert_same_film(components, image=image, **{**SHORT, "num_inference_steps": 3})


# Guidance


@pytest.mark.parametrize("kind", ["wan2.1", "ti2v-5b"])
def test_a_guider_that_is_off_is_a_guidance_of_1(kind, image):
    components = make_components(kind)
    pipe = modular(components, guider=ClassifierFreeGuidance(enabled=False))
    assert_same_film(components, pipe, {"guidance_scale": 1.0}, image=image, **SHORT)


def test_each_expert_has_its_guider(image):
    components = make_components("a14b")
    guiders = {"guider": ClassifierFreeGuidance(3.0), "guider_2": ClassifierFreeGuidance(2.0)}
    guided = {"guidance_scale": 3.0, "guidance_scale_2": 2.0}
    assert_same_film(components, modular(components, **guiders), guided, image=image, **{**SHORT, **CLIP})


@pytest.mark.parametrize("kind", ["wan2.1", "a14b", "ti2v-5b"])
def test_other_guiders_guide(kind, image):
    """Each is the plain guidance where its own part is nothing, and is not where it is something."""
    skip = {"skip_layer_config": LayerSkipConfig(indices=[1], fqn="blocks"), "skip_layer_guidance_start": 0.0}
    skip["skip_layer_guidance_stop"] = 1.0
    pipe = modular(make_components(kind))

    def with_guider(guider):
        pipe.update_components(guider=guider, guider_2=guider)
        return film(pipe, image=image, **{**SHORT, "num_inference_steps": 2})

    plain = with_guider(ClassifierFreeGuidance(5.0))
    projected = [AdaptiveProjectedGuidance(5.0, eta=eta, adaptive_projected_guidance_rescale=0.0) for eta in (1, 0)]
    skipping = [SkipLayerGuidance(5.0, skip_layer_guidance_scale=scale, **skip) for scale in (0.0, 2.8)]
    for nothing, something in (projected, skipping):
        np.testing.assert_allclose(with_guider(nothing), plain, atol=1e-6)
        assert np.abs(with_guider(something) - plain).max() > 1e-5


def test_guidance_that_stops_begins_again_with_the_next_clip(image):
    pipe = modular(make_components("i2v"), guider=ClassifierFreeGuidance(5.0, stop=0.5))
    whole = film(pipe, image=image, **{**SHORT, **CLIP})
    first = film(pipe, image=image, **{**SHORT, **CLIP, "prompts": PROMPTS[:1]})
    assert np.array_equal(whole[0, :8], first[0, :8])
    always = film(modular(make_components("i2v")), image=image, **{**SHORT, **CLIP})
    assert not np.array_equal(whole, always) and np.isfinite(whole).all()


# What a film is asked for with


def test_clips_are_directed(image):
    specs = [
        ClipSpec("a cat sits", seed=3, negative_prompt="bad", num_clips=2),
        ClipSpec("the dog jumps", cut=image.rotate(90)),
        ClipSpec("the cat sleeps", last_image=image.rotate(180)),
    ]
    assert_same_film(make_components("wan2.1"), image=image, **{**SHORT, "prompts": specs, "num_clips": 5})


def test_a_new_anchor_is_taken(image):
    specs = ["a cat sits", ClipSpec("the dog jumps", anchor=image.rotate(90))]
    options = {"image": image, "conditioning": LatentMotion(1), **SHORT}
    assert_same_film(make_components("i2v"), **{**options, "prompts": specs})


def test_prompts_may_come_from_an_iterator(image):
    components = make_components("i2v")
    lazy = film(modular(components), image=image, **{**SHORT, "prompts": iter(PROMPTS[:2])})
    assert np.array_equal(lazy, film(modular(components), image=image, **SHORT))


def test_embeddings_may_be_given_instead_of_prompts(image):
    components = make_components("wan2.1")
    embeds = torch.randn(2, 512, 16, generator=seeded(1))
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds[:1] / 2}
    assert_same_film(components, image=image, **{**SHORT, "prompts": None, **options})


def test_short_texts_are_filled_up_for_models_with_an_image_encoder(image):
    assert_same_film(make_components("wan2.1"), image=image, **{**SHORT, "max_sequence_length": 32})


def test_noise_may_be_given(image):
    noise = torch.randn(2, 48, 3, 2, 2, generator=seeded(1))
    assert_same_film(make_components("ti2v-5b"), image=image, **SHORT, generator=None, latents=noise)


def test_a_scheme_is_given_by_its_name_its_values_or_the_config(image):
    pipe = modular(make_components("i2v"))
    options = {"image": image, **SHORT}
    expected = film(pipe, conditioning=LatentMotion(1), **options)
    assert np.array_equal(film(pipe, conditioning="LatentMotion", **options), expected)
    assert np.array_equal(film(pipe, conditioning=LatentMotion(1).to_dict(), **options), expected)
    pipe.update_components(conditioning=LatentMotion(1).to_dict())
    assert np.array_equal(film(pipe, **options), expected)


@pytest.mark.parametrize("output_type", ["pt", "pil", "latent"])
def test_output_types(output_type, image):
    components = make_components("i2v")
    options = {"image": image, "output_type": output_type, "conditioning": LatentMotion(1), **SHORT}
    assert_same_film(components, **options)


def test_every_clip_is_handed_over_when_it_is_made(image):
    components, clips = make_components("i2v"), []
    film(modular(components), image=image, callback_on_clip_end=lambda pipe, clip: clips.append(clip), **SHORT)
    expected = list(quiet(SVIPipeline(**components)).stream(image=image, generator=seeded(), **SHORT))
    assert [(clip.index, clip.start, clip.spec) for clip in clips] == [(c.index, c.start, c.spec) for c in expected]
    for clip, of_pipeline in zip(clips, expected, strict=True):
        assert np.array_equal(clip.frames, of_pipeline.frames) and clip.recipe == of_pipeline.recipe
        assert torch.equal(clip.state.frames, of_pipeline.state.frames)
        assert clip.state.made_with == of_pipeline.state.made_with


def test_what_is_told_of_a_film_is_as_of_the_pipeline(image, capsys):
    for pipe in (SVIPipeline(**make_components("i2v")), modular(make_components("i2v"))):
        pipe.set_progress_bar_config(desc="cats.mp4", leave=True)
        film(pipe, image=image, **SHORT)
        lines = [line for line in capsys.readouterr().err.splitlines() if " s a clip" in line]
        assert [line.partition(":")[0] for line in lines] == ["cats.mp4, clip 1 of 2", "cats.mp4, clip 2 of 2"]


# Going on


@pytest.mark.parametrize("first", ["blocks", "pipeline"])
def test_a_film_goes_on_from_a_state_whoever_made_it(first, image, caplog):
    components, options = make_components("i2v"), {"image": image, **SHORT}
    begun = {**options, "prompts": PROMPTS[:1]}
    if first == "blocks":
        state = modular(components)(**begun, generator=seeded(), output="chain_end")
    else:
        state = next(quiet(SVIPipeline(**components)).stream(**begun, generator=seeded())).state
    expected = film(quiet(SVIPipeline(**components)), **options)
    with caplog.at_level(logging.WARNING):
        for name in ("chain", "state"):
            rest = film(modular(components), generator=seeded(5), **{name: state}, **SHORT)
            assert np.array_equal(rest, expected[:, state.start :])
    assert "made with something else" not in caplog.text


def test_a_state_tells_of_guiders_and_noise_levels(image, caplog):
    components = {**make_components("i2v"), "scheduler": SVIEulerScheduler(shift=5.0)}
    pipe = modular(components, guider=AdaptiveProjectedGuidance(5.0))
    state = pipe(image=image, **{**SHORT, "prompts": PROMPTS[:1]}, sigmas=[1.0, 0.5], output="chain_end")
    assert state.made_with["sigmas"] == "[1.0, 0.5]" and "AdaptiveProjectedGuidance" in state.made_with["guider"]
    with caplog.at_level(logging.WARNING):
        film(modular(components), chain=state, generator=None, **SHORT)
    assert "guider: AdaptiveProjectedGuidance" in caplog.text and "sigmas: [1.0, 0.5] then" in caplog.text


# LoRAs


def test_loras_are_loaded_with_their_scheme(tmp_path, image):
    lora = tmp_path / "lora.safetensors"
    save_file(make_lora(make_transformer()), lora, metadata=lora_metadata(LatentMotion(1)))
    pipe, reference = modular(make_components("i2v")), quiet(SVIPipeline(**make_components("i2v")))
    for loading in (pipe, reference):
        loading.load_lora_weights(lora, adapter_name="svi")
    assert pipe.lora_conditioning == LatentMotion(1)
    specs = ["a cat sits", ClipSpec("the dog jumps", lora_weights={"svi": 0.5})]
    for prompts in (specs, specs[:1]):  # the weight of the second clip is gone in the next film
        options = {"image": image, **SHORT, "prompts": prompts}
        assert np.array_equal(film(pipe, **options), film(reference, **options))
    with pytest.raises(ValueError, match="the loaded LoRA was trained for LatentMotion"):
        film(pipe, image=image, conditioning=PixelMotion(1), **SHORT)


# Errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": None},
        {"prompts": []},
        {"prompts": ["a cat", ""]},
        {"num_frames": 8},
        {"height": 33},
        {"conditioning": HeldLatents(1)},
        {"conditioning": 3},
        {"condition_frames": 9},
        {"num_inference_steps": 0},
        {"output_type": "mp4"},
        {"seeds": [1]},
        {"negative_prompt": 5},
        {"latents": torch.zeros(1)},
        {"prompt_embeds": torch.zeros(1, 4, 16)},
        {"num_videos_per_prompt": 2},
        {"state": "film.chain"},
        {"prompts": [ClipSpec("a cat", lora_weights={"svi": 1.0})]},
        {"prompts": [ClipSpec("a cat", guidance_scale_2=1.0)]},
    ],
    ids=str,
)
def test_errors_are_those_of_the_pipeline(wrong, image):
    components = make_components("i2v")
    options = {"image": image, "generator": None if "seeds" in wrong else seeded(), **SHORT, **wrong}
    with pytest.raises(ValueError) as expected:
        SVIPipeline(**components)(**options)
    with pytest.raises(ValueError) as raised:
        modular(components)(**options)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("lazily", [False, True])
def test_a_clip_has_no_guidance_of_its_own(lazily, image):
    prompts = [ClipSpec("a cat sits", guidance_scale=3.0)]
    with pytest.raises(ValueError, match=r"`prompts\[0\].guidance_scale`=3.0: .* the guider's"):
        film(
            modular(make_components("i2v")), image=image, **{**SHORT, "prompts": iter(prompts) if lazily else prompts}
        )


def test_models_that_are_not_loaded_are_named(image):
    components = make_components("i2v")
    pipe = modular({name: components[name] for name in ("vae", "scheduler", "tokenizer")})
    with pytest.raises(ValueError, match=r"`text_encoder`, `transformer` is missing. Call `pipe.load_components\(\)`"):
        film(pipe, image=image, **SHORT)


def test_a_cache_is_refused(image):
    components = make_components("a14b")
    components["transformer_2"].enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"`transformer_2` has a cache, .*disable_cache\(\)"):
        film(modular(components), image=image, **SHORT)


def test_an_input_that_no_block_has_is_refused(image):
    with pytest.raises(TypeError, match="No block has an input guidance_scale"):
        film(modular(make_components("i2v")), image=image, guidance_scale=3.0, **SHORT)


def test_values_that_are_not_finite_are_not_handed_on(image):
    components = make_components("i2v")
    with torch.no_grad():
        components["transformer"].proj_out.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="Clip 0 came out with values that are not finite"):
        film(modular(components), image=image, **SHORT)


# Folders


def test_a_repository_of_blocks_makes_a_film(image, tmp_path, monkeypatch):
    """In stock `ModularPipeline`, with the components of the folder."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "blocks"
    reference = quiet(SVIPipeline(**make_components("wan2.1")))
    reference.save_pretrained(folder)
    shutil.copytree(ROOT / "examples" / "modular", folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipeline.from_pretrained(str(folder), trust_remote_code=False)
    pipe = quiet(ModularPipeline.from_pretrained(str(folder), trust_remote_code=True))
    assert type(pipe) is WanModularPipeline and type(pipe.blocks) is SVIBlocks
    pipe.load_components()
    assert pipe.null_component_names == ["transformer_2"]
    options = {"image": image, "prompts": PROMPTS, "conditioning": PixelMotion(5), **CLIP}
    assert np.array_equal(film(pipe, **options), film(pipeline_of(pipe), **options))
    np.testing.assert_allclose(film(pipe, **options), film(reference, **options), atol=1e-5)
    ours = SVIModularPipeline.from_pretrained(str(folder))
    assert type(ours) is SVIModularPipeline and type(ours.blocks) is SVIBlocks


@pytest.mark.parametrize("kind", ["a14b", "ti2v-5b"])
def test_a_model_folder_is_enough(kind, image, tmp_path, caplog):
    reference = quiet(SVIPipeline(**make_components(kind)))
    reference.save_pretrained(tmp_path)
    pipe = quiet(SVIModularPipeline.from_pretrained(str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        pipe.load_components()
    assert "Failed to create component" not in caplog.text
    options = {"image": image, **SHORT}
    assert np.array_equal(film(pipe, **options), film(pipeline_of(pipe), **options))
    np.testing.assert_allclose(film(pipe, **options), film(reference, **options), atol=1e-5)


def test_what_is_saved_is_loaded_by_diffusers(tmp_path):
    components = make_components("a14b")
    modular(components).save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert json.loads((tmp_path / "modular_model_index.json").read_text())["_class_name"] == "WanModularPipeline"
    pipe = SVIModularPipeline.from_pretrained(str(tmp_path))
    pipe.load_components(names="transformer_2")
    assert pipe.config.boundary_ratio == 0.9
    for key, value in components["transformer_2"].state_dict().items():
        assert torch.equal(pipe.transformer_2.state_dict()[key], value), key


# Blocks among others


def test_the_loop_stays_a_loop_when_blocks_are_resolved():
    resolved = SVIBlocks().get_execution_blocks(image=True, prompts=True)
    assert list(resolved.sub_blocks) == ["inputs", "clips"] and type(resolved.sub_blocks["clips"]) is SVIClipLoop


def test_a_step_can_be_put_between_those_of_a_clip(image):
    """One that takes the noise away, which makes every seed the same."""

    class Silence(ModularPipelineBlocks):
        def __call__(self, components, state):
            state.set("latents", torch.zeros_like(state.get("latents")))
            return components, state

    blocks = SVIBlocks()
    blocks.sub_blocks["clips"].sub_blocks.insert("silence", Silence(), 5)
    pipe = blocks.init_pipeline()
    pipe.update_components(**make_components("i2v"))
    quiet(pipe)
    films = [film(pipe, image=image, **SHORT, generator=seeded(seed)) for seed in (0, 1)]
    assert np.array_equal(*films)


def test_models_do_not_stay_in_the_state(image):
    """Which is copied, all of it, when it is handed to a pipeline again."""
    state = modular(make_components("i2v"))(image=image, generator=seeded(), **SHORT)
    assert not any(isinstance(value, (torch.nn.Module, SVIPipeline)) for value in state.values.values())
    assert "clip" not in state.values and "latents" not in [n for n, v in state.values.items() if v is not None]


def test_the_package_is_imported_without_the_blocks():
    script = "import diffusers_svi, sys; print([name for name in sys.modules if 'diffusers' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "['diffusers_svi']", done.stderr
