"""What a clip leaves of an error: the errors, the figures, the measurement, and the command."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch
from scipy import stats

from conftest import CLIP, make_components, quiet, seeded
from diffusers_svi import ChainState, HeldLatents, LatentMotion, PixelMotion, SVIEulerScheduler, SVIPipeline
from diffusers_svi.correction.contestants import BASE, LORA, as_contestant, contestants
from diffusers_svi.correction.figures import LESS, Figures
from diffusers_svi.correction.kinds import KINDS, SIZES, Error, all_errors
from diffusers_svi.correction.measurement import HandedOn, carried_difference, colour_difference, measure
from diffusers_svi.correction.pixels import put_on_pixels
from diffusers_svi.correction.report import plot, table, verdict
from diffusers_svi.correction.samples import Sample
from diffusers_svi.correction.statistics import counted, interval, slopes
from diffusers_svi.flow import interpolate
from diffusers_svi.pixels import from_uint8, to_uint8
from diffusers_svi.wan import decode_video, encode_video, transformer_inputs
from small_videos import numbers, write_numbered
from test_cli import ROOT, SVI_TINY, environment
from test_lora import make_lora


SETTINGS = {**CLIP, "guidance_scale": 1.0}


def clip(low: int = 60, high: int = 190, frames: int = 3) -> torch.Tensor:
    """Random pixels that no error clips."""
    pixels = torch.randint(low, high, (1, 3, frames, 32, 32), generator=seeded(), dtype=torch.uint8)
    return from_uint8(pixels)


def unit(video: torch.Tensor) -> torch.Tensor:
    return (video / 2 + 0.5).double()


# The errors.


def test_every_kind_has_three_sizes_that_grow():
    assert all_errors() == [Error(kind, size) for kind in KINDS for size in SIZES] and len(all_errors()) == 27
    for name, kind in KINDS.items():
        values = kind.values if name != "jpeg" else kind.values[::-1]
        assert list(values) == sorted(set(values)) and kind.unit and kind.source
    assert Error("vae", "medium").value == 3 and str(Error("vae", "medium")) == "vae medium"
    assert all_errors(("vae", "cast"), ("large", "small")) == [
        Error(kind, size) for kind in ("vae", "cast") for size in ("small", "large")
    ]


@pytest.mark.parametrize("size", SIZES)
def test_a_cast_adds_red_and_takes_blue(size):
    error = Error("cast", size)
    moved = unit(put_on_pixels(error, clip())) - unit(clip())
    expected = torch.tensor([error.value, 0, -error.value], dtype=torch.float64).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_exposure_takes_a_share_of_the_light(size):
    error = Error("exposure", size)
    torch.testing.assert_close(unit(put_on_pixels(error, clip())), unit(clip()) * (1 - error.value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_contrast_grows_about_the_mean_of_each_frame(size):
    error, before = Error("contrast", size), unit(clip(100, 150))
    before[:, :, 1] += 0.1
    after = unit(put_on_pixels(error, (before * 2 - 1).float()))
    mean = (1, 3, 4)
    torch.testing.assert_close(after.mean(mean), before.mean(mean), atol=1e-6, rtol=0)
    torch.testing.assert_close(after.std(mean), before.std(mean) * (1 + error.value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_saturation_leaves_grey_and_takes_colours_further_from_it(size):
    error, before = Error("saturation", size), unit(clip())
    after = unit(put_on_pixels(error, clip()))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1, 1)
    grey = (before * weights).sum(1, keepdim=True)
    torch.testing.assert_close((after * weights).sum(1, keepdim=True), grey, atol=1e-6, rtol=0)
    torch.testing.assert_close(after - grey, (before - grey) * (1 + error.value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_noise_has_its_deviation_and_differs_from_frame_to_frame(size):
    error, grey = Error("noise", size), torch.zeros(1, 3, 3, 64, 64)
    noise = unit(put_on_pixels(error, grey, seed=4)) - 0.5
    assert noise.std().item() == pytest.approx(error.value, rel=0.02) and abs(noise.mean()) < error.value / 20
    assert not torch.equal(noise[:, :, 0], noise[:, :, 1])
    assert torch.equal(noise, unit(put_on_pixels(error, grey, seed=4)) - 0.5)
    assert not torch.equal(noise, unit(put_on_pixels(error, grey, seed=5)) - 0.5)


@pytest.mark.parametrize("size", SIZES)
def test_blur_spreads_a_point_by_its_deviation(size):
    error, point = Error("blur", size), -torch.ones(1, 3, 2, 33, 33)
    point[..., 16, :] = 1
    line = unit(put_on_pixels(error, point))[0, 0, 1, :, 16]
    places = torch.arange(33) - 16
    assert line.sum().item() == pytest.approx(1, abs=0.03)
    assert ((line * places**2).sum() / line.sum()).sqrt().item() == pytest.approx(error.value, rel=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_jpeg_is_what_pillow_writes_at_that_quality(size):
    error, frames = Error("jpeg", size), to_uint8(clip())[0].permute(1, 2, 3, 0).numpy()
    after = to_uint8(put_on_pixels(error, clip()))[0].permute(1, 2, 3, 0).numpy()
    for frame, changed in zip(frames, after, strict=True):
        file = io.BytesIO()
        PIL.Image.fromarray(frame).save(file, "JPEG", quality=error.value)
        np.testing.assert_array_equal(changed, np.asarray(PIL.Image.open(file)))


@pytest.mark.parametrize("kind", ["cast", "contrast", "saturation", "noise"])
def test_pixels_stay_in_their_range(kind):
    changed = put_on_pixels(Error(kind, "large"), clip(0, 256))
    assert changed.min() == -1 and changed.max() == 1 and changed.shape == clip().shape


# What is made of figures.


def handed_on(frames: torch.Tensor | None, latents: torch.Tensor | None, last: torch.Tensor) -> HandedOn:
    scheme = PixelMotion(2) if latents is None else LatentMotion(1)
    return HandedOn(ChainState(scheme, 9, torch.zeros(1, 3, 4, 4), frames=frames, latents=latents), last)


def test_what_is_carried_differs_by_the_root_mean_square():
    """Frames in shares of the range, all of them; latents as they are."""
    grey = torch.full((1, 3, 2, 4, 4), 100, dtype=torch.uint8)
    changed = grey.clone()
    changed[:, :, 0] += 51
    last = torch.zeros(3, 4, 4)
    of_frames = [handed_on(frames, None, last) for frames in (grey, changed)]
    assert carried_difference(*of_frames) == pytest.approx(0.2 / 2**0.5)
    latents = torch.zeros(1, 4, 1, 2, 2)
    more = latents.clone()
    more[:, 0] = 3
    assert carried_difference(*(handed_on(None, each, last) for each in (latents, more))) == pytest.approx(1.5)
    assert carried_difference(of_frames[0], of_frames[0]) == 0


def test_colours_differ_by_means_and_deviations_and_not_by_places():
    last = torch.rand(3, 8, 8, generator=seeded())
    one, moved = (handed_on(None, torch.zeros(1), frame) for frame in (last, last.roll(3, dims=2)))
    assert colour_difference(one, moved) == pytest.approx(0, abs=1e-7)
    redder = last.clone()
    redder[0] += 0.12
    assert colour_difference(one, handed_on(None, None, redder)) == pytest.approx(0.12 / 6**0.5)
    stronger = last + (last - last.mean((1, 2), keepdim=True))
    deviations = last.double().flatten(1).std(dim=1, correction=0)
    expected = (deviations.square().sum() / 6).sqrt().item()
    assert colour_difference(one, handed_on(None, None, stronger)) == pytest.approx(expected)


def test_a_slope_is_out_over_in_where_something_went_in():
    found = {"in": 0.2, "out": 0.1, "colour_in": 0.1, "colour_out": 0.3}
    assert slopes(found) == pytest.approx({"slope": 0.5, "colour_slope": 3})
    assert slopes({**found, "in": 0.0, "colour_in": 1 / 256}) == {"slope": None, "colour_slope": None}
    assert slopes({**found, "colour_in": 1 / 255})["colour_slope"] == pytest.approx(0.3 * 255)


@pytest.mark.parametrize("n", [2, 3, 8, 31])
def test_intervals_are_those_of_student(n):
    values = np.random.default_rng(n).normal(1, 0.3, n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    told = interval([*values])
    assert told["value"] == pytest.approx(values.mean()) and told["n"] == n
    assert (told["low"], told["high"]) == pytest.approx((low, high), rel=1e-3)


def test_intervals_of_few_and_of_many():
    assert interval([]) == {"value": None, "low": None, "high": None, "n": 0}
    assert interval([0.4]) == {"value": 0.4, "low": None, "high": None, "n": 1}
    values = np.random.default_rng(0).normal(1, 0.3, 200)
    low, _ = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert low - 0.002 < interval([*values])["low"] < low


def test_an_error_counts_where_its_whole_interval_is_on_one_side():
    found = [
        {"value": 0.5, "low": 0.3, "high": 0.7, "n": 3},
        {"value": 0.9, "low": 0.7, "high": 1.1, "n": 3},
        {"value": 1.5, "low": 1.2, "high": 1.8, "n": 3},
        {"value": 0.5, "low": None, "high": None, "n": 1},
        {"value": None, "low": None, "high": None, "n": 0},
    ]
    assert counted(found, 1) == (4, 1, 1)
    assert counted(found[3:], 1) == (1, 1, 0) and counted(found[3:], 0.2) == (1, 0, 1)


# The measurement, by tiny models.


def with_lora(kind: str, conditioning=None, only_second: bool = False) -> SVIPipeline:
    pipe = quiet(SVIPipeline(**make_components(kind)))
    if kind == "a14b":
        second = make_lora(pipe.transformer_2, seed=2)
        pipe.load_lora_weights(second, adapter_name="a", load_into_transformer_2=True, conditioning=conditioning)
    if not only_second:
        pipe.load_lora_weights(make_lora(pipe.transformer, seed=1), adapter_name="a", conditioning=conditioning)
    return pipe


def samples(image: PIL.Image.Image, count: int = 1) -> list[Sample]:
    return [Sample(name=f"{i}.png", prompt="a cat sits", seed=7 + i, image=image.rotate(90 * i)) for i in range(count)]


def measured(folder: Path, pipe: SVIPipeline, of: list[Sample], errors: list[Error], **options) -> dict:
    figures = Figures(folder / "correction.json")
    measure(pipe, of, errors, figures, **{**SETTINGS, **options})
    return json.loads((folder / "correction.json").read_text())


CARRYING = [
    ("i2v", PixelMotion(2, "reference")),
    ("wan2.1", LatentMotion(1)),
    ("a14b", LatentMotion(1)),
    ("a14b", PixelMotion(1)),
    ("ti2v-5b", HeldLatents(1)),
    ("ti2v-5b", PixelMotion(1)),
]


@pytest.mark.parametrize(("kind", "scheme"), CARRYING, ids=str)
def test_figures_are_those_of_clips_made_by_hand(kind, scheme, image, tmp_path):
    """With the LoRA, without it, and by a pipeline that never had one: to the bit."""
    pipe, error = with_lora(kind, scheme), Error("exposure", "large")
    found = measured(tmp_path, pipe, samples(image), [error])["measured"]

    def by_hand(pipe: SVIPipeline) -> dict[str, float]:
        still = from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)[None, :, None]
        still = still.expand(-1, -1, 9, -1, -1)
        begun, given, left = ChainState(scheme, 9, still[:, :, 0]), [], []
        for video in (still, (still + 1) * (1 - error.value) - 1):
            with torch.no_grad():
                state = begun.after(encode_video(pipe.vae, video), video)
            given.append(HandedOn(state, unit(video[0, :, -1]).float()))
            options = {"ignore_lora_conditioning": True, "ignore_state_settings": True, "output_type": "pt"}
            (made,) = pipe.stream(
                prompts=["a cat sits"],
                num_clips=1,
                state=replace(state, num_clips=0),
                seeds=[7],
                **options,
                **SETTINGS,
            )
            left.append(HandedOn(made.state, made.frames[-1]))
        return {
            "in": carried_difference(*given),
            "out": carried_difference(*left),
            "colour_in": colour_difference(*given),
            "colour_out": colour_difference(*left),
        }

    lora, base = (found[name]["0"]["exposure large"] for name in (LORA, BASE))
    assert lora == by_hand(pipe) and lora["in"] == base["in"]
    plain = quiet(SVIPipeline(**make_components(kind)))
    assert base == by_hand(plain) and base["out"] != lora["out"] and lora["out"] > 0
    alone = measured(tmp_path / "plain", plain, samples(image), [error], conditioning=scheme)["measured"]
    assert alone == {BASE: found[BASE]}


@pytest.fixture(autouse=True)
def folder_of_the_plain_one(tmp_path):
    (tmp_path / "plain").mkdir()


@torch.no_grad()
def test_round_trips_are_counted(i2v, image, tmp_path):
    found = measured(tmp_path, i2v, samples(image), all_errors(("vae",), ("small", "medium")))["measured"]
    video = from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)[None, :, None].expand(-1, -1, 9, -1, -1)
    clean = to_uint8(video[:, :, -1]).double() / 255
    for trips, error in ((1, "vae small"), (3, "vae medium")):
        flawed = video
        for _ in range(trips):
            flawed = decode_video(i2v.vae, encode_video(i2v.vae, flawed)).clamp(-1, 1)
        expected = (to_uint8(flawed[:, :, -1]).double() / 255 - clean).square().mean().sqrt().item()
        assert found[BASE]["0"][error]["in"] == pytest.approx(expected)


@torch.no_grad()
def test_the_own_error_is_the_clip_denoised_from_a_noise_level(i2v, image, tmp_path):
    """Of two steps the second is made, from its noise level: one step of Euler, whatever the pipeline samples with."""
    sampler = i2v.scheduler
    found = measured(tmp_path, i2v, samples(image), [Error("own", "large")])["measured"][BASE]["0"]["own large"]
    assert i2v.scheduler is sampler
    scheduler = SVIEulerScheduler.from_config(sampler.config)
    scheduler.set_timesteps(2)
    level = scheduler.sigmas[1]
    assert found["level"] == pytest.approx(level.item())

    video = from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)[None, :, None].expand(-1, -1, 9, -1, -1)
    begun = ChainState(PixelMotion(), 9, video[:, :, 0])
    latents = encode_video(i2v.vae, video)
    noisy = interpolate(latents, torch.randn(latents.shape, generator=seeded(8)), level[None])
    condition = begun.conditioning.condition(i2v.vae, begun.carried(), 9, False)
    inputs = transformer_inputs(noisy, condition, level[None], (1, 2, 2), False)
    (embeds, _) = i2v.encode_prompt("a cat sits", None, False, max_sequence_length=512)
    made = noisy - level * i2v.transformer(*inputs, embeds, return_dict=False)[0]
    flawed = to_uint8(decode_video(i2v.vae, made)[:, :, -1]).double() / 255
    expected = (flawed - to_uint8(video[:, :, -1]).double() / 255).square().mean().sqrt().item()
    assert found["in"] == pytest.approx(expected, rel=1e-3)


def test_own_errors_are_of_each_contestant_and_of_the_nearest_levels(image, tmp_path):
    pipe = with_lora("i2v")
    found = measured(tmp_path, pipe, samples(image), all_errors(("own",)), num_inference_steps=8)["measured"]
    levels = SVIEulerScheduler.from_config(pipe.scheduler.config)
    levels.set_timesteps(8)
    for error in all_errors(("own",)):
        nearest = min(levels.sigmas[1:-1].tolist(), key=lambda level: abs(level - error.value))
        for name in (BASE, LORA):
            assert found[name]["0"][str(error)]["level"] == pytest.approx(nearest)
        assert found[BASE]["0"][str(error)]["in"] != found[LORA]["0"][str(error)]["in"]
    with pytest.raises(ValueError, match="'own' needs at least 2 `num_inference_steps`"):
        measured(tmp_path / "plain", pipe, samples(image), all_errors(("own",)), num_inference_steps=1)


def test_where_nothing_goes_in_nothing_comes_out(i2v, tmp_path):
    """A black picture is not darker."""
    black = samples(PIL.Image.new("RGB", (32, 32)))
    told = measured(tmp_path, i2v, black, [Error("exposure", "large")])
    assert told["measured"][BASE]["0"]["exposure large"] == dict.fromkeys(("in", "out", "colour_in", "colour_out"), 0)
    assert told["summary"][BASE]["exposure large"]["slope"]["n"] == 0
    assert re.search(r"exposure large +0.1 0.0000 +-$", table(Figures(tmp_path / "correction.json")), re.MULTILINE)


def test_the_anchor_has_no_error(image, tmp_path):
    """A scheme that carries latents sees the start image as well: of every clip it is the clean one."""
    pipe, seen = quiet(SVIPipeline(**make_components("i2v"))), []
    encode = pipe.vae.encode
    pipe.vae.encode = lambda video, *args, **kwargs: seen.append(video) or encode(video, *args, **kwargs)
    measured(tmp_path, pipe, samples(image), [Error("exposure", "large")], conditioning=LatentMotion(1))
    anchors = [video for video in seen if video.shape[2] == 1]
    assert len(anchors) == 2 and torch.equal(*anchors)


class Interrupted(Figures):
    """Somebody presses Ctrl-C after three figures."""

    def add(self, *args) -> None:
        super().add(*args)
        if sum(len(errors) for found in self._measured.values() for errors in found.values()) == 3:
            raise KeyboardInterrupt


def test_a_measurement_that_was_stopped_ends_as_one_that_was_not(image, tmp_path):
    errors, both = all_errors(("cast", "noise"), ("small", "large")), samples(image, 2)
    whole = measured(tmp_path, with_lora("i2v"), both, errors)
    assert [len(whole["measured"][name]["1"]) for name in (BASE, LORA)] == [4, 4]
    pipe = with_lora("i2v")
    stopped = tmp_path / "plain"
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, both, errors, Interrupted(stopped / "correction.json"), **SETTINGS)
    assert not any(layer.disable_adapters for layer in pipe.transformer.modules() if hasattr(layer, "lora_A"))
    kept = json.loads((stopped / "correction.json").read_text())
    assert sum(len(errors) for found in kept["measured"].values() for errors in found.values()) == 3
    # What was kept is not made again: it would be as it was.
    kept["measured"][BASE]["0"]["cast small"]["out"] = 0.5
    (stopped / "correction.json").write_text(json.dumps(kept))
    again = measured(stopped, with_lora("i2v"), both, errors)
    assert again["measured"][BASE]["0"]["cast small"].pop("out") == 0.5
    del whole["measured"][BASE]["0"]["cast small"]["out"]
    assert again["measured"] == whole["measured"] and list(again["measured"]) == [BASE, LORA]
    # Without that, to the byte: in the order of the tables, whatever came first.
    (stopped / "correction.json").unlink()
    measured(stopped, with_lora("i2v"), both[:1], errors[2:])
    measured(stopped, with_lora("i2v"), both, errors)
    assert (stopped / "correction.json").read_bytes() == (tmp_path / "correction.json").read_bytes()


def test_clips_are_counted_and_bars_are_as_before(image, tmp_path, capfd):
    """With the clean ones and those of the model's own; what is there already is not counted."""
    pipe = with_lora("i2v")
    pipe.set_progress_bar_config()
    measured(tmp_path, pipe, samples(image), [Error("cast", "small"), Error("own", "small")])
    assert re.findall(r"Clip (\d+) of (\d+)", capfd.readouterr().err) == [(str(i), "8") for i in range(1, 9)]
    assert pipe._progress_bar_config == {}
    measured(tmp_path, pipe, samples(image), [Error("cast", "small"), Error("cast", "large")])
    assert re.findall(r"Clip (\d+) of (\d+)", capfd.readouterr().err) == [(str(i), "4") for i in range(1, 5)]
    measured(tmp_path, pipe, samples(image), [Error("cast", "small")])
    assert "Clip" not in capfd.readouterr().err


