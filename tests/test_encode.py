"""What is made of samples and captions before training: what inference would make of them, and only once."""

from dataclasses import replace

import pytest
import torch

from conftest import make_components, quiet
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.pixels import squash, to_pil, to_uint8
from diffusers_svi.training.cache import TensorCache
from diffusers_svi.training.encode import encode_sample, encode_samples, fingerprint_encoders
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.wan import encode_video
from small_videos import ramp_video


FRAMES = 9
SCHEME = PixelMotion(1)
LAYOUT = SampleLayout(num_frames=FRAMES, height=32, width=32)


def make_pipe(kind: str) -> SVIPipeline:
    return quiet(SVIPipeline(**make_components(kind)))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("wan2.1", PixelMotion(5, "zeros")),
        ("wan2.1", PixelMotion(1, "reference")),
        ("wan2.1", LatentMotion(1)),
        ("a14b", LatentMotion(0)),
        ("ti2v-5b", HeldLatents(1)),
        ("ti2v-5b", PixelMotion(5)),
    ],
)
def test_a_sample_is_encoded_as_a_chain_would_have_it(kind, scheme):
    """The condition of a clip that goes on, that of a first clip, and the image that CLIP sees, laid out by hand."""
    pixel, held = scheme.carried_frames > 0, kind == "ti2v-5b"
    history = 0 if pixel else FRAMES - scheme.overlap
    layout = replace(LAYOUT, history=history, reference="before", condition_frames=max(1, scheme.carried_frames))
    pipe, sample = make_pipe(kind), Samples([ramp_video()], replace(layout, augment=True), 1)[0]
    encoded = encode_sample(pipe, sample, scheme, FRAMES, first_clips=True)

    def encode(*parts: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return encode_video(pipe.vae, torch.cat(parts, dim=1)[None])[0]

    clip, reference, begin = sample["video"][:, -FRAMES:], sample["reference"][:, None], sample["condition"]
    if pixel and held:
        condition, first = encode(begin), encode(begin[:, :1])
    elif pixel:
        paddings = (torch.zeros(3, 1, 32, 32),) * 2 if scheme.padding == "zeros" else (reference, clip[:, :1])
        condition, first = (
            encode(frames, padding.expand(-1, FRAMES - frames.shape[1], -1, -1))
            for frames, padding in zip((begin, begin[:, :1]), paddings, strict=True)
        )
    else:
        motion = encode(sample["video"][:, :FRAMES])[:, 3 - scheme.num_latents :]
        condition, first = torch.cat([encode(reference), motion], dim=1), encode(begin[:, :1])
        if not held:
            condition, first = (
                torch.cat([front, torch.zeros(front.shape[0], 3 - front.shape[1], 4, 4)], dim=1)
                for front in (condition, first)
            )
    expected = {"latents": encode(clip), "condition": condition, "first_condition": first}
    if kind == "wan2.1":
        # CLIP never sees what augmentation made of the first frame.
        start = clip[:, :1]
        assert pixel <= ((start - begin[:, :1]).abs().max() > 0.1)
        for name, image in (("image_embeds", start if pixel else reference), ("first_image_embeds", start)):
            expected[name] = pipe.encode_image(to_pil(to_uint8(image[:, 0])), "cpu")[0].detach()
    assert encoded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(encoded[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert (condition[:, 0] - first[:, 0]).abs().max() > 1e-3 or pixel
    alone = encode_sample(pipe, sample, scheme, FRAMES)
    assert {*alone} == {name for name in expected if not name.startswith("first_")}


def test_clip_may_see_all_of_a_frame():
    """Frames that are no squares: what is squeezed is more than the square in the middle."""
    sample = Samples([ramp_video()], replace(LAYOUT, width=64), 1)[0]
    pipe = make_pipe("wan2.1")
    encoded = {way: encode_sample(pipe, sample, SCHEME, FRAMES, clip_resize=way) for way in ("crop", "squash")}
    picture = to_pil(to_uint8(sample["condition"][:, 0]))
    for way, seen in (("crop", picture), ("squash", squash(picture, 32))):
        with torch.no_grad():
            assert torch.equal(encoded[way]["image_embeds"], pipe.encode_image(seen, "cpu")[0])
    assert not torch.equal(encoded["crop"]["image_embeds"], encoded["squash"]["image_embeds"])
    assert torch.equal(encoded["crop"]["condition"], encoded["squash"]["condition"])


def test_only_what_is_missing_is_encoded(tmp_path):
    videos = [ramp_video(fingerprint=name * 64, caption=caption) for name, caption in (("a", "a cat"), ("b", "a dog"))]
    pipe, loaded, cache = make_pipe("i2v"), [], TensorCache(tmp_path)

    def load_pipeline() -> SVIPipeline:
        loaded.append(True)
        return pipe

    def encode(videos, scheme=SCHEME, encoders="tiny", **options):
        samples = Samples(videos, LAYOUT, 0, samples_per_video=2)
        options = {"text_dtype": torch.float32, "max_sequence_length": 6, **options}
        before = len(loaded), set(tmp_path.rglob("*.safetensors"))
        dataset, no_prompt = encode_samples(samples, scheme, cache, load_pipeline, encoders, **options)
        return dataset, no_prompt, len(loaded) - before[0], len({*tmp_path.rglob("*.safetensors")} - before[1])

    dataset, no_prompt, loads, new = encode(videos[:1])
    # Two samples, their caption and the empty one.
    assert (len(dataset), loads, new) == (2, 1, 4)
    with torch.no_grad():
        for text, embeds in (("", no_prompt), ("a cat", dataset[1]["prompt_embeds"])):
            expected = pipe.encode_prompt(text, None, False, max_sequence_length=6)[0][0]
            torch.testing.assert_close(embeds, expected)
    for index in range(2):
        sample = Samples(videos[:1], LAYOUT, 0, samples_per_video=2)[index]
        expected = encode_sample(pipe, sample, SCHEME, FRAMES)
        assert dataset[index].keys() == {*expected, "prompt_embeds"}
        assert all(torch.equal(dataset[index][name], value) for name, value in expected.items())

    assert encode(videos[:1])[2:] == (0, 0)
    dataset, _, loads, new = encode(videos, num_workers=1)
    assert (len(dataset), loads, new) == (4, 1, 3)
    assert torch.equal(dataset[0]["prompt_embeds"], dataset[1]["prompt_embeds"])
    assert not torch.equal(dataset[1]["prompt_embeds"], dataset[2]["prompt_embeds"])
    # Whatever changes what comes out is another entry; captions do not depend on the scheme, clips not on the length.
    assert encode(videos[:1], scheme=PixelMotion(2))[3] == 2
    assert encode(videos[:1], first_clips=True)[3] == 2
    assert encode(videos[:1], clip_resize="squash")[3] == 2
    assert encode(videos[:1], encoders="others")[3] == 4
    assert encode(videos[:1], max_sequence_length=7)[3] == 2
    assert encode(videos[:1], text_dtype=torch.bfloat16)[3] == 2


def test_encoders_are_known_by_their_files(tmp_path):
    make_pipe("wan2.1").save_pretrained(tmp_path)
    before = fingerprint_encoders(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert fingerprint_encoders(tmp_path) == before and len(before) == 64
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint_encoders(tmp_path) != before
