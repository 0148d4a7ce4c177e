"""`diffusers-svi plan`: what a film will be and take, before it is made."""

import tempfile
import time
from pathlib import Path
from typing import Any

import click

from ..presets import PRESETS
from .options import CLIPS, FILE, MACHINE, MODEL, SEED, SETTINGS, SIZE, GroupedCommand, option, with_options


EXAMPLES = """
diffusers-svi plan --preset pro --num_clips 120
diffusers-svi plan --preset pro --num_clips 120 --image kitten.png --prompt "it wakes" --measure
"""
MEASURE = [
    option("What is made", "--image", help="Its start image, for `--measure`."),
    option("Other", "--measure", is_flag=True, help="Load the model and make one clip, to tell the time of the film."),
]


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(CLIPS, MODEL, SIZE, SETTINGS, SEED, FILE, MACHINE, MEASURE)
def plan(measure: bool, **options: Any) -> None:
    """Tell frames, seconds and memory of a film, and with --measure the time that it takes."""
    import torch
    from diffusers.utils.torch_utils import get_device

    from ..conditioning import PixelMotion
    from ..plan import scheme_of, weights_of
    from .order import order

    family = PRESETS[options["preset"]]
    with tempfile.TemporaryDirectory() as folder:
        given = {**options, "out": Path(folder, "clip.mp4"), "continue_from": None, "finalize": None}
        if not options["prompt_list"] and not options["prompt_file"]:
            if options["num_clips"] is None or measure:
                raise click.UsageError("Give prompts, or `--num_clips` without `--measure`.")
            given["prompt_list"] = ("any",)
        film = order(given)
        if film.num_clips is None:
            raise click.UsageError("Give `--num_clips`: nobody knows how many prompts will be typed.")
        if measure and film.image is None:
            raise click.UsageError("Give `--image`: a clip is made to measure its time.")
        scheme = scheme_of(family, options["lora"])
        is_plain = (options["lora"] or family.lora or "none") == "none"
        known = PixelMotion() if is_plain else scheme
        num_frames = film.settings["num_frames"]
        if known is None:
            frames = f"at most {film.num_clips * num_frames} frames, as this LoRA's scheme is known once it is loaded"
            seconds = film.num_clips * num_frames / film.fps
        else:
            length = known.film_length(film.num_clips, num_frames)
            frames, seconds = f"{length} frames", length / film.fps
        click.echo(f"film     {film.num_clips} clips, {frames}: {seconds:.1f} seconds at {film.fps:g} fps")
        device = options["device"] or get_device()
        dtype = options["dtype"] or ("float32" if str(device) == "cpu" else "bfloat16")
        model = options["model"] or family.model
        try:
            weights = weights_of(model, getattr(torch, dtype))
        except (OSError, ValueError) as error:
            click.echo(
                f"weights  not known: the configuration of {model} cannot be read ({str(error).splitlines()[0]})"
            )
        else:
            sizes = ", ".join(f"{name} {_size(size)}" for name, size in weights.sizes.items())
            click.echo(f"weights  {_size(weights.all)} in {dtype}, without LoRAs and `--quantize` ({sizes})")
            click.echo(
                f"         {_size(weights.largest)} on the device with `--offload model`; what is computed is extra"
            )
        if measure:
            _measure(film, film.num_clips)


def _measure(film: Any, num_clips: int) -> None:
    """Make the first clip, and tell what it took and what the film will."""
    import torch

    pipe = film.load()
    began = time.monotonic()
    settings = {**film.settings, "image": film.image, "prompts": film.prompts[:1], "num_clips": 1}
    with film.writer() as writer:
        for clip in pipe.stream(**settings, seeds=film.seeds):
            writer.append(clip)
    each, size = time.monotonic() - began, film.out.stat().st_size
    click.echo(
        f"time     {each:.1f} seconds a clip, {num_clips * each / 60:.1f} minutes for {num_clips}, as the first took"
    )
    click.echo(f"file     {_size(size)} a clip, {_size(num_clips * size)} for {num_clips}, as the first took")
    if torch.cuda.is_available():
        click.echo(f"memory   {_size(torch.cuda.max_memory_allocated())} of the GPU at most")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
