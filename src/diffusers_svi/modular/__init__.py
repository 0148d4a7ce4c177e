"""Stable Video Infinity as blocks of Modular Diffusers."""

from .blocks import SVIBlocks, SVIModularPipeline


__all__ = ["SVIBlocks", "SVIModularPipeline"]
