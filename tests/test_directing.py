"""What a `ClipSpec` says of its clip, in every scheme: cuts, anchors, end frames, LoRA weights."""

import itertools
import logging
import threading
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from conftest import CLIP, make_components, quiet, seeded
from diffusers_svi import ChainState, ClipSpec, HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.pixels import from_uint8
from test_lora import make_lora


SCHEMES = {
    "wan2.1": [PixelMotion(1), PixelMotion(5, "reference")],
    "a14b": [LatentMotion(1), LatentMotion(0)],
    "ti2v-5b": [HeldLatents(1), PixelMotion(5)],
}
ALL = [(kind, scheme) for kind, schemes in SCHEMES.items() for scheme in schemes]
every_scheme = pytest.mark.parametrize(("kind", "scheme"), ALL, ids=str)
SEEDS = {"seeds": [3, 1, 4, 1 + 4], **CLIP}


@pytest.fixture
def other() -> PIL.Image.Image:
    pixels = np.random.default_rng(1).integers(256, size=(32, 32, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def levels(frames) -> np.ndarray:
    return np.round(np.asarray(frames) * 255)


def pixels(image: PIL.Image.Image) -> torch.Tensor:
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def made(pipe, image, prompts, **options):
    return list(pipe.stream(image=image, prompts=prompts, **{**SEEDS, **options}))


def whole(clips) -> np.ndarray:
    return np.concatenate([*(clip.frames for clip in clips), *([clips[-1].tail] if len(clips[-1].tail) else [])])


@every_scheme
def test_a_cut_is_two_films_in_one(pipe, scheme, image, other):
    prompts = ["a cat sits", "the dog jumps", ClipSpec("the cat sleeps", cut=other), "a cat sits"]
    clips = made(pipe, image, prompts, conditioning=scheme)
    first = pipe(image=image, prompts=prompts[:2], conditioning=scheme, **SEEDS).frames[0]
    options = {**SEEDS, "seeds": SEEDS["seeds"][2:]}
    second = pipe(image=other, prompts=["the cat sleeps", "a cat sits"], conditioning=scheme, **options).frames[0]
    assert np.array_equal(levels(whole(clips)), levels(np.concatenate([first, second])))
    starts = np.cumsum([0, *(len(clip.frames) for clip in clips)])
    assert [clip.start for clip in clips] == starts[:-1].tolist()
    film = pipe(image=image, prompts=prompts, conditioning=scheme, **SEEDS).frames[0]
    assert np.array_equal(film, whole(clips))


@every_scheme
def test_a_film_with_a_cut_goes_on_after_a_stop(pipe, scheme, image, other, tmp_path):
    prompts = ["a cat sits", ClipSpec("the dog jumps", cut=other, last_image=image), "the cat sleeps"]
    clips = made(pipe, image, iter(prompts), conditioning=scheme)
    for stop in (0, 1):
        clips[stop].state.save(tmp_path / "film.state")
        rest = made(pipe, image, iter(prompts), state=ChainState.load(tmp_path / "film.state"))
        assert [clip.start for clip in rest] == [clip.start for clip in clips[stop + 1 :]]
        assert np.array_equal(whole(rest), whole(clips[stop + 1 :]))


@every_scheme
def test_latents_of_a_film_with_a_cut(pipe, scheme, image, other):
    prompts = ["a cat sits", ClipSpec("the dog jumps", cut=other), "the cat sleeps"]
    options = {"image": image, "prompts": prompts, "conditioning": scheme, **SEEDS}
    latents = pipe(output_type="latent", **options).frames[0]
    film = pipe(**options).frames[0]
    assert np.array_equal(levels(pipe.decode_latents(latents, scheme, cuts=[1])), levels(film))


@pytest.mark.parametrize(("kind", "scheme"), [ALL[1], *ALL[2:5]], ids=str)
def test_an_anchor_holds_from_its_clip_on(pipe, scheme, image, other):
    prompts = ["a cat sits", ClipSpec("the dog jumps", anchor=other), "the cat sleeps"]
    clips = made(pipe, image, prompts, conditioning=scheme)
    plain = made(pipe, image, ["a cat sits", "the dog jumps", "the cat sleeps"], conditioning=scheme)
    assert np.array_equal(clips[0].frames, plain[0].frames)
    changed = replace(plain[0].state, image=pixels(other))
    rest = made(pipe, None, ["a cat sits", "the dog jumps", "the cat sleeps"], state=changed)
    assert np.array_equal(whole(rest), whole(clips[1:]))
    assert not np.array_equal(rest[0].frames, plain[1].frames)


@pytest.mark.parametrize("kind", ["i2v", "a14b"])
def test_an_end_frame_is_the_last_image_of_the_parent(kind, image, other):
    pipe = quiet(SVIPipeline(**make_components(kind)))
    parent = quiet(WanImageToVideoPipeline(**make_components(kind)))
    expected = parent(image=image, last_image=other, prompt="a cat sits", generator=seeded(), **CLIP).frames[0]
    for scheme in (PixelMotion(1), LatentMotion(1)):
        prompts = ClipSpec("a cat sits", last_image=other)
        got = pipe(image=image, prompts=prompts, conditioning=scheme, generator=seeded(), **CLIP).frames[0]
        if isinstance(scheme, PixelMotion):
            assert np.array_equal(got, expected)
        assert got.shape == expected.shape


@pytest.mark.parametrize("scheme", [PixelMotion(5), PixelMotion(1, "reference"), LatentMotion(1)], ids=str)
def test_the_condition_of_a_clip_with_an_end_frame(i2v, scheme, image, other):
    """Where a clip goes on too: its own beginning, and the parent's last latent frame and mask."""
    latents, video = torch.randn(1, 16, 3, 4, 4), torch.rand(1, 3, 9, 32, 32) * 2 - 1
    state = ChainState(scheme, 9, pixels(image)).after(latents, video)
    carried = state.carried()
    plain = scheme.condition(i2v.vae, carried, 9, False)
    ending = scheme.condition(i2v.vae, replace(carried, last=pixels(other)), 9, False)
    assert torch.equal(ending[:, :, :2], plain[:, :, :2]) and not torch.equal(ending[:, :, 2], plain[:, :, 2])
    parent = WanImageToVideoPipeline(**make_components("i2v"))
    shape = {"batch_size": 1, "height": 32, "width": 32, "num_frames": 9, "dtype": torch.float32}
    theirs = parent.prepare_latents(pixels(image), device="cpu", last_image=pixels(other), **shape)[1]
    if isinstance(scheme, LatentMotion):
        assert torch.equal(ending[:, :, 2], theirs[:, 4:, 2])
    i2v._state, i2v._last = state, pixels(other)
    ours = i2v.prepare_latents(pixels(image), device="cpu", **shape)[1]
    assert torch.equal(ours, torch.cat([theirs[:, :4], ending], dim=1))
    assert theirs[0, :4, :, 0, 0].T.flatten().tolist() == [1] * 4 + [0] * 7 + [1]


@pytest.mark.parametrize("scheme", [HeldLatents(1), PixelMotion(5)], ids=str)
def test_an_end_frame_is_held(scheme, image, other):
    pipe = quiet(SVIPipeline(**make_components("ti2v-5b")))
    prompts = ["a cat sits", ClipSpec("the dog jumps", last_image=other)]
    options = {**SEEDS, "conditioning": scheme, "output_type": "latent", "num_frames": 17}
    latents = pipe(image=image, prompts=prompts, **options).frames[0]
    still = pixels(other)[:, :, None].expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        from diffusers_svi.wan import encode_video

        held = encode_video(pipe.vae, still)[0, :, -1]
    assert torch.equal(latents[1][:, -1], held) and not torch.equal(latents[0][:, -1], held)


def test_the_last_of_several_clips_has_the_end_frame(i2v, image, other):
    spec = ClipSpec("a cat sits", num_clips=2, last_image=other, cut=other, seed=5)
    clips = made(i2v, image, ["the dog jumps", spec], num_clips=4)
    assert [clip.spec.last_image is not None for clip in clips] == [False, False, True, False]
    assert [clip.spec.cut is not None for clip in clips] == [False, True, False, False]
    assert [clip.spec.seed for clip in clips] == [3, 5, 6, 5]


@pytest.fixture
def two_loras():
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    for seed, name in ((0, "svi"), (1, "style")):
        for expert in ("transformer", "transformer_2"):
            lora = make_lora(getattr(pipe, expert), seed=seed)
            pipe.load_lora_weights(lora, adapter_name=name, load_into_transformer_2=expert == "transformer_2")
    pipe.set_adapters(["svi"], [1.0])
    return pipe


def test_weights_of_loras_hold_from_their_clip_on(two_loras, image):
    told = [{"style": 0.5}, {"svi": {"transformer": 0.25, "transformer_2": 2.0}}]
    prompts = ["a cat sits", *(ClipSpec("a cat sits", lora_weights=weights) for weights in told), "a cat sits"]
    clips = made(two_loras, image, prompts, conditioning=LatentMotion(1))
    by_hand = [([1.0], ["svi"]), ([1.0, 0.5], ["svi", "style"])]
    by_hand += [([{"transformer": 0.25, "transformer_2": 2.0}, 0.5], ["svi", "style"])] * 2
    state = None
    for index, (weights, names) in enumerate(by_hand):
        two_loras.set_adapters(names, weights)
        plain = itertools.repeat("a cat sits", index + 1)
        options = {"conditioning": LatentMotion(1), "ignore_state_settings": True}
        (clip,) = made(two_loras, None if state else image, plain, state=state, **options)
        assert np.array_equal(clip.frames, clips[index].frames), index
        state = clip.state


def test_weights_of_loras_are_put_back_and_taken_up(two_loras, image, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)

    def scales():
        layer = two_loras.transformer.blocks[0].attn1.to_q
        return dict(layer.scaling), list(layer.active_adapters)

    before = scales()
    prompts = ["a cat sits", ClipSpec("the dog jumps", lora_weights={"style": 0.5, "svi": 0.1}), "the cat sleeps"]
    clips = made(two_loras, image, prompts, conditioning=LatentMotion(1))
    assert scales() == before
    rest = made(two_loras, image, prompts, state=clips[1].state)
    assert np.array_equal(rest[0].frames, clips[2].frames) and scales() == before
    assert "something else" not in caplog.text
    made(two_loras, image, ["a cat sits"] * 3, state=clips[1].state)
    assert "LoRAs of transformer: " in caplog.text
    stream = two_loras.stream(image=image, prompts=prompts, conditioning=LatentMotion(1), **SEEDS)
    next(stream), next(stream)
    assert scales()[0]["style"] == 0.5 * before[0]["style"]
    stream.close()
    assert scales() == before


def test_a_fused_lora_has_no_weight_to_set(two_loras, image):
    two_loras.fuse_lora(adapter_names=["svi"])
    with pytest.raises(ValueError, match="names the adapter 'svi', but there are"):
        made(two_loras, image, [ClipSpec("a cat sits", lora_weights={"svi": 0.5})])


@pytest.mark.parametrize("scheme", [PixelMotion(5), LatentMotion(1)], ids=str)
def test_a_prompt_is_asked_for_when_its_clip_is_due(i2v, image, scheme):
    asked = []
    prompts = (asked.append(number) or "a cat sits" for number in range(3))
    for number, _ in enumerate(i2v.stream(image=image, prompts=prompts, conditioning=scheme, **SEEDS), start=1):
        assert asked == list(range(number))


def test_the_tail_ends_a_film_of_unknown_length(i2v, image):
    known = made(i2v, image, ["a cat sits"] * 2, conditioning=PixelMotion(5))
    unknown = made(i2v, image, iter(["a cat sits"] * 2), conditioning=PixelMotion(5))
    assert [len(clip.frames) for clip in known] == [4, 9] and [len(clip.frames) for clip in unknown] == [4, 4]
    assert [len(clip.tail) for clip in known] == [5, 0] and np.array_equal(known[0].tail, unknown[0].tail)
    assert np.array_equal(whole(known), whole(unknown))


@pytest.mark.parametrize("at", ["a step", "the end of a clip"])
def test_another_thread_ends_the_film(i2v, image, at):
    def stop(*_):
        thread = threading.Thread(target=lambda: setattr(i2v, "interrupt", True))
        thread.start()
        thread.join()
        return {}

    option = "callback_on_step_end" if at == "a step" else "callback_on_clip_end"
    clips = made(i2v, image, itertools.repeat("a cat sits"), seeds=itertools.count(), **{option: stop})
    assert len(clips) == (0 if at == "a step" else 1)
    assert i2v.interrupt and len(made(i2v, image, ["a cat sits"])) == 1 and not i2v.interrupt


def test_a_callback_sees_every_clip(i2v, image):
    seen = []
    i2v(
        image=image,
        prompts=["a cat sits"] * 2,
        callback_on_clip_end=lambda pipe, clip: seen.append((pipe, clip)),
        **SEEDS,
    )
    assert [(pipe is i2v, clip.index, len(clip.frames)) for pipe, clip in seen] == [(True, 0, 8), (True, 1, 9)]


def test_an_anchor_is_encoded_once(i2v, image, other, monkeypatch):
    encoded, encode = [], i2v.vae.encode
    monkeypatch.setattr(i2v.vae, "encode", lambda video: encoded.append(video.shape[2]) or encode(video))
    prompts = ["a cat sits", "a cat sits", ClipSpec("a cat sits", anchor=other), "a cat sits"]
    made(i2v, image, prompts, conditioning=LatentMotion(1))
    assert encoded == [1, 1]


def test_a_spec_as_plain_values(tmp_path, image):
    spec = ClipSpec("a cat sits", seed=3, lora_weights={"svi": 0.5}, cut=image)
    told = spec.to_dict()
    assert told.keys() == {"prompt", "seed", "lora_weights", "cut"} and told["cut"].startswith(
        "data:image/png;base64,"
    )
    again = ClipSpec.from_dict(told)
    assert replace(again, cut=None) == replace(spec, cut=None)
    assert np.array_equal(np.asarray(again.cut), np.asarray(image))
    image.save(tmp_path / "shot.png")
    named = ClipSpec.from_dict({"prompt": "a cat sits", "cut": "shot.png", "seed": None}, tmp_path)
    assert np.array_equal(np.asarray(named.cut), np.asarray(image)) and named.seed is None


@pytest.mark.parametrize(
    ("values", "folder", "message"),
    [
        ({"prompt": "a", "anchor": "missing.png"}, ".", "`anchor` cannot be read: .*missing.png"),
        ({"prompt": "a", "anchor": "shot.png"}, None, "`anchor` cannot be read: 'shot.png' is no picture"),
        ({"prompt": "a", "cut": "data:image/gif;base64,R0lG"}, None, "`cut` cannot be read: .* is no picture"),
        ({"prompt": "a", "cut": "data:image/png;base64,R0lG"}, None, "`cut` cannot be read: .*cannot identify"),
        ({"prompt": "a", "cut": "data:image/png;base64,%"}, None, "`cut` cannot be read: .*base64"),
    ],
)
def test_pictures_that_cannot_be_read(values, folder, message):
    with pytest.raises(ValueError, match=message):
        ClipSpec.from_dict(values, folder)


@pytest.mark.parametrize("scheme", [PixelMotion(5), LatentMotion(1)], ids=str)
def test_colours_are_matched_to_what_a_clip_begins_with(i2v, image, scheme):
    plain = made(i2v, image, ["a cat sits"] * 2, conditioning=scheme)
    matched = made(i2v, image, ["a cat sits"] * 2, conditioning=scheme, color_match="mkl")
    shown = pixels(image)[0].permute(1, 2, 0).numpy() / 2 + 0.5

    def shift(clip):
        return np.abs(clip.frames[0].mean((0, 1)) - shown.mean((0, 1))).max()

    # What leaves [0, 1] is clipped.
    assert shift(plain[0]) > 0.1 and shift(matched[0]) < 0.02
    assert matched[0].state.made_with["color_match"] == "mkl"
    if scheme == PixelMotion(5):
        # What is carried on is matched too.
        carried = matched[0].state.frames[0].permute(1, 2, 3, 0).numpy()
        assert np.array_equal(levels(matched[0].tail), carried)


def test_latents_have_no_colours_to_match(i2v, image):
    with pytest.raises(ValueError, match="`color_match`='mkl' changes pixels, but `output_type`='latent' gives none"):
        made(i2v, image, ["a cat sits"], color_match="mkl", output_type="latent")
