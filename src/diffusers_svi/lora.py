"""SVI LoRAs in a pipeline: loading and saving them, and the scheme that those in use were trained for.

What an adapter was trained for is noted where the adapter is, in the transformer: on its entry in `peft_config`, so
that it goes when the adapter goes, and in the transformer's own config once the adapter is fused and cannot be taken
out any more, so that it is saved and loaded with the weights.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import get_adapter_name, logging
from diffusers.utils.torch_utils import unwrap_module
from peft import get_peft_model_state_dict

from .checks import check_choice
from .conditioning import Scheme, scheme_from_dict
from .lora_file import EXPERTS, LoraFile, check_condition, check_scheme, read_lora, write_lora
from .lora_keys import some_of
from .lora_layers import at_work, check_fits, layer_of, lora_layers


logger = logging.get_logger(__name__)

# A list in a transformer's config. The underscore keeps stock diffusers from warning of a key it does not know.
FUSED_KEY = "_svi_fused_conditioning"
# Beside diffusers' own `pytorch_lora_weights.safetensors`.
WEIGHT_NAME_2 = "pytorch_lora_weights_2.safetensors"
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_OF_IMAGES = re.compile(r"\.add_[kv]_proj\.|\.image_embedder\.")


class _ClassOrInstanceMethod(classmethod):
    """A class method that is handed the instance where it is called on one."""

    def __get__(self, instance: object | None, owner: type | None = None) -> MethodType:
        return MethodType(self.__func__, owner if instance is None else instance)


class SVILoraLoaderMixin(WanLoraLoaderMixin):
    """diffusers' loader of LoRAs for Wan pipelines, for SVI LoRAs: before the pipeline among the bases of a class."""

    # What films follow beside text, "audio" or "pose".
    _follows: ClassVar[str | None] = None

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """As in diffusers, for every key layout of an SVI LoRA; arguments and errors are those of [`read_lora`]."""
        lora = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        check_condition(lora)
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
        expert: str | None = None,
        low_cpu_mem_usage: bool = True,
        **hub_options: Any,
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
            expert (`str`, *optional*):
                "high" or "low", the expert of Wan 2.2 A14B that the one file was trained for. By default read from the
                file's metadata or known from `high_noise` or `low_noise` in its name.
            low_cpu_mem_usage (`bool`, defaults to `True`): Do not initialize weights that are overwritten anyway.
            hub_options: As in [`read_lora`].

        What a file holds beyond what the model can take, such as changes of norms, or of image projections that the
        model does not have, is left out and named in a warning.

        Raises:
            ValueError: if a file cannot be read or is pickled, is damaged, was made for another model, another expert,
                or needs modules that are not supported; if `conditioning` is no scheme, `expert` none of the two, or
                `adapter_name` in use, or with `hotswap` not in use; if layers are kept in float8 already. Nothing has
                been loaded then.
        """
        check_scheme(conditioning)
        if expert is not None:
            check_choice("expert", expert, EXPERTS)
            if weight_name_2 is not None:
                raise ValueError(f"`expert`={expert!r} is for one file: leave it out with `weight_name_2`.")
        target = "transformer_2" if load_into_transformer_2 else "transformer"
        files = {target: read_lora(pretrained_model_name_or_path_or_dict, weight_name, **hub_options)}
        if weight_name_2 is not None:
            if load_into_transformer_2:
                raise ValueError(
                    f"`weight_name_2`={weight_name_2!r} already names the file of `transformer_2`: leave out "
                    "`load_into_transformer_2=True`."
                )
            files["transformer_2"] = read_lora(pretrained_model_name_or_path_or_dict, weight_name_2, **hub_options)

        for lora in files.values():
            check_condition(lora, self._follows)
        state_dicts = {component: self._fitted(component, lora, expert) for component, lora in files.items()}
        schemes = [conditioning] if conditioning is not None else [lora.conditioning for lora in files.values()]
        if len(set(schemes)) > 1:
            raise ValueError(f"The LoRAs of the two experts were trained for different schemes: {schemes}.")
        if adapter_name is None:
            # Free in both experts: the one with more adapters has the higher number.
            adapter_name = max(
                (get_adapter_name(getattr(self, component)) for component in files), key=lambda name: (len(name), name)
            )
        for component, state_dict in state_dicts.items():
            transformer = unwrap_module(getattr(self, component))
            if (adapter_name in getattr(transformer, "peft_config", {})) != hotswap:
                raise ValueError(
                    f"`adapter_name`={adapter_name!r} is {'not ' if hotswap else ''}in use in `{component}`, with "
                    f"`hotswap`={hotswap}: choose another name, or the other value of `hotswap`."
                )
            kept = {
                layer.weight.dtype for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)
            } & _FLOAT8
            if kept and not hotswap:
                raise ValueError(
                    f"Layers of `{component}` are kept in {kept.pop()}: the LoRA {files[component].name!r} would be "
                    "too, and nothing can be computed with it. Load LoRAs first, and call `enable_layerwise_casting` "
                    "afterwards."
                )
            places = get_peft_model_state_dict(transformer, adapter_name=adapter_name) if hotswap else {}
            more = [key for key in state_dict if key.removeprefix("transformer.") not in places]
            if hotswap and more:
                raise ValueError(
                    f"`hotswap=True` can only replace weights of layers that the adapter {adapter_name!r} has, but "
                    f"{files[component].name!r} has more: {some_of(more)}. Load it under a name of its own."
                )
        for component, lora in files.items():
            self._load_modules(component, lora)
            self.load_lora_into_transformer(
                state_dicts[component],
                transformer=getattr(self, component),
                adapter_name=adapter_name,
                metadata=lora.adapter_metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
            noted = getattr(self, component).peft_config[adapter_name]
            noted.svi_conditioning, noted.svi_clip_resize = schemes[0], lora.clip_resize
            noted.svi_source = lora.source

    @_ClassOrInstanceMethod
    def save_lora_weights(
        target: Any,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | torch.nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_2_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | torch.nn.Module | None = None,
        weight_name_2: str | None = None,
        transformer_2_lora_adapter_metadata: dict[str, Any] | None = None,
        conditioning: Scheme | None = None,
    ) -> None:
        r"""
        Save LoRAs as diffusers does, one file for each expert, with the scheme they were trained for.

        Called on the class, as in diffusers, or on a pipeline, which knows the scheme of its active LoRAs and whether
        there are two experts. `load_lora_weights` takes both over from the files.

        Args:
            save_directory: Folder to save to; made if there is none.
            transformer_lora_layers, transformer_2_lora_layers (`dict`, *optional*):
                Weights as `peft.get_peft_model_state_dict` gives them, at least one of the two. With the second, the
                first is the high-noise expert's.
            is_main_process (`bool`, defaults to `True`): Whether to write anything.
            weight_name (`str`, *optional*, defaults to `"pytorch_lora_weights.safetensors"`): The first file.
            weight_name_2 (`str`, *optional*, defaults to `"pytorch_lora_weights_2.safetensors"`): The second.
            save_function, safe_serialization: As in diffusers, but nothing beside the defaults keeps the scheme.
            transformer_lora_adapter_metadata, transformer_2_lora_adapter_metadata (`dict`, *optional*):
                What `LoraConfig.to_dict` gives. Without it, alpha counts as the rank.
            conditioning (`Scheme`, *optional*):
                The scheme they were trained for. On a pipeline, defaults to `lora_conditioning`.

        Raises:
            ValueError: if there is nothing to save, `conditioning` is no scheme, both files have one name, or a
                function or format is asked for that cannot hold the scheme.
        """
        check_scheme(conditioning)
        if save_function is not None or not safe_serialization:
            raise ValueError(
                f"`save_function`={save_function} and `safe_serialization`={safe_serialization}: the scheme of a LoRA "
                "stands in the metadata of a safetensors file, which only the defaults write. Leave both out."
            )
        if not transformer_lora_layers and not transformer_2_lora_layers:
            raise ValueError(
                "`transformer_lora_layers` and `transformer_2_lora_layers` are both empty: there is nothing to save. "
                "Pass what `peft.get_peft_model_state_dict` gives for at least one of the transformers."
            )
        weight_name, weight_name_2 = weight_name or LORA_WEIGHT_NAME_SAFE, weight_name_2 or WEIGHT_NAME_2
        if transformer_lora_layers and transformer_2_lora_layers and weight_name == weight_name_2:
            raise ValueError(f"`weight_name` and `weight_name_2` are both {weight_name!r}: name two files.")
        two_experts, clip_resize = bool(transformer_2_lora_layers), None
        if not isinstance(target, type):
            two_experts = target.transformer_2 is not None
            conditioning = target.lora_conditioning if conditioning is None else conditioning
            clip_resize = target.lora_clip_resize
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        for layers, name, adapter_metadata, expert in (
            (transformer_lora_layers, weight_name, transformer_lora_adapter_metadata, "high"),
            (transformer_2_lora_layers, weight_name_2, transformer_2_lora_adapter_metadata, "low"),
        ):
            if layers:
                weights = target.pack_weights(layers, "transformer")
                file = os.path.join(save_directory, name)
                expert_of_file = expert if two_experts else None
                write_lora(file, weights, conditioning, expert_of_file, adapter_metadata, clip_resize)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, into every transformer there is unless `components` names one."""
        _refuse_unknown(kwargs)
        components = self._lora_loadable_modules if components is None else components
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """As in diffusers, out of every transformer there is unless `components` names one."""
        _refuse_unknown(kwargs)
        super().unfuse_lora(self._lora_loadable_modules if components is None else components)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers. What is fused stays in the weights, and its scheme in the transformers' configs."""
        self._keep_fused([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().delete_adapters(adapter_names)

    def unload_lora_weights(self) -> None:
        """As in diffusers. What is fused stays in the weights, and its scheme in the transformers' configs."""
        self._keep_fused()
        super().unload_lora_weights()

    @property
    def lora_conditioning(self) -> Scheme | None:
        """The scheme that the SVI LoRAs in use, active or fused, in any expert, were trained for; `None` without one.

        Raises:
            ValueError: if they were trained for different schemes.
        """
        schemes: dict[Scheme, str] = {}
        for name, scheme, _ in self._in_use():
            schemes.setdefault(scheme, name)
        if len(schemes) > 1:
            named = ", ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
            raise ValueError(
                f"The LoRAs in use were trained for different schemes ({named}). Choose one with `set_adapters`; "
                "beside one that is fused, only LoRAs of its scheme can be used."
            )
        return next(iter(schemes), None)

    @property
    def lora_clip_resize(self) -> str | None:
        """What the image encoder was shown when the SVI LoRAs in use were trained, if they say so.

        Raises:
            ValueError: if they were trained with different values.
        """
        values = {clip_resize: name for name, _, clip_resize in self._in_use() if clip_resize is not None}
        if len(values) > 1:
            raise ValueError(
                f"The LoRAs in use were trained with different values of `clip_resize` ({values}). Choose one of the "
                "LoRAs with `set_adapters`."
            )
        return next(iter(values), None)

    def _in_use(self) -> Iterator[tuple[str, Scheme, str | None]]:
        """Name, scheme and `clip_resize` of the SVI LoRAs that are active or fused, in any expert."""
        for transformer in self._transformers:
            in_use = (
                name
                for layer in lora_layers(transformer).values()
                if not layer.disable_adapters
                # Beside one that is fused, peft applies no other.
                for name in layer.merged_adapters or at_work(layer)
            )
            for name, (scheme, clip_resize) in _noted(transformer, in_use).items():
                yield name, scheme, clip_resize
            for values in transformer.config.get(FUSED_KEY, []):
                told = dict(values)
                clip_resize = told.pop("clip_resize", None)
                yield "fused", scheme_from_dict(told), clip_resize

    @property
    def _transformers(self) -> list[WanTransformer3DModel]:
        """Those the pipeline has; one that `torch.compile` wrapped shows what it wraps."""
        transformers = (getattr(self, component, None) for component in self._lora_loadable_modules)
        return [transformer for transformer in transformers if transformer is not None]

    def _keep_fused(self, adapter_names: Iterable[str] | None = None) -> None:
        """Note the schemes of fused adapters, of all or of those named, where they stay when the adapters go."""
        for transformer in self._transformers:
            merged = {name for layer in lora_layers(transformer).values() for name in layer.merged_adapters}
            schemes = _noted(transformer, merged if adapter_names is None else merged.intersection(adapter_names))
            if schemes:
                known = transformer.config.get(FUSED_KEY, [])
                added = [
                    scheme.to_dict() | ({} if clip_resize is None else {"clip_resize": clip_resize})
                    for scheme, clip_resize in schemes.values()
                ]
                transformer.register_to_config(**{FUSED_KEY: [*known, *added]})

    def _load_modules(self, component: str, lora: LoraFile) -> None:
        """Give `component` the modules that films of `lora` need, if it needs any."""

    def _fitted(self, component: str, lora: LoraFile, expert: str | None) -> dict[str, torch.Tensor]:
        """The weights of `lora` once it is sure that they belong into `component`."""
        # A transformer that was compiled has names of its own for its layers.
        transformer = unwrap_module(getattr(self, component, None))
        if transformer is None:
            raise ValueError(
                f"The LoRA {lora.name!r} is to be loaded into `{component}`, which this pipeline does not have: "
                "only Wan 2.2 A14B has two experts."
            )
        other = {"transformer": "low", "transformer_2": "high"}[component]
        if (expert or lora.expert) == other and self.transformer_2 is not None:
            remedy = (
                "pass it as `weight_name_2` or with `load_into_transformer_2=True`"
                if other == "low"
                else "pass it as `weight_name`"
            )
            raise ValueError(
                f"The LoRA {lora.name!r} is for the {other}-noise expert, but was to be loaded into `{component}`: "
                f"{remedy}. Where the name misleads, say what it is for with `expert=`."
            )
        layers = dict(transformer.named_modules())
        if any("._orig_mod." in name for name in layers):
            raise ValueError(
                f"Parts of `{component}` are wrapped by `torch.compile`, where no LoRA finds its layers. Compile the "
                f"whole of it, or call `{component}.compile_repeated_blocks()`."
            )
        state_dict = self._maybe_expand_t2v_lora_for_i2v(transformer=transformer, state_dict=dict(lora.state_dict))
        # Layers of image embeddings, which not every model has; the rest of the LoRA works without them.
        absent = [key for key in state_dict if layer_of(key) not in layers and _OF_IMAGES.search(key)]
        left_out = [key for key in absent if key in lora.state_dict]
        if len(absent) < len(state_dict):
            state_dict = {key: value for key, value in state_dict.items() if key not in absent}
            if left_out:
                logger.warning(
                    f"Of the LoRA {lora.name!r}, this is left out, as `{component}` has no such layers: "
                    f"{some_of(left_out)}."
                )
        check_fits(state_dict, layers, lora.name)
        return state_dict


def _noted(transformer: WanTransformer3DModel, adapter_names: Iterable[str]) -> dict[str, tuple[Scheme, str | None]]:
    """Scheme and `clip_resize` of those of the adapters that `load_lora_weights` knew a scheme for, by name."""
    configs = getattr(transformer, "peft_config", {})
    noted = {name: configs[name] for name in adapter_names if getattr(configs.get(name), "svi_conditioning", None)}
    return {
        name: (config.svi_conditioning, getattr(config, "svi_clip_resize", None)) for name, config in noted.items()
    }


def _refuse_unknown(options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"There are no options {sorted(options)}: diffusers takes them, and does nothing with them.")
