"""SVI-Talk: the transformer that hears, the published audio modules on it, and films that follow audio."""

import copy
import inspect
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from optimum.quanto import freeze, qint8, quantize
from safetensors.torch import save_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from conftest import CLIP, TEXT_DIM, make_components, make_transformer, quiet, seeded
from diffusers_svi import ChainState, ClipSpec, HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.converters import convert_audio, with_modules
from diffusers_svi.conditions.guidance import AudioGuidance
from diffusers_svi.conditions.talk_pipeline import MULTITALK, MULTITALK_FILE, SVITalkPipeline
from diffusers_svi.conditions.talk_transformer import AudioAttention, AudioEmbedder, SVITalkTransformer3DModel
from diffusers_svi.conditions.windows import audio_windows, clips_to_cover, first_frame, latent_windows
from diffusers_svi.memory.model import build
from diffusers_svi.published import PUBLISHED
from diffusers_svi.training.lora_model import read_init_lora
from test_audio import speech
from test_lora import make_lora


LAYERS, CHANNELS, TOKENS, TOKEN_DIM, HIDDEN = 2, 3, 4, 6, 8


def make_multitalk(
    dim: int = 24,
    num_blocks: int = 2,
    audio_dim: int = LAYERS * CHANNELS,
    hidden: int = HIDDEN,
    tokens: int = TOKENS,
    token_dim: int = TOKEN_DIM,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """What `multitalk.safetensors` holds, at any size."""
    shapes = {
        "audio_proj.proj1": (hidden, 5 * audio_dim),
        "audio_proj.proj1_vf": (hidden, 8 * audio_dim),
        "audio_proj.proj2": (hidden, hidden),
        "audio_proj.proj3": (tokens * token_dim, hidden),
        "audio_proj.norm": (token_dim,),
    }
    for block in range(num_blocks):
        shapes |= {
            f"blocks.{block}.norm_x": (dim,),
            f"blocks.{block}.audio_cross_attn.q_linear": (dim, dim),
            f"blocks.{block}.audio_cross_attn.kv_linear": (2 * dim, token_dim),
            f"blocks.{block}.audio_cross_attn.proj": (dim, dim),
        }
    generator = seeded(5)
    weights = {}
    for name, shape in shapes.items():
        for part, of_part in {"weight": shape, "bias": shape[:1]}.items():
            if device == "meta":
                weights[f"{name}.{part}"] = torch.empty(of_part, device="meta")
            else:
                weights[f"{name}.{part}"] = torch.randn(of_part, generator=generator) / 2
    return weights


def make_talk(**config) -> SVITalkTransformer3DModel:
    return with_modules(SVITalkTransformer3DModel, make_transformer(**config), make_multitalk()).eval()


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a clip of 9 frames, 32 x 32: 3 latent frames of 4 tokens."""
    generator = seeded(seed)
    return {
        "hidden_states": torch.randn(1, 36, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, TEXT_DIM, generator=generator),
    }


def features(length: int = 30, seed: int = 1) -> torch.Tensor:
    return torch.randn(length, LAYERS, CHANNELS, generator=seeded(seed))


def windows(first: int = 3, seed: int = 1) -> torch.Tensor:
    return audio_windows(features(seed=seed), first, 9)[None]


@torch.no_grad()
def predict(model, audio=None, **given) -> torch.Tensor:
    attention_kwargs = None if audio is None else {"audio": audio, **given}
    return model(**inputs(), attention_kwargs=attention_kwargs, return_dict=False)[0]


# Windows


def test_a_frame_hears_the_rows_around_its_own_and_the_ends_hold():
    rows = torch.arange(10.0).view(10, 1, 1)
    heard = audio_windows(rows, 0, 3)[..., 0, 0].tolist()
    assert heard == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert audio_windows(rows, 7, 3)[..., 0, 0].tolist() == [[5, 6, 7, 8, 9], [6, 7, 8, 9, 9], [7, 8, 9, 9, 9]]
    assert audio_windows(rows, 12, 1)[..., 0, 0].tolist() == [[9, 9, 9, 9, 9]]


def test_a_latent_frame_hears_three_rows_two_and_three():
    """Frames 1 to 4 are the second latent frame: rows -1 to 1 of the first, 2 and 3, and 4 to 6 of the last."""
    by_frame = torch.tensor([[10 * frame + offset for offset in range(-2, 3)] for frame in range(9)])
    first, rest = latent_windows(by_frame.view(1, 9, 5, 1, 1))
    assert first.flatten().tolist() == [-2, -1, 0, 1, 2]
    assert rest[0, :, :, 0, 0].tolist() == [[8, 9, 10, 20, 30, 40, 41, 42], [48, 49, 50, 60, 70, 80, 81, 82]]


SCHEMES = (PixelMotion(1, "reference"), PixelMotion(5), LatentMotion(1), LatentMotion(0), HeldLatents(1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_frames_of_the_clips_are_those_of_the_film(scheme):
    """Every clip's first frame is told again by the one that its chain state says, and the film covers its audio."""
    state = ChainState(scheme, 9, torch.zeros(1, 3, 32, 32))
    latents, video, told, firsts = torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 3, 9, 32, 32), 0, []
    for number in range(1, 5):
        firsts.append(first_frame(state))
        told = firsts[-1] + 9
        assert clips_to_cover(told, scheme, 9) == number == clips_to_cover(told, scheme, 9, state)
        assert clips_to_cover(told + 1, scheme, 9) == number + 1 == clips_to_cover(told + 1, scheme, 9, state)
        state = state.after(latents, video)
        assert clips_to_cover(told, scheme, 9, state) == number
    assert firsts == [number * (9 - scheme.overlap) for number in range(4)]
    assert told == scheme.film_length(4, 9)


