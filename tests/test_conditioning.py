import pytest
import torch

from conftest import make_vae
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion
from diffusers_svi.conditioning import Carried, scheme_from_dict
from diffusers_svi.wan import encode_video


NUM_FRAMES = 17


@pytest.fixture(scope="module")
def vae():
    return make_vae().requires_grad_(False)


@pytest.fixture(scope="module")
def carried() -> Carried:
    """Batch 2."""
    generator = torch.Generator().manual_seed(0)
    return Carried(
        image=torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1,
        frames=torch.rand(2, 3, 6, 32, 32, generator=generator) * 2 - 1,
        latents=torch.randn(2, 16, 5, 4, 4, generator=generator),
    )


@pytest.fixture(scope="module")
def first(carried) -> Carried:
    """A first clip: the image is all there is."""
    return Carried(carried.image)


def test_zeros_are_grey_pixels_encoded_with_the_frames(vae, carried):
    condition = PixelMotion(5).condition(vae, carried, NUM_FRAMES, False)
    video = torch.cat([carried.frames[:, :, -5:], torch.zeros(2, 3, NUM_FRAMES - 5, 32, 32)], dim=2)
    assert torch.equal(condition, encode_video(vae, video))
    assert condition.shape == (2, 16, 5, 4, 4)


def test_the_reference_fills_the_rest_of_the_clip(vae, carried):
    condition = PixelMotion(1, padding="reference").condition(vae, carried, NUM_FRAMES, False)
    reference = carried.image.unsqueeze(2).repeat(1, 1, NUM_FRAMES - 1, 1, 1)
    video = torch.cat([carried.frames[:, :, -1:], reference], dim=2)
    assert torch.equal(condition, encode_video(vae, video))


@pytest.mark.parametrize(("num_references", "count"), [(1, 1), (3, 3), (12, 12), (40, 12)])
def test_some_references_fill_the_begin_of_the_rest(vae, carried, num_references, count):
    scheme = PixelMotion(5, "reference", num_references=num_references)
    condition = scheme.condition(vae, carried, NUM_FRAMES, False)
    reference = carried.image.unsqueeze(2).repeat(1, 1, count, 1, 1)
    video = torch.cat([carried.frames[:, :, -5:], reference, torch.zeros(2, 3, 12 - count, 32, 32)], dim=2)
    assert torch.equal(condition, encode_video(vae, video))


def test_the_first_frame_is_repeated_where_frames_are_missing(vae, carried, first):
    """Of a film that begins, and of a training sample that has one frame to begin with, whatever its reference."""
    scheme = PixelMotion(5, repeat_first=True)
    rest = torch.zeros(2, 3, NUM_FRAMES - 5, 32, 32)
    begun = Carried(first.image, carried.frames[:, :, :1])
    for known, frame in ((first, first.image.unsqueeze(2)), (begun, carried.frames[:, :, :1])):
        video = torch.cat([frame.repeat(1, 1, 5, 1, 1), rest], dim=2)
        assert torch.equal(scheme.condition(vae, known, NUM_FRAMES, False), encode_video(vae, video))
    later = PixelMotion(5).condition(vae, carried, NUM_FRAMES, False)
    assert torch.equal(scheme.condition(vae, carried, NUM_FRAMES, False), later)
    assert scheme.condition(vae, first, NUM_FRAMES, True).shape[2] == 2


@pytest.mark.parametrize(
    ("scheme", "in_first", "in_others"),
    [
        (PixelMotion(5), 1, 1),
        (LatentMotion(2), 1, 1),
        (PixelMotion(5, repeat_first=True), 1, 1),
        (PixelMotion(5, mask_frames="all"), 1, 5),
        (PixelMotion(5, mask_frames="all", repeat_first=True), 5, 5),
    ],
)
def test_frames_that_the_mask_marks(scheme, in_first, in_others):
    assert (scheme.known_frames(is_first=True), scheme.known_frames(is_first=False)) == (in_first, in_others)


def test_what_schemes_have_not_always_had_is_told_only_where_it_is_used():
    """So files, states and caches of old schemes are still theirs."""
    assert PixelMotion(5).to_dict() == {"scheme": "PixelMotion", "num_frames": 5, "padding": "zeros"}
    assert LatentMotion(2).to_dict() == {"scheme": "LatentMotion", "num_latents": 2}
    assert repr(PixelMotion(1, "reference")) == "PixelMotion(num_frames=1, padding='reference')"
    assert repr(HeldLatents(1)) == "HeldLatents(num_latents=1)"
    assert scheme_from_dict({"scheme": "PixelMotion", "num_frames": 5, "padding": "zeros"}) == PixelMotion(5)
    scheme = PixelMotion(5, "reference", num_references=3, mask_frames="all")
    assert repr(scheme) == "PixelMotion(num_frames=5, padding='reference', num_references=3, mask_frames='all')"
    assert eval(repr(scheme)) == scheme != PixelMotion(5, "reference")
    assert scheme.with_frames(9) == PixelMotion(9, "reference", num_references=3, mask_frames="all")


def test_the_first_clip_has_one_condition_frame(vae, first):
    condition = PixelMotion(5).condition(vae, first, NUM_FRAMES, False)
    video = torch.cat([first.image.unsqueeze(2), torch.zeros(2, 3, NUM_FRAMES - 1, 32, 32)], dim=2)
    assert torch.equal(condition, encode_video(vae, video))


