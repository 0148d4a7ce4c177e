"""The command `diffusers-svi`: films, and what files of this package hold."""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import click

from .presets import PRESETS, Preset


DTYPES = ("float32", "bfloat16", "float16")
# Seeds of the clips are so far apart. source: the authors' `seed_times`
SEED_STEP = 42


def main() -> None:
    """Run the command; its exit status is 0, 1 for an error, which is told in a line, or 130 for an interruption."""
    try:
        commands(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def commands() -> None:
    """Videos of any length with Wan models and Stable Video Infinity (SVI) LoRAs."""


@commands.command(epilog="The same command again goes on with a film that was stopped, or that is to be longer.")
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
    type=click.Choice(["none", "model", "group"]),
    default="none",
    show_default=True,
    help="Keep on the device what is at work: a model, or a group of its layers.",
)
@click.option("--vae_tiling", is_flag=True, help="Less memory for the VAE; static backgrounds may collect artifacts.")
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
    from .film import FilmWriter
    from .prompts import load_prompts

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
    from .prompts import NEGATIVE_PROMPT

    pipe = _load_pipeline(family, options)
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


def _load_pipeline(family: Preset, options: dict[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKLWan
    from diffusers.utils.torch_utils import get_device

    from .pipeline import SVIPipeline
    from .scheduler import SVIEulerScheduler

    device = options["device"] or get_device()
    dtype = getattr(torch, options["dtype"] or ("float32" if device == "cpu" else "bfloat16"))
    model = options["model"] or family.model
    # In half precision its rounding errors add up from clip to clip.
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    pipe = SVIPipeline.from_pretrained(model, vae=vae, dtype=dtype)
    pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift=family.shift)
    own = options["lora"] is not None
    lora = options["lora"] if own else family.lora
    if lora not in (None, "none"):
        pipe.load_lora_weights(
            lora,
            weight_name=options["lora_weight_name"] if own else family.weight_name,
            weight_name_2=options["lora_weight_name_2"] if own else family.weight_name_2,
        )
    if options["vae_tiling"]:
        pipe.vae.enable_tiling()
    if options["offload"] == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options["offload"] == "group":
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=device == "cuda")
    else:
        pipe.to(device)
    return pipe


def _open_image(image: str) -> Any:
    from diffusers.utils import load_image

    from .start_image import read_image

    try:
        picture = load_image(image)
    except Exception as error:
        raise ValueError(f"`--image`={image!r} cannot be read: {error}") from error
    read_image(picture)
    return picture


@commands.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Tell what FILE holds: a film, the state of one, or a LoRA."""
    from .chain import ChainState, read_notes
    from .film import read_clips
    from .lora_file import read_lora

    if file.suffix == ".mp4":
        clips = read_clips(file)
        for clip in clips:
            click.echo(f"clip {clip['index'] + 1}, from frame {clip['start']}: {clip['prompt']}")
        click.echo(_table(clips[-1]["made_with"]))
    elif file.suffix == ".safetensors":
        lora = read_lora(file)
        ranks = sorted({value.shape[0] for key, value in lora.state_dict.items() if ".lora_A." in key})
        told = {
            "scheme": lora.conditioning or "not known: pass `conditioning=` to `load_lora_weights`",
            "expert": lora.expert or "none of two",
            "CLIP sees": lora.clip_resize or "not told",
            "layers": len([key for key in lora.state_dict if ".lora_A." in key]),
            "rank": ", ".join(map(str, ranks)),
        }
        click.echo(_table(told))
    else:
        state = ChainState.load(file)
        height, width = state.image.shape[-2:]
        told = {"scheme": state.conditioning, "clips": state.num_clips, "frames a clip": state.num_frames}
        told |= {"size": f"{height} x {width}", "next clip from frame": state.start}
        notes = {name: value for name, value in read_notes(file).items() if name == "film"}
        click.echo(_table({**told, **state.made_with, **notes}))


def _table(values: dict[str, Any]) -> str:
    width = max(map(len, values), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in values.items())
