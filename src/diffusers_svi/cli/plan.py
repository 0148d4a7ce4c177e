"""`diffusers-svi plan`: what a film will be and take, before it is made."""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..presets import PRESETS, Preset
from .needs import readable_size
from .options import (
    CARD,
    CLIPS,
    FILE,
    FOLLOWED,
    HEARING,
    MACHINE,
    MODEL,
    SEED,
    SETTINGS,
    SIZE,
    SOUND,
    TRAINING,
    GroupedCommand,
    option,
    with_options,
)


EXAMPLES = """
diffusers-svi plan --preset pro --num_clips 120
diffusers-svi plan --preset pro --num_clips 120 --image kitten.png --prompt "it wakes" --measure
diffusers-svi plan --model wan2.1-i2v-14b --quantize fp8 --offload group --vae_tiling
diffusers-svi plan --model wan2.2-i2v-a14b --gguf Q4_K --card 12
diffusers-svi plan --model wan2.1-i2v-14b --train --zero 2 --processes 8 --bank_dtype int8
"""
# What counts for a film and for a training run.
OF_BOTH = ("train", "rank", "preset", "model", "height", "width", "num_frames", "dtype", "card")
MEASURE = [
    option("What is made", "--image", help="Its start image, for `--measure`."),
    option("Other", "--measure", is_flag=True, help="Load the model and make one clip, to tell the time of the film."),
]


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(CLIPS, FOLLOWED, MODEL, HEARING, SIZE, SETTINGS, SEED, FILE, SOUND, MACHINE, CARD, TRAINING, MEASURE)
@click.pass_context
def plan(context: click.Context, measure: bool, **options: Any) -> None:
    """Tell frames, seconds and memory of a film, and with --measure the time that it takes; with --train the memory
    of a training run.

    Memory is computed from shapes. Of the published models nothing is downloaded: --model takes wan2.1-i2v-14b-480p,
    wan2.1-i2v-14b-720p, wan2.2-i2v-a14b and wan2.2-ti2v-5b beside Hub names and folders.
    """
    from ..memory import model_shapes
    from .needs import of_clips, of_training
    from .order import check_followed

    family = PRESETS[options["preset"]]
    _refuse_unused(context, options["train"])
    check_followed(family, options)
    model = options["model"] or family.model
    try:
        shapes = model_shapes(model, family.follows)
    except (OSError, ValueError) as error:
        if options["train"]:
            raise
        shapes = None
        unknown = f"not known: the configuration of {model} cannot be read ({str(error).splitlines()[0]})"
    if options["train"]:
        assert shapes is not None
        return of_training(shapes, options)
    follows = family.follows is not None and options[family.follows] is not None
    if measure or follows or options["num_clips"] is not None or options["prompt_list"] or options["prompt_file"]:
        _film(family, measure, options)
    if shapes is None:
        click.echo(f"memory   {unknown}")
    else:
        of_clips(shapes, options, family)


def _refuse_unused(context: click.Context, train: bool) -> None:
    """Raise a `click.UsageError` for an option that is of no use to what is planned: a training run, or a film."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
        of_training = getattr(parameter, "group", "") == "Training"
        if given and of_training != train and parameter.name not in OF_BOTH:
            where = "with `--train`" if train else "without `--train`"
            raise click.UsageError(f"`{parameter.opts[0]}` does nothing {where}: leave it out.")


def _film(family: Preset, measure: bool, options: dict[str, Any]) -> None:
    """What the film will be, and with `measure` what a clip of it takes."""
    from ..conditioning import PixelMotion
    from ..pieces import LOSSLESS
    from ..plan import scheme_of
    from .order import order

    with tempfile.TemporaryDirectory() as folder:
        suffix = ".mkv" if options["codec"] in LOSSLESS else ".mp4"
        given = {**options, "out": Path(folder, f"clip{suffix}"), "continue_from": None, "finalize": None}
        if not options["prompt_list"] and not options["prompt_file"]:
            ends = family.follows is not None and not options["loop_pose"]
            if (options["num_clips"] is None and not ends) or measure:
                raise click.UsageError("Give prompts, or `--num_clips` without `--measure`.")
            given["prompt_list"] = ("any",)
        film = order(given)
        film = film.of_state(None)
        if film.num_clips is None:
            raise click.UsageError("Give `--num_clips`: nobody knows how many prompts will be typed.")
        if measure and film.image is None:
            raise click.UsageError("Give `--image`: a clip is made to measure its time.")
        scheme = scheme_of(family, options["lora"])
        known = scheme if family.has_lora(options["lora"]) else PixelMotion()
        num_frames = film.settings["num_frames"]
        if known is None:
            frames = f"at most {film.num_clips * num_frames} frames, as this LoRA's scheme is known once it is loaded"
            seconds = film.num_clips * num_frames / film.fps
        else:
            length = known.film_length(film.num_clips, num_frames)
            frames, seconds = f"{length} frames", length / film.fps
        click.echo(f"film     {film.num_clips} clips, {frames}: {seconds:.1f} seconds at {film.fps:g} fps")
        if measure:
            _measure(film, film.num_clips)


def _measure(film: Any, num_clips: int) -> None:
    """Make the first clip, and tell what it took and what the film will."""
    import torch

    from .making import followed

    settings = {**film.settings, "image": film.image, "prompts": film.prompts[:1], "num_clips": 1}
    with film.writer() as writer:
        pipe = film.load()
        began = time.monotonic()
        for clip in pipe.stream(**settings, seeds=film.seeds, **followed(film, pipe, None)):
            writer.append(clip)
    each, size = time.monotonic() - began, film.out.stat().st_size
    click.echo(
        f"time     {each:.1f} seconds a clip, {num_clips * each / 60:.1f} minutes for {num_clips}, as the first took"
    )
    click.echo(
        f"file     {readable_size(size)} a clip, {readable_size(num_clips * size)} for {num_clips}, as the first took"
    )
    if torch.cuda.is_available():
        click.echo(f"memory   {readable_size(torch.cuda.max_memory_allocated())} of the GPU at most")