def test_figures_of_something_else_are_not_gone_on_with(image, tmp_path):
    errors, one = [Error("cast", "small")], samples(image)
    measured(tmp_path, with_lora("i2v"), one, errors)
    before = (tmp_path / "correction.json").read_bytes()
    other = quiet(SVIPipeline(**make_components("i2v")))
    other.load_lora_weights(make_lora(other.transformer, seed=5), adapter_name="a")
    for pipe, of, options, message in [
        (with_lora("i2v"), one, {"num_inference_steps": 3}, "num_inference_steps: '2' then, '3' now"),
        (with_lora("i2v"), [replace(one[0], seed=8)], {}, "sample 1: "),
        (with_lora("i2v"), [replace(one[0], prompt="a dog")], {}, "sample 1: .*: a cat sits' then, .*: a dog' now"),
        (with_lora("i2v"), [replace(one[0], image=image.rotate(90))], {}, "sample 1: "),
        (with_lora("i2v"), one, {"conditioning": PixelMotion(2)}, "scheme: "),
        (other, one, {}, "LoRAs of transformer: "),
    ]:
        with pytest.raises(ValueError, match=f"made with something else .*{message}"):
            measured(tmp_path, pipe, of, errors, **options)
    assert (tmp_path / "correction.json").read_bytes() == before
    figures = Figures(tmp_path / "correction.json")
    figures.check(samples(image, 2), SETTINGS)
    with pytest.raises(ValueError, match="sample 1: .* then, 'nothing' now"):
        figures.check([], SETTINGS)
    with pytest.raises(ValueError, match="guidance_scale: '1.0' then, '2.0' now"):
        figures.check(one, {**SETTINGS, "guidance_scale": 2.0})
    (tmp_path / "correction.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no figures of a correction"):
        Figures(tmp_path / "correction.json")