def test_a_cut_begins_with_the_next_frame_of_the_film():
    state = ChainState(PixelMotion(5), 9, torch.zeros(1, 3, 32, 32))
    state = state.after(torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 3, 9, 32, 32))
    assert first_frame(state) == 4 and first_frame(state.cut(torch.zeros(1, 3, 32, 32))) == 9
    assert clips_to_cover(18, PixelMotion(5), 9, state.cut(torch.zeros(1, 3, 32, 32))) == 2


# The transformer


def test_the_projection_equals_a_plain_formula():
    torch.manual_seed(0)
    embedder = AudioEmbedder(5, LAYERS * CHANNELS, HIDDEN, TOKENS, TOKEN_DIM).double()
    torch.nn.init.normal_(embedder.norm.weight)
    heard = torch.randn(2, 9, 5, LAYERS, CHANNELS, dtype=torch.float64, generator=seeded())
    expected = []
    for sample in heard:
        groups = [sample[0].flatten()]
        for k in (1, 5):
            rows = [*sample[k][:3], sample[k + 1][2], sample[k + 2][2], *sample[k + 3][2:]]
            groups.append(torch.cat([row.flatten() for row in rows]))
        for index, group in enumerate(groups):
            hidden = torch.relu((embedder.first if index == 0 else embedder.rest)(group))
            tokens = embedder.tokens(torch.relu(embedder.hidden(hidden))).view(TOKENS, TOKEN_DIM)
            centred = tokens - tokens.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            expected.append(normed * embedder.norm.weight + embedder.norm.bias)
    # The norm computes in float32.
    assert torch.allclose(embedder(heard), torch.stack(expected).view(2, 3, TOKENS, TOKEN_DIM), atol=1e-5)


def test_the_attention_equals_a_plain_formula():
    torch.manual_seed(0)
    attention = AudioAttention(24, 2, TOKEN_DIM).double()
    tokens = torch.randn(2, 12, 24, dtype=torch.float64, generator=seeded())
    audio = torch.randn(2, 3, TOKENS, TOKEN_DIM, dtype=torch.float64, generator=seeded(1))
    expected = torch.empty_like(tokens)
    for sample in range(2):
        for frame in range(3):
            of_frame = tokens[sample, 4 * frame : 4 * frame + 4]
            query, key, value = (
                attention.to_q(of_frame),
                attention.to_k(audio[sample, frame]),
                attention.to_v(audio[sample, frame]),
            )
            heads = []
            for head in (slice(0, 12), slice(12, 24)):
                weights = torch.softmax(query[:, head] @ key[:, head].T / 12**0.5, dim=-1)
                heads.append(weights @ value[:, head])
            expected[sample, 4 * frame : 4 * frame + 4] = attention.to_out(torch.cat(heads, dim=-1))
    assert torch.allclose(attention(tokens, audio), expected, atol=1e-12)


