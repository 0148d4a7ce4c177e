"""A chain that goes on: what it says that it was made with, and what is said where that is something else now."""

import itertools
import json
import logging

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from optimum.quanto import freeze, qint8, quantize
from safetensors import safe_open

from conftest import CLIP, make_components, make_transformer, quiet, seeded
from diffusers_svi import ChainState, LatentMotion, PixelMotion, SVIEulerScheduler, SVIPipeline
from diffusers_svi.fingerprints import differences, fingerprint_loras, fingerprint_weights


PROMPTS = ["a cat sits", "the dog jumps"]


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged."""
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    return caplog


def make_pipe(kind: str = "i2v", **components) -> SVIPipeline:
    return quiet(SVIPipeline(**{**make_components(kind), **components}))


def make_lora(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = seeded(seed)
    name = "transformer.blocks.0.attn1.to_q"
    return {
        f"{name}.lora_A.weight": torch.randn(4, 24, generator=generator),
        f"{name}.lora_B.weight": torch.randn(24, 4, generator=generator),
    }


def begun(pipe: SVIPipeline, image, **options) -> ChainState:
    options = {"generator": seeded(), **CLIP, **options}
    return next(pipe.stream(image=image, prompts=PROMPTS, **options)).state


def go_on(pipe: SVIPipeline, state: ChainState, **options) -> None:
    """Far enough for everything to be said that is said about it."""
    options = {"generator": seeded(), **CLIP, **options}
    next(pipe.stream(prompts=PROMPTS, state=state, **options))


def test_the_same_things_are_not_spoken_of(kind, pipe, image, said, tmp_path):
    pipe.load_lora_weights(make_lora(), adapter_name="a")
    begun(pipe, image).save(tmp_path / "state")
    fresh = make_pipe(kind)
    fresh.load_lora_weights(make_lora(), adapter_name="of another name")
    go_on(fresh, ChainState.load(tmp_path / "state"))
    assert "something else" not in said.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps: 2 then, 3 now"),
        ({"guidance_scale": 2.5}, "guidance_scale: 5.0 then, 2.5 now"),
        ({"guidance_scale_2": 2.5}, "guidance_scale_2: None then, 2.5 now"),
        ({"negative_prompt": "bad"}, "negative_prompt:  then, bad now"),
        ({"max_sequence_length": 64}, "max_sequence_length: 512 then, 64 now"),
        ({"clip_resize": "squash"}, "clip_resize: crop then, squash now"),
    ],
    ids=str,
)
def test_other_settings_are_named(i2v, image, said, change, told):
    state = begun(i2v, image)
    if "guidance_scale_2" in change:
        i2v = make_pipe("i2v", transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
        state = begun(i2v, image)
    go_on(i2v, state, **change)
    assert f"made with something else ({told})" in said.text
    said.clear()
    go_on(i2v, state, ignore_state_settings=True, **change)
    assert "something else" not in said.text


def other_vae(pipe):
    pipe.vae.decoder.conv_out.bias.data += 0.1


def other_weights(pipe):
    pipe.transformer.patch_embedding.weight.data += 0.1


def other_lora(pipe):
    pipe.load_lora_weights(make_lora(1), adapter_name="b")


def other_weight(pipe):
    pipe.set_adapters("a", 0.5)


def no_lora(pipe):
    pipe.disable_lora()


def other_scheduler(pipe):
    pipe.scheduler = SVIEulerScheduler(shift=5.0)


def other_shift(pipe):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=3.0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (other_vae, {"vae"}),
        (other_weights, {"transformer"}),
        (other_lora, {"LoRAs of transformer"}),
        (other_weight, {"LoRAs of transformer"}),
        (no_lora, {"LoRAs of transformer"}),
        (other_scheduler, {"scheduler"}),
        (other_shift, {"scheduler"}),
    ],
)
def test_other_models_are_named(i2v, image, said, change, names):
    i2v.load_lora_weights(make_lora(), adapter_name="a")
    state = begun(i2v, image)
    change(i2v)
    go_on(i2v, state)
    told = said.text.split("something else (")[1].split("). The film")[0]
    assert {part.split(":")[0] for part in told.split("; ")} == names


def test_other_seeds_are_named(i2v, image, said):
    state = begun(i2v, image, generator=None, seeds=itertools.count(40, 2))
    go_on(i2v, state, generator=None, seeds=itertools.count(40, 2))
    assert "something else" not in said.text
    go_on(i2v, state, generator=None, seeds=itertools.count(41, 2))
    assert "made with something else (seed: 40 then, 41 now)" in said.text
    said.clear()
    go_on(i2v, state, generator=None, seeds=itertools.count(41, 2), ignore_state_settings=True)
    assert "something else" not in said.text


@pytest.mark.parametrize(
    ("begin", "then", "message"),
    [
        ({"generator": None, "seeds": [1, 2]}, {}, "`noise` 'seeds', but now it is 'generator'. Pass the same"),
        (
            {"generator": None, "seeds": [1, 2]},
            {"generator": None, "latents": torch.zeros(2, 16, 3, 4, 4)},
            "`noise` 'seeds', but now it is 'latents'",
        ),
    ],
)
def test_noise_of_another_source_is_refused(i2v, image, begin, then, message):
    state = begun(i2v, image, **begin)
    with pytest.raises(ValueError, match=message):
        go_on(i2v, state, **then)


def test_a_model_of_another_kind_is_refused(i2v, image):
    state = begun(make_pipe("wan2.1"), image)
    with pytest.raises(ValueError, match="`model` 'with CLIP .*', but now it is 'one transformer without CLIP'"):
        go_on(i2v, state)


def test_latents_of_another_model_are_refused(image):
    state = begun(make_pipe("a14b"), image, conditioning=LatentMotion())
    with pytest.raises(ValueError, match=r"`state` carries latents of 16 x 4 x 4 .* this model's are of 48 x 2 x 2"):
        go_on(make_pipe("ti2v-5b"), ChainState(PixelMotion(), 9, state.image, latents=state.latents, num_clips=1))


def test_a_generator_that_is_none_of_this_kind(i2v, image):
    state = begun(i2v, image)
    object.__setattr__(state, "generator", torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`state` holds a state of its generator that .* cpu does not take"):
        go_on(i2v, state)


def test_a_state_of_before_is_not_compared(i2v, image, said):
    """Nothing is known of what it was made with."""
    go_on(i2v, ChainState(PixelMotion(), 9, torch.zeros(1, 3, 32, 32)), num_inference_steps=3)
    assert "something else" not in said.text
    assert differences({}, {"a": "1"}) == {} and differences({"a": "1"}, {}) == {"a": ("1", "nothing")}


def test_fingerprints_of_weights_tell_any_part():
    transformer = make_transformer()
    before = fingerprint_weights(transformer)
    assert fingerprint_weights(make_transformer()) == before == fingerprint_weights(torch.compile(transformer))
    seen = {before}
    for name, value in transformer.state_dict().items():
        value.flatten()[0].add_(1)
        seen.add(fingerprint_weights(transformer))
        assert len(seen) > 1, name
    assert len(seen) == 1 + len(transformer.state_dict())


def test_fingerprints_of_quantized_weights():
    transformer = make_transformer()
    before = fingerprint_weights(transformer)
    quantize(transformer, weights=qint8)
    freeze(transformer)
    assert len({before, fingerprint_weights(transformer), fingerprint_weights(transformer)}) == 2


def test_fingerprints_where_weights_are_elsewhere():
    """Layers offloaded one by one leave shapes behind."""
    transformer = make_transformer().to("meta")
    assert fingerprint_weights(transformer) == fingerprint_weights(make_transformer(seed=1).to("meta"))


def test_fingerprints_of_loras(i2v):
    assert fingerprint_loras(i2v.transformer) == "none"
    i2v.load_lora_weights(make_lora(), adapter_name="a")
    alone = fingerprint_loras(i2v.transformer)
    assert alone.endswith(" of scale 1") and fingerprint_weights(i2v.transformer) == fingerprint_weights(
        make_transformer()
    )
    i2v.load_lora_weights(make_lora(1), adapter_name="b")
    i2v.set_adapters(["a", "b"], [1.0, 0.0])
    assert fingerprint_loras(i2v.transformer) == alone
    i2v.set_adapters(["b", "a"], [0.25, 1.0])
    both = fingerprint_loras(i2v.transformer)
    assert alone in both and " of scale 0.25" in both and len(both.split(", ")) == 2


def test_what_is_told_is_saved(i2v, image, tmp_path):
    state = begun(i2v, image, generator=None, seeds=[7, 8])
    state.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        told = json.loads(file.metadata()["made_with"])
    assert told == state.made_with and told["seed"] == "7" and told["num_inference_steps"] == "2"
    assert {"model", "scheduler", "transformer", "vae", "LoRAs of transformer", "noise"} < told.keys()