def test_a_fused_lora_is_measured_alone(image, tmp_path):
    pipe = with_lora("a14b", PixelMotion(1))
    pipe.fuse_lora()
    for _ in range(2):  # fused, and then taken out
        with pytest.raises(ValueError, match="A LoRA is fused into the model"):
            contestants(pipe)
        assert contestants(pipe, without_base=True) == (LORA,)
        pipe.unload_lora_weights()
    fused = measured(tmp_path, pipe, samples(image), [Error("cast", "large")], without_base=True)["measured"]
    loaded = measured(tmp_path / "plain", with_lora("a14b", PixelMotion(1)), samples(image), [Error("cast", "large")])[
        "measured"
    ]
    assert list(fused) == [LORA]
    assert fused[LORA]["0"]["cast large"] == pytest.approx(loaded[LORA]["0"]["cast large"], rel=0.05, abs=1e-4)


def test_without_a_lora_there_is_the_base_alone(i2v):
    assert contestants(i2v) == (BASE,)
    with pytest.raises(ValueError, match="`without_base` leaves nothing to measure"):
        contestants(i2v, without_base=True)
    i2v.load_lora_weights(make_lora(i2v.transformer), adapter_name="a")
    assert contestants(i2v) == (BASE, LORA)
    i2v.disable_lora()
    assert contestants(i2v) == (BASE,)