def test_audio_of_a_latent_frame_touches_the_tokens_of_that_frame_alone():
    attention = AudioAttention(24, 2, TOKEN_DIM)
    tokens, audio = torch.randn(1, 12, 24, generator=seeded()), torch.randn(1, 3, TOKENS, TOKEN_DIM)
    other = audio.clone()
    other[:, 1] += 1
    changed = (attention(tokens, audio) != attention(tokens, other)).any(-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("image_dim", [None, 16])
def test_without_audio_it_is_the_parent_bit_for_bit(image_dim):
    config = {} if image_dim is None else {"image_dim": 16, "added_kv_proj_dim": 24}
    base, talk = make_transformer(**config), make_talk(**config)
    more = {} if image_dim is None else {"encoder_hidden_states_image": torch.randn(1, 5, 16, generator=seeded(3))}
    with torch.no_grad():
        expected = base(**inputs(), **more).sample
        assert torch.equal(talk(**inputs(), **more).sample, expected)
        heard = talk(**inputs(), **more, attention_kwargs={"audio": windows()}).sample
    assert 0.01 < (heard - expected).abs().max() < 10


def test_with_an_attention_that_adds_nothing_it_is_the_parent_bit_for_bit():
    talk = make_talk()
    for block in talk.blocks:
        torch.nn.init.zeros_(block.audio_attn.to_out.weight)
        torch.nn.init.zeros_(block.audio_attn.to_out.bias)
    assert torch.equal(predict(talk, windows()), predict(make_transformer()))


def test_a_block_hears_between_text_and_feed_forward():
    """The block is the parent's whose text attention also gives what the audio attention does."""
    talk, base = make_talk(), make_transformer()
    block, plain = talk.blocks[0].double(), base.blocks[0].double()
    generator = seeded(2)
    hidden, text = (torch.randn(1, n, 24, generator=generator).double() for n in (12, 7))
    temb = torch.randn(1, 6, 24, generator=generator).double()
    rotary = talk.rope(torch.zeros(1, 36, 3, 4, 4))
    audio = torch.randn(1, 3, TOKENS, TOKEN_DIM, generator=generator).double()
    before = []
    plain.norm2.register_forward_pre_hook(lambda _, args: before.append(args[0]))

    def hear(_attention, _args, attended):
        summed = before[0].double() + attended
        return attended + block.audio_attn(block.audio_norm(summed), audio)

    plain.attn2.register_forward_hook(hear)
    with torch.no_grad():
        expected = plain(hidden, text, temb, rotary)
        assert torch.allclose(block(hidden, text, temb, (*rotary, audio)), expected, atol=1e-6)
        assert not torch.allclose(block(hidden, text, temb, rotary), expected, atol=1e-2)


def test_gradients_with_checkpointing_are_those_without():
    """Of two calls before the backward pass, as with accumulation: each is computed again with its own audio."""
    talk, gradients = make_talk().train(), []
    for checkpointing in (False, True):
        (talk.enable_gradient_checkpointing if checkpointing else talk.disable_gradient_checkpointing)()
        talk.zero_grad()
        loss = sum(
            talk(**inputs(), attention_kwargs={"audio": windows(seed=seed)}).sample.square().sum() for seed in (1, 2)
        )
        loss.backward()
        gradients.append({name: value.grad.clone() for name, value in talk.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(
        value.abs().max() > 0 for name, value in gradients[0].items() if "audio" in name and "to_k.bias" not in name
    )


def test_compiled_as_a_whole_it_hears_what_each_call_has():
    talk = make_talk()
    compiled = torch.compile(talk, backend="eager", fullgraph=True)
    for audio in (windows(3), windows(9)):
        assert torch.equal(predict(compiled, audio), predict(talk, audio))


def test_a_guided_call_can_be_compiled():
    talk, guidance = make_talk(), AudioGuidance(2.0, 5.0)
    compiled = torch.compile(talk, backend="eager")
    with compiled.cache_context("uncond"):
        made = predict(compiled, windows(), audio_guidance=guidance)
    with talk.cache_context("uncond"):
        assert torch.equal(predict(talk, windows(), audio_guidance=guidance), made)


def test_its_blocks_can_be_compiled():
    talk = make_talk()
    expected = predict(talk, windows())
    talk.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(predict(talk, windows()), expected)


def test_it_is_saved_and_loaded_with_its_sizes(tmp_path):
    talk = make_talk()
    talk.save_pretrained(tmp_path)
    loaded = SVITalkTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (loaded.config.audio_dim, loaded.config.audio_tokens, loaded.config.num_layers) == (6, TOKENS, 2)
    assert loaded.blocks[1].audio_norm.weight.dtype == torch.float32
    assert loaded.blocks[1].audio_attn.to_q.weight.dtype == torch.bfloat16
    loaded = SVITalkTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded, windows()), predict(talk, windows()))


def test_a_copy_hears_for_itself():
    talk = make_talk()
    assert torch.equal(predict(copy.deepcopy(talk), windows()), predict(talk, windows()))


def test_group_offloading_changes_nothing():
    talk = make_talk()
    expected = predict(talk, windows())
    talk.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(predict(talk, windows()), expected)


def test_a_cache_of_blocks_knows_its_blocks():
    talk = make_talk()
    expected = predict(talk, windows())
    talk.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with talk.cache_context("cond"):
        assert torch.equal(predict(talk, windows()), expected)
        # All but the first block is answered from memory.
        assert not torch.equal(predict(talk, windows(9)), predict(make_talk(), windows(9)))


def test_another_attention_backend_is_that_of_the_audio_too():
    talk = make_talk()
    talk.set_attention_backend("native")
    assert talk.blocks[0].audio_attn.processor._attention_backend == talk.blocks[0].attn1.processor._attention_backend
    assert talk.blocks[0].audio_attn.processor._attention_backend is not None
    talk.fuse_qkv_projections()
    assert torch.allclose(predict(talk, windows()), predict(make_talk(), windows()), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 5, 2, 3), (2, 9, 5, 2, 3), (1, 9, 4, 2, 3), (1, 9, 5, 2, 4), (9, 5, 2, 3)])
def test_audio_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"`audio` must be \(batch, frames, window, layers, channels\) with \(1, 9, 5\)"
    ):
        predict(make_talk(), torch.zeros(shape))


def test_nothing_is_left_of_a_call_that_failed():
    talk = make_talk()
    expected = predict(talk)
    with pytest.raises(RuntimeError):
        talk(**{**inputs(), "encoder_hidden_states": torch.zeros(1, 7, 3)}, attention_kwargs={"audio": windows()})
    assert torch.equal(predict(talk), expected)


# Guidance in three passes


@pytest.mark.parametrize(("text", "audio"), [(2.0, 5.0), (1.05, 4.0), (7.0, 0.5), (3.0, 0.0)])
def test_the_formula_of_the_pipeline_gives_that_of_three_passes(text, audio):
    u, d, c = (torch.randn(50, dtype=torch.float64, generator=seeded(seed)) for seed in range(3))
    negative = AudioGuidance(text, audio).combined(d, u).double()
    guided = negative + text * (c - negative)
    assert torch.allclose(guided, u + audio * (d - u) + text * (c - d), atol=1e-4)


def test_in_half_precision_the_combination_is_computed_in_full():
    u, d = (torch.randn(50, generator=seeded(seed)).bfloat16() for seed in range(2))
    assert torch.equal(AudioGuidance(2.0, 5.0).combined(d, u), AudioGuidance(2.0, 5.0).combined(d.float(), u.float()))


@pytest.mark.parametrize(
    ("text", "audio", "cond", "uncond"),
    [(2.0, 5.0, 1, 2), (2.0, 1.0, 1, 1), (1.0, 5.0, 2, None), (1.0, 1.0, 1, None)],
)
def test_only_the_passes_that_are_needed_are_made(text, audio, cond, uncond):
    talk, passes = make_talk(), []
    talk.proj_out.register_forward_hook(lambda *_: passes.append(1))
    for call, count in {"cond": cond, "uncond": uncond}.items():
        if count is not None:
            passes.clear()
            with talk.cache_context(call):
                predict(talk, windows(), audio_guidance=AudioGuidance(text, audio))
            assert len(passes) == count


