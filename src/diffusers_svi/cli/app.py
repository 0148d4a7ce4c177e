"""`diffusers-svi app`: the page on which films are made in a browser."""

import importlib.util
from pathlib import Path
from typing import Any

import click

from ..presets import PRESETS
from .options import (
    HEARING,
    LOADING,
    MACHINE,
    MODEL,
    PATH,
    SEED,
    SETTINGS,
    GroupedCommand,
    loading_of,
    option,
    with_options,
)


EXAMPLES = """
diffusers-svi app --preset pro --offload model
diffusers-svi app --folder films --port 8000 --open

Films lie in the folder, each in one of its own. After a stop or a crash every one of them can go on.
"""
PAGE = [
    option("Page", "--folder", type=PATH, default="films", show_default=True, help="Where films lie, and all else."),
    option("Page", "--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in, unasked."),
    option("Page", "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 for any."),
    option("Page", "--open", "open_browser", is_flag=True, help="Open the page in a browser."),
]
# Those of the settings that the page lets people choose anew for every film begin with what is given here.
SIZE = [
    option("Settings", "--height", type=int, help="In pixels; from the image's aspect if not given."),
    option("Settings", "--width", type=int, help="In pixels; from the image's aspect if not given."),
    option("Settings", "--num_frames", type=int, help="Frames of a clip, 1 + 4n; the preset's if not given."),
    option("Settings", "--fps", type=float, help="Frames a second; the preset's if not given."),
]


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(PAGE, MODEL, HEARING, SIZE, SETTINGS, SEED, MACHINE)
def app(folder: Path, host: str, port: int, open_browser: bool, preset: str, **options: Any) -> None:
    """Make films on a page in the browser."""
    # Not imported yet: `make_server` says first what it may do.
    if importlib.util.find_spec("gradio") is None:
        raise click.ClickException('The page needs Gradio: pip install "diffusers_svi[app]"')
    from ..app.serve import serve
    from ..app.settings import Settings
    from ..loading import load_pipeline
    from ..pipeline import SVIPipeline

    loading = loading_of(options)
    options = {name: value for name, value in options.items() if name not in LOADING}
    audio_encoder = options.pop("audio_encoder")
    own = loading["model"] is not None or loading["lora"] is not None

    def load(name: str) -> SVIPipeline:
        hearing = {"audio_encoder": audio_encoder} if PRESETS[name].follows == "audio" else {}
        return load_pipeline(PRESETS[name], **loading, **hearing)

    def ready(address: str) -> None:
        click.echo(f"The page is at {address} and its films in {folder}. Ctrl-C ends it.")
        if open_browser:
            click.launch(address)

    serve(
        folder,
        load,
        Settings.of(preset, **options),
        # A model of one's own is what it is, whatever the preset.
        [preset] if own else [*PRESETS],
        host,
        port,
        ready,
    )