def test_loras_of_either_expert_are_switched_off_and_on_again():
    for pipe in (with_lora("a14b"), with_lora("a14b", only_second=True)):
        assert contestants(pipe) == (BASE, LORA)
        weights = [expert.blocks[0].attn1.to_q for expert in (pipe.transformer, pipe.transformer_2)]
        before = [getattr(layer, "disable_adapters", None) for layer in weights]
        with as_contestant(pipe, BASE):
            assert all(getattr(layer, "disable_adapters", True) for layer in weights)
            assert contestants(pipe) == (BASE,)
        assert [getattr(layer, "disable_adapters", None) for layer in weights] == before
        with as_contestant(pipe, LORA):
            assert contestants(pipe) == (BASE, LORA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": LatentMotion(0)}, "carries nothing from clip to clip"),
        ({"num_frames": 10}, "num_frames"),
        ({"guidance": 3}, "no option guidance"),
    ],
)
def test_what_cannot_be_measured_is_refused(i2v, image, tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        measured(tmp_path, i2v, samples(image), [Error("cast", "small")], **options)


def test_there_must_be_something_to_measure(i2v, image, tmp_path):
    with pytest.raises(ValueError, match="There are 0 samples and 1 errors"):
        measured(tmp_path, i2v, [], [Error("cast", "small")])
    with pytest.raises(ValueError, match="`prompts\\[0\\]` is empty"):
        measured(tmp_path, i2v, [replace(samples(image)[0], prompt=" ")], [Error("cast", "small")])
    with pytest.raises(ValueError, match="seed of 0.png"):
        measured(tmp_path, i2v, [replace(samples(image)[0], seed=-1)], [Error("cast", "small")])
    assert not (tmp_path / "correction.json").exists()


# Samples.


def test_the_first_frames_of_a_video_are_the_clip_before(i2v, tmp_path):
    path = write_numbered(tmp_path / "video.mkv", num_frames=12, height=48, width=64)
    sample = Sample(name="video", prompt="a cat", seed=0, video=path)
    before = sample.clip_before(i2v, {"num_frames": 9, "height": 32, "width": 48})
    assert before.shape == (1, 3, 9, 32, 48) and numbers(before[0]) == [*range(9)]
    # Its own aspect at the area of 480 x 832, if nothing is said.
    assert sample.clip_before(i2v, {"num_frames": 5}).shape == (1, 3, 5, 544, 720)
    halved = replace(sample, fps=4)
    halved.check(6)
    assert numbers(halved.clip_before(i2v, {"num_frames": 5, "height": 32, "width": 48})[0]) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="The video 'video' has 6 frames at 4 a second, but a clip has 9"):
        halved.check(9)
    with pytest.raises(ValueError, match="needs either `image` or `video`"):
        Sample(name="none", prompt="a cat", seed=0)


