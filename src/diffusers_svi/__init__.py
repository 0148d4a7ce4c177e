"""Stable Video Infinity for diffusers: videos of any length that do not fall apart."""

import importlib
from typing import Any


__version__ = "0.1.0.dev0"

_MODULES = {
    "SVIPipeline": "pipeline",
    "SVITalkPipeline": "conditions.talk_pipeline",
    "SVIDancePipeline": "conditions.dance_pipeline",
    "SVIBlocks": "modular",
    "SVIModularPipeline": "modular",
    "FilmOptions": "options",
    "ClipSpec": "clips",
    "Clip": "clips",
    "ChainState": "chain",
    "PixelMotion": "conditioning",
    "LatentMotion": "conditioning",
    "HeldLatents": "conditioning",
    "SVIEulerScheduler": "scheduler",
    "load_prompts": "prompts",
    "parse_prompts": "prompts",
    "load_stories": "stories",
    "NEGATIVE_PROMPT": "prompts",
    "WAN_NEGATIVE_PROMPT": "prompts",
    "FilmWriter": "film",
    "read_recipe": "recipe",
    "save_video": "video",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported until it is asked for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
