"""The first block: what a film is asked for with, checked as `SVIPipeline` checks it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam

from ..chain import ChainState
from ..clips import ClipSpec
from ..conditioning import Scheme, scheme_from_dict
from ..inputs import Film, check_film
from ..lora_layers import experts_of
from ..options import FILM_DEFAULTS, FilmOptions
from .underway import pipeline_of


GUIDERS = ("guider", "guider_2")
# A guider's, or of the parent pipeline's loop.
_ELSEWHERE = (
    "guidance_scale",
    "guidance_scale_2",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "state",
)
OPTIONS = {name: default for name, default in FILM_DEFAULTS.items() if name not in _ELSEWHERE}


class SVIInputsStep(ModularPipelineBlocks):
    """All that a film is asked for with becomes a [`Film`]; its errors are those of [`check_film`]."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Checks what the film is asked for with, and brings its start image to the film's size."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        guidance = FrozenDict({"guidance_scale": FILM_DEFAULTS["guidance_scale"]})
        return [
            ComponentSpec(name, ClassifierFreeGuidance, config=guidance, default_creation_method="from_config")
            for name in GUIDERS
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [
            ConfigSpec("boundary_ratio", None, "Where the low-noise expert takes over, of models with two."),
            ConfigSpec("expand_timesteps", False, "Whether the model holds latents (Wan 2.2 TI2V-5B)."),
            ConfigSpec("conditioning", None, "Scheme of the film, as `Scheme.to_dict` tells it, where none is given."),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        types = FilmOptions.__annotations__
        told = dict.fromkeys(OPTIONS, "As in `FilmOptions`.")
        told["conditioning"] = "A scheme, its name, or what `Scheme.to_dict` gives; else as in `FilmOptions`."
        options = [
            InputParam(name, type_hint=types[name], default=default, description=told[name])
            for name, default in OPTIONS.items()
        ]
        return [
            InputParam("image", description="The start image. May be left out where `chain` is given."),
            InputParam("prompts", description="One string or `ClipSpec` a clip; a single one is that of all clips."),
            InputParam("chain", type_hint=ChainState, description="Go on from here: `state` of `FilmOptions`."),
            *options,
            InputParam("timesteps", description="Of every clip, for schedulers that take them."),
            InputParam("sigmas", description="Of every clip, for schedulers that take them."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("film", type_hint=Film, description="The film as it is to be made.")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        options = {name: getattr(given, name) for name in OPTIONS}
        options["conditioning"] = _scheme(options["conditioning"] or components.config.get("conditioning"))
        options["state"] = given.chain
        _refuse_absent(components, given.prompt_embeds)
        _refuse_caches(components)
        first, second = (_scale(getattr(components, name)) for name in GUIDERS)
        options["guidance_scale"] = first
        if components.config.boundary_ratio is not None and second != first:
            options["guidance_scale_2"] = second
        pipe = pipeline_of(components)
        scheme, clip_resize = pipe.lora_conditioning, pipe.lora_clip_resize
        film = check_film(pipe, scheme, clip_resize, given.image, given.prompts, cast(FilmOptions, options))
        prompts = given.prompts if given.prompt is None else given.prompt
        if isinstance(prompts, (str, ClipSpec, Mapping, list, tuple)):
            items = list(film.prompts)
            for index, item in enumerate(items):
                refuse_guidance(item, index)
            film = replace(film, prompts=items)
        given.film = replace(film, settings={**film.settings, **_told(components, given.timesteps, given.sigmas)})
        given.num_inference_steps = film.settings["num_inference_steps"]
        self.set_block_state(state, given)
        return components, state


def refuse_guidance(item: Any, index: int) -> None:
    """Raise a `ValueError` where a clip has a guidance of its own, which is the guider's here."""
    for name in ("guidance_scale", "guidance_scale_2"):
        value = getattr(item, name, None)
        if value is not None:
            raise ValueError(
                f"`prompts[{index}].{name}`={value}: in a modular pipeline guidance is the guider's, and that of all "
                "clips. Leave it out and set `pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale="
                f"{value}))`, or use `SVIPipeline`."
            )


def _refuse_absent(components: Any, prompt_embeds: Any) -> None:
    """Raise a `ValueError` where models are not loaded."""
    needed = ["vae", "scheduler", *([] if prompt_embeds is not None else ["tokenizer", "text_encoder"])]
    absent = [name for name in needed if getattr(components, name, None) is None]
    if not experts_of(components):
        absent.append("transformer")
    if absent:
        raise ValueError(
            f"`{'`, `'.join(absent)}` is missing. Call `pipe.load_components()`, or pass models to "
            "`pipe.update_components(...)`."
        )


def _refuse_caches(components: Any) -> None:
    """Raise a `ValueError` where a transformer has a cache, which Wan's modular blocks give no context to."""
    for name, transformer in experts_of(components).items():
        if transformer.is_cache_enabled:
            raise ValueError(
                f"`{name}` has a cache, {transformer._cache_config}, which diffusers' modular blocks for Wan do not "
                f"support. Call `pipe.{name}.disable_cache()`, or use `SVIPipeline`."
            )


def _scheme(conditioning: Any) -> Any:
    """A scheme out of its name or its values; anything else as it is, for [`check_film`] to look at."""
    if isinstance(conditioning, str):
        return scheme_from_dict({"scheme": conditioning})
    if isinstance(conditioning, Mapping) and not isinstance(conditioning, Scheme):
        return scheme_from_dict(dict(conditioning))
    return conditioning


def _scale(guider: Any) -> float:
    """The weight of a guider as `SVIPipeline` counts it; 1 where there is no guidance."""
    if guider is None or not guider.get_state()["enabled"]:
        return 1.0
    return float(getattr(guider, "guidance_scale", 1.0))


def _told(components: Any, timesteps: Any, sigmas: Any) -> dict[str, Any]:
    """What a state is to tell beyond what `SVIPipeline` has."""
    told = {"timesteps": timesteps, "sigmas": sigmas}
    for name in GUIDERS[: 1 if components.config.boundary_ratio is None else 2]:
        guider = getattr(components, name)
        config = {key: value for key, value in guider.config.items() if not key.startswith("_")}
        plain = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
        if type(guider) is not ClassifierFreeGuidance or not plain.items() <= config.items():
            told[name] = f"{type(guider).__name__} {config}"
    return {name: value for name, value in told.items() if value is not None}