def test_an_image_stands_still(i2v, image):
    before = samples(image)[0].clip_before(i2v, SETTINGS)
    assert before.shape == (1, 3, 9, 32, 32)
    for frame in before[0].unbind(1):
        np.testing.assert_array_equal(to_uint8(frame).permute(1, 2, 0).numpy(), np.asarray(image))
    wide = replace(samples(image)[0], image=image.resize((64, 32)))
    cropped = wide.clip_before(i2v, {**SETTINGS, "resize_mode": "crop"})
    assert cropped.shape == (1, 3, 9, 32, 32) and not torch.equal(cropped, wide.clip_before(i2v, SETTINGS))


def test_samples_are_told_apart(image, tmp_path):
    one = samples(image)[0]
    path = write_numbered(tmp_path / "video.mkv", num_frames=3)
    video = Sample(name="0.png", prompt="a cat sits", seed=7, video=path, fps=8)
    same = replace(one, image=image.copy())
    assert one.told() == same.told()
    others = [one, replace(one, seed=1), replace(one, prompt="a"), replace(one, image=image.rotate(90)), video]
    others += [replace(video, fps=4), replace(one, name="b")]
    assert len({other.told() for other in others}) == len(others)


# Table, verdict, picture.


def figures_of(folder: Path) -> Figures:
    """Two samples: the LoRA leaves 0.5 and 0.6 of an error, the base 1.4 and 1.5; colours, 0.2 and 2 exactly."""
    figures = Figures(folder / "correction.json")
    for number, (base, lora) in enumerate([(1.4, 0.5), (1.5, 0.6)]):
        for name, slope, colour in ((BASE, base, 2), (LORA, lora, 0.2)):
            for error in (Error("cast", "small"), Error("vae", "large")):
                found = {"in": 0.1, "out": 0.1 * slope, "colour_in": 0.1, "colour_out": 0.1 * colour}
                figures.add(name, number, error, found)
    return figures


