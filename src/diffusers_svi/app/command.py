"""The command `diffusers-svi app`."""

import importlib.util
from pathlib import Path
from typing import Any

import click

from ..presets import DTYPES, OFFLOADS, PRESETS, QUANTIZATIONS


LOADING = ("model", "lora", "device", "dtype", "offload", "vae_tiling", "attention_backend", "quantize")


@click.command(epilog="Films lie in the folder, one sub-folder each. After a stop or a crash each of them can go on.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("films"),
    show_default=True,
    help="Where the films lie. Nothing is written elsewhere.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in, unasked.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 for any free one.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
@click.option("--preset", type=click.Choice([*PRESETS]), default="film", show_default=True, help="Chosen at first.")
@click.option("--model", help="Another base model: Hub name or folder. Then `--preset` is the only one.")
@click.option("--lora", help="Another LoRA: Hub name, folder or file; `none` for the plain chain. As with `--model`.")
@click.option("--lora_weight_name", help="The file in it.")
@click.option("--lora_weight_name_2", help="The file for the low-noise expert of Wan 2.2 A14B.")
@click.option("--height", type=int, help="Of a new film, in pixels; may be changed on the page, as the next five.")
@click.option("--width", type=int, help="Of a new film, in pixels.")
@click.option("--num_frames", type=int, help="Frames of a clip, 1 + 4n; the preset's if not given.")
@click.option("--num_inference_steps", type=int, help="Steps of a clip; the preset's if not given.")
@click.option("--guidance_scale", type=float, help="Weight of the prompt; the preset's if not given.")
@click.option("--fps", type=float, help="Frames a second; the preset's if not given.")
@click.option("--max_sequence_length", type=int, help="Tokens of a prompt; as many as Wan takes if not given.")
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
def app(folder: Path, host: str, port: int, open_browser: bool, preset: str, **options: Any) -> None:
    """Make films on a page in the browser."""
    # Not imported yet: `make_server` says first what it may do.
    if importlib.util.find_spec("gradio") is None:
        raise click.ClickException('The page needs Gradio: pip install "diffusers_svi[app]"')
    from ..loading import check_loading, load_pipeline
    from .project import Settings
    from .serve import serve

    loading = {name: options.pop(name) for name in LOADING}
    loading |= {name: options.pop(f"lora_{name}") for name in ("weight_name", "weight_name_2")}
    own = loading["model"] is not None or loading["lora"] is not None
    check_loading(**{name: value for name, value in loading.items() if name not in ("model", "device", "vae_tiling")})

    def ready(address: str) -> None:
        click.echo(f"The page is at {address} and its films in {folder}. Ctrl-C ends it.")
        if open_browser:
            click.launch(address)

    serve(
        folder,
        lambda name: load_pipeline(PRESETS[name], **loading),
        Settings.of(preset, **options),
        [preset] if own else [*PRESETS],
        host,
        port,
        ready,
    )
