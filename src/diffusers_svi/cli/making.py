"""A film that was ordered is made, clip by clip."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..chain import ChainState
from ..clips import Clip, ClipSpec
from ..conditioning import PixelMotion
from ..film import FilmWriter
from ..inputs import check_size
from ..journal import Journal
from ..pipeline import SVIPipeline
from ..recipe import film_recipe, read_recipe
from ..specs import check_guidance
from ..start_image import read_image
from .order import Order
from .typed import Typed


# What changes a film, and is known before a model is loaded.
COMPARED = ("num_inference_steps", "negative_prompt", "max_sequence_length", "color_match")


def make(order: Order, load: Callable[[], SVIPipeline] | None = None, *, dry_run: bool = False) -> None:
    """Make what is missing of a film.

    Args:
        order (`Order`): The film.
        load (`Callable`, *optional*): Gives the pipeline, once it is needed; instead of `order.load`.
        dry_run (`bool`): Only tell what would be made.

    Raises:
        click.UsageError, ValueError: for what cannot be right.
        OSError: if something cannot be read or written.
        FloatingPointError: if a clip comes out with values that are not finite.
    """
    with order.writer() as film:
        order = order.of_state(film.state)
        done = check(order, film)
        if done == order.num_clips:
            click.echo(f"{order.out} has {done} clips already. For a longer film, raise `--num_clips`.")
        else:
            click.echo(_told(order, film, done))
            if dry_run:
                return
            try:
                _run(order, film, (load or order.load)())
            except KeyboardInterrupt:
                click.echo(f"\n{film.path} has {film.num_frames} frames. {order.goes_on}", err=True)
                raise
            click.echo(f"{film.path}: {film.num_frames} frames, {film.num_frames / float(film.fps):.1f} seconds.")
        if order.finalize is not None and not dry_run:
            film.finalize(order.finalize)
            click.echo(f"{order.finalize}: the same as an ordinary file.")


def check(order: Order, film: FilmWriter) -> int:
    """The clips that the film has already, if it is the one that is ordered."""
    done = 0 if film.state is None else film.state.num_clips
    if film.state is None and order.image is None and order.video is None:
        raise click.UsageError(f"{order.out} is not begun: give `--image`, its first frame, or `--continue_from`.")
    if order.num_clips is not None and done > order.num_clips:
        raise click.UsageError(
            f"{order.out} has {done} clips, and {order.num_clips} are asked for: raise `--num_clips`, or choose "
            "another `--out`."
        )
    if done and film.state is not None and not order.settings.get("ignore_state_settings"):
        _check_settings(order, film.state)
    if order.journaled:
        _journal(order, done)
    elif journal_of(order.out).exists():
        raise click.UsageError(
            f"{order.out} was directed while it was made, as {journal_of(order.out)} tells. Go on with `--prompts -` "
            "or with `diffusers-svi extend`, or delete that file."
        )
    return done


def _check_settings(order: Order, state: ChainState) -> None:
    """Raise a `ValueError` where a film was made with other settings."""
    made_with, size = state.made_with, state.image.shape[-2:]
    scales = check_guidance(order.settings["guidance_scale"], order.settings.get("guidance_scale_2"))
    asked = {
        **{name: value for name, value in order.settings.items() if name in COMPARED},
        **dict(zip(("guidance_scale", "guidance_scale_2"), scales, strict=True)),
        **({} if order.follows is None else {order.follows.name: order.follows.told(*size), **order.follows.options}),
    }
    for name, value in asked.items():
        if name in made_with and made_with[name] != str(value):
            raise ValueError(
                f"{order.out} was made with `{name}` {made_with[name]!r}, and {str(value)!r} is asked for. Ask for "
                "the same, choose another `--out`, or go on with other settings by `diffusers-svi extend`."
            )


def _check_loaded(film: FilmWriter, pipe: SVIPipeline) -> None:
    """Raise a `ValueError` where a film was made with another type, other LoRAs or another scheduler."""
    assert film.state is not None
    told = read_recipe(film.path)
    before = _of_model([told.film, *told.changes.values()][-1])
    now = _of_model(film_recipe(pipe, {}, film.state.image, film.state.conditioning))
    for name in before:
        if before[name] != now[name]:
            raise ValueError(
                f"{film.path} was made with {name} {before[name]}, and now it is {now[name]}. Ask for the same, or "
                "choose another `--out`."
            )


def _of_model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe stays while a film is made, wherever its parts lie."""
    if not recipe:
        return {}
    loras = [lora["sha256"] for lora in recipe["loras"]]
    return {"dtype": recipe["model"]["dtype"], "LoRAs": loras, "scheduler": recipe["scheduler"]}


def _told(order: Order, film: FilmWriter, done: int) -> str:
    rate, seconds = float(film.fps), order.settings["num_frames"] / float(film.fps)
    if order.num_clips is None:
        return f"{order.out}: from clip {done + 1} on, about {seconds:.1f} seconds each at {rate:g} fps."
    whole = order.num_clips * seconds
    return f"{order.out}: clips {done + 1} to {order.num_clips}, about {whole:.0f} seconds at {rate:g} fps."


def _run(order: Order, film: FilmWriter, pipe: SVIPipeline) -> None:
    if film.state is not None and film.state.num_clips:
        _check_loaded(film, pipe)
    if film.state is None and order.video is not None:
        size = {name: order.settings.get(name) for name in ("height", "width")}
        scheme = pipe.lora_conditioning or PixelMotion()
        options = {"vae": pipe.vae, "fps": int(order.fps), **size}
        film.append(Clip.from_video(order.video, scheme, order.settings["num_frames"], **options))
    journal = _journal(order, 0 if film.state is None else film.state.num_clips) if order.journaled else None
    with ExitStack() as stack:
        prompts: Any = order.prompts
        tell = None
        if prompts is None:
            assert journal is not None
            typed = stack.enter_context(Typed(repeats=bool(journal.entries)))
            if typed.watched:
                # A bar would be written over what is typed.
                pipe.set_progress_bar_config(disable=True)
                tell = typed.tell
            prompts = typed
        clips = pipe.stream(
            image=order.image,
            prompts=prompts if journal is None else journal.prompts(prompts, order.num_clips),
            num_clips=order.num_clips,
            seeds=order.seeds,
            state=film.state,
            **order.settings,
            **followed(order, pipe, film.state),
        )
        for clip in clips:
            film.append(clip)
            if tell is not None:
                tell(f"Clip {clip.index + 1} is done: {clip.prompt}")
    if not film.num_frames:
        raise click.UsageError("There was no prompt: nothing was made.")


def followed(order: Order, pipe: SVIPipeline, state: ChainState | None) -> dict[str, Any]:
    """What `pipe` is given of what the film follows."""
    if order.follows is None:
        return {}
    image = None if order.image is None else read_image(order.image)
    size = check_size(pipe, order.settings.get("height"), order.settings.get("width"), image, state)
    return order.follows.arguments(pipe, *size)


def journal_of(out: Path) -> Path:
    """Where the prompts of a film are kept that is directed while it is made."""
    return out.with_name(f"{out.name}.journal")


def _journal(order: Order, done: int) -> Journal:
    clips = [ClipSpec.from_dict(values) for values in read_recipe(order.out).clips] if done else []
    return Journal(journal_of(order.out), clips)