def test_the_summary_has_means_and_what_the_lora_leaves_less(tmp_path):
    summary = figures_of(tmp_path).summary
    assert list(summary) == [BASE, LORA, LESS] and [*summary[BASE]] == ["vae large", "cast small"]
    half = 12.706 * 0.05
    found = summary[LORA]["cast small"]
    assert found["in"]["value"] == pytest.approx(0.1)
    expected = {"value": 0.55, "low": 0.55 - half, "high": 0.55 + half, "n": 2}
    assert found["slope"] == pytest.approx(expected)
    less = summary[LESS]["cast small"]
    assert less["slope"] == pytest.approx({"value": -0.9, "low": -0.9, "high": -0.9, "n": 2})
    assert less["colour_slope"]["value"] == pytest.approx(-1.8)
    assert json.loads((tmp_path / "correction.json").read_text())["summary"] == summary


def test_the_table_and_the_verdict_say_what_was_found(tmp_path):
    figures = figures_of(tmp_path)
    lines = table(figures).splitlines()
    assert lines[0].split() == ["all", "that", "is", "carried", "in", "base", "lora", "lora", "less", "base"]
    assert re.match(r"vae large +10 0.1000 +1.45 \(0.81 to 2.09\) +0.55 \(-0.09 to 1.19\) -0.90 \(-0.90 to", lines[1])
    assert lines[2].startswith("cast small") and lines[4].startswith("its colours")
    assert re.match(r"vae large +10 0.1000 +2.00 \(2.00 to 2.00\) +0.20 \(0.20 to 0.20\) +-1.80 \(-1.80", lines[5])
    told = verdict(figures).splitlines()
    assert told == [
        "all that is carried: of 2 errors the base shrinks 0 and lets 0 grow; of 2 errors the LoRA shrinks 0 and lets "
        "0 grow; the LoRA leaves less than the base of 2 and more of 0.",
        "its colours: of 2 errors the base shrinks 0 and lets 2 grow; of 2 errors the LoRA shrinks 2 and lets 0 grow; "
        "the LoRA leaves less than the base of 2 and more of 0.",
        "(2 samples, counted by whole intervals of 95%.)",
    ]


