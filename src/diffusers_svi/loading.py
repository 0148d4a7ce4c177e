"""A pipeline for a preset, as the command and the page load it."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, PipelineQuantizationConfig, SchedulerMixin
from diffusers.models import attention_dispatch
from diffusers.utils.torch_utils import get_device

from .checks import check_choice
from .conditions.audio_encoder import load_audio_encoder, read_audio_encoder
from .conditions.converters import TRANSFORMERS
from .conditions.following import PIPELINES
from .lora_file import read_lora
from .lora_layers import EXPERTS
from .pipeline import SVIPipeline
from .presets import DTYPES, OFFLOADS, QUANTIZATIONS, Preset
from .scheduler import SVIEulerScheduler
from .weights_file import NO_FILE


def load_pipeline(
    preset: Preset,
    *,
    model: str | Path | None = None,
    lora: str | Path | None = None,
    weight_name: str | None = None,
    weight_name_2: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
    attention_backend: str | None = None,
    quantize: str | None = None,
    audio_encoder: str | Path | None = None,
) -> SVIPipeline:
    """Load model and LoRA of a member of the family, ready to make films.

    Args:
        preset (`Preset`): The member.
        model (`str`, *optional*): Another base model: Hub name or folder.
        lora (`str`, *optional*): Another LoRA: Hub name, folder or file; `"none"` for the plain chain.
        weight_name, weight_name_2 (`str`, *optional*): Its file there, and that of the low-noise expert.
        device (`str`, *optional*): Where it runs. Defaults to the accelerator, if there is one.
        dtype (`str` or `torch.dtype`, *optional*):
            Of all but the VAE, which is in float32. Defaults to float32 on a CPU, else bfloat16.
        offload (`str`, defaults to `"none"`):
            What is on the device: everything, with `"model"` the model at work, with `"group"` a few of its layers.
        vae_tiling (`bool`, defaults to `False`): Encode and decode in tiles, which takes less memory.
        attention_backend (`str`, *optional*): One of diffusers', such as `"flash"` or `"sage"`, for the transformers.
        quantize (`str`, *optional*):
            `"quanto"`: transformers and text encoder in 8-bit whole numbers, by optimum-quanto. `"fp8"`: the layers of
            the transformers kept in float8 and computed in `dtype`, which needs no other package. `"none"`: neither.
        audio_encoder (`str`, *optional*):
            What hears, for a member whose films follow audio: Hub name or folder of a `Wav2Vec2Model`. Defaults to
            that of a saved model, or else the published one.

    Returns:
        [`SVIPipeline`], or for a member whose films follow something beside text, the pipeline for that.

    Raises:
        ValueError: for a value that there is not, files without `lora`, a package that is missing, and a member whose
            films follow something for which neither model nor LoRA have modules.
        OSError: if model or LoRA cannot be read.
    """
    check_loading(lora, weight_name, weight_name_2, dtype, offload, attention_backend, quantize)
    source = preset.model if model is None else model
    if lora is None and preset.lora is not None:
        lora, weight_name, weight_name_2 = preset.lora, preset.weight_name, preset.weight_name_2
    kind = SVIPipeline if preset.follows is None else PIPELINES[preset.follows]
    components = {}
    if preset.follows is not None:
        index = kind.load_config(source)
        _check_modules(preset.follows, index, source, lora, weight_name)
        components = _hearing(index, source, None, audio_encoder) if preset.follows == "audio" else {}
    pipe = _base(source, None, device, dtype, quantize, kind, components)
    pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift=preset.shift)
    if lora not in (None, "none"):
        pipe.load_lora_weights(str(lora), weight_name=weight_name, weight_name_2=weight_name_2)
    return _set_up(pipe, device, offload, vae_tiling, attention_backend, quantize)


def load_recipe(
    film: Mapping[str, Any],
    *,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
    attention_backend: str | None = None,
    quantize: str | None = None,
    audio_encoder: str | Path | None = None,
) -> SVIPipeline:
    """Load what a film was made with, as its recipe tells: model, LoRAs with their weights, scheduler.

    Args:
        film (`dict`): The recipe, `read_recipe(path).film`.
        model (`str`, *optional*): Where the same base model is to be found now.
        dtype (`str` or `torch.dtype`, *optional*): Defaults to that of the recipe.
        device, offload, vae_tiling, attention_backend, quantize, audio_encoder:
            As in [`load_pipeline`]; a recipe does not tell them.

    Returns:
        [`SVIPipeline`], or for a film that follows something beside text, the pipeline for that.

    Raises:
        ValueError: if something of it cannot be loaded again, or a LoRA is not the file that it was.
        OSError: if something cannot be read.
    """
    check_loading(None, None, None, dtype, offload, attention_backend, quantize)
    check_recipe(film, model)
    told = film["model"]
    source, revision = (told["name"], told["revision"]) if model is None else (model, None)
    follows = next((name for name in PIPELINES if name in film["settings"]), None)
    kind, components = SVIPipeline if follows is None else PIPELINES[follows], {}
    if follows == "audio":
        components = _hearing(kind.load_config(source, revision=revision), source, revision, audio_encoder)
    pipe = _base(source, revision, device, told["dtype"] if dtype is None else dtype, quantize, kind, components)
    scheduler = dict(film["scheduler"])
    pipe.scheduler = _scheduler(scheduler.pop("class")).from_config(scheduler)
    for lora in film["loras"]:
        options = {name: lora[name] for name in ("revision", "subfolder") if lora.get(name) is not None}
        pipe.load_lora_weights(
            lora["name"],
            adapter_name=lora["adapter"],
            weight_name=lora["weight_name"],
            weight_name_2=lora["weight_name_2"],
            load_into_transformer_2=list(lora["weights"]) == ["transformer_2"],
            **options,
        )
        for name in lora["weights"]:
            now, before = (
                getattr(pipe, name).peft_config[lora["adapter"]].svi_source.get("sha256"),
                lora["sha256"].get(name),
            )
            if now != before:
                raise ValueError(
                    f"The LoRA {lora['name']!r} is not the one that the film was made with: its file has the SHA-256 "
                    f"{now}, that had {before}. Put that one back."
                )
    for name in EXPERTS:
        weights = {lora["adapter"]: lora["weights"][name] for lora in film["loras"] if name in lora["weights"]}
        if weights:
            getattr(pipe, name).set_adapters([*weights], [*weights.values()])
    return _set_up(pipe, device, offload, vae_tiling, attention_backend, quantize)


def check_recipe(film: Mapping[str, Any], model: str | Path | None = None) -> None:
    """Raise a `ValueError` for what of a recipe cannot be loaded again."""
    try:
        told, loras, scheduler, _ = film["model"], film["loras"], film["scheduler"]["class"], film["settings"]
        weights = [weight for lora in loras for weight in lora["weights"].values()]
        sources = [lora["name"] for lora in loras]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The recipe does not tell what the film was made with ({error!r} is missing).") from error
    if told.get("fused"):
        raise ValueError("The film was made with LoRAs that were fused into the model, of which no file is known.")
    if told["name"] is None and model is None:
        raise ValueError("The recipe does not tell where the model came from: give it by `model`.")
    for source in sources:
        if source in NO_FILE:
            raise ValueError(f"The film was made with a LoRA of which no file is known ({source}).")
    if any(isinstance(weight, Mapping) for weight in weights):
        raise ValueError("The film was made with a LoRA whose weight differs from layer to layer.")
    _scheduler(scheduler)


def _scheduler(name: str) -> Any:
    if name == SVIEulerScheduler.__name__:
        return SVIEulerScheduler
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"The film was made with the scheduler {name!r}, which is none of diffusers {diffusers.__version__}."
        )
    return kind


def _base(
    source: str | Path,
    revision: str | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quantize: str | None,
    kind: type[SVIPipeline] = SVIPipeline,
    components: Mapping[str, Any] | None = None,
) -> SVIPipeline:
    if dtype is None:
        dtype = "float32" if torch.device(device or get_device()).type == "cpu" else "bfloat16"
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # In half precision its rounding errors add up from clip to clip.
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", dtype=torch.float32, revision=revision)
    options = {"quantization_config": _quanto()} if quantize == "quanto" else {}
    given = {"vae": vae, **(components or {}), **options}
    return kind.from_pretrained(source, dtype=dtype, revision=revision, **given)


def _check_modules(
    follows: str, index: Mapping[str, Any], source: str | Path, lora: str | Path | None, weight_name: str | None
) -> None:
    """Raise a `ValueError` unless the model with this index, or the LoRA, has what films follow `follows` with."""
    _, kept = index.get("transformer") or (None, None)
    if kept == TRANSFORMERS[follows].__name__:
        return
    if lora in (None, "none") or read_lora(str(lora), weight_name).condition != follows:
        raise ValueError(
            f"`model`={str(source)!r} has no modules for {follows}, and `lora`={str(lora or 'none')!r} brings none: "
            "leave `lora` out for the published ones, or give a model that was saved with them."
        )


def _hearing(
    index: Mapping[str, Any], source: str | Path, revision: str | None, audio_encoder: str | Path | None
) -> dict[str, Any]:
    """The components that hear: those asked for, or the model's own, or else the published ones."""
    _, kept = index.get("audio_encoder") or (None, None)
    if audio_encoder is None and kept is not None:
        where = {"subfolder": "audio_encoder", "revision": revision or "main"}
        return {"audio_encoder": read_audio_encoder(str(source), **where)}
    return load_audio_encoder(audio_encoder)


