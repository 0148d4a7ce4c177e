"""`diffusers-svi inspect`: what a file of this package holds."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Tell what FILE holds: a film, the state of one, or a LoRA."""
    from ..chain import ChainState, read_notes
    from ..film import read_clips
    from ..lora_file import read_lora

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
