"""How a film is made, all of it, as plain values that stand in the film's file: made out of a pipeline, and read."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import WanImageToVideoPipeline

from . import __version__
from .conditioning import Scheme
from .data_uri import to_data_uri
from .lora import FUSED_KEY
from .lora_layers import experts_of, lora_layers
from .notes import read_notes
from .pixels import to_pil, to_uint8
from .weights_file import NO_FILE


FORMAT = "diffusers_svi.recipe"
# Under this key of a note stands what holds for the film, not for one clip.
RECIPE_KEY = "recipe"
# And under this one, how the file is encoded.
FORM_KEY = "form"
# A folder of the Hub's cache.
_SNAPSHOT = re.compile(r"models--(?P<name>[^\\/]+)[\\/]snapshots[\\/](?P<commit>[0-9a-f]{40})")


def film_recipe(
    pipe: WanImageToVideoPipeline, settings: Mapping[str, Any], image: torch.Tensor, scheme: Scheme
) -> dict[str, Any]:
    """All that holds for a whole film, as values that JSON knows.

    Args:
        pipe: What it is made with, LoRAs and their present weights included.
        settings (`dict`): Arguments of the call by name; of a tensor among them, its shape and type are told.
        image (`torch.Tensor` of shape `(1, 3, height, width)`): The start image in [-1, 1]; told in 8 bits a channel.
        scheme (`Scheme`): How the clips are chained.

    Returns:
        `dict`: `format`, `versions`, `model`, `loras`, `scheme`, `scheduler`, `image` (a PNG as a data URI) and
        `settings`. Of LoRAs that were fused and taken out, the schemes stand in `model`, under `fused`.
    """
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    recipe = {
        "format": FORMAT,
        "versions": {
            "diffusers_svi": __version__,
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        },
        "model": _model(pipe),
        "loras": _loras(pipe),
        "scheme": scheme.to_dict(),
        "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
        "image": to_data_uri(to_pil(to_uint8(image)[0])),
        "settings": dict(settings),
    }
    # What JSON has no form for is told in words.
    return json.loads(json.dumps(recipe, default=_in_words))


@dataclass(frozen=True)
class Recipe:
    """How a film was made.

    Args:
        film (`dict`): What held for all of it, as [`film_recipe`] gives it; empty where that was not told.
        clips (`list[dict]`): Every clip as `ClipSpec.to_dict` gives it, with the seed it had.
        changes (`dict[int, dict]`): What held from a clip on, by its number, where that changed.
        form (`dict`): How the file of a `FilmWriter` is encoded: `fps`, `codec`, `crf`, `pixel_format`.
        after_video (`bool`): Whether the film begins with a video, which its clips go on from.
    """

    film: dict[str, Any]
    clips: list[dict[str, Any]]
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)
    after_video: bool = False


def read_recipe(path: str | os.PathLike) -> Recipe:
    """How the film in a file was made.

    It is told by the file of a `FilmWriter`, by what `finalize` made of it, and by videos of Wan2GP: of these, prompts
    and seed are taken over, and nothing else. A clip that embeddings were given for has no prompt. The video that a
    film begins with is not among its clips.

    Raises:
        ValueError: if the file cannot be read, or does not say how it was made.
    """
    recipes: dict[int, dict[str, Any]] = {}
    clips: list[dict[str, Any]] = []
    form: dict[str, Any] = {}
    after_video = False
    for told in read_notes(path):
        if RECIPE_KEY in told:
            recipes[len(clips)] = told[RECIPE_KEY]
            form = told.get(FORM_KEY, form)
        elif isinstance(told.get("index"), int) and told["index"] >= 0:
            prompt = told.get("prompt")
            clips.append(told.get("spec") or ({} if prompt is None else {"prompt": prompt}))
        elif told.get("index") == -1:
            after_video = True
        elif isinstance(told.get("prompt"), str):
            recipes[0], clips = {"format": "Wan2GP"}, _clips_of_wan2gp(told)
    if not clips:
        raise ValueError(f"`path`={str(path)!r} does not say how it was made.")
    return Recipe(recipes.pop(0, {}), clips, recipes, form, after_video)


def _clips_of_wan2gp(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The clips of a video of Wan2GP: its prompt, or those of its windows, and the seed that it began with."""
    # source: Wan2GP's `shared/utils/prompt_parser.py` leaves out lines that begin with #; its `multi_prompts_gen_type`
    # says whether lines, or paragraphs, are prompts of one window each, or all of them one prompt.
    lines = [line.strip() for line in told["prompt"].removeprefix("!enhanced!\n").splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("#"))
    mode = str(told.get("multi_prompts_gen_type", "W"))
    between = None if mode in ("2", "FG", "") else "\n\n" if "P" in mode else "\n"
    prompts = [text] if between is None else text.split(between)
    clips: list[dict[str, Any]] = [{"prompt": prompt.strip()} for prompt in prompts if prompt.strip()]
    seed = told.get("seed")
    # -1 stands for one that was drawn.
    if clips and isinstance(seed, int) and seed >= 0:
        clips[0]["seed"] = seed
    return clips


def _model(pipe: WanImageToVideoPipeline) -> dict[str, Any]:
    name = pipe.config.get("_name_or_path")
    experts = [*experts_of(pipe).values()]
    found = None if name is None else _SNAPSHOT.search(str(experts[0].config.get("_name_or_path")))
    of_name = found is not None and found["name"] == str(name).replace("/", "--")
    told = {
        "name": name,
        "revision": found["commit"] if found is not None and of_name else None,
        "dtype": str(experts[0].dtype).removeprefix("torch."),
    }
    fused = [scheme for expert in experts for scheme in expert.config.get(FUSED_KEY, [])]
    return told | ({"fused": fused} if fused else {})


def _loras(pipe: WanImageToVideoPipeline) -> list[dict[str, Any]]:
    """Every LoRA that is loaded: where it came from, and its weight in each expert. One for both is one."""
    loras: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for component, module in experts_of(pipe).items():
        for adapter, config in getattr(module, "peft_config", {}).items():
            source = getattr(config, "svi_source", {"name": NO_FILE[1]})
            lora = loras.setdefault(
                (adapter, source["name"], source.get("revision")),
                {"adapter": adapter, "name": source["name"], "revision": source.get("revision")}
                | {"weight_name": None, "weight_name_2": None, "sha256": {}, "weights": {}},
            )
            if "subfolder" in source:
                lora["subfolder"] = source["subfolder"]
            # A file for one expert is `weight_name`, whichever it is for.
            second = component == "transformer_2" and "transformer" in lora["weights"]
            lora["weight_name_2" if second else "weight_name"] = source.get("weight_name")
            if "sha256" in source:
                lora["sha256"][component] = source["sha256"]
            lora["weights"][component] = _weight(module, adapter)
    return list(loras.values())


def _weight(module: torch.nn.Module, adapter: str) -> float | dict[str, float]:
    """The weight of an adapter, 0 where it does nothing; by layer where they differ."""
    weights = {}
    for name, layer in lora_layers(module).items():
        if adapter not in layer.scaling:
            continue
        at_weight_1 = layer.lora_alpha[adapter] / layer.r[adapter] ** (0.5 if layer.use_rslora[adapter] else 1)
        merged = adapter in layer.merged_adapters
        active = merged or (adapter in layer.active_adapters and not layer.disable_adapters)
        # Rounded, as the division is not the exact inverse of what was multiplied.
        weights[name] = float(f"{layer.scaling[adapter] / at_weight_1:.9g}") if active else 0.0
    values = set(weights.values())
    return weights if len(values) > 1 else next(iter(values), 0.0)


def _in_words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return str(value)
