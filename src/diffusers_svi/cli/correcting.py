"""A measurement of correction is checked, run and told."""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

from ..checks import check_count
from ..correction.figures import Figures
from ..correction.kinds import OWN, all_errors
from ..correction.measurement import measure
from ..correction.report import check_plot, plot, table, verdict
from ..correction.samples import Sample
from ..loading import load_pipeline
from ..noise import MAX_SEED
from ..presets import PRESETS, SEED_STEP
from ..specs import check_clip
from ..stories import load_stories
from ..training.environment import own_folder
from .options import loading_of
from .order import film_settings, open_image


FILE, PICTURE = "correction.json", "correction.png"


def run(options: Mapping[str, Any]) -> None:
    """Measure what `options`, those of `correct`, ask for.

    Raises:
        click.UsageError, ValueError: for what cannot be right.
        OSError: if something cannot be read or written.
        FloatingPointError: if a clip comes out with values that are not finite.
    """
    family, folder = PRESETS[options["preset"]], options["out_dir"]
    if family.follows is not None:
        raise click.UsageError(
            f"Films of `--preset {options['preset']}` follow {family.follows}, which `correct` does not give them: "
            "choose another preset."
        )
    settings = film_settings(family, options)
    samples = _samples(options, family.fps if options["fps"] is None else options["fps"])
    for sample in samples:
        sample.check(settings["num_frames"])
    errors = all_errors(options["kinds"], options["sizes"])
    has_lora = family.has_lora(options["lora"])
    if options["without_base"] and not has_lora:
        raise click.UsageError("`--without_base` leaves nothing to measure: there is no LoRA.")
    loading = loading_of(options)
    if not options["without_plot"]:
        check_plot()
    figures = Figures(folder / FILE, "diffusers-svi " + shlex.join(sys.argv[1:]))
    figures.check(samples, settings)
    sides = 2 if has_lora and not options["without_base"] else 1
    own = sum(error.kind == OWN for error in errors)
    clips = len(samples) * sides * (1 + len(errors) + own)
    told = "with the LoRA and without it" if sides == 2 else "with the LoRA" if has_lora else "without a LoRA"
    click.echo(f"{folder}: {len(errors)} errors on {len(samples)} samples, {told}: {clips} clips in all.")
    if options["dry_run"]:
        return
    with own_folder("--out_dir", folder):
        pipe = load_pipeline(family, **loading)
        try:
            measure(pipe, samples, errors, figures, without_base=options["without_base"], **settings)
        except KeyboardInterrupt:
            click.echo(f"\n{figures.path} has what was measured. The same command goes on with it.", err=True)
            raise
        click.echo(f"\n{table(figures)}\n{verdict(figures)}")
        if not options["without_plot"]:
            plot(figures, folder / PICTURE)


def _samples(options: Mapping[str, Any], fps: float) -> list[Sample]:
    """Images first, then videos, each with its prompt and its noise, and stories, which have prompts of their own."""
    if fps != int(fps) or fps < 1:
        raise ValueError(f"`--fps` {fps:g}: a video is brought to whole frames a second. Give a whole number.")
    given: list[dict[str, Any]] = [{"name": str(image), "image": open_image(image)} for image in options["images"]]
    given += [{"name": str(video), "video": video, "fps": int(fps)} for video in options["videos"]]
    prompts = [check_clip(prompt, index).prompt for index, prompt in enumerate(options["prompts"])]
    stories = [] if options["stories"] is None else load_stories(options["stories"])
    if not given and not stories:
        raise click.UsageError(
            "Give `--image`, `--video` or `--stories`, what the clip before shows: best eight of them or more."
        )
    if prompts and not given:
        raise click.UsageError("`--prompt` is of images and videos; stories have prompts of their own.")
    if given and len(prompts) not in (1, len(given)):
        raise click.UsageError(
            f"Give one `--prompt`, or one for each of the {len(given)} images and videos; got {len(prompts)}."
        )
    prompts = prompts * len(given) if len(prompts) == 1 else prompts
    for story in stories:
        given.append({"name": f"{options['stories']}: {story.name}", "image": story.image})
        prompts.append(check_clip(story.prompts[0], 0).prompt)
    first = check_count("--seed", options["seed"], 0, MAX_SEED - 1 - SEED_STEP * len(given))
    return [
        Sample(**of, prompt=prompt, seed=first + SEED_STEP * index)
        for index, (of, prompt) in enumerate(zip(given, prompts, strict=True))
    ]