def test_a_guided_call_combines_audio_and_zeros():
    talk, guidance = make_talk(), AudioGuidance(2.0, 5.0)
    heard, unheard = predict(talk, windows()), predict(talk, torch.zeros(1, 9, 5, LAYERS, CHANNELS))
    with talk.cache_context("uncond"):
        assert torch.equal(predict(talk, windows(), audio_guidance=guidance), guidance.combined(heard, unheard))
    # A call of one's own, whatever was before it, is no pass of a pipeline.
    with talk.cache_context("uncond"):
        predict(talk, windows())
    assert torch.equal(predict(talk, windows(), audio_guidance=guidance), heard)
    with talk.cache_context("cond"):
        assert torch.equal(predict(talk, windows(), audio_guidance=guidance), heard)


# The published modules


def test_the_converted_modules_do_what_the_published_names_say():
    published = make_multitalk()
    weights = convert_audio(published)
    assert torch.equal(weights["audio_embedder.first.weight"], published["audio_proj.proj1.weight"])
    assert torch.equal(weights["audio_embedder.rest.bias"], published["audio_proj.proj1_vf.bias"])
    kv = published["blocks.1.audio_cross_attn.kv_linear.weight"]
    assert torch.equal(weights["blocks.1.audio_attn.to_k.weight"], kv[:24])
    assert torch.equal(weights["blocks.1.audio_attn.to_v.weight"], kv[24:])
    assert torch.equal(weights["blocks.0.audio_norm.weight"], published["blocks.0.norm_x.weight"])
    assert torch.equal(weights["blocks.0.audio_attn.to_out.bias"], published["blocks.0.audio_cross_attn.proj.bias"])
    prefixed = convert_audio({f"pipe.dit.{key}": value for key, value in published.items()})
    assert prefixed.keys() == weights.keys()


def test_every_published_tensor_finds_its_place_at_the_true_shapes():
    published = make_multitalk(5120, 40, 12 * 768, 512, 32, 768, device="meta")
    assert len(published) == 330
    assert sum(value.numel() for value in published.values()) == 2_487_168_000
    base = build(PUBLISHED["wan2.1-i2v-14b-480p"], "transformer")
    talk = with_modules(SVITalkTransformer3DModel, base, published)
    state, of_base = talk.state_dict(), base.state_dict()
    assert len(state) - len(of_base) == 330 + 2 * 40
    own = {name: value for name, value in state.items() if name not in of_base}
    assert sum(value.numel() for value in own.values()) == sum(value.numel() for value in published.values())
    assert own["audio_embedder.first.weight"].shape == (512, 46080)
    assert own["audio_embedder.rest.weight"].shape == (512, 73728)
    assert own["audio_embedder.tokens.weight"].shape == (24576, 512)
    assert own["blocks.39.audio_attn.to_k.weight"].shape == (5120, 768)
    # The defaults are those of the published modules.
    with torch.device("meta"):
        default = SVITalkTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120)
    assert {name: value.shape for name, value in default.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }


def test_the_base_keeps_its_layers_and_shares_them():
    base = make_transformer()
    expected = predict(base)
    talk = with_modules(SVITalkTransformer3DModel, base, make_multitalk())
    assert type(base) is WanTransformer3DModel and torch.equal(predict(base), expected)
    of_talk = dict(talk.named_parameters())
    assert all(of_talk[name] is value for name, value in base.named_parameters())
    assert talk.training == base.training


def test_modules_are_of_the_type_of_the_transformer_but_for_norms():
    talk = with_modules(SVITalkTransformer3DModel, make_transformer().bfloat16(), make_multitalk())
    assert talk.blocks[0].audio_attn.to_k.weight.dtype == torch.bfloat16
    assert talk.blocks[0].audio_norm.weight.dtype == torch.float32


def test_what_the_base_remembers_its_talking_kind_does(image):
    """Checkpointing, layers in 8 bits, and that an SVI LoRA is in its weights."""
    base = make_transformer()
    base.enable_gradient_checkpointing()
    quantize(base, weights=qint8)
    freeze(base)
    expected = predict(base)
    talk = with_modules(SVITalkTransformer3DModel, base, make_multitalk())
    assert talk.gradient_checkpointing and torch.equal(predict(talk), expected)
    assert not torch.equal(predict(talk, windows()), expected)

    pipe = SVITalkPipeline(**make_components("i2v"))
    pipe.load_lora_weights(make_lora(pipe.transformer), conditioning=PixelMotion(1, "reference"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_audio_modules(make_multitalk())
    assert pipe.has_modules and pipe.lora_conditioning == PixelMotion(1, "reference")


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in make_multitalk().items() if key != name}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (without("blocks.1.norm_x.bias"), r"'blocks\.1\.audio_norm\.bias' are missing"),
        (without("audio_proj.proj1.weight"), "not complete, or damaged"),
        (make_multitalk(num_blocks=3), r"'blocks\.2\.audio_norm\.weight', .* have no place"),
        (make_multitalk(dim=48), r"`blocks\.0\.audio_norm\.weight` is \(48,\), but the layer is \(24,\)"),
        ({**make_multitalk(), "audio_proj.proj4.weight": torch.zeros(2)}, "'audio_proj.proj4.weight' is no weight"),
        ({**make_multitalk(), "blocks.0.norm_x.bias": torch.full((24,), torch.nan)}, "holds no finite numbers"),
    ],
)
def test_modules_that_do_not_fit_are_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        with_modules(SVITalkTransformer3DModel, make_transformer(), modules)


def test_a_transformer_that_something_is_around_is_refused():
    offloaded, compiled, blocks = make_transformer(), torch.compile(make_transformer()), make_transformer()
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    blocks.compile_repeated_blocks(backend="eager")
    for transformer in (offloaded, compiled, blocks):
        with pytest.raises(ValueError, match="compiled, offloaded, cached or kept in float8: load them before"):
            with_modules(SVITalkTransformer3DModel, transformer, make_multitalk())


# Films


