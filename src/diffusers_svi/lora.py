"""SVI LoRAs: the key layouts they come in, the scheme each was trained for, and loading them into a pipeline."""

import json
import os
import re
from dataclasses import dataclass

import torch
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, _fetch_state_dict
from diffusers.utils import get_adapter_name
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import save_file

from .conditioning import LatentMotion, PixelMotion, Scheme, scheme_from_dict


# The keys under which scheme and expert stand in the metadata of a safetensors file.
CONDITIONING_KEY = "svi_conditioning"
EXPERT_KEY = "svi_expert"
_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")

# Published files, by name: the authors' (vita-video-gen/svi-model) and the half-precision copies made for ComfyUI
# (Kijai/WanVideo_comfy). None of them carries metadata.
_PUBLISHED = (
    (r"svi[-_]film", PixelMotion(num_frames=5, padding="zeros")),
    (r"svi[-_]shot", PixelMotion(num_frames=1, padding="reference")),
    (r"svi[-_]tom", PixelMotion(num_frames=1, padding="zeros")),
    (r"svi.*wan2\.?2.*v2\.0_pro|svi_v2_pro.*wan2\.2", LatentMotion(num_latents=1)),
    (r"svi_wan2\.1.*v2\.0", PixelMotion(num_frames=5, padding="reference")),
    (r"svi_wan2\.2.*v2\.0", PixelMotion(num_frames=1, padding="reference")),
)
_UNSUPPORTED = {r"svi[-_]talk": "SVI-Talk", r"svi[-_]dance": "SVI-Dance"}

# What the trained layers are called in the original code, by their names in diffusers.
_ORIGINAL_NAMES = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
LAYOUTS = ("diffusers", "original")
# What the published LoRAs train, in every block.
TARGET_MODULES = [
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
]

