"""Films by the recipe of another: the same once more, or the film itself, longer."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import click

from ..clips import ClipSpec
from ..conditioning import scheme_from_dict
from ..conditions.following import CALLED, Following
from ..data_uri import from_data_uri
from ..journal import Journal
from ..loading import check_loading, check_recipe, load_recipe
from ..presets import SEED_STEP
from ..recipe import Recipe, read_recipe
from ..specs import check_clip
from .making import journal_of
from .options import LOADING
from .order import FILE, SETTINGS, Order, check_finalize, check_settings, read_prompts


# Of a recipe's settings, those that a call takes as they are.
TOLD = (*SETTINGS, "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt", "clip_resize")


def prompts_only(path: Path) -> list[ClipSpec] | None:
    """The prompts of a video of another program, of which nothing else is known; `None` for a film of this package."""
    recipe = read_recipe(path)
    return None if "model" in recipe.film else _specs(path, recipe)


def remade(path: Path, options: Mapping[str, Any]) -> Order:
    """The film in `path`, once more.

    Raises:
        ValueError: if it cannot be made again; the message tells why.
    """
    recipe = read_recipe(path)
    _check_remakable(path, recipe)
    specs = _specs(path, recipe)
    if recipe.form.get("audio") is not None and options["audio"] is None:
        raise ValueError(f"{path} has sound, which is not in its recipe: give its file by `--audio`.")
    if any(spec.seed is None for spec in specs):
        raise ValueError(
            f"{path} cannot be made again: its noise did not come from seeds, but from "
            f"{recipe.film['settings'].get('noise')!r}."
        )
    return _order(
        path,
        options,
        recipe,
        out=options["out"],
        prompts=specs,
        journaled=False,
        num_clips=len(specs),
        seeds=repeat(0),
        image=from_data_uri(recipe.film["image"]),
        file=_form(path, recipe),
    )


def extended(path: Path, options: Mapping[str, Any]) -> Order:
    """The film in `path`, longer by the prompts and clips in `options`; what they leave out is as it was.

    Raises:
        click.UsageError, ValueError: if it cannot be gone on with, or nothing is asked for.
    """
    recipe = read_recipe(path)
    check_recipe(recipe.film, options["model"])
    specs = _specs(path, recipe)
    if options["prompt_file"] and options["prompt_list"]:
        raise click.UsageError("Give either `--prompt` or `--prompts`.")
    form = _form(path, recipe)
    adapters = [lora["adapter"] for lora in recipe.film["loras"]]
    new = read_prompts(options, recipe.film["settings"], float(form["fps"]), adapters, len(specs))
    typed = new is None
    if not new and not typed and options["num_clips"] is None:
        raise click.UsageError("Say what is new: `--prompt`, `--prompts` or `--num_clips`.")
    journaled = typed or journal_of(path).exists()
    begun = len(Journal(journal_of(path), specs).entries) if journaled else len(specs)
    least = begun - len(specs) + sum(spec.num_clips for spec in new or ())
    more = options["num_clips"]
    if more is not None and more < max(least, 1):
        raise click.UsageError(f"`--num_clips {more}` is fewer than the {max(least, 1)} clips that are to be made.")
    more = least if more is None and not typed else more
    last = specs[-1].seed
    return _order(
        path,
        options,
        recipe,
        out=path,
        prompts=new if journaled or new is None else [*specs, *new],
        journaled=journaled,
        num_clips=None if more is None else len(specs) + more,
        # As if it had been asked for at once, where seeds are so far apart.
        seeds=chain(repeat(0, len(specs)), count(0 if last is None else last + SEED_STEP, SEED_STEP)),
        file=form,
        goes_on="`diffusers-svi extend` goes on with it: give what is left.",
    )


def _specs(path: Path, recipe: Recipe) -> list[ClipSpec]:
    try:
        return [check_clip(values, index) for index, values in enumerate(recipe.clips)]
    except ValueError as error:
        raise ValueError(f"{path} does not tell all that its clips were asked for with: {error}") from error


def _check_remakable(path: Path, recipe: Recipe) -> None:
    """Raise a `ValueError` unless all that the film was made with can be had again."""
    try:
        check_recipe(recipe.film)
    except ValueError as error:
        raise ValueError(f"{path} cannot be made again: {error}") from error
    if recipe.after_video:
        raise ValueError(f"{path} cannot be made again: it begins with a video. Give that by `--continue_from`.")
    before = _but_weights(recipe.film)
    for index, film in recipe.changes.items():
        changed = [name for name, value in _but_weights(film).items() if value != before.get(name)]
        if changed:
            raise ValueError(
                f"{path} cannot be made again: from clip {index} on it was made with something else "
                f"({', '.join(changed)})."
            )


def _but_weights(film: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what clips change, and tell themselves."""
    loras = [{name: value for name, value in lora.items() if name != "weights"} for lora in film["loras"]]
    return {**film, "loras": loras}


