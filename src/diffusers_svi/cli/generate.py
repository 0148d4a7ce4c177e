"""`diffusers-svi generate`: a film, clip by clip, in one file."""

from typing import Any

import click

from .options import CLIPS, DRY_RUN, FILE, FINALIZE, MACHINE, MODEL, SETTINGS, START, GroupedCommand, with_options


EXAMPLES = """
diffusers-svi generate --image kitten.png --prompts story.txt --out film.mp4
diffusers-svi generate --image kitten.png --prompts - --out film.mp4  (type while it is made)
diffusers-svi generate --preset pro --offload model --image cat.png --prompt "it wakes" --num_clips 9 --out cat.mp4

The same command again goes on with a film that was stopped, or that is to be longer.
"""


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(START, CLIPS, MODEL, SETTINGS, FILE, FINALIZE, MACHINE, DRY_RUN)
def generate(dry_run: bool, **options: Any) -> None:
    """Make a film, clip by clip, in one file."""
    from .making import make
    from .order import order

    make(order(options), dry_run=dry_run)
