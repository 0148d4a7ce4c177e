"""The model card of a trained LoRA: how it is used, how it was made, and a sample."""

import os
from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from ..conditioning import Scheme


def make_model_card(
    repo_id: str,
    base_model: str,
    weight_name: str,
    scheme: Scheme,
    method: str,
    settings: dict[str, object],
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: int = 16,
    expert: str | None = None,
    film: str | os.PathLike | None = None,
    figures: dict[str, list[float]] | None = None,
) -> ModelCard:
    """The card, with what the Hub reads of it.

    It is made anew every time: `load_or_create_model_card` of diffusers would hand back the card that is already in
    the repository, without this text.

    Args:
        repo_id (`str`): Of the LoRA.
        base_model (`str`): What it was trained on: a repository, or a local folder, which the Hub is not told of.
        weight_name (`str`): Its file.
        scheme (`Scheme`): How its clips are chained.
        method (`str`): How it was trained, after "trained": "by error recycling", say.
        settings (`dict[str, object]`): Rows of a table; those that are `None` are left out.
        height, width, num_frames, fps (`int`): Of the clips in the example.
        expert (`str`, *optional*): "high" or "low", for one expert of Wan 2.2 A14B.
        film (*optional*): A film of it, as `save_film` writes it, relative to the card.
        figures (`dict[str, list[float]]`, *optional*): What `save_film` returned.
    """
    is_local = os.path.isdir(base_model)
    load = ", load_into_transformer_2=True" if expert == "low" else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None)
    text = f"""# SVI LoRA: {repo_id}

A LoRA for {f"`{base_model}`" if is_local else f"[{base_model}](https://huggingface.co/{base_model})"} for
videos of any length, trained {method} ([paper](https://arxiv.org/abs/2510.09212)) with diffusers_svi.
Clips are chained by `{scheme}`, which `load_lora_weights` reads from the file.

```python
import torch
from diffusers.utils import export_to_video, load_image
from diffusers_svi import SVIPipeline

pipe = SVIPipeline.from_pretrained("{base_model}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo_id}", weight_name="{weight_name}"{load})
film = pipe(
    image=load_image("start.png"),
    prompts=["what the first clip shows", "what the next one shows"],
    height={height},
    width={width},
    num_frames={num_frames},
).frames[0]
export_to_video(film, "film.mp4", fps={fps})
```

| setting | |
|---|---|
{rows}
"""
    if film is not None and figures is not None:
        text += _sample(Path(film), figures)
    data = ModelCardData(base_model=None if is_local else base_model, pipeline_tag="image-to-video")
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    return populate_model_card(card, ["image-to-video", "diffusers", "diffusers-training", "lora", "wan", "svi"])


def _sample(film: Path, figures: dict[str, list[float]]) -> str:
    rows = zip(*figures.values(), strict=True)
    table = "\n".join(
        f"| {number} | " + " | ".join(f"{value:.3f}" for value in row) + " |" for number, row in enumerate(rows, 1)
    )
    return f"""
## Sample

[{len(next(iter(figures.values())))} clips]({film.as_posix()}) from one image, last frames:

![last frame of every clip]({film.with_suffix(".png").as_posix()})

How its clips differ from the first, in their last frames:

| clip | {" | ".join(name.replace("_", " ") for name in figures)} |
|---|{"---|" * len(figures)}
{table}
"""
