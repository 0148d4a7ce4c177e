"""`diffusers-svi generate`: a film, clip by clip, in one file."""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import click

from ..presets import DTYPES, OFFLOADS, PRESETS, QUANTIZATIONS, Preset


# Seeds of the clips are so far apart. source: the authors' `seed_times`
SEED_STEP = 42
LOADING = ("model", "lora", "device", "dtype", "offload", "vae_tiling", "attention_backend", "quantize")


@click.command(epilog="The same command again goes on with a film that was stopped, or that is to be longer.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The film, an MP4 that grows.")
@click.option("--image", help="Its start image: file or address. Not needed to go on.")
@click.option("--prompt", "prompt_list", multiple=True, help="What happens in a clip; may be given several times.")
@click.option("--prompts", "prompt_file", help="File of prompts: one a line, or a list.")
@click.option("--num_clips", type=int, help="Clips of the film; the last prompt holds. One a prompt if not given.")
@click.option("--preset", type=click.Choice([*PRESETS]), default="film", show_default=True, help="SVI LoRA.")
@click.option("--model", help="Another base model: Hub name or folder.")
@click.option("--lora", help="Another LoRA: Hub name, folder or file; `none` for the plain chain.")
@click.option("--lora_weight_name", help="The file in it.")
@click.option("--lora_weight_name_2", help="The file for the low-noise expert of Wan 2.2 A14B.")
@click.option("--height", type=int, help="In pixels; from the image's aspect if not given.")
@click.option("--width", type=int, help="In pixels; from the image's aspect if not given.")
@click.option("--resize_mode", help="An image of another aspect: stretch (if not given), crop or pad.")
@click.option("--num_frames", type=int, help="Frames of a clip, 1 + 4n; the preset's if not given.")
@click.option("--num_inference_steps", type=int, help="Steps of a clip; the preset's if not given.")
@click.option("--guidance_scale", type=float, help="Weight of the prompt; the preset's if not given.")
@click.option("--guidance_scale_2", type=float, help="That of the low-noise expert.")
@click.option("--negative_prompt", help="What it should not show; the authors' if not given.")
@click.option("--max_sequence_length", type=int, help="Tokens of a prompt; as many as Wan takes if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help=f"Of the first clip; then {SEED_STEP} more each.")
@click.option("--fps", type=float, help="Frames a second; the preset's if not given.")
@click.option("--crf", type=int, help="Of H.264: smaller is better and larger.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the model; float32 on a CPU, else bfloat16.")
@click.option("--device", help="Where it runs; the accelerator if there is one.")
@click.option(
    "--offload",
    type=click.Choice(OFFLOADS),
    default="none",
    show_default=True,
    help="Keep on the device what is at work: a model, or a group of its layers.",
)
@click.option("--vae_tiling", is_flag=True, help="Less memory for the VAE; static backgrounds may collect artifacts.")
@click.option("--attention_backend", help="Of diffusers' ways to compute attention: flash, sage, ...")
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    default="none",
    show_default=True,
    help="Smaller weights: quanto (8 bits, by optimum-quanto) or fp8 (kept in float8, transformers only).",
)
@click.option("--dry_run", is_flag=True, help="Check everything, tell what would be made, and load no model.")
def generate(
    out: Path,
    image: str | None,
    prompt_list: tuple[str, ...],
    prompt_file: str | None,
    preset: str,
    dry_run: bool,
    fps: float | None,
    crf: int | None,
    **options: Any,
) -> None:
    """Make a film, clip by clip, in one file."""
    from ..film import FilmWriter
    from ..prompts import load_prompts

    family = PRESETS[preset]
    if bool(prompt_list) == bool(prompt_file):
        raise click.UsageError("Give either `--prompt` or `--prompts`.")
    prompts: list[Any] = load_prompts(prompt_file) if prompt_file else list(prompt_list)
    num_clips = options["num_clips"] or len(prompts)
    if num_clips < len(prompts):
        raise click.UsageError(f"`--num_clips {num_clips}` leaves out some of the {len(prompts)} prompts.")
    start = None if image is None else _open_image(image)
    quality: dict[str, Any] = {} if crf is None else {"crf": crf}
    with FilmWriter(out, family.fps if fps is None else fps, **quality) as film:
        done = 0 if film.state is None else film.state.num_clips
        if start is None and not done:
            raise click.UsageError(f"{out} is not begun: give `--image`, its first frame.")
        if done >= num_clips:
            click.echo(f"{out} has {done} clips already. For a longer film, raise `--num_clips`.")
            return
        seconds = num_clips * (options["num_frames"] or family.num_frames) / float(film.fps)
        click.echo(f"{out}: clips {done + 1} to {num_clips}, about {seconds:.0f} seconds at {float(film.fps):g} fps.")
        if not dry_run:
            _make(film, family, start, prompts, num_clips, done, options)


def _make(
    film: Any, family: Preset, image: Any, prompts: list[Any], num_clips: int, done: int, options: dict[str, Any]
) -> None:
    """The clips that are missing, each told in a line where nobody watches a bar."""
    from ..loading import load_pipeline
    from ..prompts import NEGATIVE_PROMPT

    files = {name: options[f"lora_{name}"] for name in ("weight_name", "weight_name_2")}
    pipe = load_pipeline(family, **{name: options[name] for name in LOADING}, **files)
    watched = sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not watched)
    names = ("height", "width", "resize_mode", "guidance_scale_2", "max_sequence_length")
    clips = pipe.stream(
        image=image,
        prompts=prompts,
        num_clips=num_clips,
        seeds=itertools.count(options["seed"], SEED_STEP),
        state=film.state,
        negative_prompt=NEGATIVE_PROMPT if options["negative_prompt"] is None else options["negative_prompt"],
        num_frames=options["num_frames"] or family.num_frames,
        num_inference_steps=options["num_inference_steps"] or family.num_inference_steps,
        guidance_scale=family.guidance_scale if options["guidance_scale"] is None else options["guidance_scale"],
        **{name: options[name] for name in names if options[name] is not None},
    )
    began = time.monotonic()
    try:
        for clip in clips:
            film.append(clip)
            each = (time.monotonic() - began) / (clip.index + 1 - done)
            if not watched:
                left = each * (num_clips - clip.index - 1)
                click.echo(f"Clip {clip.index + 1} of {num_clips}: {each:.1f} s a clip, {left / 60:.1f} minutes left.")
    except KeyboardInterrupt:
        click.echo(f"\n{film.path} has {film.num_frames} frames. The same command goes on with it.", err=True)
        raise
    click.echo(f"{film.path}: {film.num_frames} frames, {film.num_frames / float(film.fps):.1f} seconds.")


def _open_image(image: str) -> Any:
    from diffusers.utils import load_image

    from ..start_image import read_image

    try:
        picture = load_image(image)
    except Exception as error:
        raise ValueError(f"`--image`={image!r} cannot be read: {error}") from error
    read_image(picture)
    return picture
