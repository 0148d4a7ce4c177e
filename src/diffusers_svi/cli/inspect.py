"""`diffusers-svi inspect`: what a file of this package holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click


FILMS = (".mp4", ".mkv", ".mov", ".webm")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="All that a film tells, as one JSON text.")
def inspect(file: Path, as_json: bool) -> None:
    """Tell what FILE holds: a film, the state of one, or a LoRA."""
    if as_json and file.suffix not in FILMS:
        raise click.UsageError("`--json` is for films.")
    if file.suffix in FILMS:
        _film(file, as_json)
    elif file.suffix == ".safetensors":
        _lora(file)
    else:
        _state(file)


def _film(file: Path, as_json: bool) -> None:
    from ..recipe import read_recipe

    recipe = read_recipe(file)
    if as_json:
        changes = {str(index): film for index, film in recipe.changes.items()}
        told = {"film": recipe.film, "clips": recipe.clips, "changes": changes, "form": recipe.form}
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    if recipe.after_video:
        click.echo("a video that the film begins with")
    for index, clip in enumerate(recipe.clips, start=1):
        more = ", ".join(f"{name} {_readable(value)}" for name, value in clip.items() if name != "prompt")
        click.echo(f"clip {index}: {clip.get('prompt', 'embeddings')}{f' ({more})' if more else ''}")
    parts: dict[str, Any] = {
        "film": recipe.film,
        **{f"from clip {index + 1} on": film for index, film in recipe.changes.items()},
    }
    for title, film in parts.items():
        if film:
            click.echo(f"\n{title}\n{_table(_lines(film))}")
    if recipe.form:
        click.echo(f"\nfile\n{_table(recipe.form)}")


def _lines(film: Mapping[str, Any]) -> dict[str, str]:
    """A recipe in a line for each of its parts; LoRAs and settings have several."""
    lines: dict[str, str] = {}
    for name, value in film.items():
        if name == "loras":
            lines |= {f"LoRA {lora.get('adapter')}": _readable(lora) for lora in value}
        elif name == "settings":
            lines |= {setting: _readable(told) for setting, told in value.items()}
        elif name != "format":
            lines[name] = _readable(value)
    return lines


def _readable(value: Any) -> str:
    """A value of a recipe in a line; of a picture, what it is and how large."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_readable(told)}" for name, told in value.items() if told is not None)
    if isinstance(value, str) and value.startswith("data:"):
        kind, _, content = value.partition(";base64,")
        return f"{kind.removeprefix('data:image/').upper()}, {max(1, len(content) * 3 // 4000)} kB"
    return str(value)


def _lora(file: Path) -> None:
    from ..lora_file import read_lora

    lora = read_lora(file)
    ranks = sorted({value.shape[0] for key, value in lora.state_dict.items() if ".lora_A." in key})
    told: dict[str, Any] = {"follows": lora.condition} if lora.condition is not None else {}
    told |= {
        "scheme": lora.conditioning or "not known: pass `conditioning=` to `load_lora_weights`",
        "expert": lora.expert or "none of two",
        "CLIP sees": lora.clip_resize or "not told",
        "layers": len([key for key in lora.state_dict if ".lora_A." in key]),
        "rank": ", ".join(map(str, ranks)),
    }
    click.echo(_table(told))


def _state(file: Path) -> None:
    from ..chain import ChainState, read_notes

    state = ChainState.load(file)
    height, width = state.image.shape[-2:]
    told = {"scheme": state.conditioning, "clips": state.num_clips, "frames a clip": state.num_frames}
    told |= {"size": f"{height} x {width}", "next clip from frame": state.start}
    notes = {name: value for name, value in read_notes(file).items() if name == "film"}
    click.echo(_table({**told, **state.made_with, **notes}))


def _table(values: Mapping[str, Any]) -> str:
    width = max(map(len, values), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in values.items())
