"""`diffusers-svi generate`: a film, clip by clip, in one file."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import (
    CLIPS,
    DRY_RUN,
    FILE,
    FOLLOWED,
    HEARING,
    MACHINE,
    MODEL,
    SEED,
    SETTINGS,
    SIZE,
    SOUND,
    START,
    WRITING,
    GroupedCommand,
    with_options,
)


EXAMPLES = """
diffusers-svi generate --image kitten.png --prompts story.txt --out film.mp4
diffusers-svi generate --image kitten.png --prompts - --out film.mp4  (type while it is made)
diffusers-svi generate --preset pro --offload model --image cat.png --prompt "it wakes" --num_clips 9 --out cat.mp4

diffusers-svi generate --preset talk --image cat.png --prompt "a person is talking" --audio speech.wav --out talk.mp4

accelerate launch -m diffusers_svi generate --jobs films.jsonl

The same command again goes on with a film that was stopped, or that is to be longer.
"""


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(START, CLIPS, FOLLOWED, MODEL, HEARING, SIZE, SETTINGS, SEED, FILE, SOUND, WRITING, MACHINE, DRY_RUN)
@click.pass_context
def generate(context: click.Context, dry_run: bool, recipe: Path | None, jobs: Path | None, **options: Any) -> None:
    """Make a film, clip by clip, in one file."""
    from .again import prompts_only, remade
    from .making import make
    from .order import order

    if jobs is not None:
        if options["out"] is not None or recipe is not None:
            raise click.UsageError("With `--jobs`, every line has its own `out`: leave out `--out` and `--recipe`.")
        from .jobs import make_all

        make_all(jobs, context.command, options, dry_run=dry_run)
        return
    if options["out"] is None:
        raise click.UsageError("`--out` is missing: the film's file.")
    told = None if recipe is None else prompts_only(recipe)
    if recipe is None or told is not None:
        make(order(options, told), dry_run=dry_run)
    else:
        _refuse_told(context)
        make(remade(recipe, options), dry_run=dry_run)


def _refuse_told(context: click.Context) -> None:
    """Raise a `click.UsageError` for an option that says what a recipe tells."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
        told = getattr(parameter, "group", "") not in ("File", "Machine", "Other")
        if given and told and parameter.name not in ("out", "model", "recipe", "pose", "audio_encoder"):
            raise click.UsageError(f"`{parameter.opts[0]}` cannot be given with `--recipe`, which tells it.")
