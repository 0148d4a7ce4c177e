"""`TrainedModules`: the modules for audio or poses that a training run begins with, wherever they come from."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ..lora_file import without_modules
from ..weights_file import fetch_weights
from .converters import (
    TRANSFORMERS,
    audio_config,
    convert_audio,
    convert_pose,
    fresh_modules,
    modules_of,
    published_modules,
    with_modules,
)
from .talk_pipeline import MULTITALK, MULTITALK_FILE
from .talk_transformer import SVITalkTransformer3DModel
from .windows import WINDOW


# Those that fresh modules may be made in, as published if nothing is said; `audio_dim` follows the encoder.
SIZES: dict[str, tuple[str, ...]] = {
    "audio": ("audio_window", "audio_hidden_dim", "audio_tokens", "audio_token_dim"),
    "pose": ("pose_dim",),
}
INIT = "init"


class TrainedModules:
    """The modules that a transformer is given, if it has none of its own, or to replace these.

    Args:
        condition (`str`): What they are for, "audio" or "pose".
        base (`Mapping[str, Any]`): The config of the transformer they are for, with its `_class_name`.
        source (`str`, *optional*):
            Where they come from: "init" for fresh ones, or a safetensors file, a folder or a Hub repository. If not
            given, those of a LoRA that is gone on from, or those that the transformer has.
        sizes (`Mapping[str, int]`, *optional*): Of fresh ones, see `SIZES`.
        in_lora (`dict[str, torch.Tensor]`, *optional*): Those that lie in the file of that LoRA.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Raises:
        ValueError: if there are none, they cannot be read, or a size is unknown or none of these.
    """

    def __init__(
        self,
        condition: str,
        base: Mapping[str, Any],
        source: str | None = None,
        sizes: Mapping[str, int] | None = None,
        in_lora: dict[str, torch.Tensor] | None = None,
        cache_dir: str | None = None,
    ):
        self.kind, sizes = TRANSFORMERS[condition], dict(sizes or {})
        has_own = base.get("_class_name") == self.kind.__name__
        if not has_own and base.get("_class_name") in {kind.__name__ for kind in TRANSFORMERS.values()}:
            raise ValueError(f"`--condition {condition}`: this model has modules for another, {base['_class_name']}.")
        # What the base is loaded as.
        self.base_kind: type[WanTransformer3DModel] = self.kind if has_own else WanTransformer3DModel
        if sizes and source != INIT:
            raise ValueError(f"`--module_sizes` {sizes} are for `--condition_modules {INIT}`: others have theirs.")
        for name, size in sizes.items():
            if name not in SIZES[condition]:
                raise ValueError(f"`--module_sizes`: {name!r} is none of {', '.join(SIZES[condition])}.")
            if size < 1 or (name == "audio_window" and size % 2 == 0):
                raise ValueError(f"`--module_sizes`: {name!r} must be {_wanted(name)}, got {size}.")
        self._sizes = sizes
        self._is_fresh, self._weights = source == INIT, None
        if source is not None and source != INIT:
            self._weights = read_modules(source, cache_dir)
        elif source is None and in_lora:
            self._weights = in_lora
        elif source is None and not has_own:
            raise ValueError(
                f"`--condition {condition}`: this model has no modules for it. Give `--condition_modules`: a file or "
                f"repository with them{f', such as {MULTITALK}' if condition == 'audio' else ''}, or `{INIT}` for "
                "fresh ones, which are to be trained."
            )
        if condition == "audio" and not self._is_fresh:
            own = {name: base[name] for name in ("audio_window", "audio_dim") if name in base}
            self._sizes |= own if self._weights is None else audio_config(convert_audio(self._weights))

    @property
    def window(self) -> int:
        """Rows of audio that a frame hears."""
        return self._sizes.get("audio_window", WINDOW)

    @property
    def row_values(self) -> int | None:
        """How many numbers a row of audio must have; any, for fresh modules."""
        return self._sizes.get("audio_dim")

    def put_on(self, transformer: WanTransformer3DModel, row_values: int | None = None) -> WanTransformer3DModel:
        """The transformer with the modules. `row_values` is how many numbers a row of audio has."""
        # They may be of gigabytes, and are needed once.
        weights, self._weights = self._weights, None
        if self._is_fresh:
            sizes = {**self._sizes, **({"audio_dim": row_values} if row_values else {})}
            weights = fresh_modules(self.kind, transformer, **sizes)
        return transformer if weights is None else with_modules(self.kind, transformer, weights)


def read_modules(source: str | os.PathLike, cache_dir: str | None = None) -> dict[str, torch.Tensor]:
    """The modules for audio or poses in a file, a folder or a Hub repository, under the names of published files.

    Raises:
        ValueError: if it cannot be read, or holds none.
    """
    weight_name = MULTITALK_FILE if source == MULTITALK else None
    fetched = fetch_weights(source, weight_name, what="condition module", cache_dir=cache_dir)
    modules = without_modules(fetched.state_dict)[1]
    if not modules:
        raise ValueError(f"`--condition_modules`: {fetched.name!r} holds no modules for audio or poses.")
    return modules


def modules_to_save(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The modules of a transformer on the CPU, under the names of published files."""
    weights = {name: parameter.detach().cpu().clone() for name, parameter in modules_of(transformer).items()}
    return published_modules(weights)


def load_modules(transformer: torch.nn.Module, modules: Mapping[str, torch.Tensor]) -> None:
    """Take over the weights of modules that were saved, into those that a transformer has."""
    own, convert = modules_of(transformer), convert_audio
    if not isinstance(transformer, SVITalkTransformer3DModel):
        convert = convert_pose
    weights = convert(modules)
    assert weights.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _wanted(name: str) -> str:
    return "an odd number" if name == "audio_window" else "at least 1"
