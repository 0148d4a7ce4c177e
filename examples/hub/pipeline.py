"""For a model repository: where diffusers finds `SVIPipeline`. The package `diffusers_svi` has to be installed."""

from diffusers_svi import SVIPipeline


__all__ = ["SVIPipeline"]