_MODULE = r"blocks[._](\d+)[._](self_attn|cross_attn)[._](q|k|v|o|k_img|v_img|norm_q|norm_k)\b"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read by [`read_lora`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): Weights under diffusers' names, such as
            `transformer.blocks.0.attn1.to_q.lora_A.weight`.
        adapter_metadata (`dict`, *optional*): diffusers' own record of the LoRA configuration.
        conditioning (`Scheme`, *optional*): The scheme it was trained for, if the file or its name says so.
        expert (`str`, *optional*): "high" or "low" for LoRAs of one expert of Wan 2.2 A14B.
        name (`str`): What to call the file in messages.
    """

    state_dict: dict[str, torch.Tensor]
    adapter_metadata: dict | None
    conditioning: Scheme | None
    expert: str | None
    name: str


def read_lora(
    source: str | os.PathLike | dict[str, torch.Tensor], weight_name: str | None = None, **hub_options
) -> LoraFile:
    """Read a LoRA from the Hub, a folder, a safetensors file or a state dict; never from a pickled file.

    Args:
        source: Hub repository, folder, file, or state dict.
        weight_name (`str`, *optional*): The file in the repository or folder.
        hub_options: `subfolder`, `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`, `proxies`.

    Raises:
        ValueError: if the file cannot be read, is pickled, holds no LoRA, or needs modules that are not supported.
    """
    name = _name(source, weight_name)
    if not isinstance(source, dict):
        _refuse_pickles(source, weight_name)
    try:
        state_dict, adapter_metadata, file_metadata = _fetch_state_dict(
            source,
            weight_name=weight_name,
            use_safetensors=True,
            allow_pickle=False,
            return_file_metadata=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **{option: hub_options.get(option) for option in _HUB_OPTIONS},
        )
    except (OSError, IndexError, SafetensorError, HFValidationError) as error:
        raise ValueError(
            f"No LoRA could be read from {name!r}: {error} Give a safetensors file, or a folder or Hub repository "
            "with `weight_name`, the file in it."
        ) from error
    _refuse_unsupported(name, state_dict)
    try:
        # With one prefix on all keys, diffusers knows the layout, folds in alphas and renames the modules.
        state_dict = WanLoraLoaderMixin.lora_state_dict(
            {_with_prefix(key): value for key, value in state_dict.items()}
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"The LoRA {name!r} has keys of a layout that is not known: {error}") from error
    conditioning, expert = _published(name)
    metadata = file_metadata or {}
    if CONDITIONING_KEY in metadata:
        conditioning = scheme_from_dict(json.loads(metadata[CONDITIONING_KEY]))
    return LoraFile(state_dict, adapter_metadata, conditioning, metadata.get(EXPERT_KEY, expert), name)


def lora_metadata(conditioning: Scheme, expert: str | None = None) -> dict[str, str]:
    """What to write into the metadata of a LoRA file so that [`read_lora`] finds its scheme and its expert."""
    metadata = {CONDITIONING_KEY: json.dumps(conditioning.to_dict())}
    return metadata if expert is None else {**metadata, EXPERT_KEY: expert}


def save_lora(
    file: str | os.PathLike,
    state_dict: dict[str, torch.Tensor],
    config: PeftConfig,
    conditioning: Scheme,
    expert: str | None = None,
    layout: str = "diffusers",
) -> None:
    """Write a LoRA with its scheme to a safetensors file that [`read_lora`] reads.

    Args:
        file: Where to.
        state_dict (`dict[str, torch.Tensor]`):
            Weights as `peft.get_peft_model_state_dict` gives them, such as `blocks.0.attn1.to_q.lora_A.weight`.
        config (`PeftConfig`): What they were trained with.
        conditioning (`Scheme`): The scheme it was trained for.
        expert (`str`, *optional*): "high" or "low", for one expert of Wan 2.2 A14B.
        layout (`str`, defaults to `"diffusers"`):
            Or "original": the names of the original code after `diffusion_model.`, as ComfyUI and the authors' loader
            read them. They apply no alpha, so it is multiplied into the weights.
    """
    metadata = {"format": "pt", **lora_metadata(conditioning, expert)}
    if layout == "diffusers":
        state_dict = {f"transformer.{key}": value for key, value in state_dict.items()}
        adapter = {f"transformer.{key}": value for key, value in config.to_dict().items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(adapter, default=sorted, sort_keys=True)
    else:
        scale = config.lora_alpha / config.r
        state_dict = {
            _original_name(key): value * scale if ".lora_B." in key else value for key, value in state_dict.items()
        }
    save_file({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, file, metadata=metadata)


class SVILoraLoaderMixin:
    """SVI LoRAs in a Wan pipeline: before diffusers' own loader among the bases of the class."""

    # The scheme of every loaded adapter that has one, by name.
    _adapter_conditioning: dict[str, Scheme] | None = None

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, return_lora_metadata: bool = False, **kwargs):
        """As in diffusers, for every key layout of an SVI LoRA."""
        lora = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        return (lora.state_dict, lora.adapter_metadata) if return_lora_metadata else lora.state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        weight_name_2: str | None = None,
        load_into_transformer_2: bool = False,
        conditioning: Scheme | None = None,
        low_cpu_mem_usage: bool = True,
        **hub_options,
    ) -> None:
        r"""
        Load an SVI LoRA, or any other of the base model, and take over the scheme it was trained for.

        Args:
            pretrained_model_name_or_path_or_dict:
                Hub repository, folder, safetensors file, or state dict, in any of the layouts SVI LoRAs come in:
                diffusers', the original names with or without a prefix, PEFT's, kohya's and musubi's.
            adapter_name (`str`, *optional*): Name for `set_adapters`; by default `default_0`, `default_1`, ...
            hotswap (`bool`, defaults to `False`): Replace the weights of the adapter of that name.
            weight_name (`str`, *optional*): The file in the repository or folder.
            weight_name_2 (`str`, *optional*):
                The file for the low-noise expert (`transformer_2`), when `weight_name` is the one for the high-noise
                expert: both are loaded under one name.
            load_into_transformer_2 (`bool`, defaults to `False`): Load into the low-noise expert.
            conditioning (`Scheme`, *optional*):
                The scheme it was trained for. By default read from the file's metadata or known from the name of the
                published file.
            low_cpu_mem_usage (`bool`, defaults to `True`): Do not initialize weights that are overwritten anyway.
            hub_options: As in [`read_lora`].

        Raises:
            ValueError: if a file cannot be read or is pickled, was made for another model, another expert, or needs
                modules that are not supported. Nothing has been loaded then.
        """
        target = "transformer_2" if load_into_transformer_2 else "transformer"
        files = {target: read_lora(pretrained_model_name_or_path_or_dict, weight_name, **hub_options)}
        if weight_name_2 is not None:
            if load_into_transformer_2:
                raise ValueError(
                    f"`weight_name_2`={weight_name_2!r} already names the file of `transformer_2`: leave out "
                    "`load_into_transformer_2=True`."
                )
            files["transformer_2"] = read_lora(pretrained_model_name_or_path_or_dict, weight_name_2, **hub_options)

        state_dicts = {component: self._fitted(component, lora) for component, lora in files.items()}
        schemes = [conditioning] if conditioning is not None else [lora.conditioning for lora in files.values()]
        if len(set(schemes)) > 1:
            raise ValueError(f"The LoRAs of the two experts were trained for different schemes: {schemes}.")
        if adapter_name is None:
            # Free in both experts: the one with more adapters has the higher number.
            adapter_name = max(
                (get_adapter_name(getattr(self, component)) for component in files), key=lambda name: (len(name), name)
            )
        for component, lora in files.items():
            self.load_lora_into_transformer(
                state_dicts[component],
                transformer=getattr(self, component),
                adapter_name=adapter_name,
                metadata=lora.adapter_metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
        known = {name: scheme for name, scheme in (self._adapter_conditioning or {}).items() if name != adapter_name}
        self._adapter_conditioning = known if schemes[0] is None else {**known, adapter_name: schemes[0]}

    @property
    def lora_conditioning(self) -> Scheme | None:
        """The scheme that the active and the fused SVI LoRAs were trained for; `None` without one.

        Raises:
            ValueError: if they were trained for different schemes.
        """
        if not self._adapter_conditioning:
            return None
        in_use = {*self.get_active_adapters(), *self.fused_loras}
        schemes = {name: scheme for name, scheme in self._adapter_conditioning.items() if name in in_use}
        if len(set(schemes.values())) > 1:
            raise ValueError(
                f"The active LoRAs were trained for different schemes: {schemes}. Choose one with `set_adapters`."
            )
        return next(iter(schemes.values()), None)

    def _fitted(self, component: str, lora: LoraFile) -> dict[str, torch.Tensor]:
        """The weights of `lora` once it is sure that they belong into `component`."""
        transformer = getattr(self, component, None)
        if transformer is None:
            raise ValueError(
                f"The LoRA {lora.name!r} is to be loaded into `{component}`, which this pipeline does not have: "
                "only Wan 2.2 A14B has two experts."
            )
        other = {"transformer": "low", "transformer_2": "high"}[component]
        if lora.expert == other and self.transformer_2 is not None:
            remedy = (
                "pass it as `weight_name_2` or with `load_into_transformer_2=True`"
                if other == "low"
                else "pass it as `weight_name`"
            )
            raise ValueError(
                f"The LoRA {lora.name!r} is for the {other}-noise expert, but was to be loaded into `{component}`: "
                f"{remedy}."
            )
        state_dict = self._maybe_expand_t2v_lora_for_i2v(transformer=transformer, state_dict=dict(lora.state_dict))
        _check_fits(state_dict, transformer, lora.name)
        return state_dict


def _check_fits(state_dict: dict[str, torch.Tensor], transformer: torch.nn.Module, name: str) -> None:
    """Raise a `ValueError` unless every LoRA matrix of `state_dict` has its layer in `transformer`."""
    # Adapters loaded before wrap their layers: "to_q.base_layer.weight" is still the weight of "to_q".
    shapes = {
        key.replace(".base_layer", "").removesuffix(".weight"): tuple(value.shape)
        for key, value in transformer.state_dict().items()
        if key.endswith(".weight") and ".lora_" not in key
    }
    for key, value in state_dict.items():
        match = re.fullmatch(r"transformer\.(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            continue
        layer, side = match.groups()
        if layer not in shapes:
            raise ValueError(
                f"The LoRA {name!r} has weights for `{layer}`, which this transformer does not have. It was made for "
                "another model: load the LoRA of this base model, or the base model of this LoRA."
            )
        rows, columns = shapes[layer][0], shapes[layer][1]
        fits = value.shape[1] == columns if side == "A" else value.shape[0] == rows
        if not fits:
            raise ValueError(
                f"The LoRA {name!r} does not fit this transformer: `{layer}.lora_{side}` is {tuple(value.shape)}, but "
                f"the layer is {rows} x {columns}. It was made for a model of another size: load the LoRA of this "
                "base model, or the base model of this LoRA."
            )


def _with_prefix(key: str) -> str:
    """One layout out of many: `diffusion_model.` before the original names, `transformer.` before diffusers' own."""
    key = key.replace(".default.", ".")
    for prefix in ("pipe.dit.", "dit.", "diffusion_model.", "base_model.model."):
        key = key.removeprefix(prefix)
    if key.startswith("lora_unet_"):
        # musubi writes underscores for all dots of the module's name.
        key = re.sub(_MODULE, r"blocks.\1.\2.\3", key.removeprefix("lora_unet_"))
        key = re.sub(r"blocks_(\d+)_ffn_(\d)", r"blocks.\1.ffn.\2", key)
    if key.startswith("transformer."):
        return key
    if re.match(r"blocks\.\d+\.(attn[12]\.|ffn\.net\.)|condition_embedder\.|proj_out\.", key):
        return f"transformer.{key}"
    return f"diffusion_model.{key}"


def _original_name(key: str) -> str:
    for name, original in _ORIGINAL_NAMES.items():
        key = key.replace(f".{name}.", f".{original}.")
    return f"diffusion_model.{key}"


def _published(name: str) -> tuple[Scheme | None, str | None]:
    stem = os.path.basename(name).lower()
    conditioning = next((scheme for pattern, scheme in _PUBLISHED if re.search(pattern, stem)), None)
    expert = re.search(r"[._-](high|low)[._-]", stem)
    return conditioning, expert.group(1) if expert and "wan2" in stem else None


def _name(source, weight_name: str | None) -> str:
    if isinstance(source, dict):
        return "state dict"
    return os.path.join(os.fspath(source), weight_name) if weight_name else os.fspath(source)


def _refuse_pickles(source: str | os.PathLike, weight_name: str | None) -> None:
    file = weight_name if weight_name is not None else os.fspath(source) if os.path.isfile(source) else None
    if file is not None and not file.endswith(".safetensors"):
        raise ValueError(
            f"The LoRA {_name(source, weight_name)!r} is not a safetensors file. Other formats can run code when they "
            "are read and are not loaded; convert it with `safetensors.torch.save_file` where you trust it."
        )


def _refuse_unsupported(name: str, state_dict: dict[str, torch.Tensor]) -> None:
    stem = os.path.basename(name).lower()
    extra = sorted(key for key in state_dict if re.search(r"audio|dwpose|randomref_embedding", key))
    member = next((member for pattern, member in _UNSUPPORTED.items() if re.search(pattern, stem)), None)
    if member or extra:
        what = f"{member or 'It'} needs modules beside the LoRA (audio or pose)"
        raise ValueError(
            f"The LoRA {name!r} is not supported yet: {what}{f', such as {extra[0]!r}' if extra else ''}. Supported "
            "are SVI-Shot, Film, Tom&Jerry, 2.0 and 2.0 Pro."
        )
    if not any(".lora_" in key for key in state_dict):
        some = f", such as {next(iter(state_dict))!r}" if state_dict else ""
        raise ValueError(
            f"{name!r} holds no LoRA: none of its {len(state_dict)} keys has `lora_A` or `lora_down`{some}."
        )