def _set_up(
    pipe: SVIPipeline,
    device: str | torch.device | None,
    offload: str,
    vae_tiling: bool,
    attention_backend: str | None,
    quantize: str | None,
) -> SVIPipeline:
    device = torch.device(device or get_device())
    for transformer in [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]:
        if quantize == "fp8":
            # After the LoRAs, which are small: their layers would be of float8 as well.
            transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        if attention_backend is not None:
            # diffusers makes it that of all models that have none of their own; here it is taken back on leaving.
            with attention_dispatch.attention_backend(attention_backend):
                transformer.set_attention_backend(attention_backend)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        # Of what hears, layers are taken one by one, around the hooks of offloading; it is small.
        outside = [name for name in pipe.components if name == "audio_encoder"]
        streams = device.type == "cuda"
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=streams, exclude_modules=outside)
    else:
        pipe.to(device)
    return pipe


def check_loading(
    lora: str | Path | None = None,
    weight_name: str | None = None,
    weight_name_2: str | None = None,
    dtype: str | torch.dtype | None = None,
    offload: str = "none",
    attention_backend: str | None = None,
    quantize: str | None = None,
) -> None:
    """Raise a `ValueError` for what can be known to be wrong before anything is loaded; see [`load_pipeline`]."""
    check_choice("offload", offload, OFFLOADS)
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZATIONS)
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
    if lora in (None, "none") and (weight_name, weight_name_2) != (None, None):
        raise ValueError(
            f"`weight_name`={weight_name!r} and `weight_name_2`={weight_name_2!r} are files of a LoRA of your own: "
            "name its repository or folder by `lora`."
        )
    if quantize == "quanto":
        try:
            importlib.import_module("optimum.quanto")
        except ImportError as error:
            raise ValueError("`quantize`='quanto' needs a package: pip install optimum-quanto") from error
    if attention_backend is not None:
        _check_attention_backend(attention_backend)


def _check_attention_backend(name: str) -> None:
    check_choice(
        "attention_backend", name, tuple(backend.value for backend in attention_dispatch.AttentionBackendName)
    )
    try:
        # Entering it asks for the packages that it needs.
        with attention_dispatch.attention_backend(name):
            pass
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`attention_backend`={name!r} cannot be used here: {error}") from error


def _quanto() -> PipelineQuantizationConfig:
    transformer = diffusers.QuantoConfig(weights_dtype="int8")
    text_encoder = transformers.QuantoConfig(weights="int8")
    return PipelineQuantizationConfig(
        quant_mapping={"transformer": transformer, "transformer_2": transformer, "text_encoder": text_encoder}
    )
