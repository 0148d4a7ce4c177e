"""For a repository of blocks: where diffusers finds `SVIBlocks`. The package `diffusers_svi` has to be installed."""

from diffusers_svi import SVIBlocks


__all__ = ["SVIBlocks"]
