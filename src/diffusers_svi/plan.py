"""What is known of a film's scheme before its model is loaded."""

import os

from .conditioning import Scheme
from .lora_file import published_scheme, read_lora
from .presets import Preset


def scheme_of(preset: Preset, lora: str | os.PathLike | None) -> Scheme | None:
    """How clips will be chained, as far as the LoRA tells it without a model; `None` where it does not, or is none.

    Args:
        preset (`Preset`): The member of the family.
        lora (*optional*): Another LoRA: file, folder or Hub name.
    """
    if lora is None:
        return None if preset.lora is None else published_scheme(f"{preset.lora}/{preset.weight_name or ''}")
    if os.path.isfile(lora):
        return read_lora(lora).conditioning
    return published_scheme(os.fspath(lora))