def test_one_sample_is_counted_by_its_values(tmp_path):
    figures = Figures(tmp_path / "correction.json")
    found = {"in": 0.1, "out": 0.05, "colour_in": 0.1, "colour_out": 0.2}
    figures.add(LORA, 0, Error("cast", "small"), found)
    assert verdict(figures).splitlines() == [
        "all that is carried: of 1 errors the LoRA shrinks 1 and lets 0 grow.",
        "its colours: of 1 errors the LoRA shrinks 0 and lets 1 grow.",
        "(1 sample, counted by value, as one sample has no interval.)",
    ]
    assert re.search(r"cast small +0.02 0.1000 +0.50$", table(figures), re.MULTILINE)


def test_the_picture_shows_every_error(tmp_path):
    figures = figures_of(tmp_path)
    plot(figures, tmp_path / "few.png")
    for error in all_errors():
        figures.add(BASE, 0, error, {"in": 0.1, "out": 0.1, "colour_in": 0.0, "colour_out": 0.1})
    plot(figures, tmp_path / "all.png")
    few, all_of_them = (PIL.Image.open(tmp_path / name) for name in ("few.png", "all.png"))
    assert few.width == all_of_them.width == 1000 and all_of_them.height > few.height + 500
    # The LoRA's blue is there.
    assert (np.abs(np.asarray(few.convert("RGB")).astype(int) - [31, 119, 180]).sum(-1) == 0).sum() > 50


# The command, on the embedded model.


def correct(**options: object) -> list[object]:
    values = {
        "out_dir": "found",
        "image": [ROOT / "docs" / "images" / "start.png"] * 2,
        "prompt": "a large red circle moves left over a green meadow",
        "kind": ["exposure", "own"],
        "size": "medium",
        "model": SVI_TINY / "model",
        "lora": SVI_TINY / "loras" / "shot.safetensors",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 1,
        "max_sequence_length": 64,
        **options,
    }
    arguments = []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            arguments += [f"--{name}"] if one is True else [f"--{name}", one]
    return ["correct", *arguments]


def test_the_command_measures_is_stopped_and_goes_on(run_command, tmp_path):
    """The file is that of a measurement that was never stopped."""
    status, told, errors = run_command(*correct(out_dir="whole"))
    assert status == 0, errors
    assert "whole: 2 errors on 2 samples, with the LoRA and without it: 16 clips in all." in told
    assert re.search(r"^exposure medium +0.05 ", told, re.MULTILINE) and "of 2 errors the LoRA shrinks" in told
    assert "Clip 16 of 16: " in errors and "00:00 left" in errors
    whole = json.loads((tmp_path / "whole" / "correction.json").read_text())
    assert whole["command"].startswith("diffusers-svi correct --out_dir whole --image")
    assert whole["scheme"] == PixelMotion(1, "reference").to_dict() and whole["loras"][0]["sha256"]
    assert whole["summary"][LORA]["own medium"]["slope"]["n"] == 2
    assert whole["made_with"]["sample 2"].endswith(", seed 42: a large red circle moves left over a green meadow")
    assert PIL.Image.open(tmp_path / "whole" / "correction.png").width == 1000

    # As by Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_svi", *map(str, correct())],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "Clip 6 of 16" not in (line := process.stderr.readline()):
        assert line, process.stdout.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "The same command goes on with it." in said
    kept = json.loads((tmp_path / "found" / "correction.json").read_text())["measured"]
    assert sum(len(errors) for found in kept.values() for errors in found.values()) >= 2
    status, told, errors = run_command(*correct())
    assert status == 0 and "Clip 16 of 16" not in errors, errors
    again = json.loads((tmp_path / "found" / "correction.json").read_text())
    assert {**again, "command": None} == {**whole, "command": None}
    status, _, errors = run_command(*correct(num_inference_steps=3))
    assert status == 1 and "num_inference_steps: '2' then, '3' now" in errors and "Traceback" not in errors


