"""The published modules for audio and poses, on a Wan transformer."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module

from ..lora import FUSED_KEY
from ..lora_keys import some_of
from ..wan import TEMPORAL_FACTOR
from .dance_transformer import STRIDES, SVIDanceTransformer3DModel
from .talk_transformer import SVITalkTransformer3DModel


logger = logging.get_logger(__name__)

Conditioned = TypeVar("Conditioned", SVITalkTransformer3DModel, SVIDanceTransformer3DModel)

# What MultiTalk calls the layers; `kv_linear` is two of them.
_AUDIO = {
    "audio_proj.proj1": ("audio_embedder.first",),
    "audio_proj.proj1_vf": ("audio_embedder.rest",),
    "audio_proj.proj2": ("audio_embedder.hidden",),
    "audio_proj.proj3": ("audio_embedder.tokens",),
    "audio_proj.norm": ("audio_embedder.norm",),
    "norm_x": ("audio_norm",),
    "audio_cross_attn.q_linear": ("audio_attn.to_q",),
    "audio_cross_attn.kv_linear": ("audio_attn.to_k", "audio_attn.to_v"),
    "audio_cross_attn.proj": ("audio_attn.to_out",),
}
_AUDIO_KEY = re.compile(
    r"(?:.*?\.)??(?P<block>blocks\.\d+\.)?(?P<layer>(?:audio_proj|audio_cross_attn)\.\w+|norm_x)\.(?P<part>weight|bias)"
)
_POSE_KEY = re.compile(r"(?:.*?\.)??dwpose_embedding\.(?P<index>\d+)\.(?P<part>weight|bias)")
# UniAnimate's encoder of a reference pose, which SVI-Dance does not use.
# source: the authors' pipeline loads `dwpose_embedding` alone
_UNUSED = re.compile(r"(?:.*?\.)??randomref_embedding_pose\.")


def convert_audio(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The audio modules of `multitalk.safetensors` under the names of [`SVITalkTransformer3DModel`].

    Raises:
        ValueError: for a key that is none of theirs.
    """
    weights = {}
    for key, value in state_dict.items():
        found = _AUDIO_KEY.fullmatch(key)
        names = None if found is None else _AUDIO.get(found["layer"])
        if found is None or names is None or (found["block"] is None) != found["layer"].startswith("audio_proj."):
            raise ValueError(f"{key!r} is no weight of the audio modules of MultiTalk.")
        for name, part in zip(names, value.chunk(len(names)), strict=True):
            weights[f"{found['block'] or ''}{name}.{found['part']}"] = part
    return weights


def convert_pose(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pose encoder of `svi-dance.safetensors` under the names of [`SVIDanceTransformer3DModel`].

    A second encoder of UniAnimate, of which SVI-Dance makes no use, is left out with a warning.

    Raises:
        ValueError: for a key that is none of theirs.
    """
    unused = [key for key in state_dict if _UNUSED.match(key)]
    if unused:
        logger.warning(f"Of the pose modules, this is left out, as SVI-Dance does not use it: {some_of(unused)}.")
    weights = {}
    for key, value in state_dict.items():
        found = _POSE_KEY.fullmatch(key)
        if key in unused:
            continue
        # Between the layers are activations, which count there.
        if found is None or int(found["index"]) % 2 or int(found["index"]) > 2 * len(STRIDES):
            raise ValueError(f"{key!r} is no weight of the pose encoder of UniAnimate.")
        weights[f"pose_embedder.layers.{int(found['index']) // 2}.{found['part']}"] = value
    return weights


def audio_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The sizes of the audio modules that [`convert_audio`] gave."""
    first, rest = (weights[f"audio_embedder.{name}.weight"].shape[1] for name in ("first", "rest"))
    audio_dim = (rest - first) // (TEMPORAL_FACTOR - 1)
    token_dim = weights["audio_embedder.norm.weight"].shape[0]
    return {
        "audio_window": first // audio_dim,
        "audio_dim": audio_dim,
        "audio_hidden_dim": weights["audio_embedder.first.weight"].shape[0],
        "audio_tokens": weights["audio_embedder.tokens.weight"].shape[0] // token_dim,
        "audio_token_dim": token_dim,
    }


def pose_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The sizes of the pose encoder that [`convert_pose`] gave."""
    return {"pose_dim": weights["pose_embedder.layers.0.weight"].shape[0]}


TRANSFORMERS: dict[str, type[Any]] = {"audio": SVITalkTransformer3DModel, "pose": SVIDanceTransformer3DModel}
# For each kind of model: the converter, the sizes of its modules, and what their names in it begin with.
_KINDS: dict[type, tuple[Any, Any, str]] = {
    SVITalkTransformer3DModel: (convert_audio, audio_config, "audio_"),
    SVIDanceTransformer3DModel: (convert_pose, pose_config, "pose_"),
}


def modules_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of a transformer's modules for audio or poses, under its own names; none of a plain one."""
    prefixes = [prefix for kind, (*_, prefix) in _KINDS.items() if isinstance(transformer, kind)]
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if any(f".{prefix}" in f".{name}" for prefix in prefixes)
    }


