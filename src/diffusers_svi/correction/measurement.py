r"""What a clip leaves of an error on the clip before, measured without a truth: the clean clip is the zero.

A film's first clip is known, a picture that stands still or a part of a video. What it hands on, x, is carried into
the next clip as the scheme carries it: its last frames or its last latents. That clip f is made by the pipeline, from
the same noise, once from what is clean, x, and once from what has an error, x'. The start image, which schemes show as
anchor or reference, has none. With d(a, b) the root mean square difference,

    in = d(x', x),    out = d(f(x'), f(x)),    slope = out / in.

Below 1 an error shrinks from clip to clip, above 1 it grows: after n clips about slope^n of it is left. Where a clip
takes another course, such as a sprite that moves otherwise, all that differs counts, though nothing of it is an error:
this slope is an upper bound. Therefore the same is told of colours, which hardly know where things are: with c(x) the
means and the standard deviations of the three channels of the last frame, in [0, 1],

    slope of colours = d(c(f(x')), c(f(x))) / d(c(x'), c(x)).

It is told where the error shifts colours at all, d(c(x'), c(x)) >= 1/255; of noise and blur it says little.

Units: frames in shares of the range, [0, 1]; latents in their standard deviation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..chain import ChainState
from ..checks import check_count
from ..conditioning import PixelMotion, Scheme
from ..flow import interpolate
from ..noise import MAX_SEED
from ..pipeline import SVIPipeline
from ..progress import Progress
from ..scheduler import SVIEulerScheduler
from ..specs import check_clip
from ..wan import decode_video, encode_video
from .contestants import as_contestant, contestants
from .figures import Figures
from .kinds import OWN, VAE, Error
from .pixels import put_on_pixels
from .samples import Sample


@dataclass(frozen=True)
class HandedOn:
    """What a clip leaves.

    Args:
        state (`ChainState`): What the next one begins with.
        last (`torch.Tensor` of shape `(3, height, width)`): Its last frame, in [0, 1].
    """

    state: ChainState
    last: torch.Tensor


def carried_difference(one: HandedOn, other: HandedOn) -> float:
    """d of what is carried: frames in shares of the range, or latents in standard deviations."""
    values, others = (_carried(of.state) for of in (one, other))
    return _rms(values - others)


def colour_difference(one: HandedOn, other: HandedOn) -> float:
    """d of means and standard deviations of the channels of the last frame, in shares of the range."""
    return _rms(_colours(one.last) - _colours(other.last))


def _carried(state: ChainState) -> torch.Tensor:
    if state.frames is not None:
        return state.frames.double() / 255
    assert state.latents is not None
    return state.latents.double()


def _colours(frame: torch.Tensor) -> torch.Tensor:
    pixels = frame.double().flatten(1)
    return torch.cat([pixels.mean(dim=1), pixels.std(dim=1, correction=0)])


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


@torch.no_grad()
def measure(
    pipe: SVIPipeline,
    samples: list[Sample],
    errors: list[Error],
    figures: Figures,
    *,
    without_base: bool = False,
    conditioning: Scheme | None = None,
    **settings: Any,
) -> None:
    """Measure what `figures` lacks, with the LoRAs of a pipeline and without them, and keep each figure at once.

    Args:
        pipe (`SVIPipeline`): The model, with its LoRA loaded and not fused. It is left as it was.
        samples (`list[Sample]`): At least two, if intervals are wanted.
        errors (`list[Error]`): See [`all_errors`].
        figures (`Figures`): Where they are kept.
        without_base (`bool`, defaults to `False`): Only with the LoRA, which may be fused then.
        conditioning (`Scheme`, *optional*): That of the LoRA if not given; without one, `PixelMotion(1)`.
        settings: Options of [`~SVIPipeline.stream`] that hold for every clip; `num_frames` must be among them.

    Raises:
        ValueError: for what cannot be right, before a clip is made; and if `figures` has those of something else.
        FloatingPointError: if a clip comes out with values that are not finite.
    """
    scheme = conditioning or pipe.lora_conditioning or PixelMotion()
    if not scheme.carried_frames and not scheme.carried_latents:
        raise ValueError(f"{scheme} carries nothing from clip to clip: there is no error on it to measure.")
    if not samples or not errors:
        raise ValueError(f"There are {len(samples)} samples and {len(errors)} errors: at least one of each is needed.")
    if any(error.kind == OWN for error in errors) and settings.get("num_inference_steps", 2) < 2:
        raise ValueError(f"The error {OWN!r} needs at least 2 `num_inference_steps`: leave it out, or make more.")
    for sample in samples:
        check_clip(sample.prompt, 0)
        check_count(f"seed of {sample.name}", sample.seed, 0, MAX_SEED - 1)
        sample.check(settings["num_frames"])
    names = contestants(pipe, without_base)
    settings.setdefault("clip_resize", pipe.lora_clip_resize)
    figures.begin(pipe, scheme, samples, settings)
    missing = [
        (number, error, name)
        for number in range(len(samples))
        for error in errors
        for name in names
        if not figures.has(name, number, error)
    ]
    cleans = {(number, name) for number, _, name in missing}
    total = len(missing) + len(cleans) + sum(error.kind == OWN for _, error, _ in missing)
    with _told(pipe, total) as progress:
        for number, sample in enumerate(samples):
            asked = [(error, name) for index, error, name in missing if index == number]
            if asked:
                _Measurement(pipe, scheme, sample, settings, progress).measure(asked, number, figures)


@contextmanager
def _told(pipe: SVIPipeline, total: int) -> Iterator[Progress]:
    """One bar for all, in place of one for every clip."""
    config = pipe._bar_config
    progress = Progress(total, 0, config)
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield progress
    finally:
        pipe.set_progress_bar_config(**config)
        progress.close()


class _Measurement:
    """The clips of one sample."""

    def __init__(
        self,
        pipe: SVIPipeline,
        scheme: Scheme,
        sample: Sample,
        settings: Mapping[str, Any],
        progress: Progress,
    ):
        self.pipe, self.sample, self.settings, self.progress = pipe, sample, dict(settings), progress
        self.before = sample.clip_before(pipe, self.settings)
        self.begun = ChainState(scheme, settings["num_frames"], self.before[:, :, 0])
        self.clean = self._handed_on(self.before)
        self._made: dict[str, HandedOn] = {}

    def measure(self, asked: list[tuple[Error, str]], number: int, figures: Figures) -> None:
        flawed: tuple[Error, HandedOn] | None = None
        for error, name in asked:
            with as_contestant(self.pipe, name):
                if error.kind == OWN:
                    given, level = self._made_anew(error.value)
                else:
                    if flawed is None or flawed[0] != error:
                        flawed = error, self._handed_on(self._flawed(error))
                    given, level = flawed[1], None
                if name not in self._made:
                    self._made[name] = self._next(self.clean.state)
                made, reference = self._next(given.state), self._made[name]
            found = {
                "in": carried_difference(given, self.clean),
                "out": carried_difference(made, reference),
                "colour_in": colour_difference(given, self.clean),
                "colour_out": colour_difference(made, reference),
            }
            figures.add(name, number, error, found if level is None else {**found, "level": level})

    def _flawed(self, error: Error) -> torch.Tensor:
        """The clip before with an error on its pixels."""
        if error.kind != VAE:
            return put_on_pixels(error, self.before, self.sample.seed)
        video = self.before
        for _ in range(int(error.value)):
            video = decode_video(self.pipe.vae, encode_video(self.pipe.vae, video)).clamp(-1, 1).to(video)
        self.pipe.maybe_free_model_hooks()
        return video

    def _handed_on(self, video: torch.Tensor) -> HandedOn:
        """What a clip of these pixels leaves."""
        # Where frames are carried no latents are looked at.
        latents = video
        if self.begun.conditioning.carried_latents:
            latents = encode_video(self.pipe.vae, video)
            self.pipe.maybe_free_model_hooks()
        return HandedOn(self.begun.after(latents, video), video[0, :, -1] / 2 + 0.5)

    def _next(self, state: ChainState, **options: Any) -> HandedOn:
        """What the clip after `state` leaves, by the pipeline itself."""
        # As after a video: the chain is at its first clip, which goes on from something.
        (clip,) = self.pipe.stream(
            prompts=[self.sample.prompt],
            num_clips=1,
            state=replace(state, num_clips=0, start=0, made_with={}),
            ignore_lora_conditioning=True,
            output_type="pt",
            **{"seeds": [self.sample.seed], **self.settings, **options},
        )
        self.progress.clip_done()
        return HandedOn(clip.state, clip.frames[-1].cpu())

    def _made_anew(self, level: float) -> tuple[HandedOn, float]:
        """The clip before, made anew by the model from a noise level on, and that level: the nearest of its schedule.

        The pipeline runs from pure noise as ever; where the level is reached, a callback puts the noised clip in place
        of what it has made.
        """
        latents = encode_video(self.pipe.vae, self.before)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.sample.seed + 1))
        reached = 1.0

        def put_in(pipe: SVIPipeline, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal reached
            # Those after every step but the last, which ends at 0.
            levels = pipe.scheduler.sigmas[1:-1].tolist()
            nearest = min(range(len(levels)), key=lambda i: abs(levels[i] - level))
            if index != nearest:
                return {}
            reached = levels[index]
            noisy = interpolate(latents.float().cpu(), noise, torch.tensor([reached]))
            return {"latents": noisy.to(kwargs["latents"])}

        sampler = self.pipe.scheduler
        if not isinstance(sampler, FlowMatchEulerDiscreteScheduler):
            # One that remembers the steps before would go on from those.
            self.pipe.scheduler = SVIEulerScheduler.from_config(sampler.config)
        try:
            made = self._next(self.begun, callback_on_step_end=put_in)
        finally:
            self.pipe.scheduler = sampler
        return made, reached