def test_nothing_is_loaded_on_trial(run_command, tmp_path):
    status, told, errors = run_command(*correct(model="no/model", kind=None, size=None, dry_run=True))
    assert status == 0 and "27 errors on 2 samples, with the LoRA and without it: 124 clips in all." in told, errors
    status, told, _ = run_command(*correct(model="no/model", dry_run=True, without_base=True))
    assert status == 0 and "2 errors on 2 samples, with the LoRA: 8 clips in all." in told
    status, told, _ = run_command(*correct(model="no/model", dry_run=True, lora="none"))
    assert status == 0 and "2 samples, without a LoRA: 8 clips in all." in told
    assert not (tmp_path / "found").exists()


def make_story(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("a large blue circle moves up\nit waits\n")
    PIL.Image.open(ROOT / "docs" / "images" / "start.png").save(folder / "frame.png")


def test_stories_come_after_images_with_prompts_of_their_own(run_command, tmp_path):
    make_story(tmp_path / "stories" / "first")
    make_story(tmp_path / "stories" / "second")
    options = {"lora": "none", "kind": "exposure", "num_inference_steps": 1, "without_plot": True}
    status, told, errors = run_command(*correct(**options, stories="stories"))
    assert status == 0 and "1 errors on 4 samples" in told, errors
    made = json.loads((tmp_path / "found" / "correction.json").read_text())["made_with"]
    assert made["sample 2"].endswith(": a large red circle moves left over a green meadow")
    assert re.fullmatch("stories: second .*: a large blue circle moves up", made["sample 4"])
    options |= {"image": None, "prompt": None, "stories": "stories", "out_dir": "other", "dry_run": True}
    status, told, errors = run_command(*correct(**options))
    assert status == 0 and "1 errors on 2 samples" in told, errors


def test_a_video_is_a_clip_before_and_the_plot_can_be_left_out(run_command, tmp_path):
    write_numbered(tmp_path / "video.mp4", num_frames=10, height=64, width=64)
    options = {"image": None, "video": "video.mp4", "fps": 8, "kind": "exposure", "lora": "none", "without_plot": True}
    status, told, errors = run_command(*correct(**options))
    assert status == 0 and "(1 sample, counted by value" in told, errors
    assert sorted(os.listdir(tmp_path / "found")) == [".lock", "correction.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "Give `--image`, `--video` or `--stories`"),
        ({"image": None, "stories": "gone"}, "'gone' is no folder"),
        ({"image": None, "stories": "story"}, "`--prompt` is of images and videos"),
        ({"image": "gone.png"}, "`--image`='gone.png' cannot be read"),
        ({"prompt": None}, "one for each of the 2 images and videos; got 0"),
        ({"prompt": ["a"] * 3}, "one for each of the 2 images and videos; got 3"),
        ({"prompt": " "}, "`prompts[0]` is empty"),
        ({"kind": "mud"}, "'mud' is not one of 'vae'"),
        ({"size": "huge"}, "'huge' is not one of 'small'"),
        ({"video": "short.mp4", "fps": 8}, "The video 'short.mp4' has 5 frames at 8 a second, but a clip has 9"),
        ({"video": "gone.mp4"}, "gone.mp4"),
        ({"fps": 0}, "`--fps` 0"),
        ({"seed": -1}, "`--seed` must be a whole number"),
        ({"num_frames": 16}, "`--num_frames` must be 1 + 4n"),
        ({"lora": "none", "without_base": True}, "`--without_base` leaves nothing to measure"),
        ({"out_dir": None}, "Missing option '--out_dir'"),
        ({"out_dir": "short.mp4/x"}, "nothing can be written"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(run_command, tmp_path, options, message):
    write_numbered(tmp_path / "short.mp4", num_frames=5)
    make_story(tmp_path / "story")
    status, _, errors = run_command(*correct(model="no/model", **options))
    assert status == 1 and message in errors and "Traceback" not in errors


def test_help_names_kinds_and_sizes(run_command):
    status, told, _ = run_command("correct", "--help")
    assert status == 0 and all(name in told for name in (*KINDS, *SIZES))
    headings = re.findall(r"^(\w[\w ]+):$", told, re.MULTILINE)
    assert headings == ["What is measured", "Model", "Settings", "Machine", "Other", "Examples"]


def test_a_missing_matplotlib_is_told_before_anything_is_loaded(tmp_path):
    script = "import sys; sys.modules['matplotlib'] = None\nfrom diffusers_svi.cli import main\n"
    script += f"sys.argv[1:] = {[*map(str, correct(model='no/model'))]!r}\nmain()"
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert ran.returncode == 1 and 'pip install "diffusers_svi[demo]"' in ran.stderr and "--without_plot" in ran.stderr
