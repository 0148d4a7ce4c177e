"""`diffusers-svi extend`: a film that was made, longer."""

from pathlib import Path
from typing import Any

import click

from .options import (
    BASE,
    DRY_RUN,
    ENCODER,
    MACHINE,
    NEW_CLIPS,
    POSE,
    SETTINGS,
    SOUND,
    WRITING,
    GroupedCommand,
    with_options,
)


EXAMPLES = """
diffusers-svi extend film.mp4 --prompt "the sun sets"
diffusers-svi extend film.mp4 --num_clips 5            (with its last prompt)
diffusers-svi extend film.mp4 --prompts -              (type while it is made)
"""


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@click.argument("film", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@with_options(NEW_CLIPS, POSE, BASE, ENCODER, SETTINGS, SOUND, WRITING, MACHINE, DRY_RUN)
def extend(film: Path, dry_run: bool, **options: Any) -> None:
    """Go on with FILM, stopped or done, as it was made: model, LoRAs and settings are those its file tells.

    What it follows, and its sound, are given again: --audio, --pose.
    """
    from .again import extended
    from .making import make

    make(extended(film, options), dry_run=dry_run)