def make_pipe(kind: str = "i2v") -> SVITalkPipeline:
    components = make_components(kind)
    components["transformer"] = with_modules(
        SVITalkTransformer3DModel, components["transformer"], make_multitalk()
    ).eval()
    return quiet(SVITalkPipeline(**components))


def make_encoder() -> Wav2Vec2Model:
    """A tiny one of the kind of wav2vec2-base."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        conv_dim=(8,) * 7,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        intermediate_size=8,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=1,
    )
    return Wav2Vec2Model(config).eval()


def counted(length: int) -> torch.Tensor:
    """Audio whose row n encodes n."""
    return torch.arange(float(length)).view(length, 1, 1).expand(length, LAYERS, CHANNELS).contiguous()


@pytest.fixture
def heard(monkeypatch) -> list[list[list[int]]]:
    """The rows that each call of a talking transformer heard, a window a frame."""
    rows, forward = [], SVITalkTransformer3DModel.forward

    def record(self, *args, attention_kwargs=None, **kwargs):
        if attention_kwargs is not None and "audio" in attention_kwargs:
            rows.append(attention_kwargs["audio"][0, :, :, 0, 0].int().tolist())
        return forward(self, *args, attention_kwargs=attention_kwargs, **kwargs)

    monkeypatch.setattr(SVITalkTransformer3DModel, "forward", record)
    return rows


# One pass a clip.
FAST = {**CLIP, "num_inference_steps": 1, "guidance_scale": 1.0, "audio_guidance_scale": 1.0}


def told(clips, heard) -> list[int]:
    """For every frame of the film in turn, the row that it heard: of the clip that told it last."""
    rows: dict[int, int] = {}
    for clip, windows_of_clip in zip(clips, heard, strict=True):
        frames = len(clip.frames) + len(clip.tail)
        # What a clip adds is its end, or its beginning; its tail is told again.
        before = clip.state.conditioning.trims == "head" and clip.start > 0 and frames < 9
        first = 9 - frames if before else 0
        for number in range(frames):
            rows[clip.start + number] = windows_of_clip[first + number][2]
    assert list(rows) == list(range(len(rows)))
    return list(rows.values())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("i2v", PixelMotion(1, "reference")),
        ("wan2.1", PixelMotion(5)),
        ("i2v", LatentMotion(1)),
        ("i2v", LatentMotion(0)),
    ],
    ids=str,
)
def test_frame_n_of_the_film_hears_row_n_through_every_seam_and_on_resume(kind, scheme, image, heard, tmp_path):
    pipe, audio = make_pipe(kind), counted(scheme.film_length(4, 9))
    options = {"conditioning": scheme, "seeds": itertools.count(), **FAST}
    clips = list(pipe.stream(image, "a cat sits", audio=audio, **options))
    assert len(clips) == 4
    assert told(clips, heard) == list(range(len(audio)))
    for clip, (first, *_) in zip(clips, heard, strict=True):
        assert (
            first[2]
            == first_frame(ChainState(scheme, 9, torch.zeros(1, 3, 32, 32))) + (9 - scheme.overlap) * clip.index
        )
    # Windows reach over the seams, into what other clips tell.
    assert heard[1][0] == [heard[1][0][2] + offset for offset in range(-2, 3)]
    clips[1].state.save(tmp_path / "state")
    heard_before = heard[2:]
    heard.clear()
    options["seeds"] = itertools.count()
    rest = list(
        make_pipe(kind).stream(prompts="a cat sits", audio=audio, state=ChainState.load(tmp_path / "state"), **options)
    )
    assert heard == heard_before and [clip.index for clip in rest] == [2, 3]
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(clips[2:], rest, strict=True))


def test_a_model_that_holds_latents_hears_too(image, heard):
    """As TI2V-5B: every token has a timestep of its own."""
    pipe, audio = make_pipe("ti2v-5b"), counted(13)
    clips = list(
        pipe.stream(image, "a cat sits", audio=audio, conditioning=HeldLatents(1), seeds=itertools.count(), **FAST)
    )
    assert told(clips, heard) == list(range(13))


def test_a_film_of_specs_hears_frame_by_frame_after_a_cut_too(image, heard):
    pipe, audio = make_pipe(), counted(34)
    prompts = [ClipSpec("a cat sits", num_clips=2, seed=3), ClipSpec("the dog jumps", cut=image), "a cat sits"]
    clips = list(pipe.stream(image, prompts, audio=audio, conditioning=PixelMotion(1, "reference"), **FAST))
    frames = np.concatenate([clip.frames for clip in clips])
    assert [clip.start for clip in clips] == [0, 8, 16, 25] and len(frames) == 34
    assert [windows_of_clip[0][2] for windows_of_clip in heard] == [0, 8, 17, 25]
    assert [windows_of_clip[8][2] for windows_of_clip in heard] == [8, 16, 25, 33]


def test_a_film_that_begins_with_a_video_hears_from_its_end_on(image, heard):
    video = torch.rand(3, 12, 32, 32, generator=seeded()).permute(1, 2, 3, 0).mul(255).byte().numpy()
    state = ChainState.from_video(video, PixelMotion(1), 9)
    clips = list(make_pipe().stream(prompts="a cat sits", audio=counted(20), state=state, **FAST))
    assert len(clips) == 1 and [window[2] for window in heard[0]] == list(range(11, 20))
    with pytest.raises(ValueError, match="`audio` has 12 frames, which make 0 clips"):
        make_pipe().stream(prompts="a cat sits", audio=counted(12), state=state, **FAST)


@pytest.mark.parametrize(("length", "clips"), [(1, 1), (9, 1), (10, 2), (17, 2), (18, 3)])
def test_the_film_is_as_long_as_its_audio(length, clips, image, heard):
    film = make_pipe()(image, "a cat sits", audio=counted(length), generator=seeded(), **FAST).frames[0]
    assert len(film) == 8 * clips + 1 and len(heard) == clips
    # Behind the end the last row holds.
    assert heard[-1][8][2] == min(8 * clips, length - 1)


def test_an_endless_list_of_prompts_ends_with_the_audio(image):
    prompts = itertools.cycle(["a cat sits", "the dog jumps"])
    clips = list(make_pipe().stream(image, prompts, audio=counted(17), generator=seeded(), **FAST))
    assert [clip.prompt for clip in clips] == ["a cat sits", "the dog jumps"]


def test_a_shorter_film_may_be_asked_for_and_no_longer_one(image, heard):
    pipe = make_pipe()
    film = pipe(image, "a cat sits", num_clips=1, audio=counted(30), generator=seeded(), **FAST).frames[0]
    assert len(film) == 9
    for asked in ({"prompts": "a cat", "num_clips": 3}, {"prompts": ["a cat", ClipSpec("a dog", num_clips=2)]}):
        name = "num_clips" if "num_clips" in asked else "prompts"
        message = (
            f"`audio` has 17 frames, which make 2 clips .* but 3 are asked for by `{name}`. The film ends with its"
        )
        with pytest.raises(ValueError, match=message):
            pipe.stream(image, audio=counted(17), **asked, **FAST)
    with pytest.raises(ValueError, match="but 3 are asked for by `prompts`"):
        pipe.stream(image, ClipSpec("a cat", num_clips=3), audio=counted(17), **FAST)
    with pytest.raises(ValueError, match="but 3 are asked for by `num_clips`"):
        pipe.stream(image, "a cat", num_clips=np.int64(3), audio=counted(17), **FAST)
    with pytest.raises(ValueError, match=r"`prompts\[0\].num_clips` must be"):
        pipe.stream(image, [ClipSpec("a cat", num_clips="two")], audio=counted(17), **FAST)
    with pytest.raises(ValueError, match="but 3 are asked for by `prompt_embeds`"):
        pipe.stream(image, prompt_embeds=torch.zeros(3, 512, TEXT_DIM), audio=counted(17), **FAST)


def test_the_guided_film_equals_one_of_three_passes_by_hand(image, heard):
    """A parent whose transformer answers "cond" with the three-pass formula, without guidance of its own."""
    pipe, audio, options = make_pipe(), features(9), {**CLIP, "height": 32, "width": 32}
    latents = pipe(
        image,
        "a cat sits",
        audio=audio,
        guidance_scale=3.0,
        audio_guidance_scale=4.0,
        negative_prompt="bad",
        generator=seeded(),
        output_type="latent",
        **options,
    ).frames[0]
    assert len(heard) == 2 * 2  # the transformer is called as often as the parent calls it

    by_hand = quiet(WanImageToVideoPipeline(**{**make_components("i2v"), "transformer": make_talk()}))
    model, forward = by_hand.transformer, by_hand.transformer.forward
    negative = by_hand.encode_prompt("bad", None, False)[0]
    heard_windows, passes = audio_windows(audio, 0, 9)[None], []
    model.proj_out.register_forward_hook(lambda *_: passes.append(1))

    def three_passes(encoder_hidden_states, attention_kwargs, return_dict, **inputs_of_step):
        def velocity(text, audio_of_pass):
            given = {"audio": audio_of_pass}
            return forward(**inputs_of_step, encoder_hidden_states=text, attention_kwargs=given, return_dict=False)[0]

        u = velocity(negative, torch.zeros_like(heard_windows))
        d, c = velocity(negative, heard_windows), velocity(encoder_hidden_states, heard_windows)
        return (u + 4.0 * (d - u) + 3.0 * (c - d),)

    model.forward = three_passes
    expected = by_hand(
        image=image, prompt="a cat sits", guidance_scale=1.0, generator=seeded(), output_type="latent", **options
    ).frames
    assert len(passes) == 3 * 2
    assert torch.allclose(latents, expected, atol=1e-3)


@pytest.mark.parametrize(("text", "audio", "passes"), [(2.0, 5.0, 3), (2.0, 1.0, 2), (1.0, 5.0, 2), (1.0, 1.0, 1)])
def test_a_step_takes_as_many_passes_as_it_needs(text, audio, passes, image):
    pipe, made = make_pipe(), []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: made.append(1))
    options = {**FAST, "guidance_scale": text, "audio_guidance_scale": audio}
    pipe(image, "a cat sits", audio=features(9), generator=seeded(), **options)
    assert len(made) == passes


def test_a_clip_may_have_a_guidance_of_its_own(image):
    pipe, made = make_pipe(), []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: made.append(1))
    prompts = [ClipSpec("a cat sits", guidance_scale=2.0), "the dog jumps"]
    list(pipe.stream(image, prompts, audio=features(17), generator=seeded(), **{**FAST, "audio_guidance_scale": 5.0}))
    assert len(made) == 3 + 2


def test_a_scale_for_loras_is_passed_on(image):
    pipe, options = make_pipe(), {"audio": features(9), **FAST}
    expected = pipe(image, "a cat", generator=seeded(), **options).frames
    pipe.load_lora_weights(make_lora(pipe.transformer))
    made = [
        pipe(image, "a cat", generator=seeded(), attention_kwargs={"scale": scale}, **options).frames
        for scale in (0.0, 1.0)
    ]
    assert np.array_equal(made[0], expected) and not np.array_equal(made[1], expected)


def test_the_defaults_are_the_authors(image):
    pipe = make_pipe()
    clip = next(pipe.stream(image, "a cat sits", audio=features(9), generator=seeded(), **CLIP))
    settings = clip.recipe["settings"]
    assert (settings["guidance_scale"], settings["audio_guidance_scale"]) == (2.0, 5.0)
    assert settings["audio"].startswith("9 frames ")
    shown = inspect.signature(SVITalkPipeline.__call__).parameters
    assert (shown["guidance_scale"].default, shown["audio_guidance_scale"].default) == (2.0, 5.0)
    assert inspect.signature(SVIPipeline.__call__).parameters["guidance_scale"].default == 5.0


def test_a_recipe_tells_what_a_film_follows_and_what_heard_it(image):
    """By fingerprints; of features that were computed before nobody knows by what."""
    encoder, pipes = make_encoder(), [make_pipe(), make_pipe()]
    for pipe in pipes:
        pipe.register_modules(audio_encoder=encoder)
    sound = (speech(0.4), 16000)
    with torch.no_grad():
        told = [next(pipes[0].stream(image, "a cat", audio=sound, generator=seeded(), **FAST)).recipe["settings"]]
        encoder.encoder.layers[1].feed_forward.output_dense.bias += 1
        told.append(next(pipes[1].stream(image, "a cat", audio=sound, generator=seeded(), **FAST)).recipe["settings"])
    assert told[0]["audio"] == told[1]["audio"] and told[0]["audio"].startswith("10 frames ")
    assert len(told[0]["audio_encoder"]) == 16 and told[0]["audio_encoder"] != told[1]["audio_encoder"]
    given = next(make_pipe().stream(image, "a cat", audio=features(9), generator=seeded(), **FAST)).recipe
    assert "audio_encoder" not in given["settings"]


def test_a_cache_keeps_the_three_passes_apart(image):
    """With a threshold that no change stays below, every pass is computed: as without a cache."""
    options = {"audio": features(9), **CLIP, "num_inference_steps": 3, "output_type": "latent"}
    plain = make_pipe()(image, "a cat sits", generator=seeded(), **options).frames
    pipe = make_pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(pipe(image, "a cat sits", generator=seeded(), **options).frames, plain)
    # Where every change stays below, each pass answers with what it kept of its own: after the first step no block
    # but the first is computed.
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    computed = []
    pipe.transformer.blocks[1].ffn.register_forward_hook(lambda *_: computed.append(1))
    assert not torch.equal(pipe(image, "a cat sits", generator=seeded(), **options).frames, plain)
    assert len(computed) == 3


def test_a_cache_for_one_pass_is_refused_where_the_audio_takes_two(image):
    pipe = make_pipe()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=(r"blocks\.\d+\.attn1",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="`PyramidAttentionBroadcastConfig` cannot be used with guidance"):
        pipe.stream(image, "a cat", audio=features(9), **{**FAST, "audio_guidance_scale": 5.0})
    pipe(image, "a cat", audio=features(9), generator=seeded(), **FAST)


def test_a_chain_names_other_audio(image, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    pipe, audio = make_pipe(), features(17)
    state = next(pipe.stream(image, "a cat sits", audio=audio, generator=seeded(), **FAST)).state
    next(pipe.stream(prompts="a cat sits", audio=audio.clone(), generator=seeded(), state=state, **FAST))
    assert "something else" not in caplog.text
    audio[5, 0, 0] += 1
    next(pipe.stream(prompts="a cat sits", audio=audio, generator=seeded(), state=state, **FAST))
    assert "made with something else (audio: 17 frames" in caplog.text


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "`audio`, which the film is to follow, is missing"),
        (7, "`audio` must be a path, `\\(array, rate\\)`, or features"),
        (torch.zeros(9, 2, 4), "`audio` has 2 layers of 4 channels a row, but this model hears 6 values"),
        (torch.zeros(0, 2, 3), "`audio` as features must be floats of the shape"),
        (torch.full((9, 2, 3), torch.nan), "`audio` has values that are no numbers"),
    ],
    ids=str,
)
def test_audio_that_is_none_is_refused(audio, message, image):
    with pytest.raises(ValueError, match=message):
        make_pipe().stream(image, "a cat", audio=audio, **FAST)


def test_an_option_that_is_wrong_is_refused(image):
    pipe = make_pipe()
    with pytest.raises(ValueError, match="`audio_guidance_scale` must be a finite number, got 'much'"):
        pipe.stream(image, "a cat", audio=features(9), **{**FAST, "audio_guidance_scale": "much"})
    with pytest.raises(ValueError, match="`image`, the start image, is missing"):
        pipe.stream(prompts="a cat", audio=features(9), **FAST)
    with pytest.raises(TypeError, match="A film has no option pose"):
        pipe.stream(image, "a cat", audio=features(9), pose=1, **FAST)


def test_features_may_stay_on_disk(image, heard, tmp_path):
    np.save(tmp_path / "speech.npy", counted(17).numpy())
    audio = np.load(tmp_path / "speech.npy", mmap_mode="r")
    assert told(list(make_pipe().stream(image, "a cat", audio=audio, generator=seeded(), **FAST)), heard) == list(
        range(17)
    )


def test_a_sound_is_heard_by_the_encoder_of_the_pipeline(image, tmp_path):
    """Two seconds of sound are 50 rows; the film equals that of the features, and a saved pipeline has the encoder."""
    encoder, sound = make_encoder(), (speech(2.0), 16000)
    pipe = SVITalkPipeline(
        **{**make_components("i2v"), "transformer": make_talk()},
        audio_encoder=encoder,
        audio_feature_extractor=Wav2Vec2FeatureExtractor(),
    )
    options = {"num_clips": 2, "generator": seeded(), **FAST}
    film = quiet(pipe)(image, "a cat", audio=sound, **options).frames
    rows = open_audio(sound, encoder)[:]
    assert rows.shape == (50, LAYERS, CHANNELS)
    options["generator"] = seeded()
    assert np.array_equal(make_pipe()(image, "a cat", audio=rows, **options).frames, film)
    pipe.save_pretrained(tmp_path)
    loaded, options["generator"] = quiet(SVITalkPipeline.from_pretrained(tmp_path)), seeded()
    assert np.array_equal(loaded(image, "a cat", audio=sound, **options).frames, film)
    with pytest.raises(ValueError, match="`audio` is a sound: pass an `audio_encoder`"):
        make_pipe().stream(image, "a cat", audio=sound, **FAST)


# Loading


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in which the names of the Hub mean something."""
    monkeypatch.chdir(tmp_path)
    for file, weights in {
        f"{MULTITALK}/{MULTITALK_FILE}": make_multitalk(),
        "vita-video-gen/svi-model/version-1.0/svi-talk.safetensors": make_lora(make_transformer()),
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        save_file(weights, tmp_path / file)
    return "vita-video-gen/svi-model", {"weight_name": "version-1.0/svi-talk.safetensors"}


def test_lora_and_modules_are_loaded_in_one_call(published, image):
    source, options = published
    pipe = quiet(SVITalkPipeline(**make_components("i2v")))
    with pytest.raises(ValueError, match="the model has no modules for it. Load the published ones"):
        pipe.stream(image, "a cat", audio=features(9), **FAST)
    pipe.load_lora_weights(source, adapter_name="talk", **options)
    assert pipe.has_modules and pipe.lora_conditioning == PixelMotion(1, padding="reference")
    assert pipe.lora_clip_resize == "squash" and pipe.get_list_adapters() == {"transformer": ["talk"]}
    made = pipe(image, "a cat", audio=features(9), generator=seeded(), **FAST).frames
    other = make_pipe()
    other.load_lora_weights(make_lora(other.transformer), conditioning=PixelMotion(1, "reference"))
    expected = other(image, "a cat", audio=features(9), generator=seeded(), clip_resize="squash", **FAST).frames
    assert np.array_equal(made, expected)


def test_modules_may_come_from_elsewhere_or_in_the_file_itself(image, tmp_path):
    lora = make_lora(make_transformer())
    for folder, weights, modules in (("a", lora, make_multitalk()), ("b", {**lora, **make_multitalk()}, None)):
        (tmp_path / folder).mkdir()
        save_file(weights, tmp_path / folder / "svi-talk.safetensors")
        pipe = SVITalkPipeline(**make_components("i2v"))
        pipe.load_lora_weights(tmp_path / folder, weight_name="svi-talk.safetensors", audio_modules=modules)
        assert torch.equal(pipe.transformer.audio_embedder.norm.bias, make_multitalk()["audio_proj.norm.bias"])
        assert pipe.lora_conditioning == PixelMotion(1, "reference")


def test_a_lora_that_was_there_before_stays(published):
    source, options = published
    pipe = SVITalkPipeline(**make_components("i2v"))
    pipe.load_lora_weights(make_lora(pipe.transformer, seed=2), adapter_name="fast")
    pipe.load_lora_weights(source, adapter_name="talk", **options)
    assert pipe.get_list_adapters() == {"transformer": ["fast", "talk"]}
    pipe.unload_lora_weights()
    assert pipe.has_modules and pipe.get_list_adapters() == {}


def test_where_something_is_wrong_nothing_has_been_loaded(published):
    source, options = published
    Path("weights.bin").write_bytes(b"pickled")
    for trouble, message in (
        ({"audio_modules": make_multitalk(dim=48)}, "The modules do not fit this transformer"),
        ({"audio_modules": make_multitalk(), "adapter_name": "a", "hotswap": True}, "is not in use"),
        ({"audio_modules": "weights.bin"}, "The audio module 'weights.bin' is not a safetensors file"),
    ):
        pipe = SVITalkPipeline(**make_components("i2v"))
        before = pipe.transformer
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, **options, **trouble)
        assert pipe.transformer is before and not hasattr(before, "peft_config")


