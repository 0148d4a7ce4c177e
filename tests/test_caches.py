"""Caches of diffusers: over a film of three clips, across a resume, and after an exception."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    WanImageToVideoPipeline,
)
from diffusers.hooks import SeaCacheConfig

from conftest import KINDS, make_components
from diffusers_svi import ClipSpec, HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.lora_layers import experts_of


STEPS = 6
# A scheme of each kind of model.
SCHEMES = {
    "wan2.1": PixelMotion(1, padding="reference"),
    "a14b": LatentMotion(1),
    "ti2v-5b": HeldLatents(1),
    "i2v": PixelMotion(5),
}
ATTENTION = (r"blocks\.\d+\.attn1",)


def noisy_latents(transformer, args, kwargs) -> list[torch.Tensor]:
    """For SeaCache: the latents that become the clip; they come before mask and condition."""
    return list(kwargs["hidden_states"][:, : transformer.config.out_channels])


CACHES = {
    "FirstBlock": lambda pipe: FirstBlockCacheConfig(threshold=0.3),
    "Mag": lambda pipe: MagCacheConfig(mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, cache_identifiers=(r"blocks\.\d+\.attn[12]",)
    ),
    "PAB": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=ATTENTION,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 750),  # each expert computes a step before it
        spatial_attention_block_identifiers=ATTENTION,
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
    ),
    "SeaCache": lambda pipe: SeaCacheConfig(threshold=1.0, raw_vision_callback=noisy_latents),
    "TextKV": lambda pipe: TextKVCacheConfig(),
}


def make_pipe(kind: str, cache: str | None = None) -> SVIPipeline:
    pipe = SVIPipeline(**make_components(kind))
    pipe.set_progress_bar_config(disable=True)
    if cache is not None:
        for transformer in experts_of(pipe).values():
            transformer.enable_cache(CACHES[cache](pipe))
    return pipe


def stream(pipe: SVIPipeline, image=None, kind: str = "i2v", **options):
    prompts = options.pop("prompts", ["a cat sits", "the dog jumps", "a red cat sleeps"])
    settings = {"num_inference_steps": STEPS, "max_sequence_length": 16} | options
    if pipe.config.boundary_ratio is not None:
        settings["guidance_scale_2"] = 1.5 if settings["guidance_scale"] > 1 else 1.0
    state = settings.get("state")
    size = {"height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}
    return pipe.stream(
        image=image,
        prompts=prompts,
        seeds=range(3),
        **{"conditioning": None if state is not None else SCHEMES[kind], **size, **settings},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_works_and_begins_anew_with_every_clip(cache, kind, image):
    # Those two mix up the passes with the prompt and without it.
    guidance = {"guidance_scale": 1.0 if cache in ("PAB", "FasterCache") else 2.0}
    plain = list(stream(make_pipe(kind), image, kind, **guidance))
    pipe = make_pipe(kind, cache)
    clips = list(stream(pipe, image, kind, **guidance))
    changed = [(clip.frames - other.frames).abs().max().item() for clip, other in zip(clips, plain, strict=True)]
    if cache == "TextKV":
        assert changed == [0.0, 0.0, 0.0]
    else:
        assert all(0 < change < 1 for change in changed)
    # A pipeline of its own takes the film up after the first clip: nothing was handed on but the state.
    rest = list(stream(make_pipe(kind, cache), kind=kind, state=clips[0].state, **guidance))
    assert all(torch.equal(clip.frames, other.frames) for clip, other in zip(clips[1:], rest, strict=True))

    def fail(pipe, step, timestep, tensors):
        if step == 3:
            raise RuntimeError("stop here")
        return tensors

    with pytest.raises(RuntimeError, match="stop here"):
        list(stream(pipe, image, kind, callback_on_step_end=fail, **guidance))
    again = next(stream(pipe, image, kind, **guidance))
    assert torch.equal(again.frames, clips[0].frames)


def test_sea_cache_is_told_the_step(image):
    """Index, count and sigma, which the parent does not tell, in both passes of every step; nothing is left of it."""
    pipe, seen = make_pipe("i2v"), []
    transformer, kind = pipe.transformer, type(pipe.transformer)

    class Told(kind):
        def cache_context(self, name, **given):
            seen.append((name, given))
            return super().cache_context(name, **given)

    transformer.__class__ = Told
    next(stream(pipe, image, guidance_scale=2.0))
    assert "cache_context" not in vars(transformer)
    steps = [given["step_index"] for _, given in seen]
    assert steps == [step for step in range(STEPS) for _ in range(2)]
    assert [name for name, _ in seen] == ["cond", "uncond"] * STEPS
    assert [given["sigma"] for _, given in seen[::2]] == pytest.approx(pipe.scheduler.sigmas[:-1].tolist())
    assert {given["num_inference_steps"] for _, given in seen} == {STEPS}


def test_a_cache_that_reaches_no_layer_is_refused(image):
    pipe = make_pipe("i2v")
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())  # its names are those of other models
    with pytest.raises(ValueError, match=r"`TaylorSeerCacheConfig` has no effect.*cache_identifiers="):
        stream(pipe, image)
    pipe.transformer.disable_cache()
    stream(pipe, image)


@pytest.mark.parametrize("cache", ["PAB", "FasterCache"])
def test_a_cache_that_mixes_up_both_passes_is_refused_with_guidance(cache, image):
    pipe = make_pipe("i2v", cache)
    with pytest.raises(ValueError, match="cannot be used with guidance"):
        stream(pipe, image, guidance_scale=2.0)
    # Also where one clip alone asks for it.
    clips = stream(
        pipe, image, prompts=["a cat sits", ClipSpec("the dog jumps", guidance_scale=3.0)], guidance_scale=1.0
    )
    next(clips)
    with pytest.raises(ValueError, match="cannot be used with guidance"):
        next(clips)


def test_why_it_is_refused(image):
    """diffusers' own pipeline gives the clip without guidance: both passes see the prompt."""
    parent = WanImageToVideoPipeline(**make_components("i2v"))
    parent.set_progress_bar_config(disable=True)

    def clip(**options):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "max_sequence_length": 16}
        return parent(
            image=image, prompt="a cat sits", generator=generator, output_type="latent", **size, **options
        ).frames

    cross = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1001),
        cross_attention_block_identifiers=(r"blocks\.\d+\.attn2",),
        current_timestep_callback=lambda: parent.current_timestep,
    )
    plain, guided = clip(guidance_scale=1.0), clip(guidance_scale=5.0)
    parent.transformer.enable_cache(cross)
    assert not torch.equal(plain, guided)
    assert torch.equal(clip(guidance_scale=5.0), plain)
