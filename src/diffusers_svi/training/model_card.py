"""What a run tells of its LoRA, and the model card made of it: how it is used, how it was made, and a sample."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from ..checks import check_choice
from ..conditioning import Scheme, scheme_from_dict
from ..files import written_whole
from ..lora_file import EXPERTS, PIPELINE_NAMES
from ..published import audio_encoder_revision


# For films that follow something: what their pipeline is given, and what saves them.
_FOLLOWING = {
    "audio": ('audio=open_audio("speech.wav", encoder, fps={fps})', ', audio="speech.wav"'),
    "pose": ('pose="dance.mp4"', ""),
}
# Settings that the example of the card takes from the table.
_OF_EXAMPLE = ("height", "width", "num_frames", "fps", "flow_shift")


def weight_name(expert: str | None = None) -> str:
    """The file of a LoRA, or of that of one expert, "high" or "low": both have their place in one folder."""
    if expert is None:
        return "pytorch_lora_weights.safetensors"
    check_choice("expert", expert, EXPERTS)
    return f"pytorch_lora_weights_{expert}_noise.safetensors"


def description_name(expert: str | None = None) -> str:
    """The file beside it that tells of it."""
    return weight_name(expert).replace(".safetensors", ".json")


@dataclass(frozen=True, kw_only=True)
class TrainedLora:
    """A LoRA as its card tells of it. It is kept beside the weights, since the card of two experts tells of both.

    Args:
        base_model (`str`): What it was trained on: a repository, or a local folder, which the Hub is not told of.
        scheme (`Scheme`): How its clips are chained.
        method (`str`): How it was trained, after "trained": "by error recycling", say.
        settings (`dict[str, Any]`):
            Rows of a table; those that are `None` are left out. The example takes `height`, `width`, `num_frames`,
            `fps` and `flow_shift` from there.
        expert (`str`, *optional*): "high" or "low", for one expert of Wan 2.2 A14B.
        film (`str`, *optional*): A film of it, as `save_film` writes it, relative to the card.
        figures (`dict[str, list[float]]`, *optional*): What `save_film` returned.
        condition (`str`, *optional*): What its films follow beside text, "audio" or "pose".
        has_modules (`bool`, defaults to `False`): Whether the modules for that lie in its file.

    Raises:
        ValueError: if a setting that the example needs is missing.
    """

    base_model: str
    scheme: Scheme
    method: str
    settings: dict[str, Any]
    expert: str | None = None
    film: str | None = None
    figures: dict[str, list[float]] | None = None
    condition: str | None = None
    has_modules: bool = False

    def __post_init__(self) -> None:
        missing = [name for name in _OF_EXAMPLE if self.settings.get(name) is None]
        if missing:
            raise ValueError(f"`settings` lacks {', '.join(missing)}, which the example of the model card has.")

    def save(self, folder: str | os.PathLike) -> None:
        """Write it to `folder`, under the name that [`read_description`] looks for."""
        values = {**asdict(self), "scheme": self.scheme.to_dict()}
        with written_whole(Path(folder) / description_name(self.expert)) as unfinished:
            unfinished.write_text(json.dumps(values, indent=1) + "\n")


def read_description(folder: str | os.PathLike, expert: str | None = None) -> TrainedLora | None:
    """What lies in `folder` about a LoRA, or that of one expert; `None` if nothing does.

    Raises:
        ValueError: if the file is damaged.
    """
    file = Path(folder) / description_name(expert)
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        return TrainedLora(**{**values, "scheme": scheme_from_dict(values["scheme"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not tell of a LoRA: {error!r}. Delete it.") from error


def write_model_card(folder: str | os.PathLike, repo_id: str, expert: str | None = None) -> None:
    """Write the card of the LoRA in `folder`: with an `expert`, of both as far as they are told of there.

    Raises:
        ValueError: as [`make_model_card`] and [`read_description`].
    """
    told = (read_description(folder, which) for which in ([None] if expert is None else EXPERTS))
    make_model_card(repo_id, [lora for lora in told if lora is not None]).save(Path(folder) / "README.md")


def make_model_card(repo_id: str, loras: list[TrainedLora]) -> ModelCard:
    """The card, with what the Hub reads of it.

    It is made anew every time: `load_or_create_model_card` of diffusers would hand back the card that is already in
    the repository, without this text.

    Args:
        repo_id (`str`): Of the LoRA.
        loras (`list[TrainedLora]`): The one, or those of the high-noise and the low-noise expert.

    Raises:
        ValueError: if the two were trained for different schemes.
    """
    last = loras[-1]
    for lora in loras:
        if lora.scheme != last.scheme:
            raise ValueError(
                f"The repository {repo_id!r} is for one LoRA, but its experts cannot be used together: the "
                f"{lora.expert}-noise one is for {lora.scheme}, the {last.expert}-noise one for {last.scheme}. Push "
                "them to repositories of their own."
            )
    base_model, is_local = last.base_model, os.path.isdir(last.base_model)
    methods = " and ".join(dict.fromkeys(lora.method for lora in loras))
    text = f"""# SVI LoRA: {repo_id}