def test_other_conditions_are_refused():
    pipe = make_pipe()
    dance = {**make_lora(pipe.transformer), "dwpose_embedding.0.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="for films that follow pose, .* load it with `SVIDancePipeline`"):
        pipe.load_lora_weights(dance)


def test_training_does_not_go_on_from_a_lora_without_its_modules(published):
    source, options = published
    with pytest.raises(ValueError, match="for films that follow audio, .* load it with `SVITalkPipeline`"):
        read_init_lora(source, options["weight_name"], rank=4, alpha=4)


def test_a_saved_pipeline_has_its_modules(image, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    loaded = quiet(SVITalkPipeline.from_pretrained(tmp_path))
    assert loaded.has_modules
    film, again = (one(image, "a cat", audio=features(9), generator=seeded(), **FAST).frames for one in (pipe, loaded))
    assert np.array_equal(film, again)
    # By itself diffusers loads it as what the base is.
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is WanImageToVideoPipeline and isinstance(stock.transformer, SVITalkTransformer3DModel)


def test_a_plain_film_is_made_with_the_same_transformer(image):
    plain = quiet(SVIPipeline(**make_components("i2v")))
    talking = quiet(SVIPipeline(**{**make_components("i2v"), "transformer": make_talk()}))
    options = {**CLIP, "num_inference_steps": 1}
    one, other = (pipe(image, "a cat", generator=seeded(), **options).frames for pipe in (plain, talking))
    assert np.array_equal(one, other)


def test_an_offloaded_film_is_the_same(image):
    options = {"audio": features(9), **CLIP}
    expected = make_pipe()(image, "a cat", generator=seeded(), **options).frames
    pipe = make_pipe()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert np.array_equal(pipe(image, "a cat", generator=seeded(), **options).frames, expected)
