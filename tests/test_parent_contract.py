"""What this package relies on inside diffusers, by name: a release that breaks it is caught here."""

import inspect

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from conftest import CLIP, KINDS, make_components, make_transformer, quiet, seeded
from diffusers_svi import FilmOptions, SVIPipeline


OWN_ARGUMENTS = {
    "prompts",
    "num_clips",
    "condition_frames",
    "conditioning",
    "seeds",
    "state",
    "ignore_lora_conditioning",
    "ignore_state_settings",
    "resize_mode",
    "clip_resize",
    "color_match",
    "callback_on_clip_end",
}
# Of no meaning for a film: its images come from the chain.
PARENT_ONLY = {"image_embeds", "last_image"}


def test_prepare_latents_has_the_signature_that_is_overridden():
    parent = list(inspect.signature(WanImageToVideoPipeline.prepare_latents).parameters)
    assert list(inspect.signature(SVIPipeline.prepare_latents).parameters) == parent


def test_the_call_keeps_the_parents_names_and_defaults():
    parent = inspect.signature(WanImageToVideoPipeline.__call__).parameters
    ours = inspect.signature(SVIPipeline.__call__).parameters
    assert set(parent) - set(ours) == PARENT_ONLY
    assert set(ours) - set(parent) == OWN_ARGUMENTS
    # The size follows the image: 480 x 832, the parent's, for one of that aspect.
    assert ours["height"].default is None and ours["width"].default is None
    for name in set(parent) & set(ours) - {"self", "image", "height", "width"}:
        assert ours[name].default == parent[name].default, name


def test_the_stream_takes_the_arguments_of_the_call():
    call, stream = (inspect.signature(f).parameters for f in (SVIPipeline.__call__, SVIPipeline.stream))
    assert set(call) - set(stream) == {"return_dict"}
    assert all(call[name].default == stream[name].default for name in stream if name != "self")
    for name in ("height", "guidance_scale", "callback_on_step_end_tensor_inputs"):
        assert call[name].annotation is FilmOptions.__annotations__[name]


class Spy(WanImageToVideoPipeline):
    """The parent, keeping what it hands to `prepare_latents` and gets back."""

    def prepare_latents(self, *args, **kwargs):
        self.seen = args, kwargs
        self.returned = super().prepare_latents(*args, **kwargs)
        return self.returned


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_latents_is_called_and_returns_as_assumed(kind, image):
    pipe = quiet(Spy(**make_components(kind)))
    latents = pipe(image=image, prompt="a cat", generator=seeded(), output_type="latent", **CLIP).frames
    (pixels, *_), kwargs = pipe.seen
    assert not kwargs and pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    z_dim, size = pipe.vae.config.z_dim, latents.shape[3:]
    if kind == "ti2v-5b":
        noise, condition, mask = pipe.returned
        assert condition.shape == (1, z_dim, 1, *size)
        assert mask.shape == (1, 1, 3, *size) and mask[:, :, 0].max() == 0 and mask[:, :, 1:].min() == 1
        # The held latents are put back at the end.
        assert torch.equal(latents[:, :, :1], condition)
    else:
        noise, condition = pipe.returned
        assert condition.shape == (1, 4 + z_dim, 3, *size)
        assert condition[:, :4, 0].min() == 1 and condition[:, :4, 1:].abs().max() == 0
    assert noise.shape == (1, z_dim, 3, *size) and noise.dtype == torch.float32


def test_the_experts_are_switched_by_the_parent(image):
    pipe = quiet(WanImageToVideoPipeline(**make_components("a14b")))
    seen = {"transformer": [], "transformer_2": []}
    for name, timesteps in seen.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, timesteps=timesteps: timesteps.append(float(kwargs["timestep"][0])),
            with_kwargs=True,
        )
    pipe(image=image, prompt="a cat", **{**CLIP, "num_inference_steps": 6})
    assert min(seen["transformer"]) >= 900 > max(seen["transformer_2"])


def test_clip_sees_the_image_that_is_passed(image):
    pipe = quiet(WanImageToVideoPipeline(**make_components("wan2.1")))
    seen = []
    encode_image = pipe.encode_image
    pipe.encode_image = lambda image, device: seen.append(image) or encode_image(image, device)
    pipe(image=image, prompt="a cat", **CLIP)
    assert seen == [image]


