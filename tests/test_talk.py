"""SVI-Talk: the transformer that hears, the published audio modules on it, and films that follow audio."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel

from conftest import TEXT_DIM, make_transformer, seeded
from diffusers_svi import ChainState, HeldLatents, LatentMotion, PixelMotion
from diffusers_svi.conditions.converters import convert_audio, with_modules
from diffusers_svi.conditions.guidance import AudioGuidance
from diffusers_svi.conditions.talk_transformer import AudioAttention, AudioEmbedder, SVITalkTransformer3DModel
from diffusers_svi.conditions.windows import audio_windows, clips_to_cover, first_frame, latent_windows
from diffusers_svi.memory.model import build
from diffusers_svi.published import PUBLISHED


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
    for audio in (windows(3), windows(9), None):
        assert torch.equal(predict(compiled, audio), predict(talk, audio))


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