def published_modules(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that [`modules_of`] names, under the names of the published files: what [`with_modules`] takes."""
    published = {}
    for name in weights:
        block, layer, part = re.fullmatch(r"(blocks\.\d+\.|)(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
        if layer.startswith("pose_embedder."):
            published[f"dwpose_embedding.{2 * int(layer.rpartition('.')[2])}.{part}"] = weights[name]
        for key, names in _AUDIO.items():
            if names[0] == layer:
                parts = [weights[f"{block}{name}.{part}"] for name in names]
                published[f"{block}{key}.{part}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return published


def fresh_modules(
    kind: type[Conditioned], transformer: WanTransformer3DModel, **sizes: int
) -> dict[str, torch.Tensor]:
    """Modules to be trained from the beginning, under the names of the published files.

    They are initialised as PyTorch does, but for the last layers, which are zeros: a transformer that has them is what
    it was.

    Args:
        kind: [`SVITalkTransformer3DModel`] or [`SVIDanceTransformer3DModel`].
        transformer (`WanTransformer3DModel`): The base they are for.
        sizes (`int`): Of the modules, by the names they have in `kind`; the published ones if not given.
    """
    prefix = _KINDS[kind][2]
    with init_empty_weights():
        model = kind(**{**_base_config(transformer, prefix), **sizes})
    last = ("audio_attn.to_out", f"pose_embedder.layers.{len(STRIDES)}")
    for name, module in model.named_modules():
        if f".{prefix}" in f".{name}" and isinstance(module, (torch.nn.Linear, torch.nn.Conv3d, torch.nn.LayerNorm)):
            module.to_empty(device="cpu").reset_parameters()
            if name.endswith(last):
                for parameter in module.parameters():
                    torch.nn.init.zeros_(parameter)
    return {name: value.detach() for name, value in published_modules(modules_of(model)).items()}


def _base_config(transformer: WanTransformer3DModel, prefix: str) -> dict[str, Any]:
    others = ("_", prefix, "quantization_config")
    return {name: value for name, value in transformer.config.items() if not name.startswith(others)}


# What a model remembers beside its weights: LoRAs on its layers, their quantization, and how it is trained.
_REMEMBERED = (
    *("_hf_peft_config_loaded", "peft_config", "hf_quantizer", "is_quantized", "quantization_method"),
    *("gradient_checkpointing", "_gradient_checkpointing_func"),
)
# And what its config tells beside its form: where it came from, and the LoRAs that are in its weights.
_NOTED = ("_name_or_path", FUSED_KEY)


def with_modules(
    kind: type[Conditioned], transformer: WanTransformer3DModel, state_dict: Mapping[str, torch.Tensor]
) -> Conditioned:
    """A transformer of `kind` that has the layers of `transformer`, the very same, and published modules beside.

    Args:
        kind: [`SVITalkTransformer3DModel`] or [`SVIDanceTransformer3DModel`].
        transformer (`WanTransformer3DModel`): The base, with its LoRAs. It stays what it was.
        state_dict (`dict[str, torch.Tensor]`): What a published file holds of the modules, under its own names.

    Returns:
        The modules are in the type of `transformer`, where it is.

    Raises:
        ValueError: if a weight is missing, unknown, not finite or of another shape than the transformer asks for, and
            for a transformer that is compiled, offloaded or cached, of which parts would be left behind.
    """
    convert, config_of, prefix = _KINDS[kind]
    _check_bare(transformer)
    weights = convert(state_dict)
    try:
        sizes = config_of(weights)
    except (KeyError, ZeroDivisionError) as error:
        raise ValueError(f"The modules for {prefix[:-1]} are not complete, or damaged: {error!r}.") from error
    # Buffers, which no file has, are real.
    with init_empty_weights():
        model = kind(**_base_config(transformer, prefix), **sizes)
    wanted = {name: value for name, value in model.state_dict().items() if f".{prefix}" in f".{name}"}
    _check_weights(weights, wanted)
    _share(model, transformer, prefix, without=("rope", "blocks"))
    for block, base in zip(model.blocks, transformer.blocks, strict=True):
        _share(block, base, prefix)
    in_float32 = set(kind._keep_in_fp32_modules)
    for name, value in weights.items():
        dtype = torch.float32 if in_float32.intersection(name.split(".")) else transformer.dtype
        weights[name] = value.to(device=transformer.device, dtype=dtype, copy=True)
    model.load_state_dict(weights, strict=False, assign=True)
    model.rope.to(transformer.device)
    for name in _REMEMBERED:
        if hasattr(transformer, name):
            setattr(model, name, getattr(transformer, name))
    model.register_to_config(**{name: transformer.config[name] for name in _NOTED if name in transformer.config})
    if isinstance(model, SVIDanceTransformer3DModel):
        model.watch_patches()
    return model.train(transformer.training)


def _share(model: torch.nn.Module, base: torch.nn.Module, prefix: str, without: tuple[str, ...] = ()) -> None:
    """Make children and parameters of `base` those of `model` too, but for modules of `prefix`."""
    for name, child in base.named_children():
        if name not in without and not name.startswith(prefix):
            setattr(model, name, child)
    for name, parameter in base.named_parameters(recurse=False):
        setattr(model, name, parameter)


def _check_bare(transformer: torch.nn.Module) -> None:
    """Raise a `ValueError` where something has been put around the transformer or its layers, LoRAs aside."""
    hooked = any(
        hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for module in transformer.modules()
    )
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in transformer.modules())
    if hooked or compiled or is_compiled_module(transformer):
        raise ValueError(
            "Modules for audio or poses cannot be put on a transformer that is compiled, offloaded, cached or kept in "
            "float8: load them before."
        )


def _check_weights(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"The modules do not fit this transformer: {some_of(missing or unknown)} "
            f"{'are missing' if missing else 'have no place'}. They were made for a model of another size, or the "
            "file is damaged."
        )
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"The modules do not fit this transformer: `{name}` is {tuple(value.shape)}, but the layer is "
                f"{tuple(wanted[name].shape)}. They were made for a model of another size."
            )
        if not value.is_floating_point() or not (value.is_meta or value.float().isfinite().all()):
            raise ValueError(f"The modules are damaged: `{name}` holds no finite numbers. Download the file again.")