def test_the_interrupt_is_reset_by_every_call(image):
    pipe = quiet(WanImageToVideoPipeline(**make_components("i2v")))
    pipe._interrupt = True
    pipe(image=image, prompt="a cat", **CLIP)
    assert pipe.interrupt is False


def test_embeddings_stand_for_a_prompt(image):
    pipe = quiet(WanImageToVideoPipeline(**make_components("i2v")))
    with torch.no_grad():
        positive, nothing = pipe.encode_prompt("a cat", None, False, max_sequence_length=512)
    assert positive.shape == (1, 512, 16) and nothing is None


def test_diffusers_does_not_load_the_official_layout_by_itself():
    """A reason for `lora_keys`."""
    key = "blocks.0.self_attn.q.lora_A.default.weight"
    assert list(WanLoraLoaderMixin.lora_state_dict({key: torch.zeros(1, 1)})) == [key]


def test_private_names_that_are_used():
    assert {"use_safetensors", "allow_pickle", "return_file_metadata"} <= set(
        inspect.signature(_fetch_state_dict).parameters
    )
    assert callable(WanLoraLoaderMixin._maybe_expand_t2v_lora_for_i2v)
    assert WanLoraLoaderMixin._lora_loadable_modules == ["transformer", "transformer_2"]


@pytest.mark.parametrize("method", ["save_lora_weights", "fuse_lora", "unfuse_lora", "delete_adapters"])
def test_the_lora_methods_take_the_parents_arguments(method):
    """In the parent's order; more may follow."""
    parent, ours = (inspect.signature(getattr(c, method)).parameters for c in (WanImageToVideoPipeline, SVIPipeline))
    assert list(ours)[: len(parent)] == list(parent)
    assert all(ours[name].default == parent[name].default for name in parent if name != "components")


def test_an_adapter_is_where_its_scheme_is_noted():
    """`peft_config` of the transformer has an entry for each adapter, and its layers know which are in use."""
    transformer = make_transformer()
    for name in ("first", "second"):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    assert list(transformer.peft_config) == ["first", "second"]
    transformer.peft_config["second"].note = "kept"
    layer = next(layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer))
    assert (layer.active_adapters, layer.merged_adapters, layer.disable_adapters) == (["second"], [], False)
    transformer.fuse_lora(adapter_names=["first"])
    assert layer.merged_adapters == ["first"]
    transformer.delete_adapters("first")
    # Still in the weights, though no longer on the list.
    assert layer.merged_adapters == ["first"] and list(transformer.peft_config) == ["second"]
    assert (
        transformer.peft_config["second"].note == "kept" and "note" not in transformer.peft_config["second"].to_dict()
    )


def test_keys_with_an_underscore_stay_in_a_models_config(tmp_path):
    transformer = make_transformer()
    transformer.register_to_config(_mine=[{"a": 1}])
    transformer.save_pretrained(tmp_path)
    assert WanTransformer3DModel.from_pretrained(tmp_path).config["_mine"] == [{"a": 1}]


def test_a_block_is_given_what_the_rope_gives():
    """What talking transformers send their tokens of audio by: four arguments, the last one as it was returned."""
    transformer, given, taken = make_transformer(), [], []
    transformer.rope.register_forward_hook(lambda *args: given.append(args[2]))
    for block in transformer.blocks:
        block.register_forward_pre_hook(lambda _, args: taken.append(args))
    latents, text = torch.zeros(1, 36, 3, 4, 4), torch.zeros(1, 512, transformer.config.text_dim)
    transformer(latents, torch.tensor([500]), text)
    assert len(given) == 1 and len(taken) == 2
    assert all(len(args) == 4 and args[3] is given[0] for args in taken)
    assert [*inspect.signature(type(transformer.blocks[0]).forward).parameters][1:] == [
        *("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
    ]


def test_the_passes_of_guidance_are_told_by_cache_context(image):
    """In this order, at every step: what talking transformers tell them by."""
    pipe, calls = quiet(WanImageToVideoPipeline(**make_components("i2v"))), []
    context = pipe.transformer.cache_context
    pipe.transformer.cache_context = lambda name: calls.append(name) or context(name)
    pipe(image=image, prompt="a cat", guidance_scale=2.0, **CLIP)
    pipe(image=image, prompt="a cat", guidance_scale=1.0, **CLIP)
    assert calls == ["cond", "uncond"] * 2 + ["cond"] * 2