@pytest.mark.parametrize("num_latents", [0, 1, 2])
def test_pro_concatenates_anchor_motion_and_zero_latents(vae, carried, num_latents):
    condition = LatentMotion(num_latents).condition(vae, carried, NUM_FRAMES, False)
    assert condition.shape == (2, 16, 5, 4, 4)
    assert torch.equal(condition[:, :, :1], encode_video(vae, carried.image.unsqueeze(2)))
    assert torch.equal(condition[:, :, 1 : 1 + num_latents], carried.latents[:, :, 5 - num_latents :])
    assert condition[:, :, 1 + num_latents :].abs().max() == 0


def test_pro_starts_from_the_anchor_alone(vae, first):
    condition = LatentMotion(1).condition(vae, first, NUM_FRAMES, False)
    assert torch.equal(condition[:, :, :1], encode_video(vae, first.image.unsqueeze(2)))
    assert condition[:, :, 1:].abs().max() == 0


def test_held_latents_are_anchor_and_motion(vae, carried, first):
    held = HeldLatents(2).condition(vae, carried, NUM_FRAMES, True)
    anchor = encode_video(vae, carried.image.unsqueeze(2))
    assert torch.equal(held, torch.cat([anchor, carried.latents[:, :, -2:]], dim=2))
    assert torch.equal(HeldLatents(2).condition(vae, first, NUM_FRAMES, True), anchor)


def test_pixel_motion_can_be_held_too(vae, carried):
    held = PixelMotion(5).condition(vae, carried, NUM_FRAMES, True)
    assert torch.equal(held, encode_video(vae, carried.frames[:, :, -5:]))
    assert held.shape[2] == 2


@pytest.mark.parametrize(
    ("scheme", "overlap"),
    [(PixelMotion(1), 1), (PixelMotion(5), 5), (LatentMotion(0), 1), (LatentMotion(1), 5), (HeldLatents(2), 9)],
)
def test_length_of_a_film(scheme, overlap):
    assert scheme.overlap == overlap
    for num_clips in (1, 2, 7):
        assert scheme.film_length(num_clips, 81) == num_clips * (81 - overlap) + overlap


@pytest.mark.parametrize(
    "scheme",
    [
        *(PixelMotion(), PixelMotion(5, "reference"), LatentMotion(), LatentMotion(2), HeldLatents(1)),
        PixelMotion(5, "reference", num_references=3, repeat_first=True, mask_frames="all"),
    ],
)
def test_schemes_are_values_that_survive_a_dictionary(scheme):
    assert scheme_from_dict(scheme.to_dict()) == scheme
    assert hash(scheme_from_dict(scheme.to_dict())) == hash(scheme)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scheme": "os.system"},
        {"scheme": "PixelMotion", "frames": 3},
        {"scheme": "LatentMotion", "num_latents": -1},
        {"scheme": "PixelMotion", "repeat_first": "yes"},
    ],
)
def test_unknown_schemes_are_refused(values):
    with pytest.raises(ValueError, match="No scheme"):
        scheme_from_dict(values)


def test_condition_frames():
    assert PixelMotion(1, "reference").with_frames(5) == PixelMotion(5, "reference")
    assert LatentMotion(1).with_frames(9) == LatentMotion(2)
    assert HeldLatents(1).with_frames(1) == HeldLatents(0)
    with pytest.raises(ValueError, match=r"`condition_frames` of LatentMotion .* got 4"):
        LatentMotion().with_frames(4)
    with pytest.raises(ValueError, match=r"`condition_frames` must be .* at least 1, got 0"):
        PixelMotion().with_frames(0)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_bad_counts(value):
    with pytest.raises(ValueError, match=r"`num_frames` must be a whole number of at least 1"):
        PixelMotion(value)


def test_bad_padding():
    with pytest.raises(ValueError, match=r"`padding` must be one of .*'zeros', 'reference'.*got 'mirror'"):
        PixelMotion(1, padding="mirror")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"padding": "reference", "num_references": 0},
            "`num_references` must be a whole number of at least 1, got 0",
        ),
        ({"num_references": 3}, "`num_references`=3 is for `padding`='reference', got 'zeros'"),
        ({"repeat_first": 1}, "`repeat_first` must be `True` or `False`, got 1"),
        ({"mask_frames": "none"}, r"`mask_frames` must be one of \('first', 'all'\), got 'none'"),
    ],
)
def test_bad_options_of_pixel_motion(values, message):
    with pytest.raises(ValueError, match=message):
        PixelMotion(5, **values)


@pytest.mark.parametrize(
    ("scheme", "num_frames", "expand_timesteps", "message"),
    [
        (PixelMotion(9), 9, False, "leaves nothing new in a clip of `num_frames`=9"),
        (LatentMotion(2), 9, False, "re-tells 9 frames"),
        (LatentMotion(), 81, True, "Use `HeldLatents`"),
        (HeldLatents(), 81, False, "Use `LatentMotion`"),
        (PixelMotion(2), 81, True, "must be 1, 5, 9"),
        (PixelMotion(5, mask_frames="all"), 81, True, "has no mask: leave out `mask_frames`"),
    ],
)
def test_schemes_that_do_not_fit(scheme, num_frames, expand_timesteps, message):
    with pytest.raises(ValueError, match=message):
        scheme.check(num_frames, expand_timesteps)