def _followed(path: Path, recipe: Recipe, options: Mapping[str, Any], fps: float) -> Following | None:
    """What the film in `path` follows, given once more.

    Raises:
        ValueError: if it is missing, or is not what it was; and where it follows nothing, for what it would follow.
    """
    settings = recipe.film.get("settings", {})
    name = next((name for name in CALLED if name in settings), None)
    if name is None:
        for option in ("pose", "audio_encoder"):
            if options[option] is not None:
                raise ValueError(f"{path} follows nothing beside text: leave out `--{option}`.")
        return None
    if options[name] is None:
        raise ValueError(
            f"{path} follows {CALLED[name]}, of which it tells no more than a fingerprint: give the file by "
            f"`--{name}`."
        )
    own = {option: settings[option] for option in ("audio_guidance_scale", "loop_pose") if option in settings}
    follows = Following(name=name, path=options[name], fps=float(fps), options=own).read()
    told = follows.told(settings["height"], settings["width"])
    if told != settings[name]:
        raise ValueError(
            f"{path} follows other {CALLED[name]} ({settings[name]}) than `--{name}` {str(options[name])!r} ({told}): "
            "give that."
        )
    return follows


def _order(path: Path, options: Mapping[str, Any], recipe: Recipe, **fields: Any) -> Order:
    """An order by the recipe in `path`, but for what the options say."""
    told = recipe.film.get("settings", {})
    settings = {name: told[name] for name in TOLD if told.get(name) is not None}
    new = {name: options[name] for name in TOLD if options.get(name) is not None}
    settings |= {**new, "ignore_state_settings": bool(new)}
    check_settings(settings)
    settings |= {"conditioning": scheme_from_dict(recipe.film["scheme"]), "ignore_lora_conditioning": True}
    loading = {name: options[name] for name in LOADING if not name.startswith("lora")}
    check_loading(**{name: loading[name] for name in ("dtype", "offload", "attention_backend", "quantize")})
    check_finalize(options["finalize"], fields["out"])
    form = {name: options[name] for name in ("fps", *FILE) if options.get(name) is not None}
    file = {**fields.pop("file"), **form}
    fps = file.pop("fps")
    follows = _followed(path, recipe, options, fps)
    if follows is not None and follows.name == "audio":
        loading["audio_encoder"] = options["audio_encoder"]
    return Order(
        fps=fps,
        load=partial(load_recipe, recipe.film, **loading),
        follows=follows,
        settings=settings,
        file=file,
        finalize=options["finalize"],
        **fields,
    )


def _form(path: Path, recipe: Recipe) -> dict[str, Any]:
    """How a film is encoded, as arguments of `FilmWriter`."""
    try:
        form = recipe.form
        return {"fps": Fraction(form["fps"]), **{name: form[name] for name in ("codec", "crf", "pixel_format")}}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not tell how it is encoded ({error!r} is missing).") from error