A LoRA for {f"`{base_model}`" if is_local else f"[{base_model}](https://huggingface.co/{base_model})"} for
videos of any length, trained {methods} ([paper](https://arxiv.org/abs/2510.09212)) with diffusers_svi.
Clips are chained by `{last.scheme}`, which `load_lora_weights` reads from the file.{_following(last)}

```python
{_example(repo_id, loras)}
```

{_table(loras)}
"""
    # A film of both is one sample.
    shared = len(loras) > 1 and len({lora.film for lora in loras}) == 1
    text += "".join(_sample(lora) for lora in ([replace(last, expert=None)] if shared else loras))
    data = ModelCardData(base_model=None if is_local else base_model, pipeline_tag="image-to-video")
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    return populate_model_card(card, ["image-to-video", "diffusers", "diffusers-training", "lora", "wan", "svi"])


def _following(lora: TrainedLora) -> str:
    """What else is to be told where films follow audio or poses."""
    if lora.condition is None:
        return ""
    name, source = PIPELINE_NAMES[lora.condition], lora.settings.get("condition_modules")
    modules = "Those lie in the file too." if lora.has_modules else f"They are those of `{source or lora.base_model}`."
    return f"\nIts films follow {lora.condition}, for which `{name}` gives the model modules. {modules}"


def _example(repo_id: str, loras: list[TrainedLora]) -> str:
    settings, base_model = loras[-1].settings, json.dumps(loras[-1].base_model)
    files = [f'weight_name="{weight_name(loras[0].expert)}"']
    files += [f'weight_name_2="{weight_name(lora.expert)}"' for lora in loras[1:]]
    files += ["load_into_transformer_2=True"] if [lora.expert for lora in loras] == ["low"] else []
    condition, imports, loaded = loras[-1].condition, "", ""
    name, follows, saved = "SVIPipeline", "", ""
    if condition is not None:
        name, (follows, saved) = PIPELINE_NAMES[condition], _FOLLOWING[condition]
        follows = f"\n    {follows.format(fps=settings['fps'])},"
    if condition == "audio":
        imports = """
from diffusers_svi.conditions.audio import open_audio
from transformers import Wav2Vec2Model"""
        encoder = settings.get("audio_encoder") or "wav2vec2"
        revision = audio_encoder_revision(encoder)
        where = "" if revision == "main" else f', revision="{revision}", use_safetensors=True'
        loaded = f"""
# that it was trained with
encoder = Wav2Vec2Model.from_pretrained({json.dumps(encoder)}{where})"""
        source = settings.get("condition_modules")
        if not loras[-1].has_modules and source:
            files.append(f"audio_modules={json.dumps(source)}")
    arguments = ",\n    ".join([json.dumps(repo_id), *files])
    components = "vae=vae, audio_encoder=encoder" if condition == "audio" else "vae=vae"
    return f"""import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import load_image
from diffusers_svi import NEGATIVE_PROMPT, SVIEulerScheduler, {name}, save_video{imports}

model = {base_model}{loaded}
# in half precision, static backgrounds collect artifacts from clip to clip
vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)
pipe = {name}.from_pretrained(model, {components}, dtype=torch.bfloat16).to("cuda")
# the schedule it was trained with
pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift={settings["flow_shift"]})
pipe.load_lora_weights(
    {arguments},
)
film = pipe(
    image=load_image("start.png"),
    prompts=["what the first clip shows", "what the next one shows"],{follows}
    negative_prompt=NEGATIVE_PROMPT,
    height={settings["height"]},
    width={settings["width"]},
    num_frames={settings["num_frames"]},
).frames[0]
save_video("film.mp4", film, fps={settings["fps"]}{saved})"""


def _table(loras: list[TrainedLora]) -> str:
    names = list(dict.fromkeys(name for lora in loras for name in lora.settings))
    rows = [(name, [lora.settings.get(name) for lora in loras]) for name in names]
    heads = [f"{lora.expert}-noise expert" if len(loras) > 1 else "" for lora in loras]
    lines = [f"| setting | {' | '.join(heads)} |", f"|---|{'---|' * len(loras)}"]
    for name, values in rows:
        if any(value is not None for value in values):
            lines.append(f"| {name} | {' | '.join('' if value is None else str(value) for value in values)} |")
    return "\n".join(lines)


def _sample(lora: TrainedLora) -> str:
    if lora.film is None or lora.figures is None:
        return ""
    rows = zip(*lora.figures.values(), strict=True)
    table = "\n".join(
        f"| {number} | " + " | ".join(f"{value:.3f}" for value in row) + " |" for number, row in enumerate(rows, 1)
    )
    by_expert = f" by the {lora.expert}-noise expert" if lora.expert else ""
    return f"""
## Sample{by_expert}

[{len(next(iter(lora.figures.values())))} clips]({lora.film}) from one image, last frames:

![last frame of every clip]({Path(lora.film).with_suffix(".png").as_posix()})

How its clips differ from the first, in their last frames:

| clip | {" | ".join(name.replace("_", " ") for name in lora.figures)} |
|---|{"---|" * len(lora.figures)}
{table}
"""
